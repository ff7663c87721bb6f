"""The integrator executes the row formula, for any table, and compiles once a shape."""

import dataclasses
import functools

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from compilations import counted

import jaxdiff as jd
from jaxdiff.predictions import PREDICTIONS
from jaxdiff.solvers import Start, Tableau

BATCH, DIM = 3, 2


def network(params, x, t):
    return jnp.tanh(params["w"] * x + t) + params["b"]


def two_outputs(params, x, t):
    return network(params, x, t), jnp.sin(x) * t


PARAMS = {"w": np.array([0.7, -0.4]), "b": np.array([0.1, 0.3])}


def random_tableau(rng, rows, registers, history, outputs, *, noise=False, shift=False):
    """Any numbers at all, small enough to keep 10 rows of order one."""
    small = lambda *shape: 0.4 * rng.normal(size=shape)  # noqa: E731
    return Tableau(
        A=small(rows, registers, registers), B=small(rows, registers, history, outputs),
        C=small(rows, registers) if noise else None, d=small(rows, registers) if shift else None,
        u=small(rows, outputs, 5), w=small(rows, outputs, 5), t=rng.uniform(0.1, 1, rows),
        alpha=rng.uniform(0.2, 1, rows), sigma=rng.uniform(0.2, 1, rows), active=np.ones(rows),
        draw=np.arange(rows, dtype=np.int32) + (1 if noise else 0), clock=None,
        nodes=np.stack([np.arange(rows + 1), np.arange(rows + 1) % registers], 1).astype(np.int32),
        start=Start(
            small(registers), small(registers) if noise else None,
            small(registers) if shift else None,
        ),
        registers=registers, history=history, outputs=outputs,
    )  # fmt: skip


def by_the_formula(tableau, params, x, noise=None, predictions=("eps",)):
    """The row formula of `jaxdiff.solvers.tableau`, in a plain NumPy loop. Returns all registers."""
    start, z = tableau.start, noise if noise is not None else [0] * (tableau.rows + 1)

    def shifted(value, c, d, z):
        return value + (0 if c is None else c * z) + (0 if d is None else d)

    def pick(array, i):
        return None if array is None else array[i]

    s = [
        shifted(start.S[i] * x, pick(start.C, i), pick(start.d, i), z[0])
        for i in range(tableau.registers)
    ]
    history, seen = [[np.zeros_like(x)] * tableau.outputs] * tableau.history, [s]
    for r in range(tableau.rows):
        out = np.tanh(params["w"] * s[0] + tableau.t[r]) + params["b"]
        outs = [out, np.sin(s[0]) * tableau.t[r]]
        m = []
        for p in range(tableau.outputs):
            used = min(p, len(predictions) - 1)
            column = PREDICTIONS.index(predictions[used])
            m.append(tableau.u[r, p, column] * outs[used] + tableau.w[r, p, column] * s[0])
        history = [m, *history[:-1]]
        s = [
            shifted(
                sum(tableau.A[r, i, j] * s[j] for j in range(tableau.registers))
                + sum(
                    tableau.B[r, i, k, p] * history[k][p]
                    for k in range(tableau.history)
                    for p in range(tableau.outputs)
                ),
                pick(pick(tableau.C, r), i), pick(pick(tableau.d, r), i), z[tableau.draw[r]],
            )
            for i in range(tableau.registers)
        ]  # fmt: skip
        seen.append(s)
    return np.array(seen)


