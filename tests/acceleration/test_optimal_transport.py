"""DPM-OT: the map against linear programming and quantiles, its bounds, and modes of a mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist
from scipy.stats import norm

import jaxdiff as jd
from jaxdiff.acceleration import SemidiscreteMap, cell_masses, fit_map, transport_error


def test_in_one_dimension_the_cells_are_quantiles():
    """Targets in order, with masses nu, take the prior's quantiles in order."""
    targets = np.array([[2.0], [-1.0], [0.5]])
    masses = np.array([0.2, 0.5, 0.3])
    fit = fit_map(targets, jax.random.key(0), masses, tolerance=0.03)
    assert fit.converged and fit.error < 0.03 and fit.steps <= 1000
    z = np.linspace(-3, 3, 601)[:, None]
    edges = norm.ppf([0.5, 0.8])
    expected = np.array([-1.0, 0.5, 2.0])[np.searchsorted(edges, z[:, 0])]
    close = np.min(np.abs(z - edges), axis=1) < 0.05
    found = np.asarray(fit.map(jnp.asarray(z, jnp.float32)))[:, 0]
    assert np.array_equal(found[~close], expected[~close].astype(np.float32))
    assert abs(float(fit.map.heights.mean())) < 1e-6
    np.testing.assert_allclose(cell_masses(fit.map, jax.random.key(1)), masses, atol=0.01)


def test_no_more_steps_than_asked_for():
    targets, key = np.random.default_rng(0).normal(size=(20, 2)), jax.random.key(0)
    fit = fit_map(targets, key, max_steps=10, block=8)
    assert fit.steps == 10 and not fit.converged


def test_it_is_the_cheapest_map_for_the_masses_it_has():
    """No assignment of z's to the targets they use costs less: 300 points, exactly."""
    rng = np.random.default_rng(0)
    found = SemidiscreteMap(
        jnp.asarray(rng.normal(size=(40, 3)), jnp.float32),
        jnp.asarray(0.3 * rng.normal(size=40), jnp.float32),
    )
    z = rng.normal(size=(300, 3)).astype(np.float32)
    used = np.asarray(found(jnp.asarray(z)))
    costs = cdist(z, used, "sqeuclidean")
    rows, columns = linear_sum_assignment(costs)
    assert np.trace(costs) == pytest.approx(costs[rows, columns].sum(), rel=1e-5)


def test_the_error_bounds_hold():
    """W_1 and W_2 between two distributions on the same 12 points, by linear programming."""
    rng = np.random.default_rng(1)
    y = rng.normal(size=(12, 2))
    found = SemidiscreteMap(jnp.asarray(y, jnp.float32), jnp.zeros(12))
    for seed in range(5):
        a, b = np.random.default_rng(seed).dirichlet(np.ones(12), size=2)
        sums = np.concatenate([np.kron(np.eye(12), np.ones(12)), np.kron(np.ones(12), np.eye(12))])
        bounds = transport_error(found, a, b)
        for p, bound in zip((1, 2), bounds):
            solved = linprog((cdist(y, y) ** p).ravel(), A_eq=sums, b_eq=np.concatenate([a, b]))
            assert solved.status == 0
            assert 0.1 * bound < solved.fun ** (1 / p) <= bound
    assert transport_error(found, a, a) == (0.0, 0.0)


def test_means_are_taken_within_a_mode_and_not_across():
    """Two pairs of near targets, far apart; z where the scores' order is known."""
    y = jnp.array([[3.0, 0.1], [3.0, -0.1], [-3.0, 0.1], [-3.0, -0.1]])
    found = SemidiscreteMap(y, jnp.zeros(4))
    z = jnp.array([[0.2, 0.1], [-0.1, -1.0]])
    assert np.array_equal(found(z), y[jnp.array([0, 3])])
    mean, number = found.averaged(z, 3, 0.7)
    np.testing.assert_allclose(mean, [[3.0, 0.0], [-3.0, 0.0]], atol=1e-6)
    assert number.tolist() == [2, 2]
    alone, number = found.averaged(z, 4, 0.0)
    assert np.array_equal(alone, found(z)) and number.tolist() == [1, 1]
    # The angle between the planes of targets 0 and 1: normals (3, 0.1, -1) and (3, -0.1, -1).
    angle = np.arccos((9 - 0.01 + 1) / (9 + 0.01 + 1))
    assert found.averaged(z, 2, 1.02 * angle)[1].tolist() == [2, 2]
    assert found.averaged(z, 2, 0.98 * angle)[1].tolist() == [1, 1]
    # All the way across, the mean lies between the modes: what the angle forbids.
    np.testing.assert_allclose(found.averaged(z, 4, np.pi)[0], 0.0, atol=1e-6)


@pytest.fixture(scope="module")
def ring():
    """512 targets of an eight-mode mixture at half-log-SNR 0, and the map from the prior to them."""
    process = jd.processes.vp_linear()
    angles = np.arange(8) * np.pi / 4
    means = 4 * np.stack([np.cos(angles), np.sin(angles)], 1)
    denoiser = jd.gaussian_mixture(means, [0.1] * 8, [1] * 8, process)
    data, _ = denoiser.params.sample(jax.random.key(1), (512,))
    t = float(process.time(0.0))
    noise = jax.random.normal(jax.random.key(2), data.shape)
    fit = fit_map(process.perturb(data, noise, t), jax.random.key(3), block=500)
    return process, denoiser, means, t, fit


def test_every_cell_has_its_mass(ring):
    """Row 13: max |w_i - 1 / 512| 512 < 0.5, on fresh samples (of whose noise it has 0.2)."""
    fit = ring[-1]
    assert fit.converged
    masses = cell_masses(fit.map, jax.random.key(4), 200_000)
    assert np.max(np.abs(masses - 1 / 512)) * 512 < 0.5
    assert transport_error(fit.map, fit.masses, fit.wanted)[0] < 0.5


def test_ten_evaluations_leave_half_of_the_samples_between_modes(ring):
    """Row 13: against DDIM with ten from pure noise; off a mode is beyond 4 of its deviations."""
    process, denoiser, means, t, fit = ring
    z = process.prior(jax.random.key(5), (4000, 2))

    def off(grid, x):
        tableau = jd.solvers.ddim(grid)
        assert tableau.nfe == 10
        x = np.asarray(jd.sample(denoiser, tableau, x))
        return np.mean(np.min(np.linalg.norm(x[:, None] - means, axis=-1), axis=1) > 0.4)

    plain = off(jd.grids.half_log_snr(process, 10), z)
    assert off(jd.grids.half_log_snr(process, 10, t_max=t), fit.map(z)) <= 0.5 * plain
    assert plain > 0.01


def test_bad_arguments():
    key, good = jax.random.key(0), np.zeros((4, 2))
    found = SemidiscreteMap(jnp.zeros((4, 2)), jnp.zeros(4))
    for match, call in (
        (r"n at least 2, got shape \(1, 2\)", lambda: fit_map(good[:1], key)),
        ("finite", lambda: fit_map(good * np.nan, key)),
        ("4 positive numbers", lambda: fit_map(good, key, [1, 1, 1, 0])),
        ("heights as many", lambda: fit_map(good, key, heights=[0.0])),
        ("at least 1", lambda: fit_map(good, key, samples=0)),
        ("tolerance", lambda: fit_map(good, key, tolerance=0)),
        ("from 1 to 4, got 5", lambda: found.averaged(jnp.zeros((1, 2)), 5, 0.7)),
        ("at least 0", lambda: found.averaged(jnp.zeros((1, 2)), 2, -1.0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
