"""log p(x) by the probability flow, against mixtures and Gaussians in closed form."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from oracles import BROAD, WIDE, Mixture
from scipy.stats import multivariate_normal, norm

import jaxdiff as jd
from jaxdiff import ode

VP, EDM, FLOW = jd.processes.vp_linear(), jd.processes.edm(), jd.processes.flow()

OTHER = Mixture(-BROAD.means, 0.5 * BROAD.std, BROAD.weights)


def pid(tolerance):
    return diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=ode.sample_norm)


def exact(mixture, prediction="eps"):
    return jd.gaussian_mixture(mixture.means, mixture.std, mixture.weights, prediction=prediction)


def level(process, t):
    return float(process.alpha(t)), float(process.sigma(t))


# --- the exact trace ------------------------------------------------------------------------------

# (process, t_min, t_max, mixture, form, prediction)
CASES = {
    "VP, 2 dimensions": (VP, 1e-3, 1.0, BROAD, "lambda", "v"),
    "EDM, 16 dimensions": (EDM, 0.002, 80.0, WIDE, "lambda", "score"),
    "flow, 2 dimensions": (FLOW, 1e-3, 0.999, BROAD, "rho", "flow"),
    "VP, 16 dimensions": (VP, 1e-3, 1.0, WIDE, "rho", "x0"),
}


@pytest.mark.parametrize("case", CASES)
def test_exact_trace_gives_the_log_density_of_a_mixture(case, x64):
    process, t_min, t_max, mixture, form, prediction = CASES[case]
    start, end = level(process, t_min), level(process, t_max)
    x = mixture.sample(np.random.default_rng(0), 6, *start)
    out = ode.log_likelihood(
        exact(mixture, prediction), process, x, t_min=t_min, t_max=t_max, form=form,
        stepsize_controller=pid(1e-7), trace=ode.exact(chunk=5),
        prior=lambda x_T: mixture.log_density(np.asarray(x_T), *end),
    )  # fmt: skip
    # The target is 1e-4 nats.
    np.testing.assert_allclose(out.log_prob, mixture.log_density(x, *start), rtol=0, atol=2e-5)
    assert out.standard_error is None
    np.testing.assert_allclose(out.x_T, mixture.flow(x, start, end), rtol=0, atol=1e-5 * end[1])


def test_default_tolerance_in_float32_and_nothing_recompiles():
    x = BROAD.sample(np.random.default_rng(1), 64, *level(VP, 1e-3)).astype(np.float32)
    out = ode.log_likelihood(exact(BROAD), VP, x)
    error = np.asarray(out.log_prob) - BROAD.log_density(x, *level(VP, 1e-3))
    assert out.log_prob.dtype == jnp.float32
    # The default prior's truncation at t_max is some 5e-4 of it.
    assert np.abs(error).max() < 3e-3
    with counted() as compiled:
        ode.log_likelihood(exact(OTHER), VP, 0.9 * x, t_min=2e-3, stepsize_controller=pid(1e-4))
    assert not compiled
    with pytest.raises(ValueError, match=r"one number a sample, \(64,\), got \(\)"):
        ode.log_likelihood(exact(BROAD), VP, x, prior=lambda x: jnp.sum(x))


# --- the prior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_max", [10.0, 80.0])
def test_prior_is_the_process_s_where_swirl_dynamics_is_not(sigma_max, x64):
    """swirl-dynamics' prior has the standard deviation sigma^2 in place of sigma.

    Its log-likelihood (lib/diffusion/samplers.py) of N(0, 1.2^2) is then too low, by 0.9
    to 4.3 nats here.
    """
    std = 1.2
    denoiser = jd.gaussian_mixture([[0.0]], [std], [1.0], prediction="eps")
    x = np.array([[-1.0], [0.5], [2.0]])
    out = ode.log_likelihood(
        denoiser, EDM, x, t_max=sigma_max, prior=std, stepsize_controller=pid(1e-8)
    )
    truth = norm.logpdf(x[:, 0], 0.0, np.hypot(std, 0.002))
    np.testing.assert_allclose(out.log_prob, truth, rtol=0, atol=1e-6)
    ours = norm.logpdf(out.x_T[:, 0], 0.0, np.hypot(std, sigma_max))
    theirs = norm.logpdf(out.x_T[:, 0], 0.0, sigma_max**2)
    wrong = np.asarray(out.log_prob) - ours + theirs
    # log(sigma_max), less half of (x_T / sigma_max)^2.
    assert np.all(truth - wrong > np.log(sigma_max) - 1.5), truth - wrong


def test_default_prior_is_what_process_prior_draws_from():
    from jaxdiff.ode.likelihood import prior_variance

    processes = [VP, EDM, FLOW, jd.processes.ve(), jd.processes.sub_vp(), jd.processes.ddpm()]
    for process in processes:
        variance = prior_variance(process, process.t_max)
        np.testing.assert_allclose(variance, process.prior_std**2, rtol=1e-6)


# --- random probes --------------------------------------------------------------------------------

DIM = 16
_BASIS = np.linalg.qr(np.random.default_rng(3).normal(size=(DIM, DIM)))[0]
# Two directions carry nearly everything: the denoised x0's Jacobian is nearly of rank 2.
COVARIANCE = (_BASIS * np.array([2.0, 1.0] + [1e-3] * (DIM - 2))) @ _BASIS.T
COPIES = 128


def near_plane(trace):
    """128 independent estimates of log p of one x, and the truth."""
    denoiser = jd.gaussian_mixture(np.zeros((1, DIM)), COVARIANCE[None], [1.0], prediction="eps")
    alpha, sigma = level(VP, 0.05)
    cov = alpha**2 * COVARIANCE + sigma**2 * np.eye(DIM)
    x = np.random.default_rng(4).multivariate_normal(np.zeros(DIM), cov)
    out = ode.log_likelihood(
        denoiser, VP, np.tile(x, (COPIES, 1)), t_min=0.05, trace=trace, key=jax.random.key(0),
        prior=lambda x_T: denoiser.params.log_density(x_T, *level(VP, 1.0)),
        stepsize_controller=pid(1e-4),
    )  # fmt: skip
    return out, multivariate_normal(np.zeros(DIM), cov).logpdf(x)


@pytest.fixture(scope="module")
def estimates():
    with jax.enable_x64(True):
        return {
            "rademacher": near_plane(ode.hutchinson(9)),
            "hutch++": near_plane(ode.hutch_pp(9)),
        }


@pytest.mark.parametrize("name", ["rademacher", "hutch++"])
def test_random_probes_are_unbiased_and_report_their_error(name, estimates):
    out, truth = estimates[name]
    values, reported = np.asarray(out.log_prob), np.asarray(out.standard_error)
    spread = values.std(ddof=1)
    assert abs(values.mean() - truth) < 3 * spread / np.sqrt(COPIES) + 1e-3
    # Nine or three terms each: their variances scatter, but not their mean.
    assert 0.8 < np.sqrt(np.mean(reported**2)) / spread < 1.25
    assert out.nfe % 10 == 0


def test_hutch_pp_varies_less_at_the_same_number_of_products(estimates):
    spreads = {name: np.asarray(out.log_prob).std() for name, (out, _) in estimates.items()}
    assert spreads["hutch++"] < 0.3 * spreads["rademacher"]


def test_traces_of_a_known_matrix():
    """Variances 2 |A|^2 (Gaussian) and 2 |A off the diagonal|^2 (signs); rank 2 exactly for Hutch++."""
    rng = np.random.default_rng(5)
    root = rng.normal(size=(6, 6)).astype(np.float32)
    full, low = root + root.T, (root[:, :2] @ root[:, :2].T)

    def estimate(method, matrix, key):
        x = jnp.zeros((4000, 6))
        fn = lambda x: (x @ matrix.T, None)  # noqa: E731
        return np.asarray(ode.value_and_trace(method, fn, x, method.probes(key, x))[2])

    key = jax.random.key(0)
    assert estimate(ode.exact(), full, key)[0] == pytest.approx(np.trace(full), rel=1e-5)
    off = full - np.diag(np.diag(full))
    for law, matrix in (("rademacher", off), ("gaussian", full)):
        found = estimate(ode.hutchinson(2, law), full, key)
        variance = 2 * np.sum(matrix**2)
        assert found.shape == (4000, 2)
        assert abs(found.mean() - np.trace(full)) < 4 * np.sqrt(variance / 8000)
        assert found.var() == pytest.approx(variance, rel=0.1)
        assert abs(np.corrcoef(found.T)[0, 1]) < 0.07
    # Two directions of the sketch span the range of a matrix of rank 2.
    found = estimate(ode.HutchPP(8, "gaussian"), low, key)
    np.testing.assert_allclose(found, np.trace(low), rtol=1e-3)


# --- what it costs, gradients, pytrees ------------------------------------------------------------


def test_derivative_is_the_score(x64):
    x = BROAD.sample(np.random.default_rng(7), 4, *level(VP, 0.05))

    def log_prob(x):
        return ode.log_likelihood(
            exact(BROAD), VP, x, t_min=0.05, stepsize_controller=pid(1e-7),
            adjoint=diffrax.ForwardMode(),
            prior=lambda x_T: exact(BROAD).params.log_density(x_T, *level(VP, 1.0)),
        ).log_prob  # fmt: skip

    direction = np.random.default_rng(8).normal(size=x.shape)
    _, slope = jax.jvp(log_prob, (jnp.asarray(x),), (jnp.asarray(direction),))
    score = BROAD.score(x, *level(VP, 0.05))
    np.testing.assert_allclose(slope, np.sum(score * direction, 1), rtol=0, atol=1e-4)


_calls = []


def _tree(scale, x, levels, cond):
    jax.debug.callback(lambda: _calls.append(1))
    _, alpha, sigma = levels
    shift = lambda a: cond.reshape(-1, *[1] * (a.ndim - 1))  # noqa: E731
    size = (alpha * scale) ** 2 + sigma**2
    return jax.tree.map(lambda a: sigma * (a - alpha * shift(a)) / size, x)


def test_pytrees_conditions_and_evaluations(x64):
    rng = np.random.default_rng(8)
    x = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=(3, 2, 2))}
    cond = np.array([0.0, 1.0, -0.5])
    denoiser = jd.Denoiser(_tree, "eps", 0.8, lambda *level: level)

    def density(x, sigma):
        flat = np.concatenate([np.reshape(a, (3, -1)) for a in x.values()], 1)
        return norm.logpdf(flat, cond[:, None], np.hypot(0.8, sigma)).sum(1)

    _calls.clear()
    out = ode.log_likelihood(
        denoiser, EDM, x, t_min=0.1, t_max=10.0, cond=cond, stepsize_controller=pid(1e-7),
        prior=lambda x_T: density(x_T, 10.0),
    )  # fmt: skip
    np.testing.assert_allclose(out.log_prob, density(x, 0.1), rtol=0, atol=1e-5)
    jax.effects_barrier()
    # A call, and a product for each of the sample's six numbers.
    assert out.nfe == len(_calls) * 7 and out.accepted > 5
    assert jax.tree.map(jnp.shape, out.x_T) == {"a": (3, 2), "b": (3, 2, 2)}


# --- errors ---------------------------------------------------------------------------------------


def _levels(x, t):
    return x


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"x": np.zeros((2, 2), np.uint8)}, TypeError, "uniform_dequantisation.*uint8"),
        (
            {"x": np.full((2, 2), 200.0), "data_range": (-1.0, 1.0)},
            ValueError,
            "200.*uniform_dequantisation or variational_dequantisation",
        ),
        (
            {"x": np.full((2, 2), 200.0)},
            ValueError,
            "up to 200.*uniform_dequantisation or variational_dequantisation.*data_range=",
        ),
        ({"t_min": 0.9, "t_max": 0.1}, ValueError, "t_min < t_max, got t_min = 0.9"),
        ({"t_max": 1.5}, ValueError, r"t must lie in \[0, 1\]"),
        ({"t_min": 0.0}, ValueError, "sigma = 0 at t = 0.*larger t_min"),
        ({"process": FLOW, "t_min": 0.1}, ValueError, "alpha = 0 at t = 1.*smaller t_max"),
        ({"solver": diffrax.SRA1()}, ValueError, "SRA1 is not a solver for ODEs"),
        ({"solver": diffrax.Euler()}, ValueError, "Euler gives no error estimate"),
        ({"x": np.zeros((2, 300))}, ValueError, r"300 products.*hutchinson.*exact\(max_dim=300\)"),
        ({"trace": ode.hutchinson(2)}, ValueError, "needs key="),
        ({"trace": ode.hutch_pp(3), "key": 0}, ValueError, "no fewer products than the exact"),
        ({"trace": "hutchinson"}, TypeError, "must be exact"),
        ({"x": np.float32(1.0)}, ValueError, "batch"),
        ({"denoiser": _levels}, TypeError, "Denoiser"),
        ({"process": "vp"}, TypeError, "process of jaxdiff.processes"),
    ],
)
def test_bad_input_is_named(options, error, message):
    arguments = {"denoiser": exact(BROAD), "process": VP, "x": np.zeros((2, 2))} | options
    with pytest.raises(error, match=message):
        ode.log_likelihood(**arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ode.hutchinson(0),
        lambda: ode.hutchinson(1, "uniform"),
        lambda: ode.hutch_pp(2),
        lambda: ode.exact(0),
    ],
)
def test_bad_estimators_are_named(make):
    with pytest.raises(ValueError, match="must be"):
        make()
