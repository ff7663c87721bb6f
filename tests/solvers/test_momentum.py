"""Momentum: the published loops, orders on uniform steps, limits of stability."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD, Mixture, fitted_order, median_error

import jaxdiff as jd
from jaxdiff.solvers.bdia import bdia
from jaxdiff.solvers.momentum import ghvb, heavy_ball, heavy_ball_multistep
from jaxdiff.solvers.pndm import ipndm, pndm

PROCESS = jd.processes.vp_linear()
LINE = Mixture(np.array([[1.0], [-0.8]]), np.array([0.5, 0.5]), np.array([0.4, 0.6]))


def mixture(data=BROAD, prediction="x0"):
    return jd.gaussian_mixture(data.means, data.std, data.weights, PROCESS, prediction)


def start(grid, count=5, data=BROAD):
    return data.sample(np.random.default_rng(0), count, grid.alpha[0], grid.sigma[0])


def uniform_rho(steps, first=3.0, last=0.1):
    """Uniform steps in rho, alpha = 1."""
    rho = np.linspace(first, last, steps + 1)
    return jd.grids.from_arrays(rho, np.ones_like(rho), rho)


# --- the published loops --------------------------------------------------------------------------


def adams(order, ets, b=1.0):
    """The authors' combination, newest last; b = 1 is Adams-Bashforth."""
    order = min(order, len(ets))
    if order == 1:
        return b * ets[-1] / b
    if order == 2:
        return ((2 + b) * ets[-1] - (2 - b) * ets[-2]) / 2 / b
    if order == 3:
        return ((18 + 5 * b) * ets[-1] - (24 - 8 * b) * ets[-2] + (6 - b) * ets[-3]) / 12 / b
    if order == 4:
        return (
            (46 + 9 * b) * ets[-1] - (78 - 19 * b) * ets[-2] + (42 - 5 * b) * ets[-3]
            - (10 - b) * ets[-4]
        ) / 24 / b  # fmt: skip
    return (
        (1650 + 251 * b) * ets[-1] - (3420 - 646 * b) * ets[-2] + (2880 - 264 * b) * ets[-3]
        - (1380 - 106 * b) * ets[-4] + (270 - 19 * b) * ets[-5]
    ) / 720 / b  # fmt: skip


def published(grid, x, order, beta, kind):
    velocity, ets = None, []
    for i in range(grid.steps):
        a, s, a1, s1 = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        e = BROAD.eps(x, a, s)
        velocity = e if velocity is None else velocity
        if kind == "generalised":
            velocity = (1 - beta) * velocity + beta * e
            ets.append(velocity)
            step = adams(order, ets, beta)
        else:
            ets.append(e)
            mean = adams(order, ets)
            step = velocity = (1 - beta) * velocity + beta * mean
            if kind == "nesterov":
                step = (1 - beta) * velocity + beta * mean
        x = (x / a + (s1 / a1 - s / a) * step) * a1
    return x


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ghvb_is_the_published_loop(x64, order):
    grid = jd.grids.quadratic(PROCESS, 9)
    x = start(grid)
    got = jd.sample(mixture(), ghvb(grid, order, 0.6), x)
    np.testing.assert_allclose(got, published(grid, x, order, 0.6, "generalised"), rtol=1e-10)
    plms = jd.sample(mixture(), ghvb(grid, order, 1.0), x)
    expected = jd.sample(mixture(), ipndm(grid, order), x)
    np.testing.assert_allclose(plms, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("order", "variant"), [(1, "polyak"), (5, "polyak"), (4, "nesterov")])
def test_momentum_over_plms_is_the_published_loop(x64, order, variant):
    grid = jd.grids.quadratic(PROCESS, 9)
    x = start(grid)
    table = heavy_ball_multistep(grid, "ipndm", order, 0.7, variant=variant)
    expected = published(grid, x, order, 0.7, variant)
    np.testing.assert_allclose(jd.sample(mixture(), table, x), expected, rtol=1e-10)


