"""Noise that belongs to samples, and Brownian paths that do not change with the step count."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy.stats import kstest

import jaxdiff as jd
from jaxdiff.noise import is_key_batch, normal, per_sample

KEY = jax.random.key(7)
VP = jd.processes.vp_linear()


def bits(keys):
    return np.asarray(jax.random.key_data(keys))


# --- keys -----------------------------------------------------------------------------------------


def test_sample_keys_are_folds():
    ids = [5, 0, 7, 5]
    keys = jd.sample_keys(KEY, ids)
    for key, i in zip(keys, ids):
        np.testing.assert_array_equal(bits(key), bits(jax.random.fold_in(KEY, i)))
    np.testing.assert_array_equal(bits(jd.sample_keys(KEY, np.array([7]))), bits(keys[2:3]))
    assert len(np.unique(bits(jd.sample_keys(KEY, np.arange(1000))), axis=0)) == 1000


def test_both_kinds_of_keys():
    """New-style keys, and raw uint32 pairs."""
    raw = jax.random.PRNGKey(7)
    assert not is_key_batch(KEY) and not is_key_batch(raw)
    assert is_key_batch(jax.random.split(KEY, 3)) and is_key_batch(jax.random.split(raw, 3))
    np.testing.assert_array_equal(jd.sample_keys(raw, [1, 2]), bits(jd.sample_keys(KEY, [1, 2])))
    x = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    np.testing.assert_array_equal(normal(raw, x), normal(KEY, x))


@pytest.mark.parametrize("key", [0, None, "key", np.zeros(2), jnp.zeros(2, jnp.int32)])
def test_what_is_no_key_is_an_error(key):
    with pytest.raises(TypeError, match="expected a PRNG key such as jax.random.key.0."):
        is_key_batch(key)


def test_bad_keys_are_named():
    with pytest.raises(ValueError, match=r"one key or one per sample, got keys of shape \(2, 3\)"):
        is_key_batch(jax.random.split(KEY, (2, 3)))
    for ids in (3, [[1, 2]], [0.5, 1.0]):
        with pytest.raises(ValueError, match="ids must be a vector of integers, got "):
            jd.sample_keys(KEY, ids)
    with pytest.raises(ValueError, match="a single key, got one per sample"):
        jd.sample_keys(jax.random.split(KEY, 3), [0, 1, 2])
    with pytest.raises(ValueError, match="got 3 keys for 4 samples"):
        per_sample(jax.random.split(KEY, 3), 4)


def test_one_key_on_many_devices_is_refused():
    """Every device would count its samples from 0, and draw its neighbour's noise."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    axis = PartitionSpec("data")

    def draw(key, x):
        return normal(key, x)

    x, keys = jnp.zeros((4, 3)), jd.sample_keys(KEY, np.arange(4))
    each = functools.partial(jax.shard_map, mesh=mesh, out_specs=axis, check_vma=False)
    with pytest.raises(ValueError, match="manual mesh axes .'data',. .* one key per sample"):
        each(draw, in_specs=(PartitionSpec(), axis))(KEY, x)
    np.testing.assert_array_equal(
        jax.jit(each(draw, in_specs=(axis, axis)))(keys, x), normal(KEY, x)
    )
    with pytest.raises(ValueError, match="one key per sample"):
        jax.pmap(draw, in_axes=(None, 0))(KEY, x.reshape(2, 2, 3))
    split = jax.pmap(draw)(keys.reshape(2, 2), x.reshape(2, 2, 3))
    np.testing.assert_array_equal(split.reshape(4, 3), normal(KEY, x))


# --- normal draws ---------------------------------------------------------------------------------


