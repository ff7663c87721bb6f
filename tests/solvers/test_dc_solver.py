"""Dynamic compensation: the authors' code, its base at rho = 1, and the rule written out."""

import calibrated_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.solvers.dc_solver import (
    CascadePolynomial,
    cascade_regression,
    dynamic_compensation,
)

CASES = calibrated_cases.load("dc_solver")
PROCESS = jd.processes.vp_linear()
GRID = jd.grids.uniform(PROCESS, 6)
RATIOS = np.array([1.0, 1.0, 1.3, 0.7, 1.1, -0.2])
MIXTURE = jd.gaussian_mixture([[-1.0, 0.5], [1.2, 0.3]], [0.3, 0.5], [0.4, 0.6])


def of_kind(kind):
    return [pytest.param(f, a, id=str(f)) for f, a in CASES if f["kind"] == kind]


def unipc(grid, facts):
    """The case's base; DC-Solver's code lowers the last orders always."""
    integrand = "x0" if facts["predict_x0"] else "eps"
    return jd.solvers.unipc(
        grid, facts["order"], facts["variant"], integrand, lower_order_final=True
    )


def start(count=4):
    return np.random.default_rng(5).standard_normal((count, 2))


@pytest.mark.parametrize(("facts", "arrays"), of_kind("ratios"))
def test_the_authors_code_makes_the_same_states(x64, facts, arrays):
    grid = calibrated_cases.grid(arrays)
    table = dynamic_compensation(unipc(grid, facts), grid, arrays["ratios"], facts["dc_order"])
    found = jd.sample(calibrated_cases.mixture("eps"), table, arrays["start"], save="trajectory")
    want = np.concatenate([arrays["inputs"], arrays["result"][None]])
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-9 * abs(want).max())


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("base", [
    lambda grid: jd.solvers.unipc(grid, 2),
    lambda grid: jd.solvers.unipc(grid, 3, "bh1"),
    lambda grid: jd.solvers.unipc(grid, 2, corrector=[False, True, True, False, True, True]),
    lambda grid: jd.solvers.exponential_adams(grid, 3),
    lambda grid: jd.solvers.dpm_solver_pp_multistep(grid, 2),
    lambda grid: jd.solvers.ddim(grid),
])  # fmt: skip
def test_ratios_of_one_are_the_base(x64, base, order):
    for grid in (GRID, jd.grids.uniform(PROCESS, 6, end="zero")):
        table = base(grid)
        found = dynamic_compensation(table, grid, np.ones(6), order)
        a, b = (jd.sample(MIXTURE, t, start(), save="nodes") for t in (table, found))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_a_predictor_follows_the_rule_written_out(x64):
    """DPM-Solver++(2M), whose last output is moved before it is used and remembered."""
    x, history, times = start(), [], []
    table = jd.solvers.dpm_solver_pp_multistep(GRID, 2, lower_order_final=False)
    for i in range(GRID.steps):
        t, alpha, sigma = GRID.node(i)
        _, alpha1, sigma1 = GRID.node(i + 1)
        history, times = [MIXTURE(x, t, alpha, sigma), *history], [t, *times]
        if i >= 2:
            polynomial = np.polynomial.polynomial.polyfit(
                times[:3], np.reshape(history[:3], (3, -1)), 2
            )
            at = RATIOS[i] * times[0] + (1 - RATIOS[i]) * times[1]
            history[0] = np.polynomial.polynomial.polyval(at, polynomial).reshape(x.shape)
        slope = 0.0
        if i:
            r = (GRID.lam[i] - GRID.lam[i - 1]) / (GRID.lam[i + 1] - GRID.lam[i])
            slope = (history[0] - history[1]) / (2 * r)
        x = sigma1 / sigma * x + (alpha1 - sigma1 / sigma * alpha) * (history[0] + slope)
    found = jd.sample(MIXTURE, dynamic_compensation(table, GRID, RATIOS), start())
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-10)


