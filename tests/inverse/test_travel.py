"""Time travel against RePaint's published schedule, taken step by step."""

import jax
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import inverse

PROCESS = jd.processes.vp_linear()


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
    rows = inverse.visits(steps, length, repeats)
    times = []
    for start, to, end in steps - 1 - rows:
        times += [start, *range(to, end)]
    assert [*times, -1] == published(*setting)


@pytest.mark.parametrize("base", ["ddim", "ddpm"])
def test_rows_are_the_step_and_then_the_forward_process(x64, base):
    """In NumPy: mean and variance of a step, and of the way up one node after another."""
    grid = jd.grids.half_log_snr(PROCESS, 5, end="zero")
    plain = jd.solvers.build(base, grid)
    table = inverse.time_travel(plain, grid, length=2, repeats=2)
    rows = inverse.visits(5, 2, 2)
    assert table.rows == table.nfe == len(rows) == 9 and table.brownian is None
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


def test_one_visit_is_the_tableau_itself():
    grid = jd.grids.half_log_snr(PROCESS, 4)
    plain = jd.solvers.ddim(grid)
    same = inverse.time_travel(plain, grid, length=9, repeats=1)
    assert not same.stochastic
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b)


def test_bad_input_is_named():
    grid = jd.grids.half_log_snr(PROCESS, 4)
    with pytest.raises(ValueError, match="length must be less than the 4 steps of the grid, got 4"):
        inverse.time_travel(jd.solvers.ddim(grid), grid, length=4, repeats=2)
    with pytest.raises(ValueError, match="repeats must be an integer of at least 1, got 0"):
        inverse.visits(4, 1, 0)
    with pytest.raises(ValueError, match="one row a step"):
        inverse.time_travel(jd.solvers.dpm_solver_pp_multistep(grid), grid, 1, 2)
    with pytest.raises(ValueError, match="one row a step"):
        inverse.time_travel(jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 5)), grid, 1, 2)
    with pytest.raises(ValueError, match="from noise to data"):
        inverse.time_travel(jd.solvers.ddim(grid.reversed()), grid.reversed(), 1, 2)