@pytest.mark.parametrize(
    ("registers", "history", "outputs", "noise", "shift"),
    [(1, 1, 1, False, False), (3, 4, 2, True, True), (2, 3, 1, True, False)],
)
def test_any_table_runs_by_the_formula(x64, registers, history, outputs, noise, shift):
    rng = np.random.default_rng(registers)
    tableau = random_tableau(rng, 7, registers, history, outputs, noise=noise, shift=shift)
    x, draws = rng.normal(size=(BATCH, DIM)), rng.normal(size=(8, BATCH, DIM))
    predictions = ("v", "flow")[:outputs]
    fn = two_outputs if outputs == 2 else network
    denoiser = jd.Denoiser(fn, predictions if outputs == 2 else "v", PARAMS)
    run = functools.partial(
        jd.sample, denoiser, tableau, x, noise=draws if noise else None
    )
    seen = by_the_formula(tableau, PARAMS, x, draws, predictions)
    np.testing.assert_allclose(run(), seen[-1, 0], rtol=1e-12)
    np.testing.assert_allclose(run(save="trajectory"), seen[:, 0], rtol=1e-12)
    nodes = seen[np.arange(8), np.arange(8) % registers]
    np.testing.assert_allclose(run(save="nodes"), nodes, rtol=1e-12)
    state = run(save="state")
    np.testing.assert_allclose(np.stack(state.registers), seen[-1], rtol=1e-12)
    levels = [(a[:, None, None]) for a in (tableau.alpha, tableau.sigma)]
    v = np.tanh(PARAMS["w"] * seen[:-1, 0] + tableau.t[:, None, None]) + PARAMS["b"]
    x0 = (levels[0] * seen[:-1, 0] - levels[1] * v) / (levels[0] ** 2 + levels[1] ** 2)
    np.testing.assert_allclose(run(save="x0"), x0, rtol=1e-11)


def test_one_output_feeds_every_slot_of_a_two_output_table(x64):
    rng = np.random.default_rng(1)
    tableau, x = random_tableau(rng, 5, 1, 2, 2), rng.normal(size=(BATCH, DIM))
    got = jd.sample(jd.Denoiser(network, "eps", PARAMS), tableau, x)
    outs = by_the_formula(tableau, PARAMS, x, predictions=("eps",))
    np.testing.assert_allclose(got, outs[-1, 0], rtol=1e-12)


@pytest.mark.parametrize("rows", [161, 333, 1000])
def test_every_row_is_visited_once_whatever_their_number(rows):
    """The row is a rounded float time: a truncated one repeats row 1 of 161."""
    grid = jd.grids.half_log_snr(jd.processes.vp_linear(), rows)
    tableau = jd.solvers.ddim(grid)
    times = jd.sample(jd.Denoiser(lambda x, t: jnp.zeros_like(x) + t), dataclasses.replace(
        tableau, A=np.ones_like(tableau.A), u=np.ones_like(tableau.u), w=np.zeros_like(tableau.w),
        B=np.ones_like(tableau.B),
    ), jnp.zeros((1, 1)), save="trajectory")  # fmt: skip
    np.testing.assert_allclose(np.diff(times[:, 0, 0]), tableau.t, atol=2e-4)


def test_coefficients_may_be_state_shaped_or_a_prefix_of_a_pytree(x64):
    rng = np.random.default_rng(2)
    base = random_tableau(rng, 4, 1, 2, 1)
    x = {"image": rng.normal(size=(BATCH, DIM)), "pose": rng.normal(size=(BATCH, 3))}
    # One table a leaf, as prefixes; the image's A differs from pixel to pixel.
    other = random_tableau(rng, 4, 1, 2, 1)
    pixels = base.A[..., None] * np.array([1.0, 0.5])
    tableau = dataclasses.replace(
        base, A={"image": pixels, "pose": other.A}, B={"image": base.B, "pose": other.B},
        t={"image": base.t, "pose": other.t}, alpha={"image": base.alpha, "pose": other.alpha},
        sigma={"image": base.sigma, "pose": other.sigma},
    )  # fmt: skip

    def fn(params, x, t):
        return {
            "image": network(params, x["image"], t["image"]), "pose": jnp.cos(x["pose"] + t["pose"])
        }  # fmt: skip

    got = jd.sample(jd.Denoiser(fn, "eps", PARAMS), tableau, x)
    for leaf, f in (("image", lambda x, t: np.tanh(PARAMS["w"] * x + t) + PARAMS["b"]),
                    ("pose", lambda x, t: np.cos(x + t))):  # fmt: skip
        s, history = base.start.S[0] * x[leaf], [0.0, 0.0]
        for r in range(4):
            column = PREDICTIONS.index("eps")
            m = base.u[r, 0, column] * f(s, tableau.t[leaf][r]) + base.w[r, 0, column] * s
            history = [m, history[0]]
            b = tableau.B[leaf][r, 0, :, 0]
            s = tableau.A[leaf][r, 0, 0] * s + b[0] * history[0] + b[1] * history[1]
        np.testing.assert_allclose(got[leaf], s, rtol=1e-12)