def test_a_draw_is_its_samples_alone():
    x = jax.ShapeDtypeStruct((6, 2, 3), jnp.float32)
    whole = normal(KEY, x, 4)
    keys = jd.sample_keys(KEY, np.arange(6))
    np.testing.assert_array_equal(normal(keys, x, 4), whole)
    for i in range(6):
        alone = jax.random.normal(jax.random.fold_in(keys[i], 4), (2, 3))
        np.testing.assert_array_equal(whole[i], alone)
    first = jax.random.normal(keys[0], (2, 3))
    np.testing.assert_array_equal(normal(KEY, x)[0], first)


def test_leaves_and_draws_are_independent():
    """Correlations of 20,000 numbers within 4 standard errors of 0, each a standard normal."""
    tree = {"a": jnp.zeros((4000, 5)), "b": (jnp.zeros((4000, 5), jnp.bfloat16),)}
    draws = [normal(KEY, tree, r) for r in (0, 1)]
    assert draws[0]["b"][0].dtype == jnp.bfloat16 and draws[0]["a"].dtype == jnp.float32
    flat = [np.asarray(a, np.float64).ravel() for d in draws for a in jax.tree.leaves(d)]
    correlation = np.corrcoef(flat)
    assert np.abs(correlation - np.eye(4)).max() < 4 / np.sqrt(20_000)
    assert kstest(flat[0], "norm").pvalue > 1e-3
    by_sample = np.corrcoef(np.asarray(draws[0]["a"])[:40])
    assert np.abs(by_sample - np.eye(40)).max() < 1.0  # five numbers each, but none twice
    assert np.unique(np.asarray(draws[0]["a"])).size > 19_900


# --- Brownian paths -------------------------------------------------------------------------------


@jax.jit
def increments(path, intervals, like):
    """One normalised increment for each clock interval, leaves [intervals, *shape]."""
    return jax.lax.map(lambda clock: path.draw(clock, like), intervals)


def clock_of(process, form, t):
    return np.exp((2 if form == "x0" else -2) * process.half_log_snr(t))


@pytest.mark.parametrize("form", ["x0", "eps"])
def test_increments_are_standard_normals_and_independent(form):
    """Over intervals that touch, long and short, at both ends of the span and between: float32.

    A bisection of the whole clock in float32 fails here: it cannot tell the last two nodes apart.
    """
    t = np.array([1.0, 0.9999, 0.98, 0.7, 0.6999, 0.3, 0.002, 0.001001, 0.001])
    clock = clock_of(VP, form, t)
    path = jd.BrownianPath(VP, form, KEY)
    intervals = jnp.asarray(np.stack([clock[:-1], clock[1:]], 1), jnp.float32)
    z = np.asarray(increments(path, intervals, jnp.zeros((4000, 1))))[..., 0]
    for row in z:
        assert kstest(row, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(z) - np.eye(8)).max() < 4.5 / np.sqrt(4000)


@pytest.mark.parametrize("form", ["x0", "eps"])
def test_fine_increments_sum_to_coarse_ones(x64, form):
    """sqrt|b - a| z is W's increment: what 12 steps see is what 3 steps see, and 1."""
    t = np.linspace(1.0, 0.05, 13)
    clock = clock_of(VP, form, t)
    nodes = [clock[::stride] for stride in (1, 4, 12)]
    intervals = np.concatenate([np.stack([c[:-1], c[1:]], 1) for c in nodes])  # 12 + 3 + 1
    width = np.abs(intervals[:, 1] - intervals[:, 0])[:, None, None]
    path = jd.BrownianPath(VP, form, KEY)
    moved = width**0.5 * increments(path, jnp.asarray(intervals), jnp.zeros((5, 2)))
    np.testing.assert_allclose(
        moved[:12].reshape(3, 4, 5, 2).sum(1), moved[12:15], rtol=1e-8, atol=1e-10
    )
    np.testing.assert_allclose(moved[:12].sum(0), moved[15], rtol=1e-8, atol=1e-10)
    other = dataclasses.replace(path, key=jax.random.key(8))
    different = width**0.5 * increments(other, jnp.asarray(intervals), jnp.zeros((5, 2)))
    assert np.abs(different - moved).min() > 1e-6


