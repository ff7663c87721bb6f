"""The inverse of a tableau: the condition, the algebra on random rows, and whole samplers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import SETTINGS, build
from oracles import BROAD

import jaxdiff as jd
from jaxdiff.solvers.inverse import entry

PROCESS = jd.processes.vp_linear()
GRID = jd.grids.uniform(PROCESS, 6)
DENOISER = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS, "x0")
INVERTIBLE = [name for name in SETTINGS if name.startswith(("bdia_", "belm", "edict"))] + ["ghvb_1"]


def start(grid=GRID, count=8):
    return BROAD.sample(np.random.default_rng(0), count, grid.alpha[0], grid.sigma[0])


# --- random rows: the theorem, with everything a row may have --------------------------------------

R, P, ROWS = 3, 2, 4


def network(x, t):
    return jnp.tanh(x[:, ::-1] + t), jnp.sin(2.0 * x) * t


def random_table(seed=0, l_B=0.0, l_C=0.0):
    """Rows with l B = l_B and l C = l_C, l = e_0 A^-1, and all else random; start not the identity."""
    rng = np.random.default_rng(seed)
    rows = [
        jd.solvers.Row((0.9 - 0.2 * r, 0.6, 0.8), [
            jd.solvers.Update(rng.normal(size=R), [tuple(rng.normal(size=P))], rng.normal())
            for _ in range(R)
        ])
        for r in range(ROWS)
    ]  # fmt: skip
    table = jd.solvers.assemble(rows, ("x0", "eps"), np)
    A, B, C = table.A, np.array(table.B), np.array(table.C)
    place = np.linalg.inv(A)[:, 0]
    unit = place / np.sum(place**2, 1, keepdims=True)
    B -= (np.einsum("ri,rikp->rkp", place, B) - l_B)[:, None] * unit[:, :, None, None]
    C -= (np.einsum("ri,ri->r", place, C) - l_C)[:, None] * unit
    return dataclasses.replace(
        table, B=B, C=C, d=rng.normal(size=(ROWS, R)),
        start=jd.solvers.Start(np.array([1.0, 0.5, -2.0])),
    )  # fmt: skip


RANDOM = jd.Denoiser(network, ("x0", "eps"))


def forward(table, x, noise):
    """The definition of a row, in NumPy: all registers before and after every row, and the m's."""
    s, history, kept = [c * x for c in table.start.S], [], []
    for r in range(ROWS):
        history.append(s)
        out = [np.asarray(o) for o in network(jnp.asarray(s[0]), table.t[r])]
        picked = [(table.u[r, p, i], table.w[r, p, i]) for p, i in enumerate(_columns())]
        m = [u * o + w * s[0] for (u, w), o in zip(picked, out)]
        kept.append(m)
        s = [
            sum(table.A[r, i, j] * s[j] for j in range(R))
            + sum(table.B[r, i, 0, p] * m[p] for p in range(P))
            + table.C[r, i] * noise[r] + table.d[r, i]
            for i in range(R)
        ]  # fmt: skip
    return [*history, s], kept


def _columns():
    return [jd.predictions.PREDICTIONS.index(p) for p in RANDOM.predictions]


@pytest.mark.parametrize("l_C", [0.0, 0.7])
def test_recovery_undoes_every_row(x64, l_C):
    table, rng = random_table(l_C=l_C), np.random.default_rng(1)
    noise = rng.normal(size=(ROWS, 5, 2))
    states, integrands = forward(table, rng.normal(size=(5, 2)), noise)
    place, back = jd.solvers.recovery(table)
    for r in range(ROWS):
        given = np.stack(states[r + 1]) - np.einsum("i,bc->ibc", table.C[r], noise[r])
        given -= table.d[r][:, None, None]
        np.testing.assert_allclose(np.tensordot(place[r], given, 1), states[r][0], atol=1e-10)
        for p in range(P):
            given = given - table.B[r, :, 0, p, None, None] * integrands[r][p]
        np.testing.assert_allclose(np.tensordot(back[r], given, 1), states[r], atol=1e-10)


