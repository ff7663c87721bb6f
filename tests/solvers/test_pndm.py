"""Pseudo-numerical methods: the published loops, and what they converge at."""

import functools

import jax
import numpy as np
import pytest
from oracles import BROAD, fitted_order, median_error

import jaxdiff as jd
from jaxdiff.solvers.pndm import ADAMS_BASHFORTH, ipndm, pndm

PROCESS = jd.processes.vp_linear()


def mixture():
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS)


def start(grid, count=5):
    return BROAD.sample(np.random.default_rng(0), count, grid.alpha[0], grid.sigma[0])


def transfer(x, e, level, end):
    """Equation 9 of Liu et al. (2022), in abar = alpha^2 of a variance-preserving process."""
    at, at_next = level[1] ** 2, end[1] ** 2
    kept = 1 / (np.sqrt(at) * (np.sqrt(at) + np.sqrt(at_next)))
    noise = 1 / (np.sqrt(at) * (np.sqrt((1 - at_next) * at) + np.sqrt((1 - at) * at_next)))
    return x + (at_next - at) * (kept * x - noise * e)


def eps(x, level):
    return BROAD.eps(x, *level[1:])


def adams_bashforth(seen):
    """The authors' coefficients, for as many predictions as there are, newest last."""
    if len(seen) == 1:
        return seen[-1]
    if len(seen) == 2:
        return (3 * seen[-1] - seen[-2]) / 2
    if len(seen) == 3:
        return (23 * seen[-1] - 16 * seen[-2] + 5 * seen[-3]) / 12
    return (55 * seen[-1] - 59 * seen[-2] + 37 * seen[-3] - 9 * seen[-4]) / 24


def f_pndm_loop(x, levels):
    """Nodes, and midpoints after each of the first three; Runge-Kutta's, then the multistep's."""
    seen = []
    for k in range(3):
        at, middle, end = levels[2 * k : 2 * k + 3]
        e1 = eps(x, at)
        e2 = eps(transfer(x, e1, at, middle), middle)
        e3 = eps(transfer(x, e2, at, middle), middle)
        e4 = eps(transfer(x, e3, at, end), end)
        seen.append(e1)
        x = transfer(x, (e1 + 2 * e2 + 2 * e3 + e4) / 6, at, end)
    for at, end in zip(levels[6:], levels[7:]):
        seen.append(eps(x, at))
        x = transfer(x, adams_bashforth(seen), at, end)
    return x


def plms_loop(x, levels, order):
    """diffusers' order of calls: node 0, node 1, node 1 again, node 2, ..."""
    seen, calls = [], 0
    for k, at in enumerate([levels[0], levels[1], *levels[1:-1]]):
        e, calls = eps(x, at), calls + 1
        if k == 1:
            x = transfer(first, (e + seen[-1]) / 2, levels[0], at)  # noqa: F821
            continue
        seen.append(e)
        first = x  # noqa: F841
        target = levels[1] if k == 0 else levels[levels.index(at) + 1]
        x = transfer(x, adams_bashforth(seen[-order:]), at, target)
    return x, calls


def test_f_pndm_is_the_published_loop(x64):
    """With the midpoints of the first three steps halfway in t, as nodes of the grid."""
    t = np.linspace(1.0, 0.01, 11)
    middles = (t[:3] + t[1:4]) / 2
    grid = jd.grids.from_times(PROCESS, np.sort(np.concatenate([t, middles]))[::-1])
    table = pndm(grid, stages="nodes")
    assert table.nfe == 10 + 9
    x = start(grid)
    expected = f_pndm_loop(x, [grid.node(i) for i in range(len(grid))])
    np.testing.assert_allclose(jd.sample(mixture(), table, x), expected, rtol=1e-10, atol=1e-12)
    nodes = jd.sample(mixture(), table, x, save="nodes")
    assert nodes.shape[0] == 11


