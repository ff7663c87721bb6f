"""BoundaryDiffusion: planes of known place, edits of digits, and a bottleneck replaced by hand."""

import dataclasses

import exact_digits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from trained import digits as trained

import jaxdiff as jd
from jaxdiff import editing

PROCESS = jd.processes.vp_cosine()
KEY = jax.random.key(0)
T_M = 0.3


def test_the_plane_is_found():
    """Two far blobs about known points: the plane halves their distance, at unit length."""
    rng = np.random.default_rng(0)
    ends = np.array([[3.0, -1.0], [-1.0, 2.0]])
    labels = np.repeat([True, False], 400)
    v = ends[np.where(labels, 0, 1)] + 0.02 * rng.normal(size=(800, 2))
    plane = editing.fit_boundary(v, labels, penalty=100.0)
    want = (ends[0] - ends[1]) / 5.0
    np.testing.assert_allclose(np.linalg.norm(plane.normal), 1.0, rtol=1e-6)
    np.testing.assert_allclose(plane.normal, want, atol=0.02)
    np.testing.assert_allclose(plane.distance(jnp.asarray(ends)), [2.5, -2.5], atol=0.05)


def test_a_move_ends_at_its_distance_and_along_the_normal():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(4, 4, 1))
    plane = editing.Boundary(jnp.asarray(normal / np.linalg.norm(normal)), jnp.asarray(0.7))
    v = jnp.asarray(rng.normal(size=(5, 4, 4, 1)), jnp.float32)
    for target in (2.0, jnp.arange(5.0)):
        moved = plane.move(v, target)
        np.testing.assert_allclose(plane.distance(moved), np.broadcast_to(target, 5), atol=1e-5)
        by = np.asarray(moved - v).reshape(5, -1)
        along = by @ np.asarray(plane.normal).reshape(-1)
        np.testing.assert_allclose(np.linalg.norm(by, axis=1), np.abs(along), rtol=1e-4)
    np.testing.assert_allclose(plane.move(v, plane.distance(v)), v, atol=1e-6)


@pytest.fixture(scope="module")
def ones_and_sevens():
    """An unconditional model of the two, and the latents at t_m of its data and of unseen ones."""
    train, test = (jd.data.digits(split) for split in ("train", "test"))
    parts = [
        (s.x[np.isin(s.label, (1, 7))], s.label[np.isin(s.label, (1, 7))]) for s in (train, test)
    ]
    denoiser = exact_digits.denoiser(*parts[0])
    grid = jd.grids.uniform(PROCESS, 20, t_min=0.02, t_max=T_M)
    x = jnp.asarray(np.concatenate([part[0] for part in parts]))
    z = jd.sample(denoiser, jd.solvers.ddim(grid.reversed()), x)
    return denoiser, grid, parts, np.split(np.asarray(z), [len(parts[0][0])])


def test_latents_are_separable_and_cross(ones_and_sevens):
    denoiser, grid, parts, (seen, fresh) = ones_and_sevens
    plane = editing.fit_boundary(seen, parts[0][1] == 7)
    distance = np.asarray(plane.distance(jnp.asarray(fresh)))
    assert np.mean((distance > 0) == (parts[1][1] == 7)) >= 0.9
    ones, x0 = jnp.asarray(fresh[parts[1][1] == 1]), parts[1][0][parts[1][1] == 1]
    for eta in (0.0, 1.0):
        tableau = jd.solvers.ddim(grid, eta=eta)
        edited = editing.cross_boundary(denoiser, tableau, ones, plane, 5.0, key=KEY)
        assert np.mean(exact_digits.nearest_label(edited, *parts[0]) == 7) >= 0.8
    # Their own distance moves nothing: DDIM's reconstruction, and an inexact one.
    tableau = jd.solvers.ddim(grid)
    same = editing.cross_boundary(denoiser, tableau, ones, plane, plane.distance(ones))
    plain = jd.sample(denoiser, tableau, ones)
    np.testing.assert_allclose(same, plain, atol=1e-5)
    assert np.sqrt(np.mean((np.asarray(same) - x0) ** 2)) < 0.2


@pytest.fixture(scope="module")
def bottleneck(ones_and_sevens):
    """The trained network's bottleneck at (z, t_m), and that level."""
    _, grid, parts, latents = ones_and_sevens
    net, level = trained.denoiser("large"), [jnp.asarray(c) for c in grid.node(0)]
    z = jnp.asarray(np.concatenate(latents))
    name = "middle_block_1"

    @jax.jit
    def read(z):
        null = jnp.full(len(z), trained.NULL)
        return editing.block_outputs(net, (name,), z, *level, null)[name]

    return net, level, np.split(np.asarray(read(z)), [len(latents[0])])


def test_the_bottleneck_is_separable(ones_and_sevens, bottleneck):
    _, _, parts, _ = ones_and_sevens
    _, _, (seen, fresh) = bottleneck
    assert seen.shape[1:] == (4, 4, 48)
    plane = editing.fit_boundary(seen, parts[0][1] == 7)
    found = np.asarray(plane.distance(jnp.asarray(fresh))) > 0
    assert np.mean(found == (parts[1][1] == 7)) >= 0.9


