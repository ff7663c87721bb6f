"""Runge-Kutta in any clock, and KDPM2: what the catalogue's tests do not say."""

import diffrax
import jax
import numpy as np
import pytest
from oracles import BROAD, fitted_order, median_error

import jaxdiff as jd
from jaxdiff.solvers.runge_kutta import METHODS, kdpm2, runge_kutta, two_stage_method
from jaxdiff.solvers.singlestep import dpm_solver_singlestep

PROCESS = jd.processes.vp_linear()
GRID = jd.grids.karras(PROCESS, 5)
RK4 = (
    [[0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 1, 0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    [0, 0.5, 0.5, 1],
)  # fmt: skip


def data(x, alpha, sigma):
    return (x + sigma**2 * BROAD.score(x, alpha, sigma)) / alpha


def flow(x, alpha, sigma):
    return BROAD.eps(x, alpha, sigma) - data(x, alpha, sigma)


def velocity(x, alpha, sigma):
    return alpha * BROAD.eps(x, alpha, sigma) - sigma * data(x, alpha, sigma)


NETWORK = {"rho": BROAD.eps, "lambda": BROAD.eps, "tau": flow, "angle": velocity, "kappa": data}


def follow(table, integrand, x):
    """The solution at the nodes, with m = integrand(s_0, alpha, sigma): NumPy, row by row."""
    registers, history = [x] * table.registers, []
    states = [registers]
    for r in range(table.rows):
        history = [integrand(registers[0], table.alpha[r], table.sigma[r]), *history]
        registers = [
            sum(a * s for a, s in zip(table.A[r, i], registers))
            + sum(b * m for b, m in zip(table.B[r, i, :, 0], history))
            for i in range(table.registers)
        ]
        states.append(registers)
    return np.array([states[rows][register] for rows, register in table.nodes])


def assert_same(one, other):
    for name in ("A", "B", "t", "alpha", "sigma"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)


def measured_order(build, steps, integrand):
    span = {"t_max": 0.6, "t_min": 0.05}
    first, last = (
        (PROCESS.alpha(t), PROCESS.sigma(t)) for t in (span["t_max"], span["t_min"])
    )  # fmt: skip
    x = BROAD.sample(np.random.default_rng(0), 32, *first)
    exact = BROAD.flow(x, first, last)
    ends = [follow(build(jd.grids.karras(PROCESS, n, **span)), integrand, x)[-1] for n in steps]
    return fitted_order(steps, [median_error(end, exact) for end in ends])


# --- the methods ----------------------------------------------------------------------------------


def reference_step(clock, x, level, end):
    """One classical step of dy / dclock = f(clock, y), in the definitions of the clocks alone."""

    def place(z):  # (alpha, sigma) of the variance-preserving process where the clock shows z
        rho = {
            "rho": lambda: z, "lambda": lambda: np.exp(-z), "tau": lambda: z / (1 - z),
            "angle": lambda: np.tan(z), "kappa": lambda: 1 / z,
        }[clock]()  # fmt: skip
        return 1 / np.hypot(1, rho), rho / np.hypot(1, rho)

    def show(alpha, sigma):
        return {
            "rho": sigma / alpha, "lambda": np.log(alpha / sigma), "tau": sigma / (alpha + sigma),
            "angle": np.arctan2(sigma, alpha), "kappa": alpha / sigma,
        }[clock]  # fmt: skip

    def size(alpha, sigma):
        other = {"tau": alpha + sigma, "angle": np.hypot(alpha, sigma), "kappa": sigma}
        return other.get(clock, alpha)

    def f(z, y):
        alpha, sigma = place(z)
        slope = NETWORK[clock](size(alpha, sigma) * y, alpha, sigma)
        return -sigma / alpha * slope if clock == "lambda" else slope

    z, h = show(*level), show(*end) - show(*level)
    y = x / size(*level)
    k1 = f(z, y)
    k2 = f(z + h / 2, y + h / 2 * k1)
    k3 = f(z + h / 2, y + h / 2 * k2)
    k4 = f(z + h, y + h * k3)
    return size(*end) * (y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))


@pytest.mark.parametrize("clock", NETWORK)
def test_a_step_is_the_classical_one_in_its_clock(clock):
    x = BROAD.sample(np.random.default_rng(0), 4, GRID.alpha[0], GRID.sigma[0])
    states = follow(runge_kutta(GRID, clock=clock), NETWORK[clock], x)
    for i in range(GRID.steps):
        level, end = GRID.node(i)[1:], GRID.node(i + 1)[1:]
        expected = reference_step(clock, states[i], level, end)
        np.testing.assert_allclose(states[i + 1], expected, rtol=1e-8, atol=1e-10)


def test_euler_and_heun_are_those_in_sigma():
    for end in ("t_min", "zero"):
        grid = jd.grids.karras(PROCESS, 4, end=end)
        assert_same(runge_kutta(grid, "euler"), jd.solvers.euler(grid))
        assert_same(runge_kutta(grid, "heun"), jd.solvers.heun(grid))
        assert_same(runge_kutta(grid, "heun", "tau"), jd.solvers.heun(grid, clock="flow"))


def test_dpm_solver_2_is_kdpm2():
    for r in (0.5, 0.3, 1.0):
        assert_same(kdpm2(GRID, r), dpm_solver_singlestep(GRID, 2, "eps", r1=r))
    to_zero = jd.grids.karras(PROCESS, 4, end="zero")
    assert_same(kdpm2(to_zero), dpm_solver_singlestep(to_zero))


def test_kdpm2_churns_as_heun_does():
    """Every evaluation but the stage's, and every draw, where Heun's sampler has it."""
    churn = {"s_churn": 1.0, "s_min": 0.1, "s_max": 10.0, "s_noise": 1.01}
    ours, heun = kdpm2(GRID, r=1.0, **churn), jd.solvers.heun(GRID, **churn)
    assert ours.draws == heun.draws > 0
    assert_same(ours, heun)
    np.testing.assert_allclose(ours.C, heun.C)
    half = kdpm2(GRID, **churn)
    np.testing.assert_allclose(half.alpha[::2], heun.alpha[::2])
    mean = np.sqrt(half.sigma[::2] / half.alpha[::2] * GRID.sigma[1:] / GRID.alpha[1:])
    np.testing.assert_allclose(half.sigma[1::2] / half.alpha[1::2], mean)


def quadrature(table):
    """(b, c) of a one-step table with alpha = 1 in rho."""
    sigma = table.sigma
    place = (sigma - sigma[0]) / (1.0 - sigma[0])
    return table.B[-1, 0, ::-1, 0] / (1.0 - sigma[0]), place


@pytest.mark.parametrize(
    ("method", "stages", "degree"),
    [
        ("euler", 1, 0), ("midpoint", 2, 1), ("heun", 2, 1), ("ralston", 2, 2), ("heun3", 3, 2),
        ("kutta3", 3, 3), ("van_der_houwen3", 3, 2), ("ssprk3", 3, 3), ("bogacki_shampine", 3, 2),
        ("rk4", 4, 3), ("rk38", 4, 3), ("dopri5", 6, 4), ("tsit5", 6, 4), ("dopri8", 13, 8),
    ],
)  # fmt: skip
def test_the_stages_and_the_polynomials_that_they_integrate(method, stages, degree):
    """An integrand of rho alone is integrated by sum_j b_j f(c_j): exactly to this degree."""
    table = runge_kutta(jd.grids.from_arrays([3.0, 1.0], [1.0, 1.0], [3.0, 1.0]), method)
    assert table.nfe == stages
    b, c = quadrature(table)
    miss = [b @ c**k - 1 / (k + 1) for k in range(degree + 2)]
    np.testing.assert_allclose(miss[:-1], 0.0, atol=1e-9)
    assert abs(miss[-1]) > 1e-6


@pytest.mark.parametrize(
    ("method", "clock", "steps", "order"),
    [
        ("dopri5", "rho", (10, 20, 40), 5),
        ("tsit5", "angle", (6, 12, 24), 5),
        ("dopri8", "rho", (4, 6, 8), 8),
        ("rk4", "tau", (20, 40, 80), 4),
        ("rk4", "angle", (20, 40, 80), 4),
        ("heun", "kappa", (40, 80, 160), 2),
    ],
)
def test_orders_that_few_steps_show(method, clock, steps, order):
    build = lambda grid: runge_kutta(grid, method, clock)  # noqa: E731
    assert measured_order(build, steps, NETWORK[clock]) > order - 0.25


def test_methods_come_as_names_as_diffrax_tableaux_and_as_arrays():
    for name in METHODS:
        assert runge_kutta(GRID, name).nfe >= 5
    assert_same(runge_kutta(GRID, diffrax.Dopri5.tableau), runge_kutta(GRID, "dopri5"))
    assert_same(runge_kutta(GRID, RK4), runge_kutta(GRID, "rk4"))


def test_in_lambda_large_steps_are_unstable():
    """Data at 0: dy / dlambda = -y. y' = R(h) y, beyond h = 2.785 growing; DDIM is exact."""
    for h, grows in ((2.7, False), (2.9, True)):
        lam = -4.0 + h * np.arange(4)
        grid = jd.grids.from_arrays(-lam, np.ones(4), np.exp(-lam))
        end = follow(runge_kutta(grid, clock="lambda"), lambda x, a, s: x / s, np.ones(1))[-1]
        factor = 1 - h + h**2 / 2 - h**3 / 6 + h**4 / 24
        np.testing.assert_allclose(end, factor**3, rtol=1e-10)
        assert (abs(factor) > 1) == grows
        exact = follow(jd.solvers.ddim(grid), lambda x, a, s: 0 * x, np.ones(1))[-1]
        np.testing.assert_allclose(exact, np.exp(-3 * h), rtol=1e-12)


# --- clocks that leave a linear part --------------------------------------------------------------

EDM_GRID = jd.grids.from_times(jd.processes.edm(), GRID.sigma / GRID.alpha)
SCHEDULES = {  # of a clock: (its value at rho, rho, d rho / dclock)
    "t": (
        lambda rho: (np.sqrt(0.01 + 39.8 * np.log1p(rho**2)) - 0.1) / 19.9,
        lambda t: np.sqrt(np.expm1(9.95 * t**2 + 0.1 * t)),
        lambda t, rho: 0.5 * (0.1 + 19.9 * t) * (rho + 1 / rho),
    ),
    "rho2": (lambda rho: rho**2, np.sqrt, lambda t, rho: 0.5 / rho),
    "rho": (lambda rho: rho, lambda t: t, lambda t, rho: 1.0),
}
SCALINGS = {  # s, d log s / d rho
    "vp": (lambda rho: 1 / np.hypot(1, rho), lambda rho: -rho / (1 + rho**2)),
    "none": (lambda rho: 1.0, lambda rho: 0.0),
}


def generalised_heun(clock, scaling, place, y, levels):
    """Karras et al. (2022), algorithm 3, on y = x / alpha between two levels of sigma / alpha."""
    show, level, rate = SCHEDULES[clock]
    s, log_rate = SCALINGS[scaling]

    def slope(t, x):
        rho = level(t)
        x0 = data(x / s(rho), 1.0, rho)
        linear = rate(t, rho) * (1 / rho + log_rate(rho))
        return linear * x - rate(t, rho) * s(rho) / rho * x0

    t, stop = (show(rho) for rho in levels)
    x, h = s(levels[0]) * y, stop - t
    first = slope(t, x)
    second = slope(t + place * h, x + place * h * first)
    x = x + h * ((1 - 0.5 / place) * first + 0.5 / place * second)
    return x / s(levels[1])


@pytest.mark.parametrize("place", [1.0, 2 / 3])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("clock", SCHEDULES)
def test_a_step_is_edms_generalised_heun_for_any_process(clock, scaling, place):
    method = two_stage_method(place)
    by_process = {"t": PROCESS}.get(clock, clock)
    for grid, choice in ((GRID, clock), (EDM_GRID, by_process)):
        x = BROAD.sample(np.random.default_rng(0), 4, grid.alpha[0], grid.sigma[0])
        table = runge_kutta(grid, method, choice, scaling=scaling)
        y = follow(table, BROAD.eps, x) / grid.alpha[:, None, None]
        rho = grid.sigma / grid.alpha
        for i in range(grid.steps):
            expected = generalised_heun(clock, scaling, place, y[i], rho[i : i + 2])
            np.testing.assert_allclose(y[i + 1], expected, rtol=1e-8, atol=1e-10)


def test_in_its_own_time_a_process_has_its_own_scaling():
    for plain, scaled in ((("t", None), ("t", "vp")), ((PROCESS, None), (PROCESS, "vp"))):
        one, other = (runge_kutta(GRID, "heun", c, scaling=s) for c, s in (plain, scaled))
        assert_same(one, other)
    assert_same(runge_kutta(EDM_GRID, "heun", "t"), runge_kutta(EDM_GRID, "heun"))


def test_in_rectified_flows_own_time_the_method_is_that_in_tau():
    """dx / dt = flow. The one works in eps, the other in flow: compared on a trajectory."""
    grid = jd.grids.uniform(jd.processes.flow(), 6, t_max=0.95, t_min=0.05)
    x = BROAD.sample(np.random.default_rng(1), 4, grid.alpha[0], grid.sigma[0])
    for method in ("rk4", "kutta3"):
        own = follow(runge_kutta(grid, method, "t"), BROAD.eps, x)
        in_tau = follow(runge_kutta(grid, method, "tau"), flow, x)
        np.testing.assert_allclose(own, in_tau, rtol=1e-9)


def test_two_stages_have_names():
    for name, place in (("heun", 1.0), ("ralston", 2 / 3), ("midpoint", 0.5)):
        assert_same(runge_kutta(GRID, two_stage_method(place)), runge_kutta(GRID, name))


def test_eulers_last_step_in_the_clock_misses_the_data():
    """With t = sigma^2 it goes halfway: x' = x - t (x - x0) / (2 t). In rho it is x0."""
    to_zero = jd.grids.karras(jd.processes.edm(), 1, end="zero")
    x = BROAD.sample(np.random.default_rng(1), 4, 1.0, to_zero.sigma[0])
    x0 = data(x, 1.0, to_zero.sigma[0])
    for clock, last, expected in (
        ("rho2", "clock", (x + x0) / 2), ("rho", "clock", x0), ("rho2", "euler", x0)
    ):  # fmt: skip
        end = follow(runge_kutta(to_zero, "heun", clock, last), BROAD.eps, x)[-1]
        np.testing.assert_allclose(end, expected, rtol=1e-9, atol=1e-11)


# --- ends -----------------------------------------------------------------------------------------


def test_a_full_last_step_keeps_the_order_to_sigma_zero():
    """Midpoint in tau from alpha = 0 to sigma = 0, against the exact end point."""
    level = 1e-7
    start, stop = (level, 1.0 - level), (1.0 - level, level)
    x = np.random.default_rng(0).normal(size=(32, 2))
    exact = BROAD.flow(x, start, stop)
    steps = (20, 40, 80)
    errors = {}
    for last in ("full", "euler"):
        tables = [runge_kutta(tau_grid(n), "midpoint", "tau", last) for n in steps]
        assert tables[0].nfe == (40 if last == "full" else 39)
        errors[last] = [median_error(follow(t, flow_net, x)[-1], exact) for t in tables]
    assert fitted_order(steps, errors["full"]) > 1.75
    assert errors["full"][-1] < 0.5 * errors["euler"][-1]


def tau_grid(steps):
    return jd.grids.uniform(jd.processes.flow(), steps, t_min=0.0)


def flow_net(x, alpha, sigma):
    """eps - x0, also at alpha = 0, where x is eps and x0 the mean of the data."""
    return x - BROAD.moments()[0] if alpha == 0 else flow(x, alpha, sigma)


def test_a_stage_at_sigma_zero_needs_a_network_that_predicts_the_integrand():
    table = runge_kutta(tau_grid(4), "heun", "tau", "full")
    process = jd.processes.flow()
    x = np.ones((1, 2))
    made = {
        kind: jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, process, kind)
        for kind in ("flow", "x0")
    }
    assert np.all(np.isfinite(jd.sample(made["flow"], table, x)))
    with pytest.raises(ValueError, match="'x0' network"):
        jd.sample(made["x0"], table, x)


