"""The exact mixture against SciPy's densities, brute-force integrals, and automatic derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm

import jaxdiff as jd
from jaxdiff.predictions import PREDICTIONS

MEANS = np.array([[1.0, 0.2, -0.5], [-0.9, 0.6, 0.3]])
WEIGHTS = np.array([0.3, 0.9])  # not normalised
_turn = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 3, 3)))[0]
_variances = np.array([[0.1, 0.5, 2.0], [0.02, 1.0, 0.3]])
COVARIANCES = np.einsum("kij,kj,klj->kil", _turn, _variances, _turn)
SCALES = {
    "one a component": np.array([0.4, 0.8]),
    "one a dimension": np.array([[0.4, 0.8, 0.1], [1.2, 0.3, 0.5]]),
    "covariances": COVARIANCES,
}
every_shape = pytest.mark.parametrize("shape", SCALES)
LEVELS = [(0.6, 0.8), (1.0, 5.0), (0.99, 0.05), (1.0, 0.0), (0.0, 1.0)]
NORMALISED = WEIGHTS / WEIGHTS.sum()


def covariances(shape):
    """[components, dim, dim] of each way to give them."""
    scales = SCALES[shape]
    if scales.ndim == 3:
        return scales
    return np.stack([np.diag(np.broadcast_to(s, 3) ** 2) for s in scales])


def build(shape, **kwargs):
    return jd.gaussian_mixture(MEANS, SCALES[shape], WEIGHTS, **kwargs)


def points(count=7):
    return np.random.default_rng(1).normal(size=(count, 3)) * 1.5


def component_densities(shape, x, alpha, sigma):
    """w_k N(x; alpha m_k, alpha^2 V_k + sigma^2 I), [components, batch]."""
    return np.stack([
        w * multivariate_normal(alpha * m, alpha**2 * v + sigma**2 * np.eye(3)).pdf(x)
        for w, m, v in zip(NORMALISED, MEANS, covariances(shape))
    ])  # fmt: skip


@every_shape
@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_density_and_responsibilities_are_scipys(x64, shape, alpha, sigma):
    x, mixture = points(), build(shape).params
    joint = component_densities(shape, x, alpha, sigma)
    log_density = mixture.log_density(jnp.asarray(x), alpha, sigma)
    np.testing.assert_allclose(log_density, np.log(joint.sum(0)), rtol=1e-11)
    shares = mixture.responsibilities(jnp.asarray(x), alpha, sigma)
    np.testing.assert_allclose(shares, (joint / joint.sum(0)).T, rtol=1e-9, atol=1e-14)
    batch = np.array([0.6, 0.9, 0.0]), np.array([0.8, 0.1, 1.0])  # a level a sample
    got = mixture.log_density(jnp.asarray(x[:3]), *map(jnp.asarray, batch))
    each = [component_densities(shape, x[i], *(b[i] for b in batch)).sum() for i in range(3)]
    np.testing.assert_allclose(got, np.log(each), rtol=1e-11)


@every_shape
@pytest.mark.parametrize("alpha, sigma", LEVELS[:3])
def test_score_and_posterior_are_derivatives_of_the_density(x64, shape, alpha, sigma):
    """Tweedie: E = (x + sigma^2 grad) / alpha, Cov = sigma^2 / alpha^2 (I + sigma^2 Hessian)."""
    x, mixture = jnp.asarray(points()), build(shape).params

    def log_density(x):
        return mixture.log_density(x, alpha, sigma)

    gradient, hessian = jax.jit(
        lambda x: (jax.vmap(jax.grad(log_density))(x), jax.vmap(jax.hessian(log_density))(x))
    )(x)
    np.testing.assert_allclose(mixture.score(x, alpha, sigma), gradient, rtol=1e-10, atol=1e-11)
    mean, cov = mixture.posterior(x, alpha, sigma)
    tweedie = (x + sigma**2 * gradient) / alpha
    np.testing.assert_allclose(mean, tweedie, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(mixture.denoise(x, alpha, sigma), tweedie, rtol=1e-9, atol=1e-10)
    expected = sigma**2 / alpha**2 * (np.eye(3) + sigma**2 * hessian)
    np.testing.assert_allclose(cov, expected, rtol=1e-7, atol=1e-10)
    eps = mixture.expected_noise(x, alpha, sigma)
    np.testing.assert_allclose(eps, (x - alpha * mean) / sigma, rtol=1e-8, atol=1e-9)


def test_posterior_moments_are_the_integrals_in_one_dimension(x64):
    """E[x_0^n | x] = int x_0^n p(x_0) N(x; alpha x_0, sigma^2) / int p(x_0) N(x; ...)."""
    means, stds, weights = [-1.0, 0.4, 2.0], [0.3, 1.0, 0.2], [0.2, 0.5, 0.3]
    mixture = jd.gaussian_mixture(np.array(means)[:, None], stds, weights).params
    for alpha, sigma, x in [(0.6, 0.8, 0.3), (0.9, 0.3, -1.1), (0.05, 1.0, 2.0)]:

        def joint(x0, n, alpha=alpha, sigma=sigma, x=x):
            prior = sum(w * norm.pdf(x0, m, s) for w, m, s in zip(weights, means, stds))
            return x0**n * prior * norm.pdf(x, alpha * x0, sigma)

        moments = [
            quad(joint, -8, 8, args=(n,), points=[-1, 0.4, 2], epsabs=1e-13, epsrel=1e-12)[0]
            for n in range(3)
        ]
        first, second = (m / moments[0] for m in moments[1:])
        mean, cov = mixture.posterior(jnp.asarray([[x]]), alpha, sigma)
        np.testing.assert_allclose(mean, [[first]], rtol=1e-10)
        np.testing.assert_allclose(cov, [[[second - first**2]]], rtol=1e-9)
        log_density = mixture.log_density(jnp.asarray([[x]]), alpha, sigma)
        np.testing.assert_allclose(log_density, np.log(moments[0]), rtol=1e-11)


def test_posterior_moments_are_the_integrals_in_two_dimensions(x64):
    """Turned covariances; a trapezoid sum, which converges geometrically on Gaussians."""
    means = np.array([[0.5, -0.4], [-1.0, 0.7]])
    covs = np.array([[[0.5, 0.3], [0.3, 0.4]], [[0.2, -0.15], [-0.15, 0.6]]])
    weights = np.array([0.4, 0.6])
    alpha, sigma, x = 0.7, 0.6, np.array([0.2, 0.5])
    axis = np.linspace(-6, 6, 401)
    x0 = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    prior = sum(w * multivariate_normal(m, c).pdf(x0) for w, m, c in zip(weights, means, covs))
    mass = prior * multivariate_normal(x, sigma**2 * np.eye(2)).pdf(alpha * x0)
    mass /= mass.sum()
    mean = mass @ x0
    cov = np.einsum("n,ni,nj->ij", mass, x0 - mean, x0 - mean)
    mixture = jd.gaussian_mixture(means, covs, weights).params
    got = mixture.posterior(jnp.asarray(x[None]), alpha, sigma)
    np.testing.assert_allclose(got[0][0], mean, rtol=1e-11)
    np.testing.assert_allclose(got[1][0], cov, rtol=1e-11)


@every_shape
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_is_the_expectation_of_its_target(x64, shape, prediction):
    """E[a x_0 + b eps | x], where eps = (x - alpha x_0) / sigma."""
    x = points()
    denoiser = build(shape, prediction=prediction)
    assert denoiser.prediction == prediction
    for alpha, sigma in LEVELS[:3]:
        x0 = np.asarray(build(shape).params.posterior(jnp.asarray(x), alpha, sigma)[0])
        eps = (x - alpha * x0) / sigma
        expected = {
            "x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0,
            "score": -eps / sigma,
        }  # fmt: skip
        got = denoiser(jnp.asarray(x), None, alpha, sigma)
        np.testing.assert_allclose(got, expected[prediction], rtol=1e-9, atol=1e-9)
        for target in PREDICTIONS:
            converted = denoiser.predict(target, jnp.asarray(x), None, alpha, sigma)
            np.testing.assert_allclose(converted, expected[target], rtol=1e-8, atol=1e-8)


@every_shape
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_at_the_ends(x64, shape, prediction):
    """Pure noise: E[x_0] is the data's mean and eps is x. Data: x_0 is x and E[eps] is 0."""
    x, denoiser = points(), build(shape, prediction=prediction)
    mean = np.broadcast_to(NORMALISED @ MEANS, x.shape)
    noise = {"x0": mean, "eps": x, "v": -mean, "flow": x - mean, "score": -x}
    np.testing.assert_allclose(
        denoiser(jnp.asarray(x), None, 0.0, 1.0), noise[prediction], rtol=1e-12, atol=1e-14
    )
    clean = {"x0": x, "eps": 0 * x, "v": 0 * x, "flow": -x}
    if prediction == "score":
        joint = component_densities(shape, x, 1.0, 0.0)
        clean["score"] = -sum(
            (j / joint.sum(0))[:, None] * np.linalg.solve(v, (x - m).T).T
            for j, m, v in zip(joint, MEANS, covariances(shape))
        )
    np.testing.assert_allclose(
        denoiser(jnp.asarray(x), None, 1.0, 0.0), clean[prediction], rtol=1e-10, atol=1e-13
    )


