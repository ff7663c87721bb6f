"""DDNM, DDNM+ and DDRM against their published steps in NumPy, and on Gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxdiff as jd
from jaxdiff import inverse

PROCESS = jd.processes.vp_linear()
DATA = oracles.WIDE
RNG = np.random.default_rng(5)
# Singular values of every kind: none, tiny, small, large.
LEFT, RIGHT = (np.linalg.qr(RNG.normal(size=(n, n)))[0] for n in (6, 16))
VALUES = np.array([3.0, 1.0, 0.6, 0.25, 0.02, 0.0])
A = LEFT @ np.diag(VALUES) @ RIGHT[:, :6].T
X0 = DATA.sample(RNG, 5)
START = RNG.normal(size=(5, 16))
STD = 0.3
Y = X0 @ A.T


def network():
    return jd.gaussian_mixture(
        DATA.means, DATA.std, DATA.weights, PROCESS, "eps", dtype=jnp.float64
    )


def measured(noise_std):
    noise = np.random.default_rng(8).normal(size=Y.shape) * (VALUES > 0) @ LEFT.T
    return inverse.Measurement(inverse.matrix(A), Y + noise_std * noise, noise_std)


def grid_of(steps):
    return jd.grids.half_log_snr(PROCESS, steps, end="zero")


def parts(measurement):
    """s, U^T y / s (0 where s is), V: of A's own decomposition."""
    u, s, vt = np.linalg.svd(A)
    s = np.pad(np.where(s > 1e-10, s, 0.0), (0, 10))
    uty = np.pad(np.asarray(measurement.y) @ u, ((0, 0), (0, 10)))
    return s, np.divide(uty, s, out=np.zeros_like(uty), where=s > 0), vt.T


def denoised(x, a, s):
    eps = DATA.eps(x, a, s)
    return (x - s * eps) / a, eps


def test_ddnm_is_the_published_loop_and_consistent(x64):
    """x0 - A^+ (A x0 - y), then a' x0 + s' (eta z + sqrt(1 - eta^2) eps); so is DDNM+."""
    eta, grid, m = 0.85, grid_of(6), measured(0.0)
    table = jd.solvers.ddim(grid, eta, outputs=2, noise_scale="full")
    noise = RNG.normal(size=(table.draws, 5, 16))
    x, pinv = START, np.linalg.pinv(A, rcond=1e-6)
    for i in range(6):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        x0, eps = denoised(x, a, s)
        z = noise[i] if i < 5 else 0.0
        x = a1 * (x0 - (x0 @ A.T - Y) @ pinv.T) + s1 * (eta * z + np.sqrt(1 - eta**2) * eps)
    got = jd.sample(inverse.ddnm(network(), m), table, START, noise=noise)
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got @ A.T, Y, atol=1e-9)
    plus, control = inverse.ddnm_plus(network(), grid, m, eta)
    again = jd.sample(network(), plus, START, noise=noise, control=control)
    np.testing.assert_allclose(again, x, rtol=1e-9, atol=1e-9)


def test_time_travel_of_ddnm_and_ddnm_plus_agree(x64):
    """Without noise they are one sampler, also on the way up."""
    grid, m = grid_of(6), measured(0.0)
    plus, control = inverse.ddnm_plus(network(), grid, m, 0.85, length=2, repeats=3)
    base = functools.partial(jd.solvers.ddim, eta=0.85, outputs=2, noise_scale="full")
    table = jd.solvers.time_travel(grid, 3, length=2, base=base)
    noise = RNG.normal(size=(table.draws, 5, 16))
    assert plus.nfe == table.nfe == 14 and plus.draws == table.draws == 13
    one = jd.sample(inverse.ddnm(network(), m), table, START, noise=noise)
    two = jd.sample(network(), plus, START, noise=noise, control=control)
    np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(one @ A.T, Y, atol=1e-9)