def test_a_start_may_be_a_linear_operator(x64):
    rng = np.random.default_rng(3)
    base, x = random_tableau(rng, 3, 1, 1, 1), rng.normal(size=(BATCH, DIM))
    matrix = rng.normal(size=(DIM, DIM))
    tableau = dataclasses.replace(base, start=Start(lx.MatrixLinearOperator(jnp.asarray(matrix))))
    denoiser = jd.Denoiser(network, "eps", PARAMS)
    plain = dataclasses.replace(base, start=Start(np.ones(1)))
    np.testing.assert_allclose(
        jd.sample(denoiser, tableau, x), jd.sample(denoiser, plain, x @ matrix.T), rtol=1e-12
    )


# --- compilation ----------------------------------------------------------------------------------


def test_new_data_compiles_nothing():
    """A second call, new parameters, a new strength, another solver of the same shape."""
    grid = jd.grids.half_log_snr(jd.processes.vp_linear(), 6)
    x = jd.processes.vp_linear().prior(jax.random.key(0), (BATCH, DIM))
    denoiser = jd.Denoiser(network, "eps", jax.tree.map(jnp.float32, PARAMS))
    keys = {"key": jax.random.key(1)}
    tableaux = [jd.solvers.ddim(grid, eta=0.3), jd.solvers.ddpm(grid)]

    def calls(tableau, scale, low):
        params = jax.tree.map(lambda a: a * scale, denoiser.params)
        changed = jd.clip_x0(dataclasses.replace(denoiser, params=params), low=low)
        return jax.block_until_ready(jd.sample(changed, tableau, x, **keys))

    first = calls(tableaux[0], 1.0, -1.0)
    with counted() as compiled:
        again = calls(tableaux[0], 1.0, -1.0)
        others = [calls(tableaux[1], 1.0, -1.0), calls(tableaux[0], 1.1, -1.0),
                  calls(tableaux[0], 1.0, -2.0)]  # fmt: skip
    assert not compiled
    np.testing.assert_array_equal(first, again)
    assert all(np.abs(other - first).max() > 1e-3 for other in others)


def test_the_counter_of_compilations_sees_a_new_shape():
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(jd.processes.vp_linear(), 3))
    with counted() as compiled:
        jd.sample(jd.Denoiser(network, "eps", PARAMS), tableau, jnp.zeros((BATCH + 1, DIM)))
    assert compiled


# --- state, memory, control ----------------------------------------------------------------------


def halves(tableau, row):
    """The same table as two that run one after the other."""
    fields = ("A", "B", "C", "d", "u", "w", "t", "alpha", "sigma", "active", "draw", "clock")

    def piece(part):
        return dataclasses.replace(
            tableau,
            **{f: v[part] for f in fields if (v := getattr(tableau, f)) is not None},
            nodes=np.zeros((2, 2), np.int32),
        )

    return piece(slice(0, row)), piece(slice(row, None))


@pytest.mark.parametrize("row", [1, 4])
def test_a_whole_carry_goes_out_and_in(x64, row):
    rng = np.random.default_rng(4)
    tableau = random_tableau(rng, 7, 2, 3, 1, noise=True)
    x, noise = rng.normal(size=(BATCH, DIM)), rng.normal(size=(8, BATCH, DIM))
    denoiser = jd.Denoiser(network, "eps", PARAMS)
    first, second = halves(tableau, row)
    state = jd.sample(denoiser, first, x, noise=noise[: first.draws], save="state")
    resumed = jd.sample(denoiser, second, None, noise=noise, state=state)
    np.testing.assert_allclose(resumed, jd.sample(denoiser, tableau, x, noise=noise), rtol=1e-12)


def counting(params, x, t, memory):
    calls, last = memory
    return network(params, x, t) + 0.1 * last, (calls + 1, jnp.float32(t) * jnp.ones_like(x))


