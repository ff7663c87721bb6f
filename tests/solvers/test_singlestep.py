"""Single-step DPM-Solver and exponential Runge-Kutta: what the catalogue's tests do not say."""

import dataclasses

import jax
import numpy as np
import pytest
from oracles import BROAD, Mixture, fitted_order, median_error

import jaxdiff as jd
from jaxdiff.solvers.exponential_rk import FIXED, exponential_rk, three_stages, two_stages
from jaxdiff.solvers.phi import phi
from jaxdiff.solvers.singlestep import dpm_solver_singlestep, singlestep_plan

PROCESS = jd.processes.vp_linear()
GRID = jd.grids.karras(PROCESS, 5)


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


def data(x, alpha, sigma):
    return (x + sigma**2 * BROAD.score(x, alpha, sigma)) / alpha


PREDICTION = {"x0": data, "eps": BROAD.eps}


def assert_same(one, other):
    for name in ("A", "B", "t", "alpha", "sigma"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)


# --- tables of coefficients -----------------------------------------------------------------------


def coefficients(scheme, z):
    """(c, a, b) of all stages at z."""
    value = lambda terms: sum(f * phi(k, c * z) for f, k, c in terms)  # noqa: E731
    c, size = np.array([0.0, *scheme.c]), len(scheme.c) + 1
    a = np.zeros((size, size))
    for i, row in enumerate(((), *scheme.a)):
        a[i + 1, 1 : 1 + len(row)] = [value(terms) for terms in row]
    b = np.array([0.0, *(value(terms) for terms in scheme.b)])
    a[:, 0] = c * phi(1, c * z) - a.sum(1)
    b[0] = phi(1, z) - b.sum()
    return c, a, b


@pytest.mark.parametrize("name", ["etdrk4", "krogstad", "strehmel_weiner", "ho4"])
def test_without_a_linear_part_the_fourth_order_conditions_of_runge_kutta_hold(name):
    """All eight of Butcher's, at z = 0."""
    c, a, b = coefficients(FIXED[name], 0.0)
    found = [
        b.sum(), b @ c, b @ c**2, b @ a @ c, b @ c**3, (b * c) @ a @ c, b @ a @ c**2, b @ a @ a @ c
    ]  # fmt: skip
    np.testing.assert_allclose(found, [1, 1 / 2, 1 / 3, 1 / 6, 1 / 4, 1 / 8, 1 / 12, 1 / 24])


def test_without_a_linear_part_krogstad_and_etdrk4_have_the_classical_weights():
    for name in ("krogstad", "etdrk4"):
        np.testing.assert_allclose(
            coefficients(FIXED[name], 0.0)[2], [1 / 6, 1 / 3, 1 / 3, 1 / 6], atol=1e-15
        )


@pytest.mark.parametrize("z", [-8.0, -0.7, 0.3, 5.0])
def test_quadrature_is_exact_for_parabolas_and_lines(z):
    """sum_j b_j c_j^k = k! phi_{k+1}(z): k to 2 for Simpson's weights, 1 for the others."""
    for scheme, degree in [
        *((scheme, 2) for scheme in FIXED.values()), (three_stages(0.5, 1.0), 1),
        (three_stages(1 / 3, 2 / 3), 1), (two_stages(0.3), 1),
    ]:  # fmt: skip
        c, _, b = coefficients(scheme, z)
        for k in range(degree + 1):
            np.testing.assert_allclose(b @ c**k, [1, 1, 2][k] * phi(k + 1, z), rtol=1e-10)


@pytest.mark.parametrize("z", [-8.0, -0.7, 0.3, 5.0])
def test_the_five_stages_need_no_smallness_of_the_linear_part(z):
    """Stages with a weight are of stage order 2 at every z: sum_j a_ij c_j = c_i^2 phi_2(c_i z)."""
    c, a, b = coefficients(FIXED["ho4"], z)
    miss = a @ c - c**2 * phi(2, c * z)
    assert np.all(b[[1, 2]] == 0)
    np.testing.assert_allclose(miss[[3, 4]], 0, atol=1e-12 * phi(1, z))
    _, a, _ = coefficients(FIXED["etdrk4"], z)
    assert abs((a @ c[:4] - c[:4] ** 2 * phi(2, c[:4] * z))[3]) > 1e-3


# --- methods that are one another -----------------------------------------------------------------