def data_of(x, a, s):
    return (x - s * BROAD.eps(x, a, s)) / a


@pytest.mark.parametrize("skip", [False, True])
def test_heavy_ball_over_dpm_solver_pp_is_the_published_loop(x64, skip):
    """The authors' second-order step; with `skip` their first and last step have no momentum."""
    grid = jd.grids.half_log_snr(PROCESS, 8)
    x = expected = start(grid)
    lam, beta, seen, velocity = grid.lam, 0.7, [], None
    for i in range(grid.steps):
        a, s, a1, s1 = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        seen.append(data_of(expected, a, s))
        h = lam[i + 1] - lam[i]
        first_order = i in (0, grid.steps - 1)
        mean = seen[-1]
        if not first_order:
            mean = mean + 0.5 * h / (lam[i] - lam[i - 1]) * (seen[-1] - seen[-2])
        if not (skip and first_order):
            velocity = mean if velocity is None else (1 - beta) * velocity + beta * mean
            mean = velocity
        expected = s1 / s * expected - a1 * np.expm1(-h) * mean
    table = heavy_ball_multistep(grid, "dpm_solver_pp", 2, beta, skip)
    np.testing.assert_allclose(jd.sample(mixture(), table, x), expected, rtol=1e-10)


def test_heavy_ball_over_unipc_moves_the_corrected_state(x64):
    """UniPC-1: a predictor of DDIM, corrected with the mean of both ends; the last is predicted."""
    grid = jd.grids.half_log_snr(PROCESS, 7)
    lam, beta, velocity = grid.lam, 0.7, None
    x = state = predicted = start(grid)
    for i in range(grid.steps):
        a, s, a1, s1 = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        m = data_of(predicted, a, s)
        if i:
            mean = (m + before) / 2  # noqa: F821
            velocity = mean if velocity is None else (1 - beta) * velocity + beta * mean
            kept = s / grid.sigma[i - 1]
            state = kept * state - a * np.expm1(lam[i - 1] - lam[i]) * velocity
        predicted = s1 / s * state - a1 * np.expm1(lam[i] - lam[i + 1]) * m
        before = m  # noqa: F841
    got = jd.sample(mixture(), heavy_ball_multistep(grid, "unipc", 1, beta), x)
    np.testing.assert_allclose(got, predicted, rtol=1e-10)


@pytest.mark.parametrize(
    "build",
    [jd.solvers.heun, jd.solvers.unipc, functools.partial(pndm, start="heun")],
    ids=["heun", "unipc", "plms"],
)
def test_beta_one_changes_nothing(x64, build):
    """For single-step and multistep methods, with stages and with a corrector, any registers."""
    grid = jd.grids.half_log_snr(PROCESS, 6, end="zero")
    base = build(grid)
    table = heavy_ball(base, 1.0)
    assert (table.nfe, table.registers) == (base.nfe, base.registers + 1)
    x = start(grid)
    with_momentum, without = (jd.sample(mixture(), t, x, save="nodes") for t in (table, base))
    np.testing.assert_allclose(with_momentum, without, rtol=1e-11, atol=1e-13)


def test_over_a_single_step_method_momentum_is_on_the_whole_step(x64):
    """Heun: v follows the mean of the two predictions of a step."""
    grid = jd.grids.karras(PROCESS, 6)
    x = start(grid)
    y, velocity, beta = x / grid.alpha[0], None, 0.8
    for i in range(grid.steps):
        rho, rho1 = (grid.sigma[k] / grid.alpha[k] for k in (i, i + 1))
        e = BROAD.eps(y, 1.0, rho)
        mean = (e + BROAD.eps(y + (rho1 - rho) * e, 1.0, rho1)) / 2
        velocity = mean if velocity is None else (1 - beta) * velocity + beta * mean
        y = y + (rho1 - rho) * velocity
    got = jd.sample(mixture(), heavy_ball(jd.solvers.heun(grid), beta), x)
    np.testing.assert_allclose(got, grid.alpha[-1] * y, rtol=1e-10)


