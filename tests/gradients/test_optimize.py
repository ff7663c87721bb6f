"""AdjointDPM's three uses, each on a Gaussian whose answer is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.projections import projection_box

import jaxdiff as jd
from jaxdiff.gradients import ReversibleAdjoint, adjoint_dpm, optimize

VP = jd.processes.vp_linear()
T = jd.grids.half_log_snr(VP, 32).t
TABLEAU = jd.solvers.bdia(jd.grids.half_log_snr(VP, 32))
STD = 0.5
ADAM = optax.adam(0.1)


def gaussian(mean, x, t, cond=None):
    """x_0 of N(mean + cond, STD^2 I) at x_t; `params` is the mean."""
    mean = mean if cond is None else mean + cond
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    share = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return mean + share * (x - alpha * mean)


def flow(x_T, mean):
    """The probability flow from t = 1 to the last t, in closed form."""
    (a, s), (b, r) = ((VP.alpha(t), VP.sigma(t)) for t in (T[0], T[-1]))
    scale = np.sqrt((b**2 * STD**2 + r**2) / (a**2 * STD**2 + s**2))
    return b * mean + scale * (x_T - a * mean), scale


def by_tableau(mean, x_T, cond=None):
    denoiser = jd.Denoiser(gaussian, "x0", mean)
    return jd.sample(denoiser, TABLEAU, x_T, cond=cond, adjoint=ReversibleAdjoint())


def by_flow(mean, x_T, cond=None):
    denoiser = jd.Denoiser(gaussian, "x0", mean)
    return jd.ode.solve(denoiser, VP, x_T, T[0], T[-1], cond=cond, **adjoint_dpm(VP, T)).x


def distance(x_T, mean, target):
    return jnp.sum((by_tableau(mean, x_T) - target) ** 2)


def test_noise_that_meets_a_target_inside_a_box():
    """The loss is a sum over numbers, so the best noise in a box is the free one, clipped."""
    rng = np.random.default_rng(0)
    mean, x_T, target = np.array([0.4, -0.2]), rng.normal(size=(5, 2)), rng.normal(size=(5, 2))
    at_zero, scale = flow(np.zeros((5, 2)), mean)
    exact = np.clip((target - at_zero) / scale, x_T - 0.5, x_T + 0.5)
    low, high = jnp.asarray(x_T - 0.5, jnp.float32), jnp.asarray(x_T + 0.5, jnp.float32)
    assert 0 < np.mean(np.abs(exact - x_T) < 0.499) < 1  # some free, some at the edge
    out = optimize(
        distance, x_T, ADAM, 150, args=(mean, target),
        project=lambda x: projection_box(x, low, high),
    )  # fmt: skip
    np.testing.assert_allclose(out.value, exact, atol=0.02)


def mismatch(embedding, x_T, samples):
    return jnp.mean((by_flow(jnp.zeros(2), x_T, embedding) - samples) ** 2)


def test_the_condition_is_recovered_from_samples():
    rng = np.random.default_rng(1)
    embedding, x_T = np.array([0.7, -1.1]), rng.normal(size=(8, 2))
    samples, _ = flow(x_T, embedding)
    out = optimize(mismatch, jnp.zeros(2), ADAM, 200, args=(x_T, samples))
    np.testing.assert_allclose(out.value, embedding, atol=0.01)


def off_target(mean, target, key):
    samples = by_tableau(mean, VP.prior(key, (256, 2)))
    return jnp.sum((jnp.mean(samples, 0) - target) ** 2)


def test_parameters_tuned_to_a_metric_of_fresh_samples():
    target = np.array([0.5, 1.5])
    out = optimize(
        off_target, jnp.zeros(2), optax.adam(optax.exponential_decay(0.1, 50, 0.3)), 200,
        args=(target,), key=jax.random.key(0),
    )  # fmt: skip
    at_zero, _ = flow(np.zeros(2), np.ones(2))  # the end's mean is linear in the parameter
    np.testing.assert_allclose(out.value, target / at_zero, atol=0.03)


def quadratic(value, centre):
    return jnp.sum((value["x"] - centre) ** 2)


def test_leaves_that_are_not_floating_point_stay():
    value = {"x": np.zeros(3), "label": np.arange(3)}
    out = optimize(quadratic, value, optax.sgd(0.5), 1, args=(np.arange(3.0),))
    np.testing.assert_allclose(out.value["x"], np.arange(3.0))  # Newton's step of a quadratic
    np.testing.assert_array_equal(out.value["label"], np.arange(3))
    np.testing.assert_allclose(out.losses, [5.0])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"optimizer": 0.1}, TypeError, "optax.GradientTransformation, got 0.1"),
        ({"steps": 0}, ValueError, "positive integer, got 0"),
        ({"steps": 2.5}, ValueError, "positive integer, got 2.5"),
        ({"value": np.arange(3)}, ValueError, "no floating-point leaf"),
        ({"loss": lambda v: v}, ValueError, r"scalar, got shape \(3,\)"),
    ],
)
def test_errors_say_what_to_do(change, error, message):
    call = {"loss": jnp.sum, "value": np.zeros(3), "optimizer": optax.sgd(0.1), "steps": 3} | change
    with pytest.raises(error, match=message):
        optimize(**call)
