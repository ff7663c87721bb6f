"""Model statistics estimated from a denoiser, against closed forms."""

import jax
import numpy as np
import pytest
from oracles import BROAD, WIDE

import jaxdiff as jd
from jaxdiff.calibration import estimate_statistics, noised_states

PROCESS = jd.processes.vp_linear()


def mixture(found):
    return jd.gaussian_mixture(found.means, found.std, found.weights, PROCESS)


def gaussian_case(bins, dim=3):
    """A correlated Gaussian, states with its exact moments at every bin, and its statistics.

    With K = (I + e^{2 lam} Sigma)^{-1} and u = x / alpha - mean: rho eps = K u, u' = -K u, so that
    l = diag K, f = (K - l) u - l mean and f' = (K' - l' - (K - l) K) u - l' mean.
    """
    rng = np.random.default_rng(0)
    factor, mean = rng.normal(size=(dim, dim)), rng.normal(size=dim)
    cov = 0.5 * factor @ factor.T + 0.1 * np.eye(dim)
    grid = jd.grids.half_log_snr(PROCESS, bins)
    z = rng.normal(size=(40, dim))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / len(z))).T
    states, found = [], []
    for lam, alpha in zip(grid.lam, grid.alpha):
        spread = cov + np.exp(-2 * lam) * np.eye(dim)
        states.append(alpha * (mean + z @ np.linalg.cholesky(spread).T))
        k = np.linalg.inv(np.eye(dim) + np.exp(2 * lam) * cov)
        slope = -2.0 * np.exp(2 * lam) * k @ cov @ k
        l, dl = np.diag(k), np.diag(slope)  # noqa: E741
        g = k - np.diag(l)
        h = slope - np.diag(dl) - g @ k
        s = np.diag(g @ spread @ h.T) / np.diag(g @ spread @ g.T)
        found.append((l, s, -dl * mean + s * l * mean))
    model = jd.gaussian_mixture(mean[None], cov[None], [1.0], PROCESS, prediction="v")
    return model, grid, np.stack(states), [np.stack(part) for part in zip(*found)]


def test_statistics_of_correlated_gaussian_data(x64):
    """Exact but for l', a difference of second order over the bins."""
    errors = []
    for bins in (50, 100):
        model, grid, states, (l, s, b) = gaussian_case(bins)  # noqa: E741
        found = estimate_statistics(model, grid, [states[:, :12], states[:, 12:]])
        np.testing.assert_allclose(found.l, l, rtol=1e-9)
        np.testing.assert_allclose(found.b, b, atol=1e-7)
        errors.append(np.abs(found.s - s)[1:-1].max())
    assert errors[1] < 0.03 and errors[0] / errors[1] > 3.5


def test_statistics_of_gaussian_data_with_independent_components(x64):
    """f = -l mean does not vary: s = 0 and b = -l' mean, l' = -2 l (1 - l)."""
    std, mean = np.array([0.3, 1.0, 2.0]), np.array([1.0, -0.5, 2.0])
    grid = jd.grids.half_log_snr(PROCESS, 200)
    x0 = mean + std * np.random.default_rng(0).normal(size=(20, 3))
    states = noised_states(grid, x0, jax.random.key(0))
    model = jd.gaussian_mixture(mean[None], std[None], [1.0], PROCESS)
    found = estimate_statistics(model, grid, [states])
    l = 1.0 / (1.0 + np.exp(2.0 * grid.lam[:, None]) * std**2)  # noqa: E741
    np.testing.assert_allclose(found.l, l, rtol=1e-8)
    assert np.all(found.s == 0)
    np.testing.assert_allclose(found.b, 2.0 * l * (1.0 - l) * mean, atol=3e-3)
    # A diagonal Jacobian is its random estimate, whatever the signs.
    random = estimate_statistics(model, grid, [states], "rademacher", key=jax.random.key(1))
    np.testing.assert_allclose(random.l, found.l, rtol=1e-8)


def test_signs_are_unbiased_and_go_by_the_key(x64):
    model, grid, states, found = gaussian_case(4)
    states = np.repeat(states, 20, axis=1)

    def run(seed):
        key = jax.random.key(seed)
        return estimate_statistics(model, grid, [states], "rademacher", probes=8, key=key).l

    once = run(0)
    np.testing.assert_array_equal(once, run(0))
    assert np.any(once != run(1))
    np.testing.assert_allclose(once, found[0], atol=0.02)  # 6400 probes of deviation below 0.3


def test_trajectories_are_states_too(x64):
    """Those of an exact denoiser have the law of noised data."""
    bins, model = jd.grids.half_log_snr(PROCESS, 20), mixture(WIDE)
    x0, _ = model.params.sample(jax.random.key(3), (1000,))
    x_T = np.random.default_rng(6).normal(size=(1000, WIDE.means.shape[1]))
    paths = jd.sample(model, jd.solvers.unipc(bins, 3), x_T, save="nodes")
    noised = noised_states(bins, x0, jax.random.key(1))
    of_paths, of_data = (estimate_statistics(model, bins, [states]) for states in (paths, noised))
    np.testing.assert_allclose(of_paths.l, of_data.l, atol=0.02)
    assert np.abs(of_paths.l - of_data.l).max() > 1e-4


def test_batches_and_chunks_do_not_matter():
    """In float32, the default; states of any shape."""
    model, grid, states, _ = gaussian_case(6, dim=4)
    shaped = jd.Denoiser(_flat, "v", model, jd.denoisers.level)
    states = states.astype(np.float32)
    once = estimate_statistics(model, grid, [states])
    parts = [np.reshape(states[:, part], (7, -1, 2, 2)) for part in (slice(0, 5), slice(5, 40))]
    split = estimate_statistics(shaped, grid, parts, chunk=3)
    for name in "lsb":
        expected = getattr(once, name).reshape(7, 2, 2)
        np.testing.assert_allclose(getattr(split, name), expected, rtol=2e-3, atol=2e-3)


def _flat(model, x, levels, cond=None):
    return model(x.reshape(len(x), -1), *levels).reshape(x.shape)


def test_bad_grids_and_batches():
    model, grid = mixture(BROAD), jd.grids.half_log_snr(PROCESS, 4)
    for refused in (jd.grids.half_log_snr(PROCESS, 4, end="zero"), grid.reversed()):
        with pytest.raises(ValueError, match="positive throughout"):
            estimate_statistics(model, refused, [np.ones((len(refused), 1, 2))])
    states = np.ones((5, 3, 2))
    for batches, options, error, message in (
        ((s for s in [states]), {}, TypeError, "twice"),
        ([], {}, ValueError, "at least one"),
        ([states[1:]], {}, ValueError, "5 nodes"),
        ([states], {"diagonal": "none"}, ValueError, "diagonal must be"),
        ([states], {"diagonal": "rademacher"}, ValueError, "key goes with"),
        ([states], {"key": jax.random.key(0)}, ValueError, "key goes with"),
    ):
        with pytest.raises(error, match=message):
            estimate_statistics(model, grid, batches, **options)
