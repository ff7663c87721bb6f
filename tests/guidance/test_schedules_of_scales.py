"""Scales that depend on the level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from scipy import stats
from test_cfg_family import LABELS, NULL, PROCESS, X, halves, network

import jaxdiff as jd
from jaxdiff import guidance
from jaxdiff.guidance import schedules

T = np.array([1.0, 0.8, 0.5, 0.2, 0.0])
U = 1.0 - T


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (schedules.linear(0.0, 6.0), 6.0 * U),
        (schedules.linear(0.0, 6.0, at_least=2.0), np.maximum(6.0 * U, 2.0)),
        (schedules.cosine(0.0, 6.0), 3.0 * (np.cos(np.pi * T) + 1.0)),
        (schedules.power_cosine(0.0, 3.0, 4.0), 3.0 * (1.0 - np.cos(np.pi * U**4.0)) / 2.0),
        (schedules.power(1.0, 4.0, 2.0), 1.0 + 3.0 * U**2),
        (schedules.beta(3.0, 2.5, 1.5), 3.0 * stats.beta.pdf(U, 2.5, 1.5)),
        (schedules.linear(1.0, 3.0, over=(0.8, 0.5)), [1.0, 1.0, 3.0, 3.0, 3.0]),
    ],
)
def test_schedules_are_the_formulas(schedule, expected):
    """Wang et al.'s linear and cosine ones of weight 3 are from 0 to 6."""
    got = schedule(T, 1.0 - T, T)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_the_other_clock_is_the_half_log_snr():
    alpha, sigma = np.array([0.0, 0.1, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0])
    schedule = schedules.linear(1.0, 2.0, over=(np.log(0.01), 0.0), clock="half_log_snr")
    np.testing.assert_allclose(schedule(T[:4], alpha, sigma), [1.0, 1.5, 2.0, 2.0], rtol=1e-6)


def test_a_scheduled_scale_is_that_of_each_row():
    grid = jd.grids.uniform(PROCESS, 5)
    x = X
    for i in range(5):
        (t, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        cond, uncond = halves(x, (t, a, s))
        eps = uncond + (1.0 + 3.0 * (1.0 - t)) * (cond - uncond)
        x = a1 * (x - s * eps) / a + s1 * eps
    table = jd.solvers.ddim(grid)

    def run(end):
        guided = guidance.classifier_free(network(), schedules.linear(1.0, end), NULL)
        return jd.sample(guided, table, jnp.asarray(X), cond=LABELS)

    got = run(4.0)
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)
    with counted() as compiled:  # its numbers are data
        run(2.5)
    assert compiled == []
    both = jax.vmap(run)(jnp.asarray([4.0, 2.5]))
    np.testing.assert_allclose(both[0], got, rtol=1e-4, atol=1e-5)


def sphere(params, x0):
    return jnp.sum((x0 - params) ** 2, 1)


def distances(params, x0, levels=None):
    return -jnp.sum((x0[:, None] - params) ** 2, -1)


def test_classifiers_and_energies_take_schedules():
    """The scale of a level is that of the number which the schedule has there."""
    net = jd.gaussian_mixture(np.eye(2), np.ones(2), np.ones(2), PROCESS)
    points, level = jnp.asarray([[1.0, 0.0], [0.0, 2.0]]), (0.25, 0.8, 0.6)
    make = {
        "classifier": lambda s: guidance.classifier_guidance(net, distances, points, 1, s),
        "clean": lambda s: guidance.off_the_shelf(net, distances, points, 1, s),
        "energy": lambda s: guidance.energy_guidance(net, sphere, points[0], s),
    }
    x = jnp.asarray(X)

    @jax.jit
    def both():
        scales = schedules.linear(1.0, 3.0), 2.5
        return {name: [build(s)(x, *level) for s in scales] for name, build in make.items()}

    for got, expected in both().values():
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    for build in make.values():
        with pytest.raises(ValueError, match="a scale must be a finite number"):
            build(np.nan)
        with pytest.raises(ValueError, match=r"a scale must be a number or \[batch\] = \(6,\), got"):
            jd.sample(build(np.ones(3)), jd.solvers.ddim(jd.grids.uniform(PROCESS, 2)), x)
    grid, scales = jd.grids.uniform(PROCESS, 5), schedules.linear(1.0, 3.0)
    fixed, moving = (
        guidance.elucd(grid, net, distances, points, 1, s).weights for s in (1.0, scales)
    )
    expected = fixed * (1.0 + 2.0 * (1.0 - grid.t[:-1]))
    np.testing.assert_allclose(moving, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: schedules.linear(0.0, np.inf), "must be finite"),
        (lambda: schedules.linear(0.0, 1.0, over=(0.5, 0.5)), "from noise to data t falls"),
        (lambda: schedules.linear(0.0, 1.0, over=(0.0, 1.0)), "from noise to data t falls"),
        (lambda: schedules.linear(0.0, 1.0, over=(np.inf, 0.0)), "two finite values"),
        (lambda: schedules.linear(0.0, 1.0, clock="half_log_snr"), r"needs over=\(noise, data\)"),
        (
            lambda: schedules.cosine(0.0, 1.0, over=(1.0, 0.0), clock="half_log_snr"),
            "from noise to data half_log_snr rises",
        ),
        (lambda: schedules.linear(0.0, 1.0, clock="step"), "clock must be one of"),
        (lambda: schedules.power(0.0, 1.0, 0.0), "exponent must be positive"),
        (lambda: schedules.beta(1.0, 0.5, 2.0), "at least 1"),
    ],
)
def test_bad_schedules_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