def test_a_path_belongs_to_a_sample_and_trees_have_one_a_leaf():
    keys = jd.sample_keys(KEY, np.arange(4))
    interval = clock_of(VP, "x0", np.array([0.6, 0.2]))
    intervals = jnp.asarray([interval, interval[[0, 0]]], jnp.float32)  # and a row without noise

    like = {"a": jnp.zeros((4, 2)), "b": jnp.zeros((4, 2))}
    order = np.array([2, 0, 3, 1])
    whole, moved = (
        increments(jd.BrownianPath(VP, "x0", k), intervals, like) for k in (keys, keys[order])
    )
    for name in ("a", "b"):
        np.testing.assert_array_equal(moved[name], whole[name][:, order])
        np.testing.assert_array_equal(whole[name][1], 0.0)
    assert np.unique(np.concatenate([whole["a"][0], whole["b"][0]])).size == 16


def test_the_clock_is_the_rows():
    """A tableau's clock is exp(2 lambda) at the row's two nodes, whatever the process."""
    for process in (VP, jd.processes.edm(), jd.processes.flow(t_min=0.01, t_max=0.99)):
        grid = jd.grids.half_log_snr(process, 6)
        tableau = jd.solvers.ddpm(grid)
        snr = (grid.alpha / grid.sigma) ** 2
        np.testing.assert_allclose(tableau.clock, np.stack([snr[:-1], snr[1:]], 1), rtol=1e-12)
        jd.BrownianPath(process, "x0", KEY).check(tableau)


def test_bad_paths_are_named():
    grid = jd.grids.half_log_snr(VP, 5)
    ddpm, plain = jd.solvers.ddpm(grid), jd.solvers.ddim(grid)
    with pytest.raises(ValueError, match="form must be 'x0' or 'eps', got 'v'"):
        jd.BrownianPath(VP, "v", KEY)
    with pytest.raises(ValueError, match="tableau's noise belongs to x0, the path is 'eps'"):
        jd.BrownianPath(VP, "eps", KEY).check(ddpm)
    with pytest.raises(ValueError, match="no Brownian path .its noise has no SDE limit."):
        jd.BrownianPath(VP, "x0", KEY).check(plain)
    share = -np.expm1(-2 * np.diff(jd.grids.half_log_snr(VP, 50).lam)).min()
    fine = jd.solvers.ddpm(jd.grids.half_log_snr(VP, 50))
    with pytest.raises(ValueError, match=f"increment is {share:.3g} of its clock, .* 0.4: pass"):
        jd.BrownianPath(VP, "x0", KEY, tolerance=0.4).check(fine)
    jd.BrownianPath(VP, "x0", KEY, tolerance=0.1).check(fine)
    with pytest.raises(ValueError, match="increment is .* not above .* tolerance 0.000122"):
        close = jd.grids.from_times(VP, [0.9, 0.5, 0.5 - 1e-6, 0.1])
        jd.BrownianPath(VP, "x0", KEY).check(jd.solvers.ddpm(close))
    for tolerance in (0.0, 1.0, -1e-3):
        with pytest.raises(ValueError, match=f"must lie in .0, 1., got {tolerance}"):
            jd.BrownianPath(VP, "x0", KEY, tolerance=tolerance)
    with pytest.raises(ValueError, match="tolerance 1e-06 is too small for float32"):
        jd.BrownianPath(VP, "x0", KEY, tolerance=1e-6).draw(jnp.asarray([1.0, 2.0]), jnp.zeros(3))
    with pytest.raises(ValueError, match="leaves the process's span: clock"):
        jd.BrownianPath(jd.processes.vp_linear(t_min=0.1), "x0", KEY).check(ddpm)
    with pytest.raises(ValueError, match="infinite lambda: give it a t_min and t_max"):
        jd.BrownianPath(jd.processes.flow(), "x0", KEY).check(ddpm)