# --- order and stability on uniform steps ---------------------------------------------------------

STEPS = (160, 320, 640)
BUILDS = {
    "ghvb_2_0.5": lambda grid: ghvb(grid, 2, 0.5),
    "ghvb_2_0.8": lambda grid: ghvb(grid, 2, 0.8),
    "ghvb_3_0.5": lambda grid: ghvb(grid, 3, 0.5),
    "ghvb_3_0.8": lambda grid: ghvb(grid, 3, 0.8),
    "heavy_ball_0.5": lambda grid: heavy_ball_multistep(grid, "ipndm", 2, 0.5),
    "heavy_ball_0.8": lambda grid: heavy_ball_multistep(grid, "ipndm", 2, 0.8),
}


@functools.cache
def orders():
    """Of each on 160 to 640 uniform steps in rho, from 3 to 0.3."""
    span = uniform_rho(1, 3.0, 0.3)
    x = start(span, 64, LINE)
    exact = LINE.flow(x, *zip(span.alpha, span.sigma))
    tables = [build(uniform_rho(n, 3.0, 0.3)) for build in BUILDS.values() for n in STEPS]
    with jax.enable_x64(True):
        run = jax.vmap(lambda table: jd.sample(mixture(LINE), table, x))
        ends = np.asarray(run(jd.solvers.stack(tables)))
    rows = np.reshape([median_error(end, exact) for end in ends], (len(BUILDS), -1))
    return {name: fitted_order(STEPS, row) for name, row in zip(BUILDS, rows)}


@pytest.mark.parametrize(
    ("name", "order", "within"),
    [
        ("ghvb_2_0.5", 2, 0.1),
        ("ghvb_2_0.8", 2, 0.1),
        # The first step's h^2 is small at so much noise; it is all that is left in the end.
        ("ghvb_3_0.5", 3, 0.2),
        ("ghvb_3_0.8", 3, 0.2),
        ("heavy_ball_0.5", 1, 0.1),
        ("heavy_ball_0.8", 1, 0.1),
    ],
)
def test_orders_on_uniform_steps(name, order, within):
    assert abs(orders()[name] - order) < within


def growth(table, z):
    """Spectral radius of one step for eps = x z / step: the rows of the middle are all alike."""
    r, registers, history = table.rows // 2, table.registers, table.history
    step = table.sigma[1] - table.sigma[0]
    size = registers + history - 1
    matrix = np.zeros((size, size))
    slope = np.eye(size)[0] * z / step
    past = [slope, *np.eye(size)[registers:]]
    for i in range(registers):
        matrix[i, :registers] = table.A[r, i]
        for k in range(history):
            matrix[i] += table.B[r, i, k, 0] * past[k]
    for k in range(history - 1):
        matrix[registers + k] = past[k]
    return np.abs(np.linalg.eigvals(matrix)).max()


@pytest.mark.parametrize(
    ("build", "limits"),
    [
        (lambda grid, beta: ghvb(grid, 2, beta), {1.0: 1.0, 0.8: 1.2, 0.5: 1.5}),
        (
            lambda grid, beta: heavy_ball_multistep(grid, "ipndm", 2, beta),
            {1.0: 1.0, 0.8: 1.5, 0.5: 3.0},
        ),
    ],
    ids=["ghvb", "heavy_ball"],
)
def test_the_region_of_stability_grows(build, limits):
    """On the real axis, to 1%: stable just inside, unstable just outside."""
    for beta, limit in limits.items():
        table = build(uniform_rho(24), beta)
        assert growth(table, -0.99 * limit) < 1 + 1e-9, (beta, limit)
        assert growth(table, -1.01 * limit) > 1 + 1e-3, (beta, limit)


# --- variable steps -------------------------------------------------------------------------------


