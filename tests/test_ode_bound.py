"""The variational bound: one Gaussian dimension term by term, a mixture, and integer levels."""

import jax
import numpy as np
import pytest
from oracles import BROAD
from scipy.integrate import quad
from scipy.stats import norm

import jaxdiff as jd
from jaxdiff import ode

VP, FLOW = jd.processes.vp_linear(), jd.processes.flow()
GRID = jd.grids.half_log_snr(VP, 12)
LARGE = jd.solvers.ddpm(GRID, "fixed_large").C[:, 0]
STD = 0.7
X = np.array([[-1.5], [0.2], [0.9]])


def gaussian(prediction="v"):
    return jd.gaussian_mixture([[0.0]], [STD], [1.0], prediction=prediction)


def level(process, t):
    return float(process.alpha(t)), float(process.sigma(t))


def expected_square(x, alpha, sigma):
    """E (x - x0_hat(alpha x + sigma eps))^2, x0_hat = k (x + eps sigma / alpha)."""
    k = alpha**2 * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return (1 - k) ** 2 * x**2 + k**2 * (sigma / alpha) ** 2


def parts(x, variance):
    """Prior, diffusion and reconstruction of `discrete_bound` on GRID, exactly."""
    alpha, sigma = GRID.alpha, GRID.sigma
    v = sigma**2 / alpha**2
    start = sigma[0] ** 2 + alpha[0] ** 2
    share = sigma[0] ** 2 / start
    prior = 0.5 * (alpha[0] ** 2 * x**2 / start + share - 1 - np.log(share))
    diffusion = 0.0
    for i in range(GRID.steps):
        # Moments of q(z' | z, x) and p(z' | z) in y = z / alpha, where only x differs from x0_hat.
        true = (v[i] - v[i + 1]) * v[i + 1] / v[i]
        model = true if variance == "small" else (LARGE[i] / alpha[i + 1]) ** 2
        shift = ((v[i] - v[i + 1]) / v[i]) ** 2 * expected_square(x, alpha[i], sigma[i])
        diffusion += 0.5 * ((true + shift) / model - 1 + np.log(model / true))
    gap = expected_square(x, alpha[-1], sigma[-1])
    reconstruction = 0.5 * (gap / v[-1] + np.log(2 * np.pi * v[-1]))
    return prior, diffusion, reconstruction


@pytest.mark.parametrize("variance", ["small", "large"])
def test_every_term_of_the_discrete_bound(variance, x64):
    copies = np.repeat(X, 4000, 0)
    out = ode.discrete_bound(gaussian(), GRID, copies, jax.random.key(0), variance=variance)
    assert out.standard_error is None and out.nfe == 13
    for found, exact in zip(
        (out.prior, out.diffusion, out.reconstruction), parts(X[:, 0], variance)
    ):
        found = np.asarray(found).reshape(3, -1)
        error = found.std(1) / np.sqrt(found.shape[1])
        assert np.all(np.abs(found.mean(1) - exact) < 3.5 * error + 1e-9)
    total = -sum(parts(X[:, 0], variance))
    assert np.all(total < norm.logpdf(X[:, 0], 0, sampler_std(variance)))