@pytest.mark.parametrize("eta", [0.85, 0.0])
def test_ddnm_plus_is_the_published_step(x64, eta):
    """Its `Lambda` and `Lambda_noise`, by index sets; every regime of singular values occurs."""
    grid, m = grid_of(6), measured(STD)
    table, control = inverse.ddnm_plus(network(), grid, m, eta)
    noise = RNG.normal(size=(table.draws, 5, 16))
    s, y, v = parts(m)
    inv = np.divide(1.0, s, out=np.zeros(16), where=s > 0)
    x, seen_regimes = START, set()
    for i in range(6):
        (_, a, sigma), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        x0, eps = denoised(x, a, sigma)
        lam, d1, d2 = np.ones(16), np.full(16, s1 * eta), np.full(16, s1 * np.sqrt(1 - eta**2))
        low, high = s1 < a1 * STD * inv, s1 > a1 * STD * inv
        lam[low] = s[low] * s1 * np.sqrt(1 - eta**2) / a1 / STD
        d1[low], d2[low] = s1 * eta, 0.0
        d1[high], d2[high] = np.sqrt(s1**2 - a1**2 * STD**2 * inv[high] ** 2), 0.0
        d1[s == 0], d2[s == 0] = s1 * eta, s1 * np.sqrt(1 - eta**2)
        seen_regimes |= {(low & (s > 0)).any(), (high & (s > 0)).any() + 2}
        gap = np.where(s > 0, x0 @ v - y, 0.0)
        z = noise[i] if i < 5 else np.zeros_like(x)
        x = a1 * (x0 - (lam * gap) @ v.T) + (d1 * (z @ v) + d2 * (eps @ v)) @ v.T
    assert seen_regimes >= {True, 3}
    got = jd.sample(network(), table, START, noise=noise, control=control)
    np.testing.assert_allclose(got, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("etas", [(0.85, 1.0), (0.6, 0.7)])
def test_ddrm_is_the_published_loop(x64, etas):
    """`efficient_generalized_steps` with etaA = etaC = eta, in VE units, from its own first state."""
    (eta, eta_b), grid, m = etas, grid_of(6), measured(STD)
    table, control = inverse.ddrm(network(), grid, m, eta, eta_b)
    noise = RNG.normal(size=(table.draws, 5, 16))
    s, y, v = parts(m)
    first = grid.sigma[0] / grid.alpha[0]
    large = s * first > STD
    init = np.where(large, y, 0.0)
    left = first**2 - np.divide(STD, s, out=np.zeros(16), where=large) ** 2
    # Here the state is alpha times that; the published one divides by sigma / alpha.
    x = grid.alpha[0] * (init + np.sqrt(left) * (START / grid.sigma[0] @ v)) @ v.T
    for i in range(6):
        (_, a, sigma), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        x0, eps = denoised(x, a, sigma)
        x0, eps, rho = x0 @ v, eps @ v, s1 / a1
        z = (noise[i] if i < 5 else np.zeros_like(x)) @ v
        before, after = s * rho > STD, (s * rho < STD) & (s > 0)
        new = x0 + rho * (np.sqrt(1 - eta**2) * eps + eta * z)
        toward = s * (y - x0) / STD
        new[:, after] = (x0 + rho * (np.sqrt(1 - eta**2) * toward + eta * z))[:, after]
        b = before
        std = np.sqrt(rho**2 - STD**2 / s[b] ** 2 * eta_b**2)
        new[:, b] = y[:, b] * eta_b + (1 - eta_b) * x0[:, b] + std * z[:, b]
        x = a1 * new @ v.T
    got = jd.sample(network(), table, START, noise=noise, control=control)
    np.testing.assert_allclose(got, x, rtol=1e-8, atol=1e-8)


def test_ddrm_of_aligned_gaussian_data_is_the_posterior(x64):
    """A prior with V's axes, no noise, eta = 0: y where it is seen, else DDIM on its marginal."""
    variances = np.linspace(0.2, 2.0, 16)
    cov = RIGHT @ np.diag(variances) @ RIGHT.T
    net = jd.gaussian_mixture(np.zeros((1, 16)), cov[None], [1.0], PROCESS)
    seen = np.array([2.0, 1.0, 0.5, 0.1])[:, None] * RIGHT[:, :4].T
    truth = np.array([0.5, -1.0, 0.3, 0.8])
    m = inverse.Measurement(inverse.matrix(seen), seen @ RIGHT[:, :4] @ truth, 0.0)
    grid, factor = grid_of(6), np.ones(16)
    for i in range(6):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        factor *= (a1 * a * variances + s1 * s) / (a**2 * variances + s**2)
    table, control = inverse.ddrm(net, grid, m, eta=0.0)
    key = jax.random.key(1)
    x = np.asarray(jd.sample(net, table, START, key, control=control)) @ RIGHT
    np.testing.assert_allclose(x[:, :4], np.broadcast_to(truth, (5, 4)), atol=1e-9)
    np.testing.assert_allclose(x[:, 4:], (factor * (START @ RIGHT))[:, 4:], rtol=1e-8)


def test_no_jacobian_and_one_evaluation():
    """A network that cannot be differentiated is sampled; a row calls it once."""
    calls = []

    @jax.custom_jvp
    def network(x, t):
        calls.append(1)
        return 0.5 * x

    def differentiated(primals, tangents):
        raise AssertionError("a Jacobian was asked for")

    network.defjvp(differentiated)
    net, grid = jd.Denoiser(network, "x0"), grid_of(4)
    m = inverse.Measurement(inverse.matrix(A), Y, STD)
    key, x = jax.random.key(0), jnp.zeros((5, 16))
    runs = [(net, *inverse.ddrm(net, grid, m)), (net, *inverse.ddnm_plus(net, grid, m)),
            (net, *inverse.daps(net, grid, m, inner=2, end=1e-4)),
            (inverse.ddnm(net, m, keep_eps=False), jd.solvers.ddim(grid), None),
            (inverse.diffpir(net, m), inverse.partial_renewal(grid), None)]  # fmt: skip
    jax.eval_shape(lambda k: jd.sample(net, jd.solvers.ddim(grid), x, k), key)
    plain = len(calls)  # the loop is traced more than once
    for denoiser, table, control in runs:
        assert denoiser.cost == 1
        calls.clear()
        jax.eval_shape(
            lambda k, d=denoiser, t=table, c=control: jd.sample(d, t, x, k, control=c), key
        )
        assert len(calls) == plain > 0


def test_bad_input_is_named():
    m, net, grid = inverse.Measurement(inverse.matrix(A), Y, STD), jd.Denoiser(_half), grid_of(3)
    with pytest.raises(TypeError, match="ddrm takes a Measurement, got tuple"):
        inverse.ddrm(net, grid, (A, Y))
    with pytest.raises(ValueError, match=r"eta_b must be in \[0.0, 1.0\], got 1.5"):
        inverse.ddrm(net, grid, m, eta_b=1.5)
    with pytest.raises(TypeError, match="ddnm_plus takes a grid"):
        inverse.ddnm_plus(net, jd.solvers.ddim(grid), m)
    with pytest.raises(ValueError, match="from noise to data"):
        inverse.ddnm_plus(net, jd.grids.half_log_snr(PROCESS, 3).reversed(), m)
    table, control = inverse.ddrm(net, grid, m)
    with pytest.raises(ValueError, match=r"DDRM: the state has shape \(2, 4, 4\)"):
        jd.sample(net, table, jnp.zeros((2, 4, 4)), jax.random.key(0), control=control)
    with pytest.raises(ValueError, match="5 measurements for 2 samples"):
        jd.sample(net, table, jnp.zeros((2, 16)), jax.random.key(0), control=control)


def _half(x, t):
    return 0.5 * x
