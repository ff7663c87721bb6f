"""Step-by-step inversion: exact where naive inversion is not, and plain about what fails."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD

import jaxdiff as jd
from jaxdiff.inversion import NotConvergedError, solve_back

PROCESS = jd.processes.vp_linear()
GRID = jd.grids.half_log_snr(PROCESS, 12)
COUNT = 6


def mixture():
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS, "x0")


def start(grid=GRID):
    return BROAD.sample(np.random.default_rng(0), COUNT, grid.alpha[0], grid.sigma[0])


@functools.cache
def forward(name, dtype=np.float64):
    """(tableau, x_T, x_0)."""
    tableau = jd.solvers.build(name, GRID)
    with jax.enable_x64(dtype == np.float64):
        x = jnp.asarray(start().astype(dtype))
        return tableau, np.asarray(x), np.asarray(jd.sample(mixture(), tableau, x))


def ddim_step(x, i):
    e = BROAD.eps(x, GRID.alpha[i], GRID.sigma[i])
    clean = (x - GRID.sigma[i] * e) / GRID.alpha[i]
    return GRID.alpha[i + 1] * clean + GRID.sigma[i + 1] * e


def naive_error(x_T, x_0):
    found = jd.sample(mixture(), jd.solvers.ddim(GRID.reversed()), jnp.asarray(x_0))
    return np.abs(np.asarray(found) - x_T).max()


@pytest.mark.parametrize("method", ["newton", "fixed_point", "forward_step", "gradient"])
def test_ddim_is_inverted_to_1e_10(x64, method):
    tableau, x_T, x_0 = forward("ddim")
    found = solve_back(mixture(), tableau, x_0, method=method, max_iterations=200)
    assert np.abs(found.x_T - x_T).max() < 1e-10 < 1e-2 < naive_error(x_T, x_0)
    # Every step holds, by NumPy's DDIM.
    ends = [*np.asarray(found.states[1:]), x_0]
    for i, (before, after) in enumerate(zip(np.asarray(found.states), ends)):
        np.testing.assert_allclose(ddim_step(before, i), after, atol=1e-11)
    assert found.residuals.shape == (12, COUNT) and np.max(found.residuals) <= 1e-12
    assert np.all(found.converged) and int(found.sweeps) == 1


def test_newton_takes_fewer_iterations_than_a_fixed_point(x64):
    tableau, _, x_0 = forward("ddim")
    most = {
        method: int(np.max(solve_back(mixture(), tableau, x_0, method=method).iterations))
        for method in ("newton", "fixed_point")
    }
    assert most["newton"] <= 6 and most["fixed_point"] > 3 * most["newton"]


def test_a_multistep_method_is_inverted(x64):
    """Each sweep takes the older evaluations from the one before, until all steps hold."""
    tableau, x_T, x_0 = forward("dpm_solver_pp_2m")
    found = solve_back(mixture(), tableau, x_0)
    assert np.abs(found.x_T - x_T).max() < 1e-10 and 1 < int(found.sweeps) < 100
    again = jd.sample(mixture(), tableau, found.x_T)
    np.testing.assert_allclose(again, x_0, atol=1e-10)


def test_a_good_guess_saves_sweeps(x64):
    """Coarse to fine (Hong et al.): older evaluations at first from a fine naive inversion."""
    tableau, x_T, x_0 = forward("dpm_solver_pp_2m")
    fine = jd.grids.half_log_snr(PROCESS, 12 * 16)
    nodes = jd.sample(mixture(), jd.solvers.ddim(fine.reversed()), jnp.asarray(x_0), save="nodes")
    guess = nodes[::-1][: 12 * 16 : 16]
    one = solve_back(mixture(), tableau, x_0, guess=guess, sweeps=1, throw=False)
    coarse = solve_back(mixture(), tableau, x_0, sweeps=1, throw=False)
    errors = [np.abs(np.asarray(f.x_T) - x_T).max() for f in (one, coarse)]
    # What one sweep leaves is reported: the residuals are of the whole steps.
    assert errors[0] < 0.5 * errors[1]
    assert not np.any(one.converged) and np.max(one.residuals) > 1e-4
    assert not np.any(coarse.converged)


def test_float32():
    tableau, x_T, x_0 = forward("ddim", np.float32)
    found = solve_back(mixture(), tableau, x_0, method="forward_step")
    assert found.x_T.dtype == np.float32 and np.abs(found.x_T - x_T).max() < 1e-5


def test_a_pytree_and_an_eps_network(x64):
    """Two leaves with equations of their own, and a conditional network."""

    def network(x, t, cond):
        return {"a": jnp.tanh(x["a"]) * cond[:, None], "b": 0.3 * x["b"] * (1.0 + t)}

    denoiser = jd.Denoiser(network, "eps")
    rng = np.random.default_rng(3)
    x = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=(2, 2, 2))}
    cond = jnp.asarray([0.3, 0.6])
    tableau = jd.solvers.ddim(jd.grids.uniform(PROCESS, 8))
    x_0 = jd.sample(denoiser, tableau, x, cond=cond)
    options = dict(method="fixed_point", max_iterations=200)
    found = solve_back(denoiser, tableau, x_0, cond=cond, **options).x_T
    for name in x:
        np.testing.assert_allclose(found[name], x[name], atol=1e-10)


# --- what fails, and says so -----------------------------------------------------------------------


def test_an_iteration_that_does_not_contract_is_named(x64):
    """The x0 form divides by sigma' / sigma: its iteration grows on long steps."""
    tableau, _, x_0 = forward("ddim")
    options = dict(method="fixed_point", splitting="x0", max_iterations=20)
    with pytest.raises(NotConvergedError, match="did not reach tol = 1e-12 .*in row .*newton"):
        solve_back(mixture(), tableau, x_0, **options)
    found = solve_back(mixture(), tableau, x_0, **options, throw=False)
    assert not np.any(found.converged)