def sampler_std(variance):
    """What ddpm on GRID draws from pure noise, and the decoder after it: that density is bounded."""
    table = jd.solvers.ddpm(GRID, f"fixed_{variance}")
    alpha, sigma = GRID.alpha, GRID.sigma
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)  # x0_hat = gain z
    total = alpha[0] ** 2 + sigma[0] ** 2
    for i in range(GRID.steps):
        factor = table.A[i, 0, 0] + np.sum(table.B[i, 0]) * gain[i]
        total = factor**2 * total + table.C[i, 0] ** 2
    return np.sqrt(gain[-1] ** 2 * total + (sigma[-1] / alpha[-1]) ** 2)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_step_from_alpha_zero(variance, x64):
    """To z' = (x + eps) / 2: x0_hat = 0, and the variance is (1/2)^2, or ddpm's."""
    grid = jd.grids.uniform(FLOW, 2)
    assert grid.ends == (True, True)
    out = ode.discrete_bound(gaussian("flow"), grid, X, jax.random.key(0), variance=variance)
    model = jd.solvers.ddpm(grid, f"fixed_{variance}").C[0, 0] ** 2
    exact = 0.5 * ((0.25 + 0.25 * X[:, 0] ** 2) / model - 1 + np.log(model / 0.25))
    np.testing.assert_allclose(out.diffusion, exact, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_promoted(dtype):
    x, key = jax.numpy.asarray(X, dtype), jax.random.key(0)
    wide = x.astype("float32")
    law = ode.importance_law(gaussian(), VP, x, key)
    for bound in (
        lambda x: ode.discrete_bound(gaussian(), GRID, x, key),
        lambda x: ode.continuous_bound(gaussian(), VP, x, key, samples=4, law=law),
    ):
        found = bound(x).log_prob
        assert found.dtype == "float32"
        np.testing.assert_allclose(found, bound(wide).log_prob, rtol=1e-6)


def test_the_continuous_bound_is_the_log_density_for_the_exact_denoiser(x64):
    """By quadrature in closed form: prior and decoder alone are missing. Then by sampling."""
    end, start = level(VP, VP.t_min), level(VP, VP.t_max)

    def error(lam, x):  # E |eps - eps_hat|^2
        t = VP.time(lam)
        alpha, sigma = level(VP, t)
        return (alpha / sigma) ** 2 * expected_square(x, alpha, sigma)

    span = [np.log(a / s) for a, s in (start, end)]
    exact = []
    for x in X[:, 0]:
        diffusion = quad(error, *span, args=(x,), epsabs=1e-9, limit=200)[0]
        share = start[1] ** 2
        prior = 0.5 * (start[0] ** 2 * x**2 + share - 1 - np.log(share))
        rho2 = (end[1] / end[0]) ** 2
        decoder = 0.5 * (expected_square(x, *end) / rho2 + np.log(2 * np.pi * rho2))
        exact.append(-prior - diffusion - decoder)
    assert np.all(np.abs(exact - norm.logpdf(X[:, 0], 0, STD)) < 1e-3)
    out = ode.continuous_bound(gaussian(), VP, X, jax.random.key(1), samples=4000, stratified=False)
    assert np.all(np.abs(out.log_prob - np.array(exact)) < 3.5 * out.standard_error)
    assert np.all(out.standard_error < 0.2)
    total = out.prior + out.diffusion + out.reconstruction
    np.testing.assert_allclose(out.log_prob, -total, rtol=1e-12)


@pytest.fixture(scope="module")
def mixture():
    """(denoiser, 64 points, their log-densities, the law of importance)."""
    denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, prediction="v")
    x = BROAD.sample(np.random.default_rng(0), 64).astype(np.float32)
    law = ode.importance_law(denoiser, VP, x, jax.random.key(9))
    return denoiser, x, BROAD.log_density(x.astype(float), 1.0, 0.0), law


@pytest.mark.parametrize("law", ["uniform in lambda", "importance", "log_normal_sigma"])
def test_laws_of_the_time_give_one_bound(law, mixture):
    denoiser, x, truth, importance = mixture
    options = {"importance": importance, "uniform in lambda": None}
    out = ode.continuous_bound(
        denoiser,
        VP,
        x,
        jax.random.key(2),
        samples=256,
        stratified=False,
        law=options.get(law, law),
    )
    gap = truth - np.asarray(out.log_prob)
    error = np.sqrt(np.mean(np.asarray(out.standard_error) ** 2) / len(x))
    assert abs(gap.mean()) < 3 * error
    # What is reported is the scatter that there is.
    assert 0.8 < gap.std() / (error * np.sqrt(len(x))) < 1.25
    # Times where the error is large: 0.6 of the scatter.
    if law == "importance":
        assert error * np.sqrt(len(x)) < 0.8


def test_stratified_times_vary_less(mixture):
    denoiser, x, _, _ = mixture
    copies = np.repeat(x[:1], 512, 0)
    out = ode.continuous_bound(denoiser, VP, copies, jax.random.key(3), samples=32, t_min=0.05)
    # The reported error is that of independent times.
    reported = np.sqrt(np.mean(np.asarray(out.standard_error) ** 2))
    assert np.asarray(out.log_prob).std() < 0.92 * reported


# --- integer levels -------------------------------------------------------------------------------

LEVELS = 5
SHARES = np.array([0.1, 0.3, 0.05, 0.35, 0.2])
K = np.arange(LEVELS)[:, None]


def of_levels(prediction="x0"):
    """The exact denoiser of data that are levels, with these shares."""
    values = ode.from_levels(K, LEVELS)
    return jd.gaussian_mixture(values, np.zeros(LEVELS), SHARES, prediction=prediction)


@pytest.mark.parametrize("decoder", ["categorical", "discretised_normal"])
def test_bounds_on_the_probability_of_a_level(decoder, x64):
    """The truth is known, and at low noise z tells the level: the continuous bound is tight."""
    out = ode.continuous_bound(
        of_levels(), VP, np.tile(K, (200, 1)), jax.random.key(5), samples=100, decoder=decoder,
        levels=LEVELS,
    )  # fmt: skip
    found = np.asarray(out.log_prob).reshape(200, LEVELS)
    error = found.std(0) / np.sqrt(len(found))
    assert np.all(np.abs(found.mean(0) - np.log(SHARES)) < 3.5 * error + 5e-4)
    assert np.abs(np.asarray(out.reconstruction)).max() < 1e-6


def test_the_last_step_to_sigma_zero_is_the_decoder_s():
    grid = jd.grids.uniform(FLOW, 10)
    assert grid.ends == (True, True)
    out = ode.discrete_bound(
        of_levels("flow"), grid, np.tile(K, (400, 1)), jax.random.key(6), levels=LEVELS,
        decoder="discretised_normal", decoder_std=0.1,
    )  # fmt: skip
    assert out.nfe == 10
    found = np.asarray(out.log_prob).reshape(400, LEVELS)
    assert np.all(found.mean(0) < np.log(SHARES))
    np.testing.assert_allclose(out.prior, 0.0, atol=1e-6)  # pure noise at t = 1