@pytest.mark.parametrize("clock", NETWORK)
def test_a_reversed_grid_goes_back(clock):
    grid = jd.grids.half_log_snr(PROCESS, 60)
    x = BROAD.sample(np.random.default_rng(2), 8, grid.alpha[0], grid.sigma[0])
    forth = follow(runge_kutta(grid, clock=clock), NETWORK[clock], x)[-1]
    back = follow(runge_kutta(grid.reversed(), clock=clock), NETWORK[clock], forth)[-1]
    assert np.median(np.abs(back - x)) < 2e-3


def test_a_traced_grid_makes_the_same_table(x64):
    times = np.array([1.0, 0.5, 0.2, 0.01])

    def coefficients(t):
        grid = jd.grids.from_times(PROCESS, t)
        tables = [runge_kutta(grid, "kutta3", "angle"), kdpm2(grid)]
        tables.append(runge_kutta(grid, "kutta3", jd.processes.vp_cosine(), scaling="none"))
        return [(table.A, table.B, table.t) for table in tables]

    for got, want in zip(
        jax.tree.leaves(jax.jit(coefficients)(times)), jax.tree.leaves(coefficients(times))
    ):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk5"}, "method must be one of .*'rk4'.*got 'rk5'"),
        ({"clock": "s"}, "clock must be one of .*'rho'.*'t'.*got 's'"),
        ({"scaling": "ve"}, "scaling must be one of .*'none', 'vp'.*got 've'"),
        ({"last": "none"}, "last must be one of .*'euler', 'clock', 'full'.*got 'none'"),
        ({"clock": "kappa", "last": "full"}, "finite at sigma = 0, as is its rate, not 'kappa'"),
        ({"clock": "t", "last": "full"}, "finite at sigma = 0, as is its rate, not 't'"),
        ({"clock": "lambda", "last": "clock"}, "finite at sigma = 0, not 'lambda'"),
        ({"clock": jd.processes.ve(), "last": "clock"}, "finite at sigma = 0, not VE"),
        ({"method": diffrax.Kvaerno3.tableau}, "must be explicit"),
        ({"method": ([[0.5]], [1.0], [0.5])}, "strictly lower triangular"),
        ({"method": ([[0.0]], [0.5], [0.0])}, "b to 1, got"),
        ({"method": ([[0.0]], [1.0], [0.0, 1.0])}, r"shapes \[s, s\], \[s\] and \[s\]"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        runge_kutta(GRID, **options)


def test_options_of_a_wrong_type_are_named():
    with pytest.raises(TypeError, match="a name, a diffrax.ButcherTableau or arrays"):
        runge_kutta(GRID, 4)
    with pytest.raises(TypeError, match="clock must be a name or a process, got int"):
        runge_kutta(GRID, clock=4)
    with pytest.raises(ValueError, match="'t' needs a grid from a process"):
        runge_kutta(jd.grids.from_arrays([3.0, 1.0], [1.0, 1.0], [3.0, 1.0]), clock="t")
    for place, kind in (("half", TypeError), (True, TypeError), (0.0, ValueError)):
        with pytest.raises(kind, match="place must be"):
            two_stage_method(place)
    with pytest.raises(TypeError, match="r must be a number, got 'half'"):
        kdpm2(GRID, "half")
    with pytest.raises(ValueError, match=r"r must be in \(0, 1\], got 0.0"):
        kdpm2(GRID, 0.0)
