"""Energies of the denoised x0: the published steps and loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import jaxdiff as jd
from jaxdiff import guidance
from jaxdiff.predictions import PREDICTIONS

PROCESS = jd.processes.vp_cosine()
RNG = np.random.default_rng(0)
TARGET = np.array([0.5, -0.8])
MEAN, VARIANCE = np.array([0.4, -0.2]), np.array([0.3, 1.2])


def distance(params, x0):
    """|x0 - target|^2 / 2."""
    return 0.5 * jnp.sum((x0 - params) ** 2, -1)


def gaussian(prediction="x0"):
    """Data N(MEAN, VARIANCE): x0^ is linear in x_t, so its Jacobian is known."""
    scales = np.sqrt(VARIANCE)[None]
    return jd.gaussian_mixture(MEAN[None], scales, [1.0], PROCESS, prediction, dtype=jnp.float64)


def denoised(x, alpha, sigma):
    """(x0^, its diagonal Jacobian, eps)."""
    slope = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    x0 = MEAN + slope * (x - alpha * MEAN)
    return x0, slope, (x - alpha * x0) / sigma


def test_the_three_sizes_are_those_of_the_formulas(x64):
    """On every prediction, with and without the unguided noise beside."""
    x, level = RNG.normal(size=(4, 2)), (0.4, 0.8, 0.6)
    _, alpha, sigma = level
    x0, slope, eps = denoised(x, alpha, sigma)
    g = slope * (x0 - TARGET)
    rms = lambda a: np.sqrt(np.mean(a**2, 1, keepdims=True))  # noqa: E731
    factors = {
        "score": sigma**2 / alpha, "x0": 1.0, "relative": rms(sigma / alpha * eps) / rms(g),
    }  # fmt: skip

    @jax.jit
    def every(x):
        found = {}
        for size in factors:
            for prediction in PREDICTIONS:
                args = gaussian(prediction), distance, jnp.asarray(TARGET), 0.7, size
                guided = guidance.energy_guidance(*args)
                assert guided.prediction == prediction and guided.cost == 1
                pair = guidance.energy_guidance(*args, keep_eps=True)(x, *level)
                found[size, prediction] = guided.predict("x0", x, *level), *pair
        return found

    for (size, _), (alone, beside, noise) in every(x).items():
        want = x0 - 0.7 * factors[size] * g
        np.testing.assert_allclose(alone, want, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(beside, want, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(noise, eps, rtol=1e-9, atol=1e-9)


def test_it_is_freedom_for_clip(x64):
    """Yu et al.'s loop in NumPy: DDPM, rho = 0.02 l1 / rms(grad), two repeats with new noise."""
    grid = jd.grids.uniform(PROCESS, 4, t_max=0.9, t_min=0.1)
    x = start = RNG.normal(size=(1, 2))
    tableau = jd.solvers.time_travel(grid, [1, 3, 2, 1])
    assert tableau.rows == 7
    noise, drawn = RNG.normal(size=(7, 1, 2)), 0
    for i, repeats in enumerate([1, 3, 2, 1]):
        (_, a, s), (_, a1, _) = grid.node(i), grid.node(i + 1)
        at, at_next = a**2, a1**2
        for repeat in range(repeats):
            x0, slope, et = denoised(x, a, s)
            g = slope * (x0 - TARGET)
            c1 = np.sqrt(at_next) * (1 - at / at_next) / (1 - at)
            c2 = np.sqrt(at / at_next) * (1 - at_next) / (1 - at)
            c3 = np.sqrt((1 - at_next) * (1 - at / at_next) / (1 - at))
            l1 = np.sqrt(np.mean(et * et)) * np.sqrt(1 - at) / np.sqrt(at) * c1
            mean = c1 * x0 + c2 * x - 0.02 * l1 / np.sqrt(np.mean(g * g)) * g
            bt = at / at_next
            if repeat + 1 < repeats:
                # The tableau draws the step's noise and the way back's as one normal.
                spread = np.hypot(np.sqrt(bt) * c3, np.sqrt(1 - bt))
                x = np.sqrt(bt) * mean + spread * noise[drawn]
            else:
                x = mean + c3 * noise[drawn]
            drawn += 1
    guided = guidance.energy_guidance(gaussian("eps"), distance, TARGET, 0.02, "relative")
    got = jd.sample(guided, tableau, jnp.asarray(start), noise=jnp.asarray(noise))
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


