"""DAPS on Gaussian data: its posterior step, by Langevin too, and the whole chain's moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import inverse

PROCESS = jd.processes.vp_linear()
RNG = np.random.default_rng(4)
A, STD, RADIUS = RNG.normal(size=(2, 3)), 0.4, 0.7
Y, CENTRE = np.array([0.5, -0.8]), np.array([0.3, -0.2, 0.6])
FROM_NOISE = jd.grids.uniform(jd.processes.flow(), 4, t_max=1.0, t_min=0.1, end="zero")
MEASUREMENT = inverse.Measurement(inverse.matrix(A), Y, STD)


def exact():
    precision = A.T @ A / STD**2 + np.eye(3) / RADIUS**2
    cov = np.linalg.inv(precision)
    return cov @ (A.T @ Y / STD**2 + CENTRE / RADIUS**2), cov


@pytest.mark.parametrize("how", ["solve", "langevin", "momentum"])
def test_the_posterior_step(how):
    """Mean and covariance of p(x_0 | x_0hat, y); the steps' own bias is of the order of h."""
    mean, cov = exact()
    x0 = jnp.broadcast_to(jnp.asarray(CENTRE, jnp.float32), (20000, 3))
    key = jax.random.key(0)
    if how == "solve":
        x = inverse.gaussian_posterior(MEASUREMENT, x0, RADIUS, key)
    else:
        momentum = 0.7 if how == "momentum" else None
        h = 0.004 if how == "momentum" else 0.01
        chain = inverse.Langevin(steps=150, step_size=h, last=1.0, momentum=momentum)
        x = jax.jit(chain)(MEASUREMENT, x0, jnp.float32(RADIUS), jnp.float32(0.5), key)
    x = np.asarray(x, np.float64)
    scale = np.sqrt(np.diag(cov))
    np.testing.assert_allclose(x.mean(0), mean, atol=0.06 * scale.max())
    np.testing.assert_allclose(np.cov(x.T), cov, atol=0.12 * cov.max())


def test_one_langevin_step_is_as_written(x64):
    """h falls linearly along the levels; tau stands in for the measurement's noise."""
    chain = inverse.Langevin(steps=1, step_size=0.02, last=0.1, tau=0.5)
    m = inverse.Measurement(inverse.matrix(A), Y, STD)
    x0 = RNG.normal(size=(4, 3))
    one, two = (np.asarray(chain(m, jnp.asarray(x0), RADIUS, share, jax.random.key(3)))
                for share in (0.0, 0.5))  # fmt: skip
    gradient = (Y - x0 @ A.T) @ A / 0.5**2
    h = {0.0: 0.02, 0.5: 0.02 * 0.55}
    z = (one - x0 - h[0.0] * gradient) / np.sqrt(2 * h[0.0])
    np.testing.assert_allclose(two, x0 + h[0.5] * gradient + np.sqrt(2 * h[0.5]) * z, rtol=1e-9)
    assert 0.3 < z.std() < 2.0


def test_the_chain_has_the_moments_of_its_recursion():
    """One dimension, prior N(0, c), y = x + noise: every level is linear and Gaussian."""
    c, y, std, inner, end = 0.8, 1.3, 0.5, 3, 0.05
    grid = jd.grids.karras(PROCESS, 5, t_max=0.9, t_min=0.05, end="zero")
    net = jd.gaussian_mixture([[0.0]], [np.sqrt(c)], [1.0], PROCESS)
    m = inverse.Measurement(inverse.matrix([[1.0]]), [y], std)
    table, control = inverse.daps(net, grid, m, inner=inner, end=end)
    assert table.nfe == 5 * inner
    start = PROCESS.prior(jax.random.key(0), (20000, 1))
    x = np.asarray(jd.sample(net, table, start, jax.random.key(1), control=control), np.float64)
    mean, variance = 0.0, float(np.var(start))
    for i in range(5):
        alpha, sigma = grid.alpha[i], grid.sigma[i]
        r = sigma / alpha
        mean, variance = mean / alpha, variance / alpha**2
        # The flow of x / alpha by Euler in rho: dx / drho = rho x / (c + rho^2).
        rhos = np.linspace(r ** (1 / 7), end ** (1 / 7), inner + 1) ** 7
        factor = np.prod(1 + np.diff(rhos) * rhos[:-1] / (c + rhos[:-1] ** 2))
        keep = (1 / r**2) / (1 / r**2 + 1 / std**2)
        mean = keep * factor * mean + (1 - keep) * y
        variance = (keep * factor) ** 2 * variance + 1 / (1 / r**2 + 1 / std**2)
        mean = grid.alpha[i + 1] * mean
        variance = grid.alpha[i + 1] ** 2 * variance + grid.sigma[i + 1] ** 2
    np.testing.assert_allclose(x.mean(), mean, atol=0.02)
    np.testing.assert_allclose(x.var(), variance, rtol=0.04)


def test_bad_input_is_named():
    net = jd.Denoiser(_half, "x0")
    grid = jd.grids.half_log_snr(PROCESS, 4, end="zero")
    m = inverse.Measurement(inverse.matrix(A), Y, STD)
    with pytest.raises(ValueError, match='to sigma = 0: build it with end="zero"'):
        inverse.daps(net, jd.grids.half_log_snr(PROCESS, 4), m)
    with pytest.raises(ValueError, match="must end below the last level's sigma / alpha"):
        inverse.daps(net, grid, m, end=0.5)
    with pytest.raises(ValueError, match="needs a noise_std above 0"):
        inverse.daps(net, grid, inverse.Measurement(m.operator, Y, 0.0), end=1e-3)
    with pytest.raises(TypeError, match="langevin must be a Langevin or None, got int"):
        inverse.daps(net, grid, m, end=1e-3, langevin=100)
    for name, value in (("momentum", 1.0), ("last", 0.0), ("step_size", 0.0)):
        with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
            inverse.daps(net, grid, m, end=1e-3, langevin=inverse.Langevin(**{name: value}))
    with pytest.raises(ValueError, match="alpha = 0 at the noise end"):
        inverse.daps(net, FROM_NOISE, m)
    table, control = inverse.daps(net, grid, m, end=1e-3)
    with pytest.raises(ValueError, match=r"daps: the state has shape \(2, 4\)"):
        jd.sample(net, table, jnp.zeros((2, 4)), jax.random.key(0), control=control)


def _half(x, t):
    return 0.5 * x