def test_memory_goes_from_evaluation_to_evaluation():
    rng = np.random.default_rng(5)
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(jd.processes.vp_linear(), 4))
    x = jnp.asarray(rng.normal(size=(BATCH, DIM)), jnp.float32)
    denoiser = jd.Denoiser(counting, "eps", PARAMS, memory=(jnp.int32(0), jnp.zeros_like(x)))
    clipped = jd.clip_x0(denoiser, -1e6, 1e6)
    for d in (denoiser, clipped):
        state = jd.sample(d, tableau, x, save="state")
        assert int(state.memory[0]) == tableau.nfe
        np.testing.assert_allclose(state.memory[1], tableau.t[-1], rtol=1e-6)
        # The same run with the previous t written in by hand.
        y = x
        for r in range(4):
            eps = network(PARAMS, y, tableau.t[r]) + 0.1 * (tableau.t[r - 1] if r else 0.0)
            x0 = (y - tableau.sigma[r] * eps) / tableau.alpha[r]
            y = tableau.A[r, 0, 0] * y + tableau.B[r, 0, 0, 0] * x0
        np.testing.assert_allclose(state.registers[0], y, rtol=2e-4, atol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Swap(jd.Control):
    """Adds to s_0 before row 1, reverses the batch after row 2, and logs rows and noise."""

    amount: jax.Array

    def init(self, x):
        return {"rows": jnp.zeros(8, jnp.int32), "total": jnp.float32(0)}

    def before(self, aux, row, x, key):
        return x + jnp.where(row.index == 1, self.amount, 0.0), aux

    def after(self, aux, row, x, out, z, carry, key):
        aux = {
            "rows": aux["rows"].at[row.index].add(1),
            "total": aux["total"] + jnp.sum(z).astype(jnp.float32),
        }
        order = jnp.where(row.index == 2, jnp.arange(BATCH)[::-1], jnp.arange(BATCH))
        return carry.gather(order), aux


def test_a_control_acts_between_rows(x64):
    rng = np.random.default_rng(6)
    tableau = random_tableau(rng, 5, 2, 3, 1, noise=True)
    x, noise = rng.normal(size=(BATCH, DIM)), rng.normal(size=(6, BATCH, DIM))
    denoiser = jd.Denoiser(network, "eps", PARAMS)
    state = jd.sample(
        denoiser, tableau, x, noise=noise, control=Swap(jnp.asarray(0.3)), save="state"
    )
    pieces = [*halves(tableau, 1)]
    pieces[1:] = halves(pieces[1], 2)
    expected = jd.sample(denoiser, pieces[0], x, noise=noise[:2], save="state")
    expected = expected._replace(
        registers=(expected.registers[0] + 0.3, expected.registers[1])
    )
    expected = jd.sample(denoiser, pieces[1], None, noise=noise[:4], state=expected, save="state")
    expected = expected._replace(
        registers=tuple(s[::-1] for s in expected.registers),
        history=tuple(h[:, ::-1] for h in expected.history),
    )
    expected = jd.sample(denoiser, pieces[2], None, noise=noise, state=expected)
    np.testing.assert_allclose(state.registers[0], expected, rtol=1e-12)
    np.testing.assert_array_equal(state.aux["rows"], [1] * 5 + [0] * 3)
    np.testing.assert_allclose(state.aux["total"], noise[1:].sum(), rtol=1e-5)


class Record(jd.Control):
    """Keeps the keys it is given."""

    def init(self, x):
        return jnp.zeros((2, 3))

    def before(self, aux, row, x, key):
        return x, aux.at[0, row.index].set(jax.random.uniform(key))

    def after(self, aux, row, x, out, z, carry, key):
        return carry, aux.at[1, row.index].set(jax.random.uniform(key))


def test_a_control_gets_a_fresh_key_each_time():
    tableau = jd.solvers.ddpm(jd.grids.half_log_snr(jd.processes.vp_linear(), 3))
    state = jd.sample(
        jd.Denoiser(network, "eps", PARAMS), tableau, jnp.zeros((BATCH, DIM)), jax.random.key(0),
        control=Record(), save="state",
    )  # fmt: skip
    assert len(np.unique(state.aux)) == 6


# --- gradients -----------------------------------------------------------------------------------


def test_every_adjoint_gives_the_gradient_of_the_loop(x64):
    rng = np.random.default_rng(7)
    tableau = random_tableau(rng, 6, 2, 2, 1, noise=True)
    x, noise = rng.normal(size=(BATCH, DIM)), rng.normal(size=(7, BATCH, DIM))
    traced = dataclasses.replace(tableau, A=jnp.asarray(tableau.A))

    def loss(inputs, adjoint):
        params, a, x = inputs
        out = jd.sample(
            jd.Denoiser(network, "eps", params), dataclasses.replace(traced, A=a), x,
            noise=noise, adjoint=adjoint,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out))

    inputs = (jax.tree.map(jnp.asarray, PARAMS), traced.A, jnp.asarray(x))
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), inputs)

    def plain(step):
        params, a, y = jax.tree.map(lambda i, d: np.asarray(i + step * d), inputs, direction)
        out = by_the_formula(dataclasses.replace(tableau, A=a), params, y, noise)[-1, 0]
        return np.sum(np.sin(out))

    h = 1e-5
    expected = (plain(h) - plain(-h)) / (2 * h)
    for adjoint in (None, diffrax.DirectAdjoint(), diffrax.RecursiveCheckpointAdjoint(3)):
        grads = jax.grad(loss)(inputs, adjoint)
        got = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, direction))))
        np.testing.assert_allclose(got, expected, rtol=1e-7)
    forward = functools.partial(loss, adjoint=diffrax.ForwardMode())
    _, got = jax.jvp(forward, (inputs,), (direction,))
    np.testing.assert_allclose(got, expected, rtol=1e-7)


