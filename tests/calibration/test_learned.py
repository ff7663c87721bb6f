"""Learned solvers: consistent for any parameters, the family's own at zero, better on fresh starts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Mixture

import jaxdiff as jd
from jaxdiff import calibration
from jaxdiff.calibration import learned, learned_tableau, no_freedom
from jaxdiff.denoisers import level

VP, EDM = jd.processes.vp_linear(), jd.processes.edm()
FAMILIES = {
    "ddim": jd.solvers.ddim,
    "unipc_3": functools.partial(jd.solvers.unipc, order=3),
    "adams": functools.partial(
        jd.solvers.exponential_adams, order=2, integrand="flow", corrector=4, blend=0.5
    ),
    "ghvb_3": functools.partial(jd.solvers.ghvb, order=3),
    "heun": jd.solvers.heun,
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def some_freedom(family, grid, seed=0, history=4):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(size=a.shape), no_freedom(family, grid, history))


@every_family
@pytest.mark.parametrize("process", [VP, EDM], ids=["vp", "edm"])
def test_no_freedom_is_the_family(family, process):
    grid = jd.grids.karras(process, 5)
    base = family(grid)
    same = learned_tableau(family, grid, no_freedom(family, grid))
    for name in ("A", "B", "u", "w", "t", "alpha", "sigma", "nodes"):
        np.testing.assert_allclose(getattr(same, name), getattr(base, name), rtol=1e-9, atol=1e-12)
    assert (same.history, same.registers) == (base.history, base.registers)


@every_family
def test_consistent_for_any_freedom(family, x64):
    """A constant integrand is integrated exactly, nodes stay in order, ends stay."""
    grid = jd.grids.logistic(VP, 6)
    for seed in range(3):
        free = some_freedom(family, grid, seed)
        table = learned_tableau(family, grid, free)
        moved = learned_tableau(family, grid, free.__class__(free.nodes, *_zero(free)))
        # The sums over the evaluations, the integral of a constant, are those of these nodes.
        np.testing.assert_allclose(table.B.sum(2), moved.B.sum(2), rtol=1e-12, atol=1e-12)
        assert np.abs(table.B[..., : moved.history, :] - moved.B).max() > 1e-2 or table.rows < 2
        np.testing.assert_array_equal(table.A, moved.A)
        # No weight on evaluations that were not made yet.
        for row in range(table.rows):
            assert not np.any(table.B[row, :, row + 1 :])
        assert np.all(np.diff(moved.t) <= 0) and moved.t[0] == grid.t[0]
        assert table.t.max() <= VP.t_max and table.t.min() >= VP.t_min
        np.testing.assert_allclose(table.alpha, VP.alpha(table.t), rtol=1e-12)


def _zero(free):
    return np.zeros_like(free.coefficients), np.zeros_like(free.times)


@every_family
def test_traced_is_the_same(family, x64):
    grid = jd.grids.half_log_snr(VP, 4)
    free = some_freedom(family, grid)
    host = learned_tableau(family, grid, free)
    traced = jax.jit(lambda f: learned_tableau(family, grid, f))(jax.tree.map(jnp.asarray, free))
    for a, b in zip(jax.tree.leaves(host), jax.tree.leaves(traced)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_ends_at_pure_noise_and_data_stay(name):
    """The last step to sigma = 0 is x0; the first may start at alpha = 0."""
    process = {"flow": jd.processes.flow(), "edm": EDM}[name]
    grid = jd.grids.uniform(process, 5) if name == "flow" else jd.grids.karras(EDM, 5, end="zero")
    family = jd.solvers.ddim
    free = some_freedom(family, grid)
    table = learned_tableau(family, grid, free.__class__(free.nodes, *_zero(free)))
    assert table.alpha[0] == grid.alpha[0] and table.sigma[0] == grid.sigma[0]
    np.testing.assert_array_equal(table.A[-1], 0.0)
    np.testing.assert_allclose(learned_tableau(family, grid, free).B[-1].sum(), 1.0, rtol=1e-12)


@functools.cache
def fitted(parts):
    """A fit at five evaluations, EDM's span, on a mixture in 8 dimensions; errors on fresh starts."""
    rng = np.random.default_rng(3)
    mixture = Mixture(rng.normal(size=(8, 8)), rng.uniform(0.25, 0.6, 8), np.full(8, 1 / 8))
    x = mixture.sample(rng, 448, 1.0, 80.0)
    ends = mixture.flow(x, (1.0, 80.0), (1.0, 0.002))
    fit, held, fresh = slice(0, 192), slice(192, 320), slice(320, 448)
    denoiser = jd.gaussian_mixture(mixture.means, mixture.std, mixture.weights, EDM)
    family, grid = FAMILIES["adams"], jd.grids.logistic(EDM, 5)
    with jax.enable_x64(True):
        found = calibration.learn(
            denoiser, family, grid, x[fit], ends[fit], (x[held], ends[held]), parts=parts,
            history=5, steps=200, learning_rate=0.02,
        )  # fmt: skip

        def error(table):
            out = np.asarray(jd.sample(denoiser, table, x[fresh]))
            return np.median(np.linalg.norm(out - ends[fresh], axis=1) / 8**0.5)

        return found, error(family(grid)), error(found.tableau)