TO_ZERO = jd.grids.half_log_snr(PROCESS, 4, end="zero")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jd.solvers.ddim(TO_ZERO), "row 3 steps to sigma = 0.*end the grid at sigma > 0.*bdia"),
        (lambda: jd.solvers.dpm_solver_multistep(TO_ZERO), "steps to sigma = 0"),
        (lambda: jd.solvers.ddpm(GRID), "deterministic samplers.*edit-friendly"),
        (lambda: jd.solvers.bdia(GRID), "one register .*got 2 and 1: .*shoot, or invert"),
        (lambda: jd.solvers.ddim(GRID, outputs=2), "one output, got 1 and 2"),
    ],
)
def test_samplers_it_does_not_invert_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        solve_back(mixture(), make(), jnp.zeros((2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "secant"}, "method must be one of .*'newton'.* got 'secant'"),
        ({"splitting": "score"}, "splitting must be one of .* got 'score'"),
        ({"tol": 0.0}, "tol must be a positive number or None, got 0.0"),
        ({"max_iterations": 0}, "max_iterations must be an integer of at least 1, got 0"),
        ({"sweeps": True}, "sweeps must be an integer of at least 1, got True"),
        ({"guess": jnp.zeros((3, 2, 2))}, r"guess must have shape \(12, 2, 2\), got \(3, 2, 2\)"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        solve_back(mixture(), jd.solvers.ddim(GRID), jnp.zeros((2, 2)), **options)


def test_the_tolerance_follows_the_states_size():
    """From sigma = 80 in float32, where a unit in the last place is 8e-6."""
    process = jd.processes.edm()
    denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, process, "x0")
    tableau = jd.solvers.ddim(jd.grids.karras(process, 12))
    x_T = process.prior(jax.random.key(0), (COUNT, 2))
    found = solve_back(denoiser, tableau, jd.sample(denoiser, tableau, x_T))
    assert np.all(found.converged)
    again = jd.sample(denoiser, tableau, found.x_T)
    np.testing.assert_allclose(again, jd.sample(denoiser, tableau, x_T), atol=2e-4)


def test_a_denoiser_with_memory_is_named():
    denoiser = jd.Denoiser(lambda x, t, memory: (x, memory), "eps", memory=jnp.zeros(()))
    with pytest.raises(ValueError, match="solve_back .* no denoiser with memory"):
        solve_back(denoiser, jd.solvers.ddim(GRID), jnp.zeros((2, 2)))
