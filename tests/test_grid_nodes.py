"""Nodes in between: SciPy's interpolation, insertion, reversal; grids whose nodes are traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedules import SPANS
from scipy.interpolate import PchipInterpolator

from jaxdiff import grids, processes
from jaxdiff.interpolation import pchip

pytestmark = pytest.mark.filterwarnings("error:.*:RuntimeWarning")

VP = processes.vp_linear()
EDM = processes.edm()
FLOW = processes.flow()
every_process = pytest.mark.parametrize("process", SPANS.values(), ids=SPANS)


def as_arrays(grid):
    return grids.from_arrays(grid.t, grid.alpha, grid.sigma)


@every_process
def test_at_is_exact_from_a_process(process):
    grid = grids.uniform(process, 4)
    exact = np.linspace(process.t_min, process.t_max, 23)[1:-1]
    lam = process.half_log_snr(exact)
    t, alpha, sigma = grid.at(lam)
    np.testing.assert_allclose(t, exact, rtol=1e-12)
    np.testing.assert_allclose(alpha, process.alpha(exact), rtol=1e-11)
    np.testing.assert_allclose(np.log(alpha / sigma), lam, rtol=0, atol=1e-11)


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_interpolation_is_scipys(count):
    """Rising, falling, flat and turning data; inside and at the nodes."""
    rng = np.random.default_rng(count)
    nodes = np.cumsum(rng.uniform(0.1, 2.0, count))
    x = np.sort(np.concatenate([np.linspace(nodes[0], nodes[-1], 101), nodes]))
    x = np.clip(x, nodes[0], nodes[-1])
    walk = rng.normal(size=count)
    for values in (np.cumsum(np.abs(walk)), -np.cumsum(walk**2), walk, np.round(walk), 0 * walk,
                   np.cumsum(np.exp(3 * walk))):  # fmt: skip
        expected = PchipInterpolator(nodes, values)(x)
        got = pchip(np, nodes, values, x)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13 * np.ptp(values) + 1e-14)


@every_process
def test_at_interpolates_monotonically_from_arrays(process):
    """t by SciPy's monotone cubic in lambda; alpha and sigma exactly, for the usual families."""
    exact = grids.half_log_snr(process, 8)
    grid = as_arrays(exact)
    lam = np.linspace(grid.lam[0], grid.lam[-1], 57)
    t, alpha, sigma = grid.at(lam)
    np.testing.assert_allclose(t, PchipInterpolator(grid.lam, grid.t)(lam), rtol=1e-12, atol=1e-12)
    assert np.all(np.diff(t) <= 0)
    np.testing.assert_allclose(np.log(alpha / sigma), lam, rtol=0, atol=1e-13)
    if not isinstance(process, processes.SubVP):
        _, true_alpha, true_sigma = exact.at(lam)
        np.testing.assert_allclose(alpha, true_alpha, rtol=1e-11)
        np.testing.assert_allclose(sigma, true_sigma, rtol=1e-11)
    for node in range(9):
        np.testing.assert_allclose(grid.at(grid.lam[node]), grid.node(node), rtol=1e-12)


def test_at_interpolates_the_size_of_other_families():
    """Neither alpha, alpha + sigma nor alpha^2 + sigma^2 constant: the log of the last is."""
    grid = as_arrays(grids.half_log_snr(processes.sub_vp(), 6))
    lam = np.linspace(grid.lam[0], grid.lam[-1], 31)
    size = PchipInterpolator(grid.lam, np.log(grid.alpha**2 + grid.sigma**2))(lam)
    _, alpha, sigma = grid.at(lam)
    np.testing.assert_allclose(alpha**2 + sigma**2, np.exp(size), rtol=1e-12)
    np.testing.assert_allclose(alpha / sigma, np.exp(lam), rtol=1e-12)


def test_at_between_finite_nodes_of_a_grid_with_ends():
    whole = grids.uniform(FLOW, 8)
    grid = as_arrays(whole)
    assert grid.ends == (True, True)
    t, alpha, sigma = grid.at(0.3)
    np.testing.assert_allclose([alpha + sigma, np.log(alpha / sigma)], [1.0, 0.3], rtol=1e-14)
    inner = PchipInterpolator(whole.lam[1:-1], whole.t[1:-1])(0.3)
    np.testing.assert_allclose(t, inner, rtol=1e-13)
    with pytest.raises(ValueError, match="outside the grid"):
        grid.at(whole.lam[1] - 0.1)  # between alpha = 0 and the first finite node