def test_it_learns_what_holds_on_fresh_starts():
    found, before, after = fitted(("nodes", "coefficients", "times"))
    assert after <= 0.4 * before
    assert found.held_out.min() <= 0.5 * found.held_out[0]
    assert found.train.shape == found.held_out.shape == (9,)
    nodes, _, nodes_only = fitted(("nodes",))
    assert after < 0.7 * nodes_only and nodes.held_out.min() < nodes.held_out[0]
    assert not np.any(nodes.freedom.coefficients) and not np.any(nodes.freedom.times)
    assert np.any(nodes.freedom.nodes)


def _which_row(times, x, t):
    """x0 is the unit vector of the evaluation: states are then their own coefficients."""
    row = jnp.argmin(jnp.abs(times - t))
    return jnp.broadcast_to(jax.nn.one_hot(row + 1, x.shape[1], dtype=x.dtype), x.shape)


@pytest.mark.parametrize("name", ["unipc_3", "unipc_2_eps", "flow_pc_2", "deis_tab3"])
def test_weights_with_all_integrands_kept_reach_every_such_method(x64, name):
    """Methods of other integrands, registers and correctors are DDIM with other weights."""
    grid = jd.grids.half_log_snr(VP, 5)
    table, base = jd.solvers.build(name, grid), jd.solvers.ddim(grid)
    sigma = np.asarray(grid.sigma)
    states = np.asarray(jd.sample(
        jd.Denoiser(_which_row, "x0", grid.t[:-1]), table, jnp.eye(6)[:1], save="trajectory"
    ))[:, 0]  # fmt: skip
    np.testing.assert_allclose(states[:, 0], sigma / sigma[0], rtol=1e-9)
    free = no_freedom(jd.solvers.ddim, grid, 5)
    coefficients = free.coefficients.copy()
    for r in range(5):
        weights = (states[r + 1] - sigma[r + 1] / sigma[r] * states[r])[r + 1 : 0 : -1]
        total = base.B[r, 0].sum()
        np.testing.assert_allclose(weights.sum(), total, rtol=1e-9)
        coefficients[r, 0, : r + 1, 0] = weights / total - np.eye(r + 1)[0]
    same = learned_tableau(jd.solvers.ddim, grid, dataclasses.replace(free, coefficients=coefficients))
    mixture = jd.gaussian_mixture([[1.0, -1.0], [0.5, 2.0]], [0.3, 0.5], [0.4, 0.6], VP)
    x = VP.prior(jax.random.key(0), (4, 2), jnp.float64)
    found, want = (np.asarray(jd.sample(mixture, t, x)) for t in (same, table))
    np.testing.assert_allclose(found, want, rtol=1e-8)
    assert np.abs(want - np.asarray(jd.sample(mixture, base, x))).max() > 0.01


