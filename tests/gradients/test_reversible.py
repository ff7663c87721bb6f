"""The reversible adjoint: the gradients of DirectAdjoint to rounding, in memory that does not grow."""

import dataclasses

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from jax.sharding import AxisType, PartitionSpec

import jaxdiff as jd
from jaxdiff.gradients import ReversibleAdjoint
from jaxdiff.solvers import Start, Tableau

VP = jd.processes.vp_linear()
GRID = jd.grids.half_log_snr(VP, 12)
BATCH, DIM, LABEL = 3, 2, 4


def network(params, x, t, cond):
    return jnp.tanh(x @ params["x"] + cond @ params["c"] + t) @ params["out"]


def weights(rng):
    return {
        "x": jnp.asarray(rng.normal(size=(DIM, 8))), "c": jnp.asarray(rng.normal(size=(LABEL, 8))),
        "out": jnp.asarray(0.3 * rng.normal(size=(8, DIM))),
    }  # fmt: skip


def score_of(out):
    """A scalar to which every number of every floating-point leaf contributes differently."""
    leaves = [a for a in jax.tree.leaves(out) if jnp.issubdtype(a.dtype, jnp.floating)]
    return sum(
        jnp.sum(jnp.sin(a) * jnp.linspace(1.0, 2.0, a.size).reshape(a.shape)) for a in leaves
    )


def assert_same_gradients(loss, inputs, rtol=1e-12):
    """`loss(inputs, adjoint)` differentiated by both adjoints; none of the gradients is zero."""
    direct = jax.grad(loss)(inputs, diffrax.DirectAdjoint())
    got = jax.grad(loss)(inputs, ReversibleAdjoint())
    for path, expected in jax.tree_util.tree_leaves_with_path(direct):
        scale = np.abs(expected).max()
        assert scale > 1e-6, jax.tree_util.keystr(path)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max()),
        got,
        direct,
    )


def test_parameters_noise_condition_and_guidance(x64):
    rng = np.random.default_rng(0)
    tableau = jd.solvers.bdia(GRID)

    def loss(inputs, adjoint):
        params, x_T, cond, scale, null = inputs
        denoiser = jd.guidance.classifier_free(jd.Denoiser(network, "v", params), scale, null)
        return score_of(jd.sample(denoiser, tableau, x_T, cond=cond, adjoint=adjoint, save="state"))

    inputs = weights(rng), *map(jnp.asarray, (
        rng.normal(size=(BATCH, DIM)), rng.normal(size=(BATCH, LABEL)), 1.7, rng.normal(size=LABEL),
    ))  # fmt: skip
    assert_same_gradients(loss, inputs)


def reversible_rows(rng, rows):
    """s_0' is anything; the other register keeps s_0, plus noise and a shift."""
    coefficient = lambda *shape: rng.uniform(0.3, 0.7, shape)  # noqa: E731
    A, B = np.zeros((rows, 2, 2)), np.zeros((rows, 2, 1, 1))
    A[:, 0], A[:, 1, 0], B[:, 0] = coefficient(rows, 2), 1.0, coefficient(rows, 1, 1)
    A[0] = [[0.4, 0.0], [1.0, 0.0]]  # the first row need not be undone
    return Tableau(
        A=A, B=B, C=coefficient(rows, 2), d=coefficient(rows, 2), u=coefficient(rows, 1, 5),
        w=coefficient(rows, 1, 5), t=coefficient(rows), alpha=coefficient(rows),
        sigma=coefficient(rows), active=np.ones(rows), draw=np.arange(rows, dtype=np.int32) + 1,
        clock=None, nodes=np.array([(r, r % 2) for r in range(rows + 1)], np.int32),
        start=Start(coefficient(2), coefficient(2), coefficient(2)), registers=2, history=1, outputs=1,
    )  # fmt: skip