@every_shape
def test_float32_is_float32_accurate(shape):
    """Also near the data, where (x - alpha x_0) / sigma would lose everything."""
    x = points()
    mixture = build(shape).params
    assert mixture.means.dtype == jnp.float32
    for alpha, sigma in [(0.6, 0.8), (1.0, 1e-3), (1.0, 80.0)]:
        with jax.enable_x64(True):
            wide = build(shape).params
            x0, eps = (
                np.asarray(f(jnp.asarray(x), alpha, sigma))
                for f in (wide.denoise, wide.expected_noise)
            )
        got = mixture.denoise(jnp.asarray(x, jnp.float32), alpha, sigma)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, x0, rtol=3e-5, atol=3e-6)
        got = mixture.expected_noise(jnp.asarray(x, jnp.float32), alpha, sigma)
        np.testing.assert_allclose(got, eps, rtol=1e-4, atol=1e-5 * np.abs(eps).max())


@every_shape
def test_samples_have_the_components_moments(x64, shape):
    """20,000 of them: shares, means and covariances within 5 standard errors."""
    x, k = build(shape).params.sample(jax.random.key(0), (200, 100))
    assert x.shape == (200, 100, 3) and k.shape == (200, 100)
    x, k = np.asarray(x).reshape(-1, 3), np.asarray(k).ravel()
    for component, (share, mean, cov) in enumerate(zip(NORMALISED, MEANS, covariances(shape))):
        mine = x[k == component]
        assert abs(len(mine) / len(x) - share) < 5 * np.sqrt(share * (1 - share) / len(x))
        errors = np.abs(mine.mean(0) - mean)
        assert np.all(errors < 5 * np.sqrt(np.diag(cov) / len(mine)))
        spread = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / len(mine))
        assert np.all(np.abs(np.cov(mine.T) - cov) < 5 * spread)