def test_components_with_coefficients_of_their_own(tmp_path):
    """Alone they are their component's sampler, and the zero freedom is the family."""
    family, grid = FAMILIES["adams"], jd.grids.logistic(EDM, 4)
    rng = np.random.default_rng(5)
    plain = no_freedom(family, grid, 4)
    shaped = no_freedom(family, grid, 4, (2, 3))
    assert shaped.coefficients.shape == (*plain.coefficients.shape, 2, 3)
    x = rng.normal(size=(5, 2, 3)) * 80
    denoiser = jd.Denoiser(_shrink, "x0", time=level)  # acts on each component by itself
    with jax.enable_x64(True):
        base = jd.sample(denoiser, family(grid), x)
        np.testing.assert_allclose(
            jd.sample(denoiser, learned_tableau(family, grid, shaped), x), base, rtol=1e-11
        )
        free = dataclasses.replace(shaped, coefficients=rng.normal(size=shaped.coefficients.shape))
        table = learned_tableau(family, grid, free)
        jd.solvers.save(table, tmp_path / "shaped.json")
        found = jd.sample(denoiser, jd.solvers.load(tmp_path / "shaped.json"), x)
        for i, j in np.ndindex(2, 3):
            one = dataclasses.replace(plain, coefficients=free.coefficients[..., i, j])
            alone = jd.sample(denoiser, learned_tableau(family, grid, one), x)
            np.testing.assert_allclose(found[:, i, j], alone[:, i, j], rtol=1e-10)
        assert np.max(np.abs(found - base)) > 0.1


def _shrink(x, levels):
    _, alpha, sigma = levels
    return x / (alpha**2 + sigma**2) + 0.1 * jnp.sin(x)


@pytest.mark.parametrize("average", ["arithmetic", "geometric"])
def test_the_first_look_is_the_familys_average_error(average):
    family, grid = FAMILIES["adams"], jd.grids.logistic(EDM, 3)
    rng = np.random.default_rng(6)
    x, ends = rng.normal(size=(8, 3)) * 80, rng.normal(size=(8, 3))
    denoiser = jd.Denoiser(_shrink, "x0", time=level)
    with jax.enable_x64(True):
        out = np.asarray(jd.sample(denoiser, family(grid), x))
        found = calibration.learn(
            denoiser, family, grid, x[:5], ends[:5], (x[5:], ends[5:]), average=average, shaped=True,
            steps=1,
        )  # fmt: skip
    errors = np.sqrt(np.mean((out - ends) ** 2, 1))
    mean = np.mean if average == "arithmetic" else lambda e: np.exp(np.mean(np.log(e)))
    np.testing.assert_allclose(found.train[0], mean(errors[:5]), rtol=1e-9)
    np.testing.assert_allclose(found.held_out[0], mean(errors[5:]), rtol=1e-9)


def test_a_learned_solver_is_a_file(tmp_path):
    found, _, _ = fitted(("nodes", "coefficients", "times"))
    path = tmp_path / "five.json"
    jd.solvers.save(found.tableau, path, about={"nfe": 5})
    read = jd.solvers.load(path)
    assert jax.tree.structure(read) == jax.tree.structure(found.tableau)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(found.tableau)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"parts": ("nodes", "order")}, "part.*'order'"),
        ({"family": jd.solvers.ddpm}, "only deterministic"),
        ({"steps": 0}, "steps must be an integer"),
        ({"average": "median"}, "average.*'median'"),
        ({"history": 2.5}, "history must be an integer"),
        ({"learning_rate": np.nan}, "learning_rate must be positive"),
        ({"decay": -1.0}, "decay not negative"),
        ({"parts": ()}, "parts must name"),
        ({"target": np.zeros((3, 2))}, "target must have the starts' shapes"),
        ({"grid": jd.grids.from_arrays([1.0, 0.5], [0.1, 0.9], [0.9, 0.1])}, "needs its process"),
    ],
)
def test_bad_input(change, message):
    x = np.ones((4, 2), np.float32)
    options = {
        "denoiser": jd.gaussian_mixture(np.zeros((1, 2)), [1.0], [1.0], VP),
        "family": jd.solvers.ddim, "grid": jd.grids.half_log_snr(VP, 2), "x_T": x, "target": x,
        "held_out": (x, x), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        calibration.learn(**options)


@pytest.mark.parametrize("build", [jd.solvers.unipc, jd.solvers.deis])
def test_the_builders_gradient_taken_forward_is_the_reverse_one(build, x64):
    grid = jd.grids.half_log_snr(jd.processes.vp_linear(), 4)
    nodes = jnp.asarray(np.random.default_rng(0).normal(size=4))
    at_nodes = functools.partial(learned._at_nodes, build, grid)

    def total(make, nodes):
        table = make(nodes)
        return sum(jnp.sum(jnp.sin(a)) for a in (table.A, table.B, table.t, table.alpha))

    forward = functools.partial(learned._with_forward_gradient, at_nodes)
    found, expected = (jax.grad(functools.partial(total, f))(nodes) for f in (forward, at_nodes))
    assert np.abs(expected).min() > 1e-6
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