@pytest.mark.parametrize("integrand", ["x0", "eps"])
def test_dpm_solver_is_exponential_runge_kutta(integrand):
    for order, options, method in [
        (2, {"r1": 0.4}, {"method": "ho2_weak", "c2": 0.4}),
        (2, {"solver_type": "taylor"}, {"method": "ho2"}),
        (3, {}, {"method": "ho3"}),
        (3, {"r1": 0.5}, {"method": "ho3", "c2": 0.5}),
    ]:
        assert_same(
            dpm_solver_singlestep(GRID, order, integrand, **options),
            exponential_rk(GRID, integrand=integrand, **method),
        )


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("kind", ["dpmsolver", "taylor", "midpoint"])
def test_stages_on_evenly_spaced_nodes_are_those_between_them(order, kind):
    fine = jd.grids.half_log_snr(PROCESS, 4 * order)
    coarse = jd.grids.half_log_snr(PROCESS, 4)
    on_nodes = dpm_solver_singlestep(fine, order, "x0", kind, stages="nodes", plan=[order] * 4)
    between = dpm_solver_singlestep(coarse, order, "x0", kind)
    x = BROAD.sample(np.random.default_rng(0), 4, fine.alpha[0], fine.sigma[0])
    got = follow(on_nodes, data, x)
    assert len(got) == 4 * order + 1
    np.testing.assert_allclose(got[::order], follow(between, data, x), rtol=1e-8)


def published_step(x, integrand, level, end, kind, order):
    """One step as the authors' code writes it."""
    network = PREDICTION[integrand]
    (a, s), (a1, s1) = level, end
    lam, lam1 = np.log(a / s), np.log(a1 / s1)
    h, sign = lam1 - lam, -1.0 if integrand == "x0" else 1.0
    r1, r2 = (1 / 3, 2 / 3) if order == 3 else (0.5, None)

    def at(r):
        alpha = np.sqrt(1 / (1 + np.exp(-2 * (lam + r * h))))
        return alpha, np.sqrt(1 - alpha**2)

    def first(alpha, sigma, r):
        kept = sigma / s if integrand == "x0" else alpha / a
        return kept * x - (alpha if integrand == "x0" else sigma) * np.expm1(sign * r * h) * m

    m = network(x, a, s)
    m1 = network(first(*at(r1), r1), *at(r1))
    out, size = first(a1, s1, 1.0), a1 if integrand == "x0" else s1
    phi_1 = np.expm1(sign * h)
    phi_2 = phi_1 / h - sign
    if order == 2 and kind == "dpmsolver":
        return out - 0.5 / r1 * size * phi_1 * (m1 - m)
    if order == 2:
        return out - sign / r1 * size * phi_2 * (m1 - m)
    (a2, s2), size2 = at(r2), at(r2)[0 if integrand == "x0" else 1]
    phi_22 = np.expm1(sign * r2 * h) / (r2 * h) - sign
    m2 = network(first(a2, s2, r2) - sign * r2 / r1 * size2 * phi_22 * (m1 - m), a2, s2)
    if kind == "dpmsolver":
        return out - sign / r2 * size * phi_2 * (m2 - m)
    near, far = (m1 - m) / r1, (m2 - m) / r2
    slope, bend = (r2 * near - r1 * far) / (r2 - r1), 2 * (far - near) / (r2 - r1)
    return out - sign * size * phi_2 * slope - size * (phi_2 / h - 0.5) * bend


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("kind", ["dpmsolver", "taylor"])
@pytest.mark.parametrize("integrand", ["x0", "eps"])
def test_the_steps_are_the_published_ones(integrand, kind, order):
    table = dpm_solver_singlestep(GRID, order, integrand, kind)
    x = BROAD.sample(np.random.default_rng(1), 4, GRID.alpha[0], GRID.sigma[0])
    states = follow(table, PREDICTION[integrand], x)
    for i in range(GRID.steps):
        expected = published_step(
            states[i], integrand, GRID.node(i)[1:], GRID.node(i + 1)[1:], kind, order
        )
        np.testing.assert_allclose(states[i + 1], expected, rtol=1e-9, atol=1e-11)


# --- plans ----------------------------------------------------------------------------------------