@pytest.mark.parametrize("source", [lambda g: g, as_arrays], ids=["process", "arrays"])
@pytest.mark.parametrize("backward", [False, True])
def test_insert(source, backward):
    grid = source(grids.uniform(VP, 4))
    grid = grid.reversed() if backward else grid
    lam = 0.4 * grid.lam[1] + 0.6 * grid.lam[2]
    new = grid.insert(lam)
    assert len(new) == 6 and new.backward is backward and new.ends == grid.ends
    np.testing.assert_array_equal(np.delete(new.t, 2), grid.t)
    np.testing.assert_array_equal(np.delete(new.alpha, 2), grid.alpha)
    np.testing.assert_array_equal([a[2] for a in (new.t, new.alpha, new.sigma)], grid.at(lam))
    np.testing.assert_allclose(new.lam[2], lam, rtol=1e-13)
    sign = -1 if backward else 1
    assert np.all(sign * np.diff(new.lam) > 0)
    if new.process is not None:
        np.testing.assert_allclose(new.sigma, VP.sigma(new.t), rtol=1e-14)
        np.testing.assert_array_equal(new.rates(), VP.rates(new.t))


def test_insert_next_to_the_ends():
    grid = grids.uniform(FLOW, 4)
    for lam, place in ((-9.0, 1), (9.0, 4)):
        new = grid.insert(lam)
        assert new.ends == (True, True) and len(new) == 6
        np.testing.assert_allclose(new.lam[place], lam, rtol=1e-12)
        np.testing.assert_allclose(new.t[place], 1 / (1 + np.exp(lam)), rtol=1e-12)


def test_reversed():
    grid = grids.uniform(processes.flow(2.0), 5)
    back = grid.reversed()
    np.testing.assert_array_equal(back.t, grid.t[::-1])
    np.testing.assert_array_equal(back.lam, grid.lam[::-1])
    assert back.backward and back.ends == grid.ends == (True, True)
    assert (back.lam[0], back.lam[-1]) == (np.inf, -np.inf)
    again = back.reversed()
    np.testing.assert_array_equal(again.sigma, grid.sigma)
    assert not again.backward
    np.testing.assert_array_equal(back.at(0.2), grid.at(0.2))
    arrays = as_arrays(grids.uniform(VP, 5))
    np.testing.assert_array_equal(arrays.reversed().at(0.2), arrays.at(0.2))


# --- traced -------------------------------------------------------------------------------------


def test_gradients_through_times_nodes_and_insertions(x64):
    """d/dt of a function of every node, of a node in between and of an inserted one."""

    def value(t, lam, xp):
        grid = grids.from_times(VP, t, end="zero")
        between = grid.at(0.3 * grid.lam[0] + 0.7 * grid.lam[1])
        new = grid.insert(lam)
        weights = np.arange(1.0, 5.0)
        total = (weights * grid.sigma).sum() + (weights[:3] * grid.lam[:3]).sum() + sum(between)
        return total + (np.arange(5.0) * new.alpha).sum() + (np.arange(5.0) * new.t).sum()

    t, lam = np.array([0.9, 0.5, 0.2]), -1.0
    got = jax.jit(jax.grad(lambda t, lam: value(t, lam, jnp), (0, 1)))(jnp.asarray(t), lam)
    np.testing.assert_allclose(
        jax.jit(lambda t: value(t, lam, jnp))(jnp.asarray(t)), value(t, lam, np), rtol=1e-13
    )
    step = 1e-6
    for i in range(3):
        moved = t + step * np.eye(3)[i], t - step * np.eye(3)[i]
        expected = (value(moved[0], lam, np) - value(moved[1], lam, np)) / (2 * step)
        np.testing.assert_allclose(got[0][i], expected, rtol=1e-7)
    expected = (value(t, lam + step, np) - value(t, lam - step, np)) / (2 * step)
    np.testing.assert_allclose(got[1], expected, rtol=1e-7)


def test_gradients_through_arrays(x64):
    """Interpolation between traced nodes, against differences of the same on the host."""
    host = grids.half_log_snr(processes.sub_vp(), 4)
    nodes = np.stack([host.t, host.alpha, host.sigma])

    def value(nodes):
        t, alpha, sigma = grids.from_arrays(*nodes).at(0.7)
        return t + 2 * alpha + 3 * sigma

    got = jax.jit(jax.grad(value))(jnp.asarray(nodes))
    for index in [(0, 1), (1, 2), (2, 3), (2, 1)]:
        step = np.zeros_like(nodes)
        step[index] = 1e-6 * nodes[index]
        expected = (value(nodes + step) - value(nodes - step)) / (2e-6 * nodes[index])
        np.testing.assert_allclose(got[index], expected, rtol=1e-6, atol=1e-9)


def test_spacings_vmap_over_their_parameters(x64):
    """rho, exponent, the span and the process itself may be traced."""
    rhos = np.array([1.0, 5.0, 7.0])
    got = jax.vmap(lambda rho: grids.karras(EDM, 4, rho=rho).sigma)(jnp.asarray(rhos))
    np.testing.assert_allclose(got, [grids.karras(EDM, 4, rho=r).sigma for r in rhos], rtol=1e-12)
    got = jax.vmap(lambda p: grids.power(VP, 3, exponent=p).t)(jnp.asarray(rhos))
    np.testing.assert_allclose(got, [grids.power(VP, 3, exponent=p).t for p in rhos], rtol=1e-12)
    shifts = np.array([0.5, 3.0])
    got = jax.vmap(lambda s: grids.uniform(processes.flow(s), 3).lam)(jnp.asarray(shifts))
    np.testing.assert_allclose(
        got, [grids.uniform(processes.flow(s), 3).lam for s in shifts], rtol=1e-12
    )