def test_coefficients_and_noise_of_a_traced_stochastic_table(x64):
    rng = np.random.default_rng(1)
    table = reversible_rows(rng, 4)
    fields = ("A", "B", "C", "d", "u", "w", "t", "alpha", "sigma")

    def loss(inputs, adjoint):
        coefficients, start, noise, params = inputs
        tableau = dataclasses.replace(table, start=start, **coefficients)
        out = jd.sample(
            jd.Denoiser(network, "v", params), tableau, x_T, noise=noise, cond=cond, save="x0",
            adjoint=adjoint,
        )  # fmt: skip
        return score_of(out)

    x_T, cond = rng.normal(size=(BATCH, DIM)), rng.normal(size=(BATCH, LABEL))
    noise, coefficients = rng.normal(size=(5, BATCH, DIM)), {f: getattr(table, f) for f in fields}
    inputs = jax.tree.map(jnp.asarray, (coefficients, table.start, noise, weights(rng)))
    assert_same_gradients(loss, inputs)


def two_leaves(params, x, t):
    return {
        "a": jnp.sin(params * x["a"]) + x["b"][:, None],
        "b": jnp.cos(x["b"] + t) * x["a"].mean(-1),
    }


def test_the_state_may_be_a_pytree_and_the_noise_a_key(x64):
    """The key's numbers, drawn again on the way back, are those of an array of the same draws."""
    rng, key = np.random.default_rng(2), jax.random.key(3)
    table = reversible_rows(rng, 4)
    x_T = {"a": jnp.asarray(rng.normal(size=(BATCH, 2))), "b": jnp.asarray(rng.normal(size=BATCH))}
    draws = [jd.noise.normal(key, x_T, number) for number in range(5)]
    draws = jax.tree.map(lambda *a: jnp.stack(a), *draws)

    def loss(inputs, adjoint):
        params, x_T = inputs
        denoiser = jd.Denoiser(two_leaves, "eps", params)
        random = {"noise": draws} if isinstance(adjoint, diffrax.DirectAdjoint) else {"key": key}
        return score_of(jd.sample(denoiser, table, x_T, save="nodes", adjoint=adjoint, **random))

    assert_same_gradients(loss, (jnp.asarray(0.6), x_T))


def test_a_stack_of_invertible_samplers_under_vmap(x64):
    rng = np.random.default_rng(3)
    small = jd.grids.uniform(jd.processes.vp_cosine(), 6, t_max=0.95, t_min=0.05)
    stack = jd.solvers.stack([
        jd.solvers.bdia(small), jd.solvers.bdia(small, 0.8), jd.solvers.belm(small, "v"),
        jd.solvers.edict(small),
    ])  # fmt: skip
    cond = rng.normal(size=(BATCH, LABEL))

    def loss(inputs, adjoint):
        params, x_T = inputs

        def one(table):
            denoiser = jd.Denoiser(network, "v", params)
            return jd.sample(denoiser, table, x_T, cond=cond, adjoint=adjoint)

        return score_of(jax.vmap(one)(stack))

    assert_same_gradients(loss, (weights(rng), jnp.asarray(rng.normal(size=(BATCH, DIM)))), 1e-11)


# --- memory ---------------------------------------------------------------------------------------


def temporary_bytes(adjoint, rows):
    tableau = jd.solvers.bdia(jd.grids.half_log_snr(VP, rows))

    def loss(params, x_T):
        denoiser = jd.Denoiser(lambda p, x, t: jnp.tanh(x @ p + t), "v", params)
        return jnp.sum(jd.sample(denoiser, tableau, x_T, adjoint=adjoint))

    inputs = jnp.eye(64), jnp.ones((32, 64))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_from_20_to_200_rows():
    state = 4 * 32 * 64
    short, long = (temporary_bytes(ReversibleAdjoint(), rows) for rows in (20, 200))
    table = 180 * 4 * 16  # of the rows' own coefficients
    assert long - short <= 3 * table < 180 * state / 40
    default = temporary_bytes(diffrax.RecursiveCheckpointAdjoint(), 200)
    assert long < default / 3


# --- errors ---------------------------------------------------------------------------------------


def remembering(x, t, memory):
    return x, memory