def test_plans_spend_the_evaluations_and_are_the_published_ones():
    for count in range(1, 40):
        for order in (1, 2, 3):
            for lowered in (None, True, False):
                plan = singlestep_plan(count, order, lowered)
                assert sum(plan) == count and plan == sorted(plan, reverse=True)
    # "DPM-Solver-fast" (k-diffusion: n // 3 + 1 steps), its order 2, and diffusers' default.
    assert [singlestep_plan(n) for n in (1, 2, 3, 9, 10, 11)] == [
        [1], [2], [2, 1], [3, 3, 2, 1], [3, 3, 3, 1], [3, 3, 3, 2],
    ]  # fmt: skip
    assert all(len(singlestep_plan(n)) == n // 3 + 1 for n in range(1, 30))
    assert singlestep_plan(6, 2) == [2, 2, 2] and singlestep_plan(7, 2) == [2, 2, 2, 1]
    assert singlestep_plan(6, 2, True) == [2, 2, 1, 1]
    assert singlestep_plan(9, 3, False) == [3, 3, 3]


def test_a_plan_sets_the_evaluations_of_each_step():
    plan = singlestep_plan(10)
    table = dpm_solver_singlestep(jd.grids.half_log_snr(PROCESS, len(plan)), plan=plan)
    assert table.nfe == 10 and np.diff(table.nodes[:, 0]).tolist() == plan
    lowered = dpm_solver_singlestep(GRID, 3, lower_order_final=True)
    assert np.diff(lowered.nodes[:, 0]).tolist() == [3, 3, 3, 2, 1]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("process", [jd.processes.flow(), PROCESS])
def test_on_nodes_every_end_costs_a_step_of_its_own(process, order):
    """From alpha = 0 or to sigma = 0: as many evaluations as steps, all of them finite."""
    for steps in (1, 2, 3, 4, 7):
        grid = jd.grids.uniform(process, steps, t_min=process.data_time)
        table = dpm_solver_singlestep(grid, order, "x0", stages="nodes")
        assert grid.ends[1] and table.nfe == steps and np.all(np.isfinite(table.B))
        # The last step is x0 at the last level itself.
        np.testing.assert_allclose(table.A[-1, 0], 0.0, atol=1e-15)
        np.testing.assert_allclose(table.B[-1, 0, :, 0], np.eye(table.history)[0], atol=1e-15)


# --- orders ---------------------------------------------------------------------------------------


def measured_order(build, steps, spacing=jd.grids.quadratic, integrand="x0", span=(0.6, 0.05)):
    first, last = ((PROCESS.alpha(t), PROCESS.sigma(t)) for t in span)
    x = BROAD.sample(np.random.default_rng(0), 32, *first)
    exact = BROAD.flow(x, first, last)
    tables = [build(spacing(PROCESS, n, t_max=span[0], t_min=span[1])) for n in steps]
    ends = [follow(table, PREDICTION[integrand], x)[-1] for table in tables]
    return fitted_order(steps, [median_error(end, exact) for end in ends])


@pytest.mark.parametrize(("order", "least"), [(1, 0.95), (2, 1.95), (3, 2.8)])
def test_dpm_solver_has_its_orders_from_pure_noise(order, least):
    """Noise prediction, 40 to 320 steps even in lambda, t from 1 to 1e-2."""
    build = lambda grid: dpm_solver_singlestep(grid, order)  # noqa: E731
    spacing = jd.grids.half_log_snr
    assert measured_order(build, (40, 80, 160, 320), spacing, "eps", (1.0, 1e-2)) > least


def test_with_strong_guidance_the_data_prediction_is_the_stabler():
    """Guidance scale 7.5 to one of three narrow components, whose means have entries up to 1.1.

    DPM-Solver-2 and -3 blow up with 9 and 12 evaluations, DPM-Solver++(2S) and (2M) do not.
    """
    mixture = dataclasses.replace(BROAD, std=np.array([0.2] * 3))
    chosen = Mixture(mixture.means[:1], mixture.std[:1], np.ones(1))

    def eps(x, alpha, sigma):
        free = mixture.eps(x, alpha, sigma)
        return free + 7.5 * (chosen.eps(x, alpha, sigma) - free)

    def guided(x, alpha, sigma):
        return (x - sigma * eps(x, alpha, sigma)) / alpha

    def size(build, evaluations, order, network, **options):
        plan = singlestep_plan(evaluations, order)
        grid = jd.grids.half_log_snr(PROCESS, len(plan))
        return np.abs(follow(build(grid, plan=plan, **options), network, x)[-1]).max()

    x = np.random.default_rng(1).normal(size=(256, 2))
    build = dpm_solver_singlestep
    assert size(build, 9, 2, eps) > 5 and size(build, 12, 3, eps) > 5
    for count in (9, 12):
        grid = jd.grids.half_log_snr(PROCESS, count)
        multistep = follow(jd.solvers.dpm_solver_pp_multistep(grid), guided, x)[-1]
        assert size(build, count, 2, guided, integrand="x0") < 2.5
        assert np.abs(multistep).max() < 2.5


def test_a_plan_of_third_order_steps_on_nodes_keeps_order_three():
    """On a smooth grid: the stages tend to r1 = 1/3, r2 = 2/3; a last step of order 1 leaves 2."""
    options = {"order": 3, "integrand": "x0", "stages": "nodes"}
    full = lambda grid: dpm_solver_singlestep(grid, lower_order_final=False, **options)  # noqa: E731
    fast = lambda grid: dpm_solver_singlestep(grid, **options)  # noqa: E731
    assert measured_order(full, (60, 120, 240)) > 2.75
    assert 1.75 < measured_order(fast, (60, 120, 240)) < 2.5


@pytest.mark.parametrize("kind", ["dpmsolver", "taylor", "midpoint"])
def test_stages_elsewhere_cost_dpm_solver_its_third_order_and_not_ho3(kind):
    places = {"r1": 0.5, "r2": 1.0}
    build = lambda g: dpm_solver_singlestep(g, 3, "x0", kind, **places)  # noqa: E731
    assert 1.75 < measured_order(build, (20, 40, 80)) < 2.4
    ours = lambda g: exponential_rk(g, "ho3", c2=0.5, c3=1.0)  # noqa: E731
    assert measured_order(ours, (20, 40, 80)) > 2.75
    elsewhere = lambda g: exponential_rk(g, "ho3", "eps", c2=0.9, c3=0.4)  # noqa: E731
    assert measured_order(elsewhere, (20, 40, 80), integrand="eps") > 2.75


# --- grids ----------------------------------------------------------------------------------------


BUILDERS = [
    lambda grid: exponential_rk(grid),
    lambda grid: exponential_rk(grid, "ho3", "eps"),
    lambda grid: dpm_solver_singlestep(grid, 3, "x0", "taylor"),
    lambda grid: dpm_solver_singlestep(grid, 3, "x0", "midpoint", stages="nodes"),
]


@pytest.mark.parametrize("build", BUILDERS)
def test_a_traced_grid_makes_the_same_table_and_its_derivative(x64, build):
    """Against the host's table, and central differences of it."""
    times, moved = np.array([1.0, 0.5, 0.2, 0.01]), np.array([0.0, 0.7, -0.3, 0.1])

    def coefficients(t):
        table = build(jd.grids.from_times(PROCESS, t))
        return table.A, table.B, table.t

    values, slopes = jax.jit(lambda t: jax.jvp(coefficients, (t,), (moved,)))(times)
    step = 1e-5
    ahead, behind = (coefficients(times + side * step * moved) for side in (1.0, -1.0))
    for got, slope, want, high, low in zip(values, slopes, coefficients(times), ahead, behind):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(slope, (high - low) / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_reversed_grid_goes_back(build):
    grid = jd.grids.half_log_snr(PROCESS, 60)
    x = BROAD.sample(np.random.default_rng(2), 8, grid.alpha[0], grid.sigma[0])
    eps = np.array(build(grid).w[0, 0, jd.predictions.PREDICTIONS.index("eps")]) == 0
    network = PREDICTION["eps" if eps else "x0"]
    forth = follow(build(grid), network, x)[-1]
    back = follow(build(grid.reversed()), network, forth)[-1]
    assert np.median(np.abs(back - x)) < 2e-3


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order must be an integer from 1 to 3, got 4"),
        ({"integrand": "v"}, "integrand must be one of .*'eps', 'x0'.*got 'v'"),
        ({"solver_type": "heun"}, "solver_type must be one of .*'taylor'.*got 'heun'"),
        ({"stages": "in"}, "stages must be one of .*'at', 'nodes'.*got 'in'"),
        ({"r1": 0.0}, r"r1 must be in \(0, 1\], got 0.0"),
        ({"order": 3, "r1": 0.5, "r2": 0.5}, "r1 and r2 must differ, got 0.5 and 0.5"),
        ({"r2": 0.5}, "r2 is for order 3, got r2=0.5 with order 2"),
        ({"r1": 0.5, "stages": "nodes"}, "takes r1 from the grid, got 0.5"),
        ({"plan": [2, 2]}, "the plan has 2 steps, the grid 5"),
        ({"plan": [2, 2], "stages": "nodes"}, "makes 4 evaluations, the grid has 5 steps"),
        ({"plan": [4, 1], "stages": "nodes"}, "order of the plan must be an integer from 1 to 3"),
        ({"plan": []}, "the plan is empty"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dpm_solver_singlestep(GRID, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk4"}, "method must be one of .*'krogstad'.*got 'rk4'"),
        ({"integrand": "v"}, "integrand must be one of .*got 'v'"),
        ({"c2": 0.5}, "'krogstad' has no c2, got c2=0.5"),
        ({"method": "ho2", "c3": 0.5}, "'ho2' has no c3, got c3=0.5"),
        ({"method": "ho3", "c3": 1.5}, r"c3 must be in \(0, 1\], got 1.5"),
        ({"method": "ho3", "c2": 2 / 3}, "any c2 but 2/3"),
    ],
)
def test_bad_methods_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        exponential_rk(GRID, **options)


def test_places_must_be_numbers():
    for build in (
        lambda: exponential_rk(GRID, "ho2", c2="half"),
        lambda: dpm_solver_singlestep(GRID, r1=True),
    ):
        with pytest.raises(TypeError, match="must be a number"):
            build()
