"""The integrands that a solver integrates exactly, checked on the table itself by hypothesis.

An integrand that depends on the noise level alone, a polynomial P(z) in the variable z that the setting
names, has a flow in closed form: x' = (scale' / scale) x + scale' int g P(z) dclock. The last
step must follow it to rounding; and where P has one degree more, it must not.
"""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listed import SETTINGS, build
from scipy.integrate import quad

import jaxdiff as jd
from jaxdiff.predictions import PREDICTIONS
from jaxdiff.solvers import clocks

PROCESS = jd.processes.vp_linear()
EXACT = [name for name, (_, setting) in SETTINGS.items() if setting.exact is not None]
# Uneven steps, so many that every start is over and no order is lowered at the end.
GRID = jd.grids.from_times(
    PROCESS, 0.6 - 0.45 * (np.linspace(0.0, 1.0, 17) + 0.02 * np.sin(np.arange(17.0)))
)


def powers(name, levels):
    """s^0, ..., s^(degree + 1) at levels, s = z^power mapped affinely to [-1, 1] over the grid."""
    exact = SETTINGS[name][1].exact
    low, high, z = (
        clocks.coordinate(np, exact.variable, at, exact.power)
        for at in (GRID.node(0), GRID.node(GRID.steps), levels)
    )
    s = 2.0 * (z - low) / (high - low) - 1.0
    return np.stack([s**k for k in range(exact.degree + 2)])


@functools.cache
def run(name):
    """The solution at the grid's nodes for P = each power of s, from 0: [degree + 2, nodes]."""
    entry, setting = SETTINGS[name]
    table = build(name, GRID)
    column = PREDICTIONS.index(entry.integrand_of(setting))
    assert np.all(table.u[:, 0, column] == 1) and np.all(table.w[:, 0, column] == 0)
    outputs = powers(name, (table.t, table.alpha, table.sigma))
    registers = np.zeros((len(outputs), table.registers))
    history = np.zeros((len(outputs), table.history))
    states = [registers]
    for r in range(table.rows):
        history = np.concatenate([outputs[:, r : r + 1], history[:, :-1]], axis=1)
        registers = registers @ table.A[r].T + history @ table.B[r, :, :, 0].T
        states.append(registers)
    return np.stack([states[rows][:, register] for rows, register in table.nodes], axis=1)


@functools.cache
def integrals(name):
    """(carry, the exact last step's contributions of each power of s), by adaptive quadrature."""
    entry, setting = SETTINGS[name]
    integrand = entry.integrand_of(setting)
    before, end = GRID.node(GRID.steps - 1), GRID.node(GRID.steps)
    outer = clocks.scale(np, integrand, end)
    first, last = GRID.lam[-2], GRID.lam[-1]

    def rate(lam, degree):
        at = GRID.at(np.asarray(lam))
        rho = np.exp(-lam)
        clock = {
            "kappa": 1.0 / rho, "rho": -rho, "tau": -rho / (1.0 + rho) ** 2,
            "angle": -rho / (1.0 + rho**2),
        }[clocks.own_clock(np, integrand, at)[0]]  # fmt: skip
        g = 1.0 / clocks.scale(np, "v", at) if integrand == "v" else 1.0
        return powers(name, at)[degree] * g * clock

    found = [
        outer * quad(rate, first, last, args=(d,), epsabs=1e-15, epsrel=1e-13)[0]
        for d in range(setting.exact.degree + 2)
    ]
    return clocks.carry(np, integrand, before, end), np.array(found)


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=20)
def test_polynomials_of_the_stated_degree_are_integrated_exactly(name, data):
    degree = SETTINGS[name][1].exact.degree
    c = np.array(data.draw(st.lists(
        st.floats(-2.0, 2.0, allow_subnormal=False), min_size=degree + 1, max_size=degree + 1
    )))  # fmt: skip
    kept, expected = integrals(name)
    nodes = c @ run(name)[: degree + 1]
    size = np.abs(c).sum() * np.abs(expected).max()
    assert abs(nodes[-1] - kept * nodes[-2] - c @ expected[: degree + 1]) <= 1e-11 * size


@pytest.mark.parametrize("name", EXACT)
def test_one_degree_more_is_not(name):
    kept, expected = integrals(name)
    nodes = run(name)[-1]
    assert abs(nodes[-1] - kept * nodes[-2] - expected[-1]) > 1e-9 * abs(expected).max()
