"""Time travel: RePaint's published schedule, FreeDoM's loop in NumPy, and what it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.solvers import time_travel, visits

PROCESS = jd.processes.vp_linear()
MEAN, VARIANCE = np.array([0.4, -0.2]), np.array([0.3, 1.2])
RNG = np.random.default_rng(0)


def gaussian(process=PROCESS):
    scales = np.sqrt(VARIANCE)[None]
    return jd.gaussian_mixture(MEAN[None], scales, [1.0], process, "x0", dtype=jnp.float64)


def published(t_T, jump_length, jump_n_sample):
    """The times that RePaint's `get_schedule_jump` (and DDNM's) lists: T - 1, ..., -1."""
    jumps = {j: jump_n_sample - 1 for j in range(0, t_T - jump_length, jump_length)}
    t, ts = t_T, []
    while t >= 1:
        t -= 1
        ts.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                ts.append(t)
    return [*ts, -1]


@pytest.mark.parametrize("setting", [(250, 10, 10), (100, 1, 3), (7, 3, 2), (5, 4, 2), (6, 2, 1)])
def test_the_schedule_is_the_published_one(setting):
    steps, length, repeats = setting
    rows = visits(steps, repeats, length)
    times = []
    for start, to, end in steps - 1 - rows:
        times += [start, *range(to, end)]
    assert [*times, -1] == published(*setting)


@pytest.mark.parametrize("base", ["ddim", "ddpm"])
@pytest.mark.parametrize("repeats", [2, [3, 1, 2]])
def test_rows_are_the_step_and_then_the_forward_process(x64, base, repeats):
    """In NumPy: mean and variance of a step, and of the way up one node after another."""
    grid = jd.grids.half_log_snr(PROCESS, 5, end="zero")
    build = functools.partial(jd.solvers.build, base)
    plain, table = build(grid), time_travel(grid, repeats, 2, build)
    rows = visits(5, repeats, 2)
    assert table.rows == table.nfe == len(rows) == (9 if repeats == 2 else 10)
    assert table.brownian is None
    for r, (start, to, end) in enumerate(rows):
        share, variance = 1.0, 0.0 if plain.C is None else plain.C[start, 0] ** 2
        for k in range(to, end, -1):
            (_, a, s), (_, a1, s1) = grid.node(k), grid.node(k - 1)
            beta = s1**2 - (a1 / a * s) ** 2
            share, variance = share * a1 / a, variance * (a1 / a) ** 2 + beta
        np.testing.assert_allclose(table.A[r], share * plain.A[start], rtol=1e-12)
        np.testing.assert_allclose(table.B[r], share * plain.B[start], rtol=1e-12)
        np.testing.assert_allclose(table.C[r] ** 2, variance, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(table.t[r], grid.t[start])
    noisy = np.flatnonzero(table.C[:, 0])
    assert list(table.draw[noisy]) == list(range(len(noisy))) and table.draws == len(noisy)
    # The node solutions: the last visit of each.
    states = np.arange(10) * 0
    for r, (_, _, end) in enumerate(rows):
        states[end] = r + 1
    assert table.nodes[:, 0].tolist() == states[:6].tolist()


@pytest.mark.parametrize("base", ["ddim", "dpm_solver_pp_multistep"])
def test_one_visit_is_the_tableau_itself(base):
    grid = jd.grids.half_log_snr(PROCESS, 4)
    build = functools.partial(jd.solvers.build, base)
    for repeats, length in ((1, 9), ([1] * 4, 1)):
        same = time_travel(grid, repeats, length, build)
        assert not same.stochastic
        for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(build(grid)), strict=True):
            np.testing.assert_allclose(a, b)


def test_it_is_the_self_recurrence_of_ddim(x64):
    """Universal guidance's and FreeDoM's loop in NumPy, one number a step: the last step, to the
    data, is repeated too, and so is one from pure noise."""
    counts, process = [2, 1, 3, 2], jd.processes.vp_cosine()
    grid = jd.grids.uniform(process, 4, t_max=1.0, end="zero")
    assert grid.ends == (True, True)
    start = RNG.normal(size=(5, 2))
    table = time_travel(grid, counts, base=jd.solvers.ddim)
    assert table.rows == 8 and table.draws == 4
    noise, drawn, x = RNG.normal(size=(4, 5, 2)), iter(range(4)), start
    for i, count in enumerate(counts):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        for again in range(count - 1, -1, -1):
            slope = a * VARIANCE / (a**2 * VARIANCE + s**2)
            x0 = MEAN + slope * (x - a * MEAN)
            x = a1 * x0 + s1 * (x - a * x0) / s
            if again:
                beta = 1.0 - (a / a1) ** 2
                x = np.sqrt(1.0 - beta) * x + np.sqrt(beta) * noise[next(drawn)]
    got = jd.sample(gaussian(process), table, jnp.asarray(start), noise=jnp.asarray(noise))
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


def test_a_multistep_base_starts_anew_in_a_repeated_block(x64):
    """Piece by piece, with the noise added outside."""
    grid = jd.grids.half_log_snr(PROCESS, 8, t_max=0.9, t_min=0.05)
    base = jd.solvers.dpm_solver_pp_multistep
    table = time_travel(grid, [1, 2, 1, 1], 3, base)  # blocks of 1, 3, 3 and 1 steps
    assert table.rows == 11
    start, noise = RNG.normal(size=(5, 2)), RNG.normal(size=(1, 5, 2))
    x = jnp.asarray(start)
    for first, last in ((0, 1), (1, 4), (None, None), (1, 4), (4, 8)):
        if first is None:
            (_, a, s), (_, a1, s1) = grid.node(4), grid.node(1)
            x = a1 / a * x + np.sqrt(s1**2 - (a1 * s / a) ** 2) * noise[0]
            continue
        keep = slice(first, last + 1)
        piece = jd.grids.from_arrays(grid.t[keep], grid.alpha[keep], grid.sigma[keep])
        x = jd.sample(gaussian(), base(piece), x)
    got = jd.sample(gaussian(), table, jnp.asarray(start), noise=jnp.asarray(noise))
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


def test_it_leaves_the_distribution_alone(x64):
    """Repeats change nothing of the marginal (a Gaussian, in closed form)."""
    grid = jd.grids.half_log_snr(PROCESS, 30, t_max=0.97, t_min=0.05)
    table = time_travel(grid, 3, length=12, base=jd.solvers.heun)
    assert table.rows == 2 * (5 + 3 * 12 + 3 * 12 + 1)
    (_, a, s), (_, a1, s1) = grid.node(0), grid.node(30)
    normal = np.random.default_rng(3).normal
    x = a * MEAN + np.sqrt(a**2 * VARIANCE + s**2) * normal(size=(4000, 2))
    y = np.asarray(jd.sample(gaussian(), table, jnp.asarray(x), key=jax.random.key(0)))
    np.testing.assert_allclose(y.mean(0), a1 * MEAN, atol=0.06)
    np.testing.assert_allclose(y.var(0), a1**2 * VARIANCE + s1**2, rtol=0.08)


def test_bad_input_is_named():
    grid = jd.grids.half_log_snr(PROCESS, 4)
    for call, message in (
        (
            lambda: time_travel(grid, 2, 4),
            "length must be less than the 4 steps of the grid, got 4",
        ),
        (lambda: visits(4, 0, 1), "repeats must be an integer of at least 1, got 0"),
        (lambda: visits(4, 2, 1.5), "length must be an integer of at least 1, got 1.5"),
        (lambda: time_travel(grid, [1, 2]), "repeats must be a number or 4, one a block; got 2"),
        (lambda: time_travel(grid, [1, 2, 1, 0]), r"repeats\[3\] must be an integer of at least 1"),
        (lambda: time_travel(grid.reversed(), 2), "from noise to data"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
