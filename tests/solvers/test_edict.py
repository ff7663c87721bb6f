"""EDICT: the published steps one by one, there and back, and the p that rounding allows."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD, median_error
from round_trips import largest_errors

import jaxdiff as jd
from jaxdiff.solvers.edict import edict

PROCESS = jd.processes.vp_linear()


def mixture():
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS, "eps")


def start(count=16):
    ends = PROCESS.alpha(PROCESS.t_max), PROCESS.sigma(PROCESS.t_max)
    return BROAD.sample(np.random.default_rng(0), count, *ends)


def leave_and_enter(grid, i):
    """sqrt(alpha_cumprod) and sqrt(1 - alpha_cumprod) before and after step i, as the code has them."""
    return grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]


def published(x, grid, p, leapfrog):
    """The authors' loop: `forward_step` for one of the pair, then the other, then the mixing layer."""
    pair = [x, x]
    for i in range(grid.steps):
        a, s, a1, s1 = leave_and_enter(grid, i)
        for k in range(2):
            mine = (k + i % 2) % 2 if leapfrog else k
            eps = BROAD.eps(pair[1 - mine], a, s)
            pair[mine] = pair[mine] / (a / a1) - s / (a / a1) * eps + s1 * eps
        pair[0] = p * pair[0] + (1 - p) * pair[1]
        pair[1] = (1 - p) * pair[0] + p * pair[1]
    return pair


def published_inverse(pair, grid, p, leapfrog):
    """The loop with `reverse=True`: the mixing undone, then `reverse_step` in the other order."""
    pair = list(pair)
    for i in reversed(range(grid.steps)):
        pair[1] = (pair[1] - (1 - p) * pair[0]) / p
        pair[0] = (pair[0] - (1 - p) * pair[1]) / p
        a, s, a1, s1 = leave_and_enter(grid, i)
        for k in range(2):
            mine = (k + (i + 1) % 2) % 2 if leapfrog else 1 - k
            eps = BROAD.eps(pair[1 - mine], a, s)
            pair[mine] = a / a1 * pair[mine] + s * eps - a / a1 * s1 * eps
    return pair


@pytest.mark.parametrize("end", ["t_min", "zero"])
@pytest.mark.parametrize("alternate", [True, False])
def test_it_is_the_published_step(x64, alternate, end):
    grid, x = jd.grids.quadratic(PROCESS, 5, end=end), start()
    state = jd.sample(mixture(), edict(grid, 0.9, alternate), x, save="state")
    np.testing.assert_allclose(np.stack(state.registers), published(x, grid, 0.9, alternate), 1e-8)


def test_the_solution_at_a_node_is_x(x64):
    grid, x = jd.grids.quadratic(PROCESS, 5), start()
    nodes = jd.sample(mixture(), edict(grid, 0.9), x, save="nodes")
    for last in (3, 4):
        fewer = jd.grids.from_arrays(*(a[: last + 1] for a in (grid.t, grid.alpha, grid.sigma)))
        np.testing.assert_allclose(nodes[last], published(x, fewer, 0.9, True)[0], 1e-8)


def test_the_inverse_is_the_published_one(x64):
    """Of an image: both states are copies of it, and what they become is kept as a pair."""
    grid = jd.grids.uniform(PROCESS, 5)
    image = BROAD.sample(np.random.default_rng(1), 16, grid.alpha[-1], grid.sigma[-1])
    image = jnp.asarray(image)
    tableau = edict(grid)
    pair = jd.inversion.invert(mixture(), tableau, jd.State((image, image), ()))
    theirs = published_inverse([image, image], grid, 0.93, True)
    # Step 0 evaluates at y, so y stands in register 0.
    np.testing.assert_allclose(np.stack(pair.registers[::-1]), theirs, atol=1e-11)
    entered = jd.sample(mixture(), tableau.inverse(), image)
    np.testing.assert_allclose(entered, pair.registers[0], atol=1e-12)
    again = jd.sample(mixture(), tableau, None, state=pair, save="state")
    np.testing.assert_allclose(np.stack(again.registers), np.stack([image] * 2), atol=1e-12)


@functools.cache
def errors():
    """{(p, steps): largest error of x_T found again in (float32, float64)}."""
    cases = [(p, steps) for p in (0.93, 0.98) for steps in (10, 20, 50, 100, 200)]
    tables = [edict(jd.grids.uniform(PROCESS, steps), p) for p, steps in cases]
    found = [largest_errors(mixture, tables, start(), d) for d in (np.float32, np.float64)]
    return dict(zip(cases, zip(*found)))


@pytest.mark.parametrize(
    ("p", "steps"),
    [(0.93, 10), (0.93, 20), (0.93, 50), *((0.98, steps) for steps in (10, 20, 50, 100, 200))],
)
def test_a_round_trip_is_exact(p, steps):
    single, double = errors()[p, steps]
    assert single <= 1e-5 and double <= 1e-10


def test_two_hundred_steps_need_a_weaker_mixing():
    """0.93^-400 = 4e12 of rounding: nothing is left in float32, and 1e-10 is missed in float64."""
    single, double = errors()[0.93, 200]
    assert single > 1.0 and double > 1e-10


def test_without_mixing_the_copies_drift_apart(x64):
    grid, x = jd.grids.uniform(PROCESS, 50), jnp.asarray(start())
    exact = BROAD.flow(np.asarray(x), *[(grid.alpha[i], grid.sigma[i]) for i in (0, -1)])
    gaps, wrong = {}, {}
    for p in (0.93, 1.0):
        state = jd.sample(mixture(), edict(grid, p), x, save="state")
        gaps[p] = median_error(state.registers[0], np.asarray(state.registers[1]))
        wrong[p] = median_error(state.registers[0], exact)
    assert gaps[0.93] < 1e-2 < 0.1 < gaps[1.0]
    assert wrong[0.93] < 0.5 * wrong[1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: edict(g, 0.0), r"p must be in \(0, 1\], got 0.0"),
        (lambda g: edict(g, 1.1), r"p must be in \(0, 1\], got 1.1"),
        (lambda g: edict(g.reversed()), r"its exact inverse, edict\(grid\).inverse\(\)"),
        (lambda g: edict(jd.grids.uniform(jd.processes.flow(), 4)), "edict does not .*alpha = 0"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(jd.grids.uniform(PROCESS, 4))


def test_a_weight_that_is_no_number_is_named():
    with pytest.raises(TypeError, match="p must be a number, got True"):
        edict(jd.grids.uniform(PROCESS, 4), p=True)