@pytest.mark.parametrize("source", ["array", "key"])
def test_a_random_invertible_table_runs_back(x64, source):
    """Three registers, two outputs, noise and shifts: to the first registers, and forward again."""
    table, rng = random_table(), np.random.default_rng(1)
    x, noise = rng.normal(size=(5, 2)), rng.normal(size=(ROWS, 5, 2))
    drawn = {"noise": noise} if source == "array" else {"key": jax.random.key(3)}
    state = jd.sample(RANDOM, table, x, save="state", **drawn)
    if source == "array":
        np.testing.assert_allclose(np.stack(state.registers), forward(table, x, noise)[0][-1])
    before = jd.inversion.invert(RANDOM, table, state, **drawn)
    for found, scale in zip(before.registers, table.start.S):
        np.testing.assert_allclose(found, scale * x, atol=1e-9)
    again = jd.sample(RANDOM, table, None, save="state", state=before, **drawn)
    np.testing.assert_allclose(np.stack(again.registers), np.stack(state.registers), atol=1e-8)
    assert int(again.draws) == int(state.draws) == ROWS
    # The inverse is a table like any other: it has an inverse.
    twice = table.inverse().inverse()
    ends = np.tensordot(entry(table)[0], np.stack(state.registers), 1)
    matrix, shift = entry(table.inverse())
    first = np.tensordot(matrix, np.stack(before.registers), 1) + shift[:, None, None]
    moved = state._replace(registers=tuple(jnp.asarray(first)), draws=jnp.int32(0))
    got = jd.sample(RANDOM, twice, None, save="state", state=moved, **drawn).registers
    shifted = ends + entry(table)[1][:, None, None]
    np.testing.assert_allclose(np.stack(got), shifted, atol=1e-8)


def test_the_condition_is_necessary():
    with pytest.raises(ValueError, match="row . .*not a linear function of the registers it leaves"):
        random_table(l_B=0.1).inverse()
    with pytest.raises(ValueError, match="row . .*the noise that it draws afterwards"):
        random_table(l_C=0.1).inverse()
    table = random_table()
    A = np.array(table.A)
    A[2, 1] = 2.0 * A[2, 0]
    with pytest.raises(ValueError, match="row 2 .*singular, so that what a register held is lost"):
        dataclasses.replace(table, A=A).inverse()


# --- whole samplers ------------------------------------------------------------------------------


def test_the_samplers_that_have_one_are_those_with_a_register_to_spare():
    found = []
    for name in SETTINGS:
        try:
            build(name, GRID).inverse()
            found.append(name)
        except ValueError as error:
            assert "has no exact inverse: " in str(error) and "bdia, belm and edict" in str(error)
    assert sorted(found) == sorted(INVERTIBLE)


@functools.cache
def round_trip(name):
    with jax.enable_x64(True):
        table, x = build(name, GRID), jnp.asarray(start())
        state = jd.sample(DENOISER, table, x, save="state")
        return table, x, state, jd.inversion.invert(DENOISER, table, state)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_back_to_the_noise(name):
    table, x, _, before = round_trip(name)
    for found, scale in zip(before.registers, np.asarray(table.start.S)):
        # Momentum forgets all but (1 - beta) of the velocity a row: the inverse multiplies by 5.
        tolerance = 1e-12 if name != "ghvb_1" else 1e-10
        np.testing.assert_allclose(found, scale * np.asarray(x), atol=tolerance)
    assert table.inverse().nfe == table.nfe - (0 if name.startswith("edict") else 1)


@pytest.mark.parametrize("name", ["bdia_ddim", "bdia_edm", "belm", "belm_v"])
def test_it_is_the_builder_on_the_reversed_grid(x64, name):
    """The inverse by algebra is the one that the authors of each method wrote down."""
    table, _, state, before = round_trip(name)
    entry_, setting = SETTINGS[name]
    back = entry_.build(GRID.reversed(), **setting.options, start="pair")
    pair = state._replace(registers=state.registers[::-1])
    theirs = jd.sample(DENOISER, back, None, state=pair)
    np.testing.assert_allclose(before.registers[0], theirs, atol=1e-12)