# --- errors ---------------------------------------------------------------------------------------

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ode.discrete_bound(gaussian(), VP, X, KEY), TypeError, "expected a grid"),
        (lambda: ode.discrete_bound(gaussian(), GRID.reversed(), X, KEY), ValueError, "reversed"),
        (
            lambda: ode.discrete_bound(gaussian("eps"), jd.grids.uniform(FLOW, 4), X, KEY),
            ValueError,
            "alpha = 0.*'eps'.*use v, x0 or flow",
        ),
        (
            lambda: ode.discrete_bound(gaussian(), GRID, K, KEY),
            TypeError,
            "uniform_dequantisation.*int",
        ),
        (
            lambda: ode.discrete_bound(gaussian(), GRID, X, KEY, levels=5),
            ValueError,
            "continuous data: pass no levels",
        ),
        (
            lambda: ode.discrete_bound(gaussian(), GRID, X, KEY, decoder="categorical"),
            ValueError,
            "needs levels=",
        ),
        (
            lambda: ode.discrete_bound(gaussian(), GRID, X, KEY, decoder="categorical", levels=5),
            TypeError,
            "integer levels 0 .. 4, got float64",
        ),
        (
            lambda: ode.continuous_bound(gaussian(), FLOW, X, KEY),
            ValueError,
            "t = 0: pass a larger",
        ),
        (
            lambda: ode.continuous_bound(gaussian(), VP, X, KEY, law="unifrom"),
            ValueError,
            "did you mean uniform",
        ),
        (
            lambda: ode.continuous_bound(gaussian(), VP, X, KEY, decoder="normall"),
            ValueError,
            "decoder must be one of",
        ),
        (
            lambda: ode.continuous_bound(gaussian(), VP, X, KEY, t_min=0.9, t_max=0.1),
            ValueError,
            "t_min < t_max, got t_min = 0.9",
        ),
        (
            lambda: ode.continuous_bound(gaussian(), VP, X, KEY, t_max=1.5),
            ValueError,
            r"t must lie in \[0, 1\]",
        ),
        (
            lambda: ode.importance_law(gaussian(), VP, X, KEY, t_min=0.5, t_max=0.5),
            ValueError,
            "t_min < t_max",
        ),
        (
            lambda: ode.discrete_bound(gaussian(), GRID, 200.5 * X, KEY, data_range=(-1, 1)),
            ValueError,
            r"lie in \[-1, 1\].*uniform_dequantisation",
        ),
        (
            lambda: ode.continuous_bound(gaussian(), VP, 200.5 * X, KEY, data_range=(-1, 1)),
            ValueError,
            r"lie in \[-1, 1\].*uniform_dequantisation",
        ),
        (
            lambda: ode.discrete_bound(gaussian(), GRID, 1.0 * K, KEY),
            ValueError,
            "up to 4.*uniform_dequantisation or variational_dequantisation.*data_range=",
        ),
        (
            lambda: ode.continuous_bound(gaussian(), VP, jax.numpy.asarray(K, "bfloat16"), KEY),
            ValueError,
            "up to 4.*uniform_dequantisation",
        ),
        (
            lambda: ode.discrete_bound(
                gaussian(), GRID, K, KEY, decoder="categorical", levels=5, data_range=(0, 4)
            ),
            ValueError,
            "data_range is of continuous data",
        ),
        (
            lambda: ode.discrete_bound(gaussian(), GRID, X, KEY, decoder_std=0.0),
            ValueError,
            "decoder_std must be positive",
        ),
        (
            lambda: ode.continuous_bound(gaussian(), VP, X, KEY, decoder_std=-0.1),
            ValueError,
            "decoder_std must be positive",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_whole_numbers_are_taken_with_their_range():
    x = np.array([[-3.0], [4.0]])
    out = ode.discrete_bound(gaussian(), GRID, x, KEY, data_range=(-4, 4))
    assert np.all(np.isfinite(out.log_prob))


def test_pytrees_are_taken(x64):
    tree = {"a": np.repeat(X, 500, 0), "b": np.zeros((1500, 1, 1))}

    out = ode.discrete_bound(_TREE, GRID, tree, jax.random.key(0))
    exact = sum(parts(X[:, 0], "small")) + sum(parts(np.zeros(3), "small"))
    found = -np.asarray(out.log_prob).reshape(3, -1)
    assert np.all(np.abs(found.mean(1) - exact) < 3.5 * found.std(1) / np.sqrt(500))


def _tree(x, levels):
    _, alpha, sigma = levels
    k = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return jax.tree.map(lambda a: k * a, x)


_TREE = jd.Denoiser(_tree, "x0", None, lambda *level: level)
