"""Ratios found on a few starts: the authors' search, and what they gain on others."""

import functools

import calibrated_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.calibration import ddim_trajectory, fit_compensation
from jaxdiff.denoisers import level
from jaxdiff.solvers.dc_solver import cascade_regression, dynamic_compensation

SEARCHES = [c for c in calibrated_cases.load("dc_solver") if c[0]["kind"] == "search"]
PROCESS = jd.processes.vp_linear()
SCALE = 7.5


@pytest.mark.parametrize(("facts", "arrays"), SEARCHES, ids=[str(f) for f, _ in SEARCHES])
def test_the_authors_search_finds_the_same_ratios(x64, facts, arrays):
    grid = calibrated_cases.grid(arrays)
    if facts["order"] <= facts["dc_order"]:
        # Their buffer holds `order` outputs, so that this search never starts.
        assert set(arrays["ratios"]) == {1.0}
        return
    integrand = "x0" if facts["predict_x0"] else "eps"
    base = jd.solvers.unipc(
        grid, facts["order"], facts["variant"], integrand, lower_order_final=True
    )
    found = fit_compensation(
        calibrated_cases.mixture("eps"), base, grid, arrays["start"],
        reference=arrays["reference"], order=facts["dc_order"], keep="last",
    )  # fmt: skip
    np.testing.assert_allclose(found.ratios, arrays["ratios"], rtol=0, atol=1e-6)


# --- a conditional mixture under strong guidance --------------------------------------------------


def conditional(params, x, levels, cond):
    """E[x0 | x] of the whole mixture (cond 0), or of its first components (cond 1)."""
    _, alpha, sigma = levels
    whole, part = (m.denoise(x, alpha, sigma) for m in params)
    return jnp.where(cond[:, None] == 1, part, whole)


def guided(scale=SCALE):
    rng = np.random.default_rng(0)
    means, scales = rng.normal(size=(6, 16)), np.full(6, 0.3)
    whole = jd.gaussian_mixture(means, scales, np.ones(6))
    part = jd.gaussian_mixture(means[:2], scales[:2], np.ones(2))
    denoiser = jd.Denoiser(conditional, "x0", (whole.params, part.params), level)
    return jd.guidance.classifier_free(denoiser, scale, 0)


def noise(seed, count):
    return PROCESS.prior(jax.random.key(seed), (count, 16)), jnp.ones(count, int)


def bases(steps):
    grid = jd.grids.uniform(PROCESS, steps)
    return grid, jd.solvers.unipc(grid, 2)


@functools.cache
def exact(scale):
    x, cond = noise(1, 256)
    return ddim_trajectory(guided(scale), bases(5)[0], x, 999, cond)[-1]


def held_out(table, scale=SCALE):
    """RMSE on 256 starts that no fit has seen."""
    x, cond = noise(1, 256)
    end = jd.sample(guided(scale), table, x, cond=cond)
    return float(jnp.sqrt(jnp.mean((end - exact(scale)) ** 2)))


@pytest.fixture(scope="module")
def fits():
    x, cond = noise(2, 10)
    return {
        (n, s): fit_compensation(guided(s), *bases(n)[::-1], x, cond)
        for n in (5, 8, 10) for s in (3.0, 5.0, SCALE)
    }  # fmt: skip


@pytest.mark.parametrize(("steps", "bound"), [(5, 0.9), (8, 1.0), (10, 1.0)])
def test_ratios_of_ten_starts_serve_others(fits, steps, bound):
    grid, base = bases(steps)
    found = dynamic_compensation(base, grid, fits[steps, SCALE].ratios)
    assert held_out(found) <= bound * held_out(base)


def test_no_step_is_worse_than_without(fits):
    for fit in fits.values():
        assert np.all(np.isnan(fit.before[:2])) and list(fit.ratios[:2]) == [1.0, 1.0]
        assert np.all(fit.after[2:] <= fit.before[2:])
        assert fit.after[-1] < 0.9 * fit.before[-1]


def test_a_predictor_alone_is_served_too():
    grid = bases(6)[0]
    base = jd.solvers.dpm_solver_pp_multistep(grid, order=2)
    x, cond = noise(2, 10)
    fit = fit_compensation(guided(), base, grid, x, cond, keep="last")
    assert held_out(dynamic_compensation(base, grid, fit.ratios)) < held_out(base)
    # The error reported for a step is that of the trajectory the ratios make.
    found = jd.sample(
        guided(), dynamic_compensation(base, grid, fit.ratios), x, cond=cond, save="nodes"
    )
    want = ddim_trajectory(guided(), grid, x, 999, cond)
    errors = jnp.mean((found - want) ** 2, (1, 2))[3:]
    np.testing.assert_allclose(fit.after[2:], errors, rtol=1e-3)


@pytest.mark.parametrize(("steps", "scale"), [(7, SCALE), (9, SCALE), (9, 6.0), (6, 6.0)])
def test_the_regression_serves_settings_between(fits, steps, scale):
    """Numbers of steps, or these and a guidance scale, that no fit has seen."""
    ratios = [fit.ratios for fit in fits.values()]
    found = cascade_regression(ratios, [s for _, s in fits], (3, 1, 1))
    grid, base = bases(steps)
    table = dynamic_compensation(base, grid, found.predict(steps, scale))
    assert held_out(table, scale) <= held_out(base, scale)


def test_the_reference_is_the_flow():
    """DDIM's own steps over the grid's: those of one long grid, and one that ends at the data."""
    x, cond = noise(3, 4)
    found = ddim_trajectory(guided(), jd.grids.uniform(PROCESS, 3), x, 12, cond)
    fine = jd.solvers.ddim(jd.grids.uniform(PROCESS, 12))
    want = jd.sample(guided(), fine, x, cond=cond, save="nodes")[::4]
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5)
    zero = ddim_trajectory(guided(), jd.grids.uniform(PROCESS, 4, end="zero"), x, 999, cond)
    np.testing.assert_allclose(zero[-1], found_at_zero(guided(), x, cond), rtol=0, atol=1e-3)


def found_at_zero(denoiser, x, cond):
    grid = jd.grids.uniform(PROCESS, 999, end="zero")
    return jd.sample(denoiser, jd.solvers.ddim(grid), x, cond=cond)


@pytest.mark.parametrize(("change", "message"), [
    (dict(iterations=0), "iterations must be an integer"),
    (dict(learning_rate=0.0), "learning_rate > 0"),
    (dict(keep="first"), "keep must be one of"),
    (dict(order=5), "no ratio of order 5"),
    (dict(reference=np.zeros((5, 4, 16))), "reference must be"),
])  # fmt: skip
def test_bad_arguments(change, message):
    grid, base = bases(5)
    x, cond = noise(0, 4)
    with pytest.raises(ValueError, match=message):
        fit_compensation(guided(), base, grid, x, cond, **change)


def test_a_grid_from_arrays_with_an_end_has_no_reference():
    grid = jd.grids.from_arrays([1.0, 0.5, 0.0], [0.1, 0.5, 1.0], [1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="cannot be refined"):
        ddim_trajectory(guided(), grid, np.zeros((2, 16)))
