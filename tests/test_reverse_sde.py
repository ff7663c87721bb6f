"""The reverse SDE: its marginals, its strong order, its noise."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD, fitted_order, median_error

import jaxdiff as jd
from jaxdiff import ode

VP = jd.processes.vp_linear()
T_MAX, T_MIN = 0.9, 0.05
START, END = ((float(VP.alpha(t)), float(VP.sigma(t))) for t in (T_MAX, T_MIN))
LAMBDAS = [float(VP.half_log_snr(t)) for t in (T_MAX, T_MIN)]


@eqx.filter_jit
def _reverse(x, keys, eta, steps, solver, levy_area):
    start, end = LAMBDAS
    mixture = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, prediction="eps")
    path = ode.SamplePaths(start, end, x, keys, 2.0**-9 * (end - start), levy_area)
    return diffrax.diffeqsolve(
        ode.reverse_sde(path), solver, start, end, (end - start) / steps, x,
        ode.Problem(mixture, VP, eta=eta), max_steps=256,
    ).ys[0]  # fmt: skip


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_reverse_sde_has_the_marginal(eta):
    count = 4096
    x = BROAD.sample(np.random.default_rng(9), count, *START).astype(np.float32)
    keys = jd.sample_keys(jax.random.key(0), np.arange(count))
    increment = diffrax.BrownianIncrement
    out = _reverse(
        jnp.asarray(x), keys, jnp.float32(eta), jnp.float32(64.0), diffrax.Heun(), increment
    )
    mean, cov = BROAD.moments(*END)
    # Five standard errors; those of a covariance from the fourth moments of a Gaussian.
    np.testing.assert_allclose(
        np.mean(out, 0), mean, rtol=0, atol=5 * np.sqrt(np.diag(cov).max() / count)
    )
    bound = 5 * np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / count)
    assert np.all(np.abs(np.cov(np.asarray(out), rowvar=False) - cov) < bound)


def test_reverse_sde_has_the_strong_order_of_additive_noise(x64):
    x = jnp.asarray(BROAD.sample(np.random.default_rng(10), 24, *START))
    keys = jd.sample_keys(jax.random.key(1), np.arange(24))
    area = diffrax.SpaceTimeLevyArea

    def run(steps):
        return _reverse(x, keys, jnp.float64(1.0), jnp.float64(steps), diffrax.SRA1(), area)

    exact, steps = np.asarray(run(256)), [8, 16, 32]
    # At least SRA1's 1.5; Euler and Heun have 1.
    assert fitted_order(steps, [median_error(run(n), exact) for n in steps]) > 1.25


def test_reverse_sde_without_noise_is_the_flow(x64):
    x = BROAD.sample(np.random.default_rng(11), 24, *START)
    keys = jd.sample_keys(jax.random.key(1), np.arange(24))
    out = _reverse(
        jnp.asarray(x), keys, jnp.float64(0.0), jnp.float64(256.0), diffrax.SRA1(),
        diffrax.SpaceTimeLevyArea,
    )  # fmt: skip
    exact = BROAD.flow(x, START, END)
    np.testing.assert_allclose(out, exact, rtol=0, atol=1e-4)


def test_a_sample_paths_noise_is_its_own():
    keys = jd.sample_keys(jax.random.key(2), np.arange(6))

    @jax.jit
    def increments(keys):
        like = jnp.zeros((len(keys), 3))
        return ode.SamplePaths(-2.0, 2.0, like, keys, 1e-3).evaluate(-1.0, 0.5)

    whole, part = increments(keys), increments(keys[2:5])
    np.testing.assert_array_equal(whole[2:5], part)
    assert len(np.unique(whole)) == whole.size