def test_ends_of_traced_grids_are_static():
    """They follow from the span; a traced end of it, or traced times, lie inside; `ends` overrides."""
    seen = {}

    def trace(t_max, t):
        seen["whole"] = grids.uniform(processes.flow(t_max), 3).ends
        seen["from a traced t_max"] = grids.uniform(FLOW, 3, t_max=t_max).ends
        seen["to zero"] = grids.uniform(VP, 3, t_max=t_max, end="zero").ends
        seen["part"] = grids.uniform(processes.flow(t_max), 3, t_max=0.5).ends
        seen["times"] = grids.from_times(FLOW, t).ends
        inner, whole = grids.from_times(FLOW, t), grids.from_times(FLOW, t, ends=[True, True])
        seen["times with ends"] = whole.ends
        seen["times to zero"] = grids.from_times(VP, t, end="zero").ends
        seen["known times"] = grids.from_times(processes.flow(t_max), [1.0, 0.5, 0.1]).ends
        seen["arrays"] = grids.from_arrays(t, 1 - t, t).ends
        seen["arrays with ends"] = grids.from_arrays(t, 1 - t, t, ends=[True, False]).ends
        return inner.lam, whole.lam

    inner, whole = jax.jit(trace)(0.9, jnp.asarray([0.8, 0.5, 0.1]))
    assert seen == {
        "whole": (True, True), "from a traced t_max": (False, True), "to zero": (False, True),
        "part": (False, True), "times": (False, False), "times with ends": (True, True),
        "times to zero": (False, True), "known times": (True, False),
        "arrays": (False, False), "arrays with ends": (True, False),
    }  # fmt: skip
    np.testing.assert_allclose(inner, np.log([0.25, 1.0, 9.0]), atol=1e-6)
    assert (whole[0], whole[-1]) == (-np.inf, np.inf)


def test_gradients_at_exact_ends_are_finite(x64):
    """lambda is infinite there; nothing that is finite may get a NaN from it."""

    def value(shift):
        grid = grids.uniform(processes.flow(shift), 4)
        return grid.lam[1:-1].sum() + grid.alpha.sum() + grid.sigma.sum()

    shift, step = 2.0, 1e-6
    expected = (value(shift + step) - value(shift - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(value)(shift), expected, rtol=1e-8)


def test_a_grid_is_a_pytree():
    grid = grids.half_log_snr(VP, 3)
    leaves, structure = jax.tree.flatten(grid)
    assert [np.shape(leaf) for leaf in leaves[:3]] == [(4,)] * 3
    np.testing.assert_array_equal(structure.unflatten(leaves).lam, grid.lam)
    doubled = jax.jit(lambda g: g.insert(0.0))(jax.tree.map(jnp.asarray, grid))
    np.testing.assert_allclose(doubled.lam, grid.insert(0.0).lam, atol=1e-5)


def test_jax_arrays_with_known_values_live_on_the_host():
    """Without x64 a grid of jnp arrays is the float64 grid of the same numbers; tracers stay."""
    t = np.float32([0.9, 0.5, 0.2])
    for got in (
        grids.from_times(VP, jnp.asarray(t)),
        grids.from_times(processes.vp_linear(jnp.float32(0.1), jnp.float32(20.0)), t),
        grids.uniform(VP, 3, t_max=jnp.float32(0.9)),
        grids.karras(VP, 3, rho=jnp.float32(7.0)),
    ):
        assert {type(a) for a in (got.t, got.alpha, got.sigma, got.lam)} == {np.ndarray}
        assert isinstance(got.at(0.1)[1], np.floating)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    np.testing.assert_array_equal(grids.from_times(VP, jnp.asarray(t)).alpha, alpha)
    arrays = grids.from_arrays(*map(jnp.asarray, (t, alpha, sigma)))
    assert arrays.xp is np and arrays.alpha.dtype == np.float64
    np.testing.assert_array_equal(arrays.sigma, np.float64(np.float32(sigma)))
    jax.jit(lambda t: None if grids.from_times(VP, t).xp is jnp else 1 / 0)(jnp.asarray(t))


def test_traced_times_are_the_same_as_known_ones(x64):
    """Inside the process's span: eager and jitted agree, with no end assumed."""
    t = np.linspace(0.9, 0.1, 5)
    lam = jax.jit(lambda t: grids.from_times(FLOW, t).lam)(jnp.asarray(t))
    np.testing.assert_allclose(lam, grids.from_times(FLOW, t).lam, rtol=1e-12)