@pytest.mark.parametrize("order", [2, 4])
def test_plms_and_s_pndm_are_the_published_loops(x64, order):
    grid = jd.grids.uniform(PROCESS, 9)
    table, x = pndm(grid, order, "heun"), start(grid)
    expected, calls = plms_loop(x, [grid.node(i) for i in range(len(grid))], order)
    assert table.nfe == calls == 10
    np.testing.assert_allclose(jd.sample(mixture(), table, x), expected, rtol=1e-10, atol=1e-12)


def test_ipndm_is_diffusers_loop_from_a_finite_start(x64):
    """On its grid sigma = sin^2, with a network that predicts v; its first node has alpha = 0."""
    place = np.linspace(1.0, 0.0, 9)[1:]
    sigma = np.sin(place * np.pi / 2) ** 2
    alpha = np.sqrt(1.0 - sigma**2)
    grid = jd.grids.from_arrays(place, alpha, sigma)
    x = expected = start(grid)
    seen = []
    for i in range(grid.steps):
        e = BROAD.eps(expected, alpha[i], sigma[i])
        x0 = (expected - sigma[i] * e) / alpha[i]
        v = alpha[i] * e - sigma[i] * x0
        seen.append(expected * sigma[i] + v * alpha[i])
        e = adams_bashforth(seen)
        expected = alpha[i + 1] * (expected - sigma[i] * e) / alpha[i] + sigma[i + 1] * e
    np.testing.assert_allclose(jd.sample(mixture(), ipndm(grid), x), expected, rtol=1e-9)


# --- the variable step ----------------------------------------------------------------------------


def test_variable_coefficients_are_linear_multistep_in_rho(x64):
    grid = jd.grids.karras(PROCESS, 12)
    x = start(grid)
    ours, lms = (
        jd.sample(mixture(), table, x) for table in (ipndm(grid, coefficients="variable"),
                                                     jd.solvers.lms(grid))
    )  # fmt: skip
    np.testing.assert_allclose(ours, lms, rtol=1e-11)


def last_coefficients(rho, coefficients):
    """Of dy = eps drho in the last step, newest first, divided by the step."""
    table = ipndm(jd.grids.from_arrays(rho, np.ones_like(rho), rho), coefficients=coefficients)
    return table.B[-1, 0, :, 0] / (rho[-1] - rho[-2])


def test_the_published_variable_step_is_not_adams_bashforth():
    """diff-sampler's slips: on uniform nodes a wrong third difference, else also a wrong sum."""
    uniform = np.linspace(9.0, 1.0, 9)
    np.testing.assert_allclose(
        last_coefficients(uniform, "published"), np.array([57, -65, 43, -11]) / 24, rtol=1e-13
    )
    np.testing.assert_allclose(
        last_coefficients(uniform, "variable"), np.array([55, -59, 37, -9]) / 24, rtol=1e-13
    )
    rho = np.array([9.0, 6.5, 5.4, 3.0, 2.0])
    assert abs(last_coefficients(rho, "variable").sum() - 1) < 1e-13
    assert abs(last_coefficients(rho, "published").sum() - 1) > 0.1


def test_the_published_variable_step_is_diff_samplers():
    """Its coefficients, in its own names."""
    t = np.array([9.0, 6.5, 5.4, 3.0, 2.0])
    h_n, h_n_1, h_n_2, h_n_3 = -np.diff(t)[::-1]
    one = h_n / (3 * (h_n + h_n_1))
    temp1 = (1 - one * (h_n * (h_n + h_n_1)) / (h_n_1 * (h_n_1 + h_n_2))) / 2
    temp2 = (1 - one) / 2 + (1 - h_n / (2 * (h_n + h_n_1))) * h_n / (6 * (h_n + h_n_1 + h_n_2))
    temp2 *= (h_n * (h_n + h_n_1) * (h_n + h_n_1 + h_n_2)) / (
        h_n_1 * (h_n_1 + h_n_2) * (h_n_1 + h_n_2 + h_n_3)
    )
    far = h_n_1 * (h_n_1 + h_n_2) / (h_n_2 * (h_n_2 + h_n_3))
    ratio = h_n_1 / h_n_2
    expected = [
        (2 + h_n / h_n_1) / 2 + temp1 + temp2,
        -h_n / h_n_1 / 2 - (1 + ratio) * temp1 - (1 + ratio + far) * temp2,
        temp1 * ratio + (ratio + far * (1 + h_n_2 / h_n_3)) * temp2,
        -temp2 * far * h_n_1 / h_n_2,
    ]
    np.testing.assert_allclose(last_coefficients(t, "published"), expected, rtol=1e-12)