def test_it_is_freedom_for_faces(x64):
    """DDIM with eta = 1/2, then x' - rho grad, rho = 0.3 alpha'; no noise scale of its own."""
    grid = jd.grids.uniform(PROCESS, 3, t_max=0.9, t_min=0.1)
    x = start = RNG.normal(size=(4, 2))
    noise = RNG.normal(size=(3, 4, 2))
    for i in range(3):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        x0, slope, et = denoised(x, a, s)
        x = a1 * x0 + 0.5 * s1 * noise[i] + s1 * np.sqrt(0.75) * et
        x = x - 0.3 * a1 * slope * (x0 - TARGET)
    guided = guidance.energy_guidance(gaussian("v"), distance, TARGET, 0.3, "x0", keep_eps=True)
    tableau = jd.solvers.ddim(grid, 0.5, outputs=2, noise_scale="full")
    got = jd.sample(guided, tableau, jnp.asarray(start), noise=jnp.asarray(noise))
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


@jax.custom_jvp
def opaque(x):
    return x


@opaque.defjvp
def _no_derivative(primals, tangents):
    raise AssertionError("the network's Jacobian was asked for")


def network(params, x, levels):
    return opaque(params(x, *levels))


def test_the_backward_step_descends_without_the_jacobian(x64):
    """Bansal et al.'s Delta: gradient descent on the distance has a closed form."""
    x, (t, alpha, sigma) = RNG.normal(size=(4, 2)), (0.4, 0.8, 0.6)
    net = jd.Denoiser(network, "eps", gaussian("eps"), jd.denoisers.level)
    x0 = denoised(x, alpha, sigma)[0]
    guided = guidance.backward_guidance(net, distance, jnp.asarray(TARGET), 5, optax.sgd(0.1))
    want = TARGET + 0.9**5 * (x0 - TARGET)
    np.testing.assert_allclose(guided(x, t, alpha, sigma), want, rtol=1e-9)
    with pytest.raises(AssertionError, match="Jacobian was asked for"):
        guidance.energy_guidance(net, distance, jnp.asarray(TARGET))(x, t, alpha, sigma)


def test_an_energy_draws_samples_to_it():
    """Three components, the target in one: 21% of the samples are near it without, most with guidance
    and two passes over the middle steps."""
    o = oracles.Mixture(oracles.BROAD.means * 2, np.full(3, 0.3), oracles.BROAD.weights)
    net = jd.gaussian_mixture(o.means, o.std, o.weights, PROCESS)
    grid = jd.grids.half_log_snr(PROCESS, 15, t_max=0.97, t_min=0.05)
    tableau = jd.solvers.time_travel(grid, [1] * 5 + [2] * 5 + [1] * 5)
    x_T = jax.random.normal(jax.random.key(0), (500, 2))

    def near(scale):
        guided = guidance.energy_guidance(net, distance, o.means[2], scale)
        y = jd.sample(guided, tableau, x_T, key=jax.random.key(1))
        return float(jnp.mean(distance(o.means[2], y) < 1.0))

    plain, drawn = near(0.0), near(0.3)
    assert abs(plain - 0.25) < 0.08 and drawn > 0.6


def batched(params, x0):
    return jnp.sum(x0)


def test_bad_input_is_named():
    net = jd.Denoiser(lambda x, t: x, "x0")
    with pytest.raises(ValueError, match="size must be one of"):
        guidance.energy_guidance(net, distance, TARGET, size="big")
    kept = jd.Denoiser(lambda x, t, memory: (x, memory), "x0", memory=jnp.zeros(()))
    with pytest.raises(ValueError, match="takes none with memory"):
        guidance.energy_guidance(kept, distance, TARGET)
    with pytest.raises(ValueError, match=r"energy must be \[4\], one a sample, got \(\)"):
        guidance.energy_guidance(net, batched, None)(jnp.ones((4, 2)), 0.5, 0.7, 0.7)
    with pytest.raises(ValueError, match="steps must be an integer from 1"):
        guidance.backward_guidance(net, distance, TARGET, 0, optax.sgd(0.1))
    with pytest.raises(TypeError, match="optax.GradientTransformation, got 0.1"):
        guidance.backward_guidance(net, distance, TARGET, 2, 0.1)