def test_scale_shapes_agree(x64):
    """The same mixture written three ways."""
    x, stds = jnp.asarray(points()), np.array([0.4, 0.8])
    ways = [stds, np.repeat(stds[:, None], 3, 1), stds[:, None, None] ** 2 * np.eye(3)]
    values = []
    for way in ways:
        mixture = jd.gaussian_mixture(MEANS, way, WEIGHTS).params
        parts = mixture.log_density(x, 0.6, 0.8), *mixture.posterior(x, 0.6, 0.8)
        values.append(np.concatenate([np.ravel(part) for part in parts]))
    np.testing.assert_allclose(values[1], values[0], rtol=1e-13)
    np.testing.assert_allclose(values[2], values[0], rtol=1e-12, atol=1e-13)


def test_a_component_may_be_a_point(x64):
    """Scale 0: the denoiser of a finite set of points, a softmax over them."""
    mixture = jd.gaussian_mixture(MEANS, [0.0, 0.0], WEIGHTS).params
    x, alpha, sigma = points(), 0.6, 0.8
    logits = np.log(WEIGHTS) - np.sum((x[:, None] - alpha * MEANS) ** 2, -1) / (2 * sigma**2)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    x = jnp.asarray(x)
    np.testing.assert_allclose(mixture.denoise(x, alpha, sigma), share @ MEANS, rtol=1e-12)
    flat = np.array([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.5]]] * 2)  # rank 2
    mean, cov = jd.gaussian_mixture(MEANS, flat, WEIGHTS).params.posterior(x, alpha, sigma)
    assert np.all(np.isfinite(mean)) and np.all(np.linalg.eigvalsh(cov) > -1e-14)


def test_levels_of_the_mixtures_process():
    process = jd.processes.vp_linear()
    mixture = build("covariances", process=process).params
    assert mixture.at(0.3) == (process.alpha(0.3), process.sigma(0.3))
    with pytest.raises(ValueError, match="without a process"):
        build("covariances").params.at(0.3)


def test_parameters_are_leaves(x64):
    """The gradient of the mean log-density with respect to the weights, in closed form."""
    x, denoiser = jnp.asarray(points()), build("covariances")
    gradient = jax.grad(lambda d: d.params.log_density(x, 0.6, 0.8).sum())(denoiser)
    shares = denoiser.params.responsibilities(x, 0.6, 0.8)
    np.testing.assert_allclose(gradient.params.log_weights, shares.sum(0), rtol=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(means=[0.0, 1.0]), r"\[components, dim\]"),
        (dict(means=[[0.0, 1.0, np.nan], [0.0, 1.0, 2.0]]), "means must be finite"),
        (dict(weights=[1.0]), "weights must be 2 positive numbers"),
        (dict(weights=[1.0, 0.0]), r"got \[1. 0.\]"),
        (dict(weights=[1.0, np.nan]), "weights must be 2 positive"),
        (dict(scales=[0.1, -0.1]), r"must not be negative, got \[ 0.1 -0.1\]"),
        (dict(scales=[0.1, np.nan]), "must not be negative"),
        (dict(scales=[0.1, 0.2, 0.3]), r"shape \(2,\), \(2, 3\) or \(2, 3, 3\), got \(3,\)"),
        (dict(scales=0.1), r"got \(\)"),
        (dict(scales=np.ones((2, 2))), r"got \(2, 2\)"),
        (dict(scales=np.triu(np.ones((2, 3, 3)))), "covariances must be symmetric"),
        (dict(scales=np.stack([np.eye(3), -np.eye(3)])), "positive semi-definite"),
        (dict(scales=np.full((2, 3, 3), np.nan)), "covariances must be symmetric"),
        (dict(prediction="noise"), "unknown prediction 'noise'"),
    ],
)
def test_bad_mixtures_are_named(change, message):
    arguments = dict(means=MEANS, scales=SCALES["one a component"], weights=WEIGHTS)
    with pytest.raises(ValueError, match=message):
        jd.gaussian_mixture(**{**arguments, **change})