@pytest.fixture(scope="module")
def small():
    """A small UNet away from its initialisation, where the last layer is 0; its module, states."""
    module = jd.models.UNet(width=4, multipliers=(1,), num_blocks=1, attention_resolutions=())
    x = jax.random.normal(KEY, (4, 4, 4, 1))
    variables = jax.jit(module.init)(KEY, x, jnp.full(4, 0.5))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda a: np.asarray(a + 0.3 * rng.normal(size=a.shape), np.float32), variables
    )
    return module, variables, jd.models.from_linen(module, variables, "v"), x


def test_the_bottleneck_crosses_a_boundary(small):
    """h moved to its own distance is the unedited run; to another, in the first row alone, not."""
    _, _, net, x = small
    tableau = jd.solvers.ddim(jd.grids.uniform(PROCESS, 2, t_min=0.1, t_max=T_M))
    level = [jnp.asarray(c)[0] for c in (tableau.t, tableau.alpha, tableau.sigma)]
    name, rng = "middle_block_1", np.random.default_rng(1)

    def plane(shape):
        normal = rng.normal(size=shape)
        return editing.Boundary(jnp.asarray(normal / np.linalg.norm(normal)), jnp.asarray(0.2))

    z, of_h = plane(x.shape[1:]), plane((4, 4, 4))

    @jax.jit
    def runs(x):
        h = editing.block_outputs(net, (name,), x, *level)[name]
        distances = of_h.distance(h), jnp.full(len(x), 5.0)
        edited = [
            editing.cross_boundary(net, tableau, x, z, z.distance(x), of_h, d) for d in distances
        ]
        return jd.sample(net, tableau, x), *edited

    plain, same, other = runs(x)
    np.testing.assert_allclose(same, plain, rtol=1e-6, atol=3e-6)
    assert np.abs(other - plain).max() > 0.01


def test_a_replaced_bottleneck_is_the_decoders_input(small):
    """From t on it is decode(features with another middle); at smaller times, nothing."""
    module, variables, net, x = small
    times = jnp.asarray([0.9, 0.6, 0.5, 0.1])
    level = times, PROCESS.alpha(times), PROCESS.sigma(times)

    @jax.jit
    def outputs(x):
        features = module.apply(variables, x, times, method="encode")
        middle = features.middle + 1.0
        features = dataclasses.replace(features, middle=middle)
        by_hand = module.apply(variables, features, times, method="decode")
        other = editing.replace_block(net, "middle_block_1", middle, 0.6)
        return by_hand, other(x, *level), net(x, *level)

    by_hand, replaced, plain = outputs(x)
    assert np.abs(by_hand - plain).max() > 0.1
    np.testing.assert_allclose(replaced, jnp.concatenate([by_hand[:2], plain[2:]]), atol=1e-5)
    with pytest.raises(ValueError, match="calls no block 'middle'"):
        jax.eval_shape(lambda x: editing.block_outputs(net, ("middle",), x, *level), x)


def test_the_mixing_step_is_where_radii_agree():
    """Gaussian data of std s: |x_k| is a chi law scaled by sqrt(alpha^2 s^2 + sigma^2)."""
    s, dim, count = 0.5, 16, 4000
    grid = jd.grids.uniform(PROCESS, 20, t_min=0.02, t_max=0.99).reversed()
    spread = np.sqrt((np.asarray(grid.alpha) * s) ** 2 + np.asarray(grid.sigma) ** 2)
    law = stats.chi(dim)
    r = np.linspace(0.01, 12.0, 4000)
    exact = [np.abs(law.cdf(r / c) - law.cdf(r / spread[-1])).max() for c in spread]
    e = np.random.default_rng(0).normal(size=(21, count, dim))
    for tolerance in (0.1, 0.4):
        found = editing.mixing_step(spread[:, None, None] * e, grid, tolerance)
        want = int(np.max(np.flatnonzero(np.asarray(exact) > tolerance))) + 1
        assert 0 < want < 20 and abs(found - want) <= 1


def test_bad_input_is_named():
    v = np.zeros((4, 3))
    with pytest.raises(ValueError, match=r"shapes \(4, 3\) and \(3,\)"):
        editing.fit_boundary(v, np.zeros(3, bool))
    with pytest.raises(ValueError, match="of both kinds"):
        editing.fit_boundary(v, np.zeros(4, bool))
    with pytest.raises(ValueError, match="penalty must be positive, got 0"):
        editing.fit_boundary(v, np.arange(4) > 1, penalty=0)
    grid = jd.grids.uniform(PROCESS, 3)
    with pytest.raises(ValueError, match="of a grid from noise to data"):
        editing.mixing_step(np.zeros((4, 2, 1)), grid)
    with pytest.raises(ValueError, match="3 states and 4 nodes"):
        editing.mixing_step(np.zeros((3, 2, 1)), grid.reversed())
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\), got 1"):
        editing.mixing_step(np.zeros((4, 2, 1)), grid.reversed(), tolerance=1)
    with pytest.raises(ValueError, match="must be finite"):
        editing.mixing_step(np.full((4, 2, 1), np.nan), grid.reversed())