@pytest.mark.parametrize(
    "denoiser, tableau, options, message",
    [
        (jd.Denoiser(lambda x, t: x), jd.solvers.ddim(GRID), {}, "row 1 .*RecursiveCheckpoint"),
        (jd.Denoiser(lambda x, t: x), jd.solvers.bdia(GRID, 0.0), {}, "row 1 .*singular"),
        (jd.Denoiser(lambda x, t: x), jd.solvers.unipc(GRID), {}, "one integrand, got"),
        (
            jd.Denoiser(lambda x, t: x), jd.solvers.bdia(GRID), {"control": jd.Control()},
            "cannot undo a control.*RecursiveCheckpoint",
        ),
        (
            jd.Denoiser(remembering, memory=jnp.zeros(())), jd.solvers.bdia(GRID), {},
            "memory.*RecursiveCheckpoint",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_undone_is_named_before_tracing(denoiser, tableau, options, message):
    with pytest.raises(ValueError, match=message):
        jd.sample(denoiser, tableau, jnp.ones((2, 2)), adjoint=ReversibleAdjoint(), **options)


def test_inside_shard_map_the_error_names_the_adjoint_that_works():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def run(x):
        denoiser = jd.Denoiser(lambda x, t: x)
        return jd.sample(denoiser, jd.solvers.bdia(GRID), x, adjoint=ReversibleAdjoint())

    split = jax.shard_map(
        run, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"),
        check_vma=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="shard_map and pmap.*DirectAdjoint"):
        split(jnp.ones((4, 2)))


def test_another_sampler_of_the_shape_compiles_nothing():
    denoiser, x_T = jd.Denoiser(lambda x, t: jnp.sin(x)), jnp.ones((2, 2))

    def run(gamma):
        tableau = jd.solvers.bdia(GRID, gamma)
        return jax.block_until_ready(jd.sample(denoiser, tableau, x_T, adjoint=ReversibleAdjoint()))

    first = run(1.0)
    with counted() as compiled:
        second = run(0.5)
    assert not compiled
    assert np.abs(first - second).max() > 1e-4


def test_a_traced_tableau_is_checked_when_it_runs():
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(VP, 3))

    @jax.jit
    def run(A):
        table = dataclasses.replace(tableau, A=A)
        denoiser = jd.Denoiser(lambda x, t: x)
        return jd.sample(denoiser, table, jnp.ones((2, 2)), adjoint=ReversibleAdjoint())

    with pytest.raises(Exception, match="no exact inverse"):
        jax.block_until_ready(run(jnp.asarray(tableau.A)))


def test_the_continuous_adjoint_of_a_stochastic_table_names_what_to_take():
    tableau = jd.solvers.ddpm(GRID)
    with pytest.raises(ValueError, match="BacksolveAdjoint.*RecursiveCheckpoint.*jaxdiff.ode"):
        jd.sample(
            jd.Denoiser(lambda x, t: x), tableau, jnp.ones((2, 2)), jax.random.key(0),
            adjoint=diffrax.BacksolveAdjoint(),
        )  # fmt: skip


def test_a_flow_has_no_rows_to_walk_back():
    process = jd.processes.vp_linear()
    denoiser = jd.gaussian_mixture(np.zeros((1, 1)), np.ones(1), np.ones(1), process)
    options = {"t_min": 1e-2, "adjoint": ReversibleAdjoint()}
    with pytest.raises(ValueError, match="walks a tableau's rows back.*adjoint_dpm"):
        jd.ode.sample(denoiser, process, jnp.zeros((2, 1)), **options)


def test_a_constant_alone_may_be_traced(x64):
    process = jd.processes.vp_linear()
    denoiser = jd.gaussian_mixture(np.zeros((1, 1)), np.ones(1), np.ones(1), process)
    table = jd.solvers.bdia(jd.grids.uniform(process, 4))
    x = jnp.ones((3, 1))

    def total(d, adjoint):
        return jnp.sum(jd.sample(denoiser, dataclasses.replace(table, d=d), x, adjoint=adjoint) ** 2)

    zero = jnp.zeros((4, 2))
    found, expected = (
        jax.grad(total)(zero, a) for a in (ReversibleAdjoint(), diffrax.DirectAdjoint())
    )
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-10)
