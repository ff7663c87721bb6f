"""Intrinsic dimension on a circle, a sphere and a plane, whose exact denoisers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ive

import jaxdiff as jd
from jaxdiff import diagnostics

PROCESS = jd.processes.vp_linear()
COUNT = 6


def on_sphere(dimension, ambient):
    y = np.random.default_rng(dimension).normal(size=(COUNT, dimension + 1))
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return np.pad(y, ((0, 0), (0, ambient - dimension - 1))).astype(np.float32)


def plane():
    """A Gaussian of variances 1 and 1 / 2 on a plane through R^6: (denoiser, points, basis)."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0][:, :2]
    covariance = basis @ np.diag([1.0, 0.5]) @ basis.T
    denoiser = jd.gaussian_mixture(np.zeros((1, 6)), covariance[None], np.ones(1))
    return denoiser, denoiser.params.sample(jax.random.key(0), (COUNT,))[0], basis


MANIFOLDS = {
    "circle": (1, lambda: (diagnostics.sphere(1, 3), on_sphere(1, 3))),
    "sphere": (2, lambda: (diagnostics.sphere(2, 5), on_sphere(2, 5))),
    "plane": (2, lambda: plane()[:2]),
}


@pytest.mark.parametrize("name", MANIFOLDS)
def test_scores_tell_the_dimension(name):
    """1 for a circle in R^3, 2 for a sphere in R^5 and a plane in R^6, at every point."""
    want, make = MANIFOLDS[name]
    denoiser, x = make()
    t = float(PROCESS.time(3.5))
    found = diagnostics.flipd(denoiser, PROCESS, x, t)
    np.testing.assert_allclose(found, want, atol=0.01)
    bundle = diagnostics.normal_bundle(denoiser, PROCESS, x, t, jax.random.key(1))
    np.testing.assert_array_equal(bundle.dimension, want)


@pytest.mark.parametrize("name", ["circle", "sphere"])
def test_the_flow_contracts_all_other_directions(name):
    want, make = MANIFOLDS[name]
    denoiser, x = make()
    grid = jd.grids.half_log_snr(PROCESS, 20)
    start = PROCESS.prior(jax.random.key(2), x.shape)
    tableau = jd.solvers.dpm_solver_pp_multistep(grid)
    _, values = diagnostics.flow_singular_values(denoiser, tableau, start)
    np.testing.assert_array_equal(diagnostics.flow_dimension(values, grid.sigma), want)


def test_flipd_of_a_gaussian_in_closed_form():
    """d - sum sigma^2 / V + sigma^2 |Sigma^-1 alpha x|^2 in the plane, V = alpha^2 v + sigma^2."""
    denoiser, x, basis = plane()
    for lam in (-0.5, 1.0):
        t = float(PROCESS.time(lam))
        alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
        total = alpha**2 * np.array([1.0, 0.5]) + sigma**2
        inside = np.asarray(x, np.float64) @ basis
        want = 2 - np.sum(sigma**2 / total) + sigma**2 * np.sum((alpha * inside / total) ** 2, 1)
        np.testing.assert_allclose(
            diagnostics.flipd(denoiser, PROCESS, x, t), want, rtol=1e-4, atol=1e-4
        )


def test_flipd_with_probes_is_near_the_exact_trace():
    denoiser, x, _ = plane()
    t = float(PROCESS.time(0.0))
    exact = diagnostics.flipd(denoiser, PROCESS, x, t)
    found = diagnostics.flipd(denoiser, PROCESS, x, t, probes=400, key=jax.random.key(3))
    # A sign's estimate of sigma^2 tr J varies by at most sqrt(2) |sigma^2 J|_F <= sqrt(2 d).
    assert np.max(np.abs(found - exact)) < 4 * np.sqrt(2 * 6 / 400)
    assert np.max(np.abs(found - exact)) > 1e-4


def test_singular_values_of_a_linear_flow():
    """For a Gaussian x_t = mean + sqrt(V_t / V_T) (x_T - mean_T), direction by direction."""
    denoiser, x, _ = plane()
    grid = jd.grids.half_log_snr(PROCESS, 60)
    tableau = jd.solvers.dpm_solver_pp_multistep(grid)
    start = PROCESS.prior(jax.random.key(2), (COUNT, 6))
    states, values = diagnostics.flow_singular_values(denoiser, tableau, start)
    np.testing.assert_allclose(
        states[-1], jd.sample(denoiser, tableau, start), rtol=1e-5, atol=1e-5
    )
    variances = np.array([1.0, 0.5, 0, 0, 0, 0])
    total = [grid.alpha[i] ** 2 * variances + grid.sigma[i] ** 2 for i in (0, -1)]
    want = np.broadcast_to(np.sqrt(total[1] / total[0]), (COUNT, 6))
    np.testing.assert_allclose(values[-1], want, rtol=0.01)
    np.testing.assert_array_equal(diagnostics.flow_dimension(values, grid.sigma), 2)


@pytest.mark.parametrize("dimension", [1, 2])
def test_the_sphere_is_the_mean_of_points_on_it(dimension):
    """E[x_0 | x] by quadrature over the circle, and over the sphere's angle to x."""
    alpha, sigma, radius = 0.8, 0.5, 1.3
    x = np.random.default_rng(1).normal(size=(4, 5))
    n = dimension + 1
    length = np.linalg.norm(x[:, :n], axis=1)
    k = alpha * radius * length / sigma**2
    if dimension == 1:
        ratio = ive(1, k) / ive(0, k)
    else:
        u, w = np.polynomial.legendre.leggauss(80)  # the cosine of the angle is uniform on [-1, 1]
        weight = w * np.exp(k[:, None] * (u - 1))
        ratio = weight @ u / weight.sum(1)
    want = np.zeros_like(x)
    want[:, :n] = (radius * ratio / length)[:, None] * x[:, :n]
    denoiser = diagnostics.sphere(dimension, 5, radius)
    found = denoiser(jnp.asarray(x, jnp.float32), 0.5, alpha, sigma)
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("call", "message"), [
    (lambda d, x: diagnostics.flipd(d, PROCESS, x, 0.0), "sigma > 0"),
    (lambda d, x: diagnostics.flipd(d, PROCESS, x, 0.1, probes=3), "go together"),
    (lambda d, x: diagnostics.normal_bundle(d, PROCESS, x, 0.1, jax.random.key(0), count=2), "count"),
    (lambda d, x: diagnostics.flow_singular_values(
        d, jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 3), eta=1.0), x), "deterministic"),
    (lambda d, x: diagnostics.flow_dimension(np.ones((3, 2, 2)), np.array([3.0, 2.0, 1.5])), "3 times"),
    (lambda d, x: diagnostics.flow_dimension(np.ones((3, 2, 2)), np.ones(2)), "sigma"),
    (lambda d, x: diagnostics.sphere(3, 5), "dimension must be 1"),
    (lambda d, x: diagnostics.sphere(2, 2), "ambient"),
    (lambda d, x: diagnostics.sphere(1, 2, -1.0), "radius"),
])  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(diagnostics.sphere(1, 3), on_sphere(1, 3))
