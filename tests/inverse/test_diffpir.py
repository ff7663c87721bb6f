"""DiffPIR's proximal step and renewal against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxdiff as jd
from jaxdiff import inverse

PROCESS = jd.processes.vp_linear()
RNG = np.random.default_rng(2)
A = RNG.normal(size=(4, 6))
DATA = oracles.Mixture(RNG.normal(size=(2, 6)), np.array([0.5, 0.8]), np.array([0.4, 0.6]))
Y, STD = RNG.normal(size=(3, 4)), 0.2


def network():
    return jd.gaussian_mixture(DATA.means, DATA.std, DATA.weights, PROCESS, "v", dtype=jnp.float64)


def prox(x0, ridge):
    """argmin |y - A u|^2 + ridge |u - x0|^2, by its normal equations."""
    return np.linalg.solve(A.T @ A + ridge * np.eye(6), A.T @ Y.T + ridge * x0.T).T


@pytest.mark.parametrize("setting", [(0.3, 0.0, 1), (1.0, 0.0, 1), (0.4, 0.5, 2)])
def test_it_is_the_published_loop(x64, setting):
    """x_0 by the proximal map, eps anew from it, then the renewal; back up between repeats."""
    zeta, eta, repeats = setting
    strength, guidance = 1.7, 0.8
    grid = jd.grids.half_log_snr(PROCESS, 4, end="zero")
    table = inverse.partial_renewal(grid, zeta, eta, repeats)
    assert table.rows == 3 * repeats + 1 and table.draws == 3 * repeats
    start, noise = RNG.normal(size=(3, 6)), RNG.normal(size=(table.draws, 3, 6))
    x, draw = start, 0
    for i in range(4):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        for repeat in range(repeats if i < 3 else 1):
            x0 = (x - s * DATA.eps(x, a, s)) / a
            x0 = x0 + guidance * (prox(x0, strength * STD**2 * a**2 / s**2) - x0)
            if i == 3:
                x = x0
                break
            eps = (x - a * x0) / s
            eta_s = eta * s1 / s * np.sqrt(s**2 - (a / a1) ** 2 * s1**2)  # beta of the step
            x = a1 * x0 + np.sqrt(1 - zeta) * np.sqrt(s1**2 - eta_s**2) * eps
            variance = (1 - zeta) * eta_s**2 + zeta * s1**2
            if repeat < repeats - 1:
                x = a / a1 * x
                variance = (a / a1) ** 2 * variance + s**2 - (a / a1 * s1) ** 2
            x, draw = x + np.sqrt(variance) * noise[draw], draw + 1
    m = inverse.Measurement(inverse.matrix(A), Y, STD)
    got = jd.sample(inverse.diffpir(network(), m, strength, guidance), table, start, noise=noise)
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


def test_the_ends_of_renewal():
    """zeta = 0 is DDIM with eta; zeta = 1 renews everything; one strength is data for another."""
    grid = jd.grids.half_log_snr(PROCESS, 5, end="zero")
    for zeta, eta, other in (
        (0.0, 0.7, jd.solvers.ddim(grid, 0.7)),
        (1.0, 0.0, jd.solvers.ddim(grid, 1.0, noise_scale="full")),
    ):
        table = inverse.partial_renewal(grid, zeta, eta)
        for name in ("A", "B", "C", "draw"):
            np.testing.assert_allclose(getattr(table, name), getattr(other, name), atol=1e-12)
    ours = inverse.partial_renewal(grid, jnp.asarray(0.3))
    np.testing.assert_allclose(ours.C, inverse.partial_renewal(grid, 0.3).C, rtol=1e-5)


def test_a_mask_mixes_pixels_by_the_published_formula():
    """(m y + rho x0) / (m + rho), with a noise floor where the measurement has none."""
    mask = np.array([1.0, 0.0, 1.0])
    y = np.array([0.3, 0.0, -0.5])
    m = inverse.Measurement(inverse.inpainting(mask), y, 0.0)
    net = inverse.diffpir(jd.Denoiser(_third, "x0"), m, strength=2.0, least_std=0.1)
    x = np.array([[0.9, 0.6, -0.3]], np.float32)
    rho = 2.0 * (0.1 * 0.8 / 0.6) ** 2
    want = (mask * y + rho * x / 3) / (mask + rho)
    np.testing.assert_allclose(net(jnp.asarray(x), 0.5, 0.8, 0.6), want, rtol=1e-5)
    scales = jnp.array([0.5, 2.0])
    build = lambda c: inverse.diffpir(jd.Denoiser(_third, "x0"), m, c, 1.0, 0.1)  # noqa: E731
    many = jax.vmap(lambda c: build(c)(x, 0.5, 0.8, 0.6))(scales)
    np.testing.assert_allclose(many[1], want, rtol=1e-5)


def _third(x, t):
    return x / 3


def test_bad_input_is_named():
    m = inverse.Measurement(inverse.matrix(A), Y, 0.0)
    net, grid = jd.Denoiser(_third, "x0"), jd.grids.half_log_snr(PROCESS, 3)
    with pytest.raises(ValueError, match="strength must be at least 0.0, and finite, got -1"):
        inverse.diffpir(net, m, strength=-1)
    with pytest.raises(ValueError, match="without noise least_std must be positive, got 0"):
        inverse.diffpir(net, m, least_std=0)
    with pytest.raises(ValueError, match=r"diffpir: the state has shape \(3, 5\)"):
        inverse.diffpir(net, m)(jnp.zeros((3, 5)), 0.5, 0.8, 0.6)
    with pytest.raises(ValueError, match=r"zeta must be in \[0.0, 1.0\], got 1.5"):
        inverse.partial_renewal(grid, 1.5)
    with pytest.raises(ValueError, match="repeats must be an integer of at least 1, got True"):
        inverse.partial_renewal(grid, repeats=True)
