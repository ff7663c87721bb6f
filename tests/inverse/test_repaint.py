"""RePaint: what is known is noised at every level, and resampling brings the rest into harmony."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import inverse

PROCESS = jd.processes.vp_linear()
COV = np.array([[1.0, 0.9], [0.9, 1.0]])
KNOWN, MASK = np.array([1.5, 77.0]), np.array([1, 0])
COUNT = 3000


@pytest.fixture(scope="module")
def net():
    return jd.gaussian_mixture(np.zeros((1, 2)), COV[None], [1.0], PROCESS)


def run(net, grid, save="final", **options):
    table, control = inverse.repaint(grid, KNOWN, MASK, **options)
    x = PROCESS.prior(jax.random.key(0), (COUNT, 2))
    x = jd.sample(net, table, x, jax.random.key(1), control=control, save=save)
    return table, np.asarray(x, np.float64)


def test_resampling_comes_to_the_conditional(net):
    """p(x_2 | x_1) = N(0.9 x_1, 0.19): replacement alone misses its mean, repeats find it."""
    grid = jd.grids.half_log_snr(PROCESS, 12, end="zero")
    errors = {}
    for repeats in (1, 10):
        table, x = run(net, grid, length=1, repeats=repeats)
        assert table.nfe == 12 + (repeats - 1) * 11
        np.testing.assert_array_equal(x[:, 0], np.float32(1.5))
        errors[repeats] = abs(x[:, 1].mean() - 0.9 * 1.5)
    assert errors[1] > 0.1 and errors[10] < 0.4 * errors[1]
    assert abs(x[:, 1].std() - np.sqrt(0.19)) < 0.1


def test_known_entries_are_noised_ones(net):
    """Before every evaluation but the first, alpha y + sigma z, and independent from row to row."""
    grid = jd.grids.half_log_snr(PROCESS, 5)
    table, x = run(net, grid, "trajectory", length=2, repeats=2)
    seen = x[1:-1, :, 0]
    for r, row in enumerate(seen):
        alpha, sigma = table.alpha[r + 1], table.sigma[r + 1]
        assert abs(row.mean() - 1.5 * alpha) < 4 * sigma / np.sqrt(COUNT)
        assert abs(row.std() / sigma - 1) < 0.06
    across = np.corrcoef(seen)
    assert np.abs(across[~np.eye(len(seen), dtype=bool)]).max() < 0.08


def test_bad_input_is_named(net):
    grid = jd.grids.half_log_snr(PROCESS, 3)
    with pytest.raises(ValueError, match="a mask is 0 or 1"):
        inverse.repaint(grid, KNOWN, np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match="does not fit an image"):
        inverse.repaint(grid, KNOWN, np.array([1, 0, 1]))
    with pytest.raises(ValueError, match="length must be less than the 3 steps"):
        inverse.repaint(grid, KNOWN, MASK)
    with pytest.raises(ValueError, match="one register and one row a step, got 2 registers"):
        inverse.repaint(grid, KNOWN, MASK, 1, 2, jd.solvers.heun)
    with pytest.raises(ValueError, match="finite where the mask is 1"):
        inverse.repaint(grid, np.array([np.nan, 0.0]), MASK)
    inverse.repaint(grid, np.array([0.0, np.nan]), MASK, length=1)
    table, control = inverse.repaint(grid, KNOWN, MASK, length=1, repeats=2)
    for shape in ((4, 3), (4, 1)):
        with pytest.raises(ValueError, match=r"do not fit a state of shape \(4, "):
            jd.sample(net, table, jnp.zeros(shape), jax.random.key(0), control=control)
    noise = jnp.zeros((table.draws, 4, 2))
    with pytest.raises(ValueError, match="sample needs key="):
        jd.sample(net, table, jnp.zeros((4, 2)), noise=noise, control=control)