# --- what it is worth -----------------------------------------------------------------------------


def spaced(kind, steps):
    """Nodes uniform in t, or in rho (with alpha = 1)."""
    if kind == "t":
        return jd.grids.uniform(PROCESS, steps, t_max=1.0, t_min=1e-2)
    rho = np.linspace(3.0, 0.3, steps + 1)
    return jd.grids.from_arrays(rho, np.ones_like(rho), rho)


@functools.cache
def start_and_end(kind):
    grid = spaced(kind, 1)
    x = start(grid, 64)
    return x, BROAD.flow(x, *zip(grid.alpha, grid.sigma))


@functools.cache
def error(kind, steps, build):
    x, exact = start_and_end(kind)
    with jax.enable_x64(True):
        return median_error(jd.sample(mixture(), build(spaced(kind, steps)), x), exact)


def order(kind, steps, build):
    return fitted_order(steps, [error(kind, n, build) for n in steps])


def s_pndm(grid):
    return pndm(grid, 2, "heun")


def test_fifty_steps_beat_ddim_with_a_thousand():
    """On nodes uniform in t; the asymptotic order is 2 all the same, not 4."""
    assert error("t", 50, pndm) < 0.3 * error("t", 1000, jd.solvers.ddim)
    assert error("t", 50, pndm) < 0.3 * error("t", 250, jd.solvers.ddim)
    steps = (160, 320, 640)
    assert 1.9 < order("t", steps, pndm) < 2.3
    assert 1.85 < order("t", steps, s_pndm) < 2.3


def test_on_nodes_uniform_in_rho_the_order_is_four():
    assert order("rho", (40, 80, 160), pndm) > 3.75
    # Of the ramp the first step's h^2 remains.
    assert order("rho", (160, 320, 640), ipndm) < 2.2


def test_order_one_is_ddim(x64):
    grid = jd.grids.half_log_snr(PROCESS, 7, end="zero")
    x = start(grid)
    for kind in ("runge_kutta", "heun", "euler"):
        table = pndm(grid, 1, kind)
        assert (table.nfe, table.registers, table.history) == (7, 1, 1)
        expected = jd.sample(mixture(), jd.solvers.ddim(grid), x)
        np.testing.assert_allclose(jd.sample(mixture(), table, x), expected, rtol=1e-10)


def test_coefficients_integrate_polynomials_on_uniform_nodes():
    for order, coefficients in ADAMS_BASHFORTH.items():
        places = -np.arange(order * 1.0)
        moments = [np.dot(coefficients, places**k) for k in range(order)]
        np.testing.assert_allclose(moments, 1.0 / np.arange(1.0, order + 1), rtol=1e-12)


def test_few_steps_to_sigma_zero_need_no_stage_there():
    """Runge-Kutta where the step ends at sigma > 0; the last step is multistep's."""
    for steps, nfe in ((1, 1), (2, 4 + 1), (3, 8 + 1), (4, 12 + 1)):
        assert pndm(jd.grids.half_log_snr(PROCESS, steps, end="zero")).nfe == nfe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 6}, "order must be an integer from 1 to 5, got 6"),
        ({"order": 5, "coefficients": "published"}, "order must be an integer from 1 to 4, got 5"),
        ({"start": "prk"}, "start must be one of .*'runge_kutta'.* got 'prk'"),
        ({"coefficients": "fixed"}, "coefficients must be one of .* got 'fixed'"),
        ({"stages": "t"}, "stages must be one of .* got 't'"),
        ({"stages": "nodes"}, "2 nodes for each of 3 steps"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pndm(jd.grids.half_log_snr(PROCESS, 5), **options)