@pytest.mark.parametrize("name", ["bdia_ddim", "edict", "ghvb_1"])
def test_the_solution_at_the_nodes(x64, name):
    table, x, state, _ = round_trip(name)
    there = jd.sample(DENOISER, table, x, save="nodes")
    matrix, _ = entry(table)
    registers = tuple(np.tensordot(matrix, np.stack(state.registers), 1))
    entered = state._replace(registers=registers)
    back = jd.sample(DENOISER, table.inverse(), None, state=entered, save="nodes")
    np.testing.assert_allclose(back, there[::-1], atol=1e-9)


def test_a_row_of_padding_has_its_inverse(x64):
    table, x, _, before = round_trip("bdia_ddim")
    longer = jd.solvers.stack([table, build("bdia_ddim", jd.grids.uniform(PROCESS, 9))])
    padded = jax.tree.map(lambda a: a[0], longer)
    state = jd.sample(DENOISER, padded, x, save="state")
    found = jd.inversion.invert(DENOISER, padded, state)
    np.testing.assert_allclose(found.registers[0], x, atol=1e-12)
    assert padded.inverse().nfe == table.nfe - 1 and padded.rows == 9


def test_one_step_and_continued_runs():
    """Row 0 of BDIA is undone through the start: not where the start was skipped."""
    table = jd.solvers.bdia(jd.grids.uniform(PROCESS, 1))
    assert table.inverse().nfe == 1
    with pytest.raises(ValueError, match="row 0 .*singular"):
        jd.solvers.recovery(table, started=False)
    pair = jd.solvers.bdia(GRID, start="pair")
    assert jd.solvers.recovery(pair, started=False).l.shape == (5, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jd.solvers.ddim(GRID), "row 0 .*bdia, belm and edict; jaxdiff.inversion.solve_back"),
        (lambda: jd.solvers.ddim(GRID, outputs=2), "row 0 .*singular"),
        (lambda: jd.solvers.heavy_ball_multistep(GRID), "row 1 .*evaluations of earlier rows"),
        (lambda: jd.solvers.stack([jd.solvers.bdia(GRID)] * 2), "stacked .*invert, then stack"),
        (
            lambda: dataclasses.replace(jd.solvers.bdia(GRID), A=np.zeros((6, 2, 2, 3))),
            "one number each",
        ),
    ],
)
def test_tables_without_an_inverse_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make().inverse()


def test_a_traced_table_is_named():
    def traced(gamma):
        return jd.solvers.bdia(GRID, gamma).inverse().A

    with pytest.raises(ValueError, match="traced tableau .*outside jit, grad and vmap"):
        jax.jit(traced)(0.9)


def test_what_invert_takes():
    table, x, state, _ = round_trip("bdia_ddim")
    with pytest.raises(TypeError, match=r"save='state'\), got ArrayImpl: one sample does not tell"):
        jd.inversion.invert(DENOISER, table, x)
    with pytest.raises(ValueError, match="the state has 1 registers, the tableau 2"):
        short = state._replace(registers=state.registers[:1])
        jd.inversion.invert(DENOISER, table, short)
    with pytest.raises(TypeError, match="expected a Tableau"):
        jd.solvers.inverse(None)


def test_invert_refuses_what_it_would_get_wrong():
    table, x, state, _ = round_trip("bdia_ddim")
    # BDIA's first row is singular: only the start tells what its second register was.
    with pytest.raises(ValueError, match="row 0 of this tableau has no exact inverse"):
        jd.inversion.invert(DENOISER, table, state, started=False)
    remembering = dataclasses.replace(DENOISER, memory=jnp.zeros(()))
    with pytest.raises(ValueError, match="no denoiser with memory"):
        jd.inversion.invert(remembering, table, state)
