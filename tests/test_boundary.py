"""Boundary conditions against the formulas of the released codes, and where x0 is the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD

import jaxdiff as jd

EDM = jd.processes.edm()
X = np.random.default_rng(0).normal(size=(4, 3))


def raw(scale, x, clock):
    """Some network F with parameters."""
    return jnp.sin(scale * x + clock[..., None] if jnp.ndim(clock) else scale * x + clock)


@pytest.mark.parametrize("sigma", [0.002, 0.0021, 0.3, 80.0])
@pytest.mark.parametrize("data", [0.5, 1.2])
def test_a_preconditioned_network_gets_the_scalings_of_consistency_models(x64, sigma, data):
    """c_skip x + c_out F(c_in x, log(sigma) / 4), as openai/consistency_models computes them."""
    found = jd.consistency_boundary(jd.precondition(raw, data, 0.7), 0.002, data)(
        X, np.float64(sigma), np.float64(1.0), np.float64(sigma)
    )
    c_skip = data**2 / ((sigma - 0.002) ** 2 + data**2)
    c_out = (sigma - 0.002) * data / (sigma**2 + data**2) ** 0.5
    network = raw(0.7, X / np.hypot(sigma, data), np.float64(np.log(sigma) / 4))
    np.testing.assert_allclose(found, c_skip * X + c_out * network, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("process", [EDM, jd.processes.vp_linear(), jd.processes.flow()],
                         ids=["edm", "vp", "flow"])  # fmt: skip
def test_at_the_smallest_level_x0_is_the_state(x64, process):
    """Up to alpha, and for each sample at its own level."""
    t = process.time(-np.log(np.array([0.05, 0.05, 0.4, 0.4])))
    alpha, sigma = process.alpha(t), process.sigma(t)
    inner = jd.gaussian_mixture(
        np.zeros((1, 3)), np.array([0.8]), np.ones(1), process, prediction="v"
    )
    denoiser = jd.consistency_boundary(inner, sigma_min=0.05)
    x0 = np.asarray(denoiser(X, *map(jnp.asarray, (t, alpha, sigma))))
    np.testing.assert_allclose(x0[:2], X[:2] / alpha[:2, None], rtol=1e-9)
    assert np.all(np.abs(x0[2:] - X[2:] / alpha[2:, None]) > 0.05 * np.abs(X[2:]))
    # Without a smallest level it is the denoiser itself, also from pure noise.
    for place in [(t[2], alpha[2], sigma[2]), (1.0, 0.0, 1.0)]:
        same = jd.consistency_boundary(inner, sigma_min=0.0)(X, *map(jnp.asarray, place))
        expected = inner.predict("x0", X, *map(jnp.asarray, place))
        np.testing.assert_allclose(same, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(("scaling", "data"), [(10.0, 0.5), (0.01, 0.7)])
def test_latent_consistency_is_diffusers(x64, prediction, scaling, data):
    """LCMScheduler's x0 from each output and its scalings, at several timesteps in one batch."""
    process = jd.processes.ddpm("scaled_linear", beta_start=0.00085, beta_end=0.012)
    t = np.array([0.0, 19.0, 499.0, 999.0])
    bar = process.alpha(t)[:, None] ** 2
    out = np.cos(X)
    original = {
        "eps": (X - np.sqrt(1 - bar) * out) / np.sqrt(bar), "x0": out,
        "v": np.sqrt(bar) * X - np.sqrt(1 - bar) * out,
    }  # fmt: skip
    c_skip = data**2 / ((t * scaling) ** 2 + data**2)
    c_out = t * scaling / ((t * scaling) ** 2 + data**2) ** 0.5
    expected = c_skip[:, None] * X + c_out[:, None] * original[prediction]
    inner = jd.Denoiser(lambda x, t: jnp.cos(x), prediction)
    denoiser = jd.latent_consistency_boundary(inner, scaling, data)
    levels = map(jnp.asarray, (t, process.alpha(t), process.sigma(t)))
    found = np.asarray(denoiser(X, *levels))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found[0], X[0])


def test_a_consistency_sampler_ends_where_the_boundary_is(x64):
    """One jump that ends at sigma_min, then one from there: the second changes nothing."""
    inner = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, EDM)
    denoiser = jd.consistency_boundary(inner, sigma_min=0.1)
    x = 80.0 * np.random.default_rng(1).normal(size=(4, 2))
    jump = jd.grids.from_times(EDM, [80.0], end="zero")
    again = jd.grids.from_times(EDM, [0.1], end="zero")
    once = jd.sample(denoiser, jd.solvers.ddim(jump), x)
    twice = jd.sample(denoiser, jd.solvers.ddim(again), once)
    np.testing.assert_allclose(twice, once, rtol=1e-10)


def test_strengths_are_leaves_and_half_precision_is_added_in_the_states():
    inner = jd.Denoiser(lambda x, t: x.astype(jnp.bfloat16), "x0")
    make = lambda data: jd.latent_consistency_boundary(inner, 10.0, data)  # noqa: E731
    assert jax.tree.structure(make(0.5)) == jax.tree.structure(make(0.7))
    x = np.float32(X)
    found = make(0.5)(x, jnp.float32(0.0), jnp.float32(1.0), jnp.float32(0.01))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, x)


DENOISER = jd.Denoiser(lambda x, t: x, "x0")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jd.consistency_boundary(DENOISER, -0.1), ValueError, "sigma_min .* got -0.1"),
        (lambda: jd.consistency_boundary(DENOISER, sigma_data=0.0), ValueError, "sigma_data .*0.0"),
        (
            lambda: jd.latent_consistency_boundary(DENOISER, 0.0), ValueError,
            "timestep_scaling must be positive, got 0.0",
        ),
        (
            lambda: jd.latent_consistency_boundary(jd.clip_x0(DENOISER, keep_eps=True)), ValueError,
            "one prediction",
        ),
        (lambda: jd.consistency_boundary(raw), TypeError, "takes a jaxdiff.Denoiser"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