def test_half_log_snr_as_the_variable(x64):
    """A rho of 0 is the output remembered at the node before, in any variable."""
    ratios = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    base = jd.solvers.unipc(GRID, 2)
    ends = [
        jd.sample(MIXTURE, dynamic_compensation(base, GRID, r, variable=v), start())
        for r, v in ((ratios, "t"), (ratios, "lambda"), (RATIOS, "t"), (RATIOS, "lambda"))
    ]
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-12)
    assert np.abs(ends[2] - ends[3]).max() > 1e-3


def test_it_is_differentiable_in_the_ratios_and_compiles_once(x64):
    base = jd.solvers.unipc(GRID, 2)

    @jax.jit
    def end(ratios):
        return jnp.sum(jd.sample(MIXTURE, dynamic_compensation(base, GRID, ratios), start()) ** 2)

    slope = jax.grad(end)(RATIOS)
    step = 1e-5 * np.eye(6)
    want = [(end(RATIOS + s) - end(RATIOS - s)) / 2e-5 for s in step]
    np.testing.assert_allclose(slope[2:], want[2:], rtol=1e-5)
    assert end._cache_size() == 1


@pytest.mark.parametrize(("change", "message"), [
    (dict(ratios=np.ones(5)), "one for each of 6 steps"),
    (dict(ratios=np.r_[1.0, 0.9, np.ones(4)]), "must be 1"),
    (dict(ratios=np.full(6, np.nan)), "finite"),
    (dict(order=0), "order must be an integer from 1 to 8"),
    (dict(variable="s"), "variable must be one of"),
    (dict(tableau=jd.solvers.heun(GRID)), "one evaluation a step"),
    (dict(tableau=jd.solvers.ddpm(GRID)), "deterministic"),
    (dict(tableau=jd.solvers.bdia(GRID)), "got nodes"),
])  # fmt: skip
def test_what_it_does_not_take(change, message):
    call = {"tableau": jd.solvers.unipc(GRID, 2), "ratios": RATIOS, **change}
    with pytest.raises(ValueError, match=message):
        dynamic_compensation(call.pop("tableau"), GRID, call.pop("ratios"), **call)


def test_an_infinite_variable_is_refused():
    grid = jd.grids.uniform(jd.processes.flow(), 6)
    with pytest.raises(ValueError, match="infinite"):
        dynamic_compensation(jd.solvers.unipc(grid, 2), grid, RATIOS, variable="lambda")


# --- ratios of other settings ---------------------------------------------------------------------


@pytest.mark.parametrize(("facts", "arrays"), of_kind("cascade"))
def test_the_released_polynomial(facts, arrays):
    """Their file holds, for each power of the step, a 3 x 3 table of falling powers."""
    table = arrays["coefficients"].reshape(4, 3, 3)[:, ::-1, ::-1]
    found = CascadePolynomial(table).predict(facts["steps"], facts["scale"])
    np.testing.assert_allclose(found, arrays["ratios"], rtol=0, atol=1e-9)


def test_a_cascade_polynomial_is_recovered():
    known = CascadePolynomial(np.random.default_rng(0).standard_normal((4, 3, 3)))
    settings = [(n, s) for n in (8, 10, 15) for s in (2.0, 5.0, 7.5)]
    found = cascade_regression([known.predict(*s) for s in settings], [s for _, s in settings])
    np.testing.assert_allclose(found.predict(12, 3.0), known.predict(12, 3.0), atol=1e-7)
    assert list(found.predict(12, 3.0)[:2]) == [1.0, 1.0]


@pytest.mark.parametrize(("ratios", "options", "message"), [
    ([np.ones(5), np.ones(6), np.ones(7)], {}, "degree 2 needs 3 guidance scales, got 1"),
    ([np.ones(5), np.ones(6)], {"degrees": (2, 0, 2)}, "needs 3 numbers of steps, got 2"),
    ([np.ones(5)], {"degrees": (3, 0, 0)}, "needs 4 ratios a setting, got 3"),
    ([np.ones(5)], {"scales": [1.0, 2.0]}, "one for each scale"),
])  # fmt: skip
def test_too_few_settings(ratios, options, message):
    with pytest.raises(ValueError, match=message):
        cascade_regression(ratios, **options)