def test_variable_coefficients_tend_to_the_papers_on_uniform_steps():
    grid = uniform_rho(60)
    for order in (2, 3, 4, 5):
        ours, constant = (ghvb(grid, order, 0.8, kind) for kind in ("variable", "constant"))
        np.testing.assert_allclose(ours.A[-1], constant.A[-1], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(ours.B[-1], constant.B[-1], rtol=1e-9)
        # The velocities of the first steps have not settled.
        assert abs(ours.A[3, 0, 1] / constant.A[3, 0, 1] - 1) > 1e-3


@pytest.mark.parametrize("order", [2, 3, 4])
def test_variable_coefficients_are_exact_for_polynomials(order):
    """Of degree order - 1 in rho, on uneven steps, from the step on where there are so many."""
    rho = np.array([5.0, 4.2, 3.9, 3.0, 2.2, 2.0, 1.1, 0.6])
    table = ghvb(jd.grids.from_arrays(rho, np.ones_like(rho), rho), order, 0.7, "variable")
    for degree in range(order + 1):
        registers, states = np.zeros(table.registers), [0.0]
        for r in range(table.rows):
            registers = table.A[r] @ registers + table.B[r, :, 0, 0] * rho[r] ** degree
            states.append(registers[0])
        exact = np.diff(rho ** (degree + 1) / (degree + 1))
        wrong = np.abs(np.diff(states) / exact - 1)[order - 1 :].max()
        assert wrong < 1e-9 if degree < order else wrong > 1e-3


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda nodes, beta: ghvb(nodes, 3, beta, "variable"),
        lambda nodes, beta: heavy_ball_multistep(nodes, "unipc", 2, beta),
    ],
    ids=["ghvb", "heavy_ball"],
)
def test_strength_and_nodes_may_be_traced(x64, build):
    """The table of traced nodes is the host's, and its derivative the difference quotient."""
    grid = jd.grids.half_log_snr(PROCESS, 4)

    @jax.jit
    def table(beta, sigma):
        made = build(jd.grids.from_arrays(grid.t, grid.alpha, sigma), beta)
        return made.A, made.B

    at = (0.7, jnp.asarray(grid.sigma))
    expected = build(grid, 0.7)
    for got, want in zip(table(*at), (expected.A, expected.B)):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    _, slopes = jax.jvp(table, at, (1.0, 0.1 * at[1]))
    high, low = (table(0.7 + d, (1 + 0.1 * d) * at[1]) for d in (1e-6, -1e-6))
    for slope, a, b in zip(slopes, high, low):
        np.testing.assert_allclose(slope, (a - b) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: ghvb(g, 6), "order must be an integer from 1 to 5, got 6"),
        (lambda g: ghvb(g, beta=0.0), r"beta must be in \(0, 1\], got 0.0"),
        (lambda g: heavy_ball(ipndm(g), 1.5), r"beta must be in \(0, 1\], got 1.5"),
        (lambda g: ghvb(g, coefficients="free"), "coefficients must be one of .* got 'free'"),
        (lambda g: heavy_ball(ipndm(g), variant="both"), "variant must be one of .* got 'both'"),
        (lambda g: heavy_ball_multistep(g, "lms"), "base must be one of .* got 'lms'"),
        (lambda g: heavy_ball(jd.solvers.stack([ipndm(g)])), "one tableau, not stacked"),
        (lambda g: heavy_ball(jd.solvers.ddim(g, outputs=2)), "one output"),
        (lambda g: heavy_ball(bdia(g)), r"carry one state, but row 1 carries registers \[0, 1\]"),
        (lambda g: heavy_ball(ghvb(g)), r"carry one state, but row 1 carries registers \[0, 1\]"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(jd.grids.half_log_snr(PROCESS, 5))


def test_a_strength_that_is_no_number_is_named():
    with pytest.raises(TypeError, match="beta must be a number, got None"):
        ghvb(jd.grids.half_log_snr(PROCESS, 5), beta=None)