def test_a_saved_state_can_be_differentiated(x64):
    rng = np.random.default_rng(8)
    tableau, x = random_tableau(rng, 4, 2, 3, 1), rng.normal(size=(BATCH, DIM))

    def total(x):
        state = jd.sample(jd.Denoiser(network, "eps", PARAMS), tableau, x, save="state")
        return sum(jnp.sum(a) for a in jax.tree.leaves((state.registers, state.history)))

    direction, h = rng.normal(size=x.shape), 1e-5
    slope = (total(x + h * direction) - total(x - h * direction)) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(jax.grad(total)(jnp.asarray(x)), direction), slope, rtol=1e-7)


def shifted_by(amount):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Shift(jd.Control):
        def before(self, aux, row, x, key):
            return x + amount, aux

    return Shift()


def test_two_controls_with_the_same_fields_are_not_confused():
    """jaxlib 0.10 calls the tree structures of two such classes equal."""
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(jd.processes.vp_linear(), 3))
    run = functools.partial(jd.sample, jd.Denoiser(network, "eps", PARAMS), tableau)
    x = jnp.ones((BATCH, DIM))
    ends = [run(x, control=shifted_by(amount)) for amount in (0.0, 5.0)]
    np.testing.assert_allclose(ends[0], run(x), rtol=1e-6)
    assert np.abs(ends[1] - ends[0]).max() > 1


def test_a_continued_run_goes_on_with_fresh_noise(x64):
    rng = np.random.default_rng(9)
    tableau = random_tableau(rng, 7, 2, 3, 1, noise=True)
    x, key = rng.normal(size=(BATCH, DIM)), jax.random.key(2)
    denoiser = jd.Denoiser(network, "eps", PARAMS)
    first, second = halves(tableau, 3)
    whole = jd.sample(denoiser, tableau, x, key)
    state = jd.sample(denoiser, first, x, key, save="state")
    np.testing.assert_allclose(jd.sample(denoiser, second, None, key, state=state), whole, rtol=1e-12)
    # A tableau that numbers its draws from 0 continues the count, too.
    renumbered = dataclasses.replace(second, draw=np.arange(4, dtype=np.int32))
    got = jd.sample(denoiser, renumbered, None, key, state=state)
    np.testing.assert_allclose(got, whole, rtol=1e-12)


def test_structures_of_two_classes_are_not_confused():
    """A state, a condition: the class of a pytree decides, not its fields alone."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class A:
        x: jax.Array

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class B:
        x: jax.Array

    def fn(x, t, cond):
        return x * (1.0 if isinstance(cond, A) else 2.0)

    tableau = jd.solvers.ddim(jd.grids.half_log_snr(jd.processes.vp_linear(), 2))
    x = jnp.ones((BATCH, DIM))
    a, b = (jd.sample(jd.Denoiser(fn), tableau, x, cond=c(jnp.zeros(BATCH))) for c in (A, B))
    assert np.abs(a - b).max() > 0.1
    identity = jd.Denoiser(lambda x, t: x)
    for c in (A, B):
        assert type(jd.sample(identity, tableau, c(x))) is c
