"""Losses against closed forms: posterior variances, the papers' weights, the time laws' CDFs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Mixture
from scipy import stats
from scipy.optimize import brentq

import jaxdiff as jd
from jaxdiff import losses
from jaxdiff.predictions import PREDICTIONS, convert, target

PROCESSES = {
    "vp_linear": jd.processes.vp_linear(),
    "vp_cosine": jd.processes.vp_cosine(),
    "sub_vp": jd.processes.sub_vp(),
    "ddpm": jd.processes.ddpm(),
    "ve": jd.processes.ve(),
    "edm": jd.processes.edm(),
    "flow": jd.processes.flow(shift=2.0),
}
SPANS = ("vp_linear", "ddpm", "edm", "flow")  # one of each family, for the slower tests


def middle(process, n, margin=0.05):
    """n times inside the span, evenly spaced in t."""
    return jnp.linspace(*np.interp([margin, 1 - margin], [0, 1], [process.t_min, process.t_max]), n)


def first(params, x, t, cond=None):
    return params


# --- weights --------------------------------------------------------------------------------------


def snr_weight(name, snr, d_log_snr, **o):
    """(space, weight) as the papers and their code write them, for a log SNR of slope d_log_snr."""
    sigma = snr**-0.5  # EDM's, at alpha = 1
    return {
        "simple": ("eps", np.ones_like(snr)),
        "x0": ("x0", np.ones_like(snr)),
        "v": ("x0", snr + 1),
        "flow": ("flow", np.ones_like(snr)),
        "edm": ("x0", (sigma**2 + o.get("sigma_data", 0.5) ** 2)
                / (sigma * o.get("sigma_data", 0.5)) ** 2),
        "min_snr": ("x0", np.minimum(snr, o.get("gamma", 5.0))),
        "p2": ("eps", 1 / (o.get("k", 1.0) + snr) ** o.get("gamma", 1.0)),
        "elbo": ("eps", -0.5 * d_log_snr),
        "sigmoid": ("x0", -0.5 * d_log_snr * np.exp(o.get("bias", 0.0))
                    / (1 + np.exp(o.get("bias", 0.0)) / snr)),
    }[name]  # fmt: skip


def space_factor(space, prediction, alpha, sigma):
    """(error in `space` / error in `prediction`)^2 at a given x_t: the slope of the conversion."""
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    slope = convert(one, zero, prediction, space, alpha, sigma) - convert(
        zero, zero, prediction, space, alpha, sigma
    )
    return slope**2


CASES = [(name, {}) for name in losses.WEIGHTINGS] + [
    ("edm", {"sigma_data": 1.3}),
    ("min_snr", {"gamma": 0.7}),
    ("p2", {"gamma": 0.5, "k": 2.0}),
    ("sigmoid", {"bias": -3.0}),
]


def test_the_oracle_and_the_factors_cover_every_name():
    assert {name for name, _ in CASES} == set(losses.WEIGHTINGS)
    assert set(losses._LOG_FACTOR) == set(PREDICTIONS)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_weights_are_the_papers(process, x64):
    # A network that misses its target by 1 everywhere has a loss equal to the weight of its error.
    t = np.asarray(middle(process, 9, 0.01))
    alpha, sigma = process.alpha(t), process.sigma(t)
    x0, eps = np.random.default_rng(0).normal(size=(2, len(t), 3))
    d_log_snr = -process.rates(t)[1] / sigma**2  # g^2 = -2 sigma^2 d lam / dt
    for prediction in PREDICTIONS:
        missed = target(prediction, x0, eps, alpha, sigma) + 1.0
        denoiser = jd.Denoiser(first, prediction, params=missed)
        for name, options in CASES:
            space, weight = snr_weight(name, (alpha / sigma) ** 2, d_log_snr, **options)
            want = weight * space_factor(space, prediction, alpha, sigma)
            got = losses.score_matching(
                denoiser, process, x0, t, eps, weighting=name, **options
            )
            np.testing.assert_allclose(got, want, rtol=1e-7, err_msg=f"{prediction} {name}")


def test_a_weighting_can_be_a_function():
    process, t = PROCESSES["vp_linear"], jnp.array([0.2, 0.7])
    x0, eps = jax.random.normal(jax.random.key(0), (2, 2, 5))
    denoiser = jd.Denoiser(first, "v", params=jnp.zeros((2, 5)))
    loss = functools.partial(losses.score_matching, denoiser, process, x0, t, eps)
    mine = loss(weighting=lambda lam, rate, power: power * lam, power=-2.0)
    np.testing.assert_allclose(mine, loss(weighting="x0"), rtol=1e-6)


# --- one objective, five predictions --------------------------------------------------------------


class _Converted:
    """The prediction of a small network for eps, converted: five views of one function."""

    def __init__(self, prediction):
        self.prediction = prediction

    def __call__(self, params, x, levels, cond=None):
        t, alpha, sigma = levels
        eps = jnp.tanh(x @ params["w"] + params["b"] * t[:, None])
        return convert(eps, x, "eps", self.prediction, alpha, sigma)


def levels(t, alpha, sigma):
    return t, alpha, sigma


@pytest.mark.parametrize("name", SPANS)
def test_predictions_agree_in_value_and_gradient(name, x64):
    process, batch = PROCESSES[name], 6
    t = middle(process, batch)
    x0, eps = jax.random.normal(jax.random.key(1), (2, batch, 2))

    @jax.jit
    def table(params):
        return jnp.stack([
            jnp.stack([
                losses.score_matching(
                    jd.Denoiser(_Converted(p), p, params, levels), process, x0, t, eps, None, w
                )
                for p in PREDICTIONS
            ])
            for w in losses.WEIGHTINGS
        ])  # fmt: skip

    params = {"w": jnp.array([[0.3, -1.0], [0.8, 0.2]]), "b": jnp.array([0.5, -0.2])}
    value = table(params)  # [weighting, prediction, batch]
    np.testing.assert_allclose(value, jnp.broadcast_to(value[:, :1], value.shape), rtol=1e-10)
    for gradient in jax.tree.leaves(jax.jit(jax.jacfwd(table))(params)):
        assert jnp.all(jnp.abs(gradient).max(axis=(1, 2)) > 0)
        scale = jnp.abs(gradient).max(axis=(1, 3), keepdims=True)
        np.testing.assert_allclose(gradient / scale, (gradient / scale)[:, :1] + 0 * gradient,
                                   atol=1e-10)  # fmt: skip


def test_both_ends_take_their_limits():
    # alpha = 0 at t = 1 and sigma = 0 at t = 0, float32: weights of an error of 1.
    process, t = jd.processes.flow(), jnp.array([0.0, 1.0])
    x0, eps = jax.random.normal(jax.random.key(2), (2, 2, 4))
    alpha, sigma = process.alpha(t), process.sigma(t)

    def weights(prediction, weighting):
        # The score's error is measured as sigma times it: a miss of 1 in sigma score.
        y = -eps if prediction == "score" else target(prediction, x0, eps, alpha, sigma)
        params = y / sigma[:, None] if prediction == "score" else y + 1.0
        denoiser = jd.Denoiser(first, prediction, params=params)
        return losses.score_matching(denoiser, process, x0, t, eps, weighting=weighting)

    ends = {
        ("eps", "simple"): [1, 1], ("x0", "x0"): [1, 1], ("flow", "flow"): [1, 1],
        ("v", "v"): [1, 1], ("flow", "simple"): [1, 0], ("flow", "x0"): [0, 1],
        ("v", "simple"): [1, 0], ("v", "x0"): [0, 1], ("x0", "min_snr"): [5, 0],
        ("eps", "min_snr"): [0, 1], ("v", "min_snr"): [0, 0], ("eps", "p2"): [0, 1],
        ("x0", "p2"): [1, 0], ("eps", "edm"): [1, None], ("x0", "edm"): [None, 4],
        ("v", "edm"): [1, 4], ("eps", "sigmoid"): [0, None],
    }  # fmt: skip
    for (prediction, weighting), want in ends.items():
        got = weights(prediction, weighting)
        for g, w in zip(got, want):
            if w is not None:
                np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-6, err_msg=(prediction, weighting))
    # Diverging weights are cut off, not infinite or undefined.
    for weighting in losses.WEIGHTINGS:
        for prediction in ("x0", "eps", "v", "flow"):
            assert np.all(np.isfinite(weights(prediction, weighting))), (prediction, weighting)


def test_preconditioned_network_starts_at_one_under_edm():
    # F = 0 leaves the unit variance of its target: E loss = 1 at every level, for any alpha.
    s, batch = 0.7, 200_000
    for name in SPANS:
        process = PROCESSES[name]
        zero = jd.precondition(lambda x, c: jnp.zeros_like(x), s)
        keys = jax.random.split(jax.random.key(3), 2)
        x0 = s * jax.random.normal(keys[0], (batch, 1))
        eps = jax.random.normal(keys[1], (batch, 1))
        t = jnp.repeat(middle(process, 4), batch // 4)
        loss = losses.score_matching(zero, process, x0, t, eps, weighting="edm", sigma_data=s)
        by_level = np.asarray(loss).reshape(4, -1)
        error = by_level.std(1) / np.sqrt(by_level.shape[1])
        assert np.all(np.abs(by_level.mean(1) - 1) < 4 * error) and np.all(error < 0.01), name


# --- the exact denoiser ---------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gaussian_loss_is_the_posterior_variance(prediction):
    # E |x0_hat - x0|^2 = tr Cov[x0 | x_t] = sum_j v_j sigma^2 / (alpha^2 v_j + sigma^2).
    process, n = PROCESSES["vp_linear"], 40_000
    std, mean = np.array([0.5, 1.5]), np.array([[1.0, -2.0]])
    t = middle(process, 5, 0.1)
    denoiser = jd.gaussian_mixture(mean, std[None], [1.0], process, prediction)
    key_x, key_e = jax.random.split(jax.random.key(4))
    x0 = mean + std * jax.random.normal(key_x, (5 * n, 2))
    eps = jax.random.normal(key_e, (5 * n, 2))
    loss = jax.jit(lambda x0, eps, t: losses.score_matching(
        denoiser, process, x0.astype(jnp.float32), t, eps, weighting="x0"
    ))(x0, eps, jnp.repeat(t, n))  # fmt: skip
    loss = np.asarray(loss, np.float64).reshape(5, n)
    a2, s2 = (np.asarray(f(np.asarray(t, np.float64)))[:, None] ** 2
              for f in (process.alpha, process.sigma))  # fmt: skip
    want = np.mean(std**2 * s2 / (a2 * std**2 + s2), axis=1)
    error = loss.std(1) / np.sqrt(n)
    assert np.all(np.abs(loss.mean(1) - want) < 4 * error), (loss.mean(1), want, error)
    assert np.all(error < 0.02 * want)


LINE = Mixture(np.array([[-1.5], [0.5], [2.0]]), np.array([0.3, 0.5, 0.2]), np.array([0.3, 0.5, 0.2]))


def eps_error(alpha, sigma, mixture=LINE):
    """E |E[eps | x_t] - eps|^2 = 1 - E |E[eps | x_t]|^2, by quadrature in one dimension."""
    spread = 8 * np.sqrt(alpha**2 * 5.0 + sigma**2)
    x = np.linspace(-spread, spread, 20_001)[:, None]
    density = np.exp(mixture.log_density(x, alpha, sigma))
    return 1 - np.trapezoid(density * mixture.eps(x, alpha, sigma)[:, 0] ** 2, x[:, 0])


def draw(key, batch, mixture=LINE, process=None):
    """x0 and eps, [batch, 1], and the exact denoiser's builder for the mixture."""
    build = functools.partial(jd.gaussian_mixture, mixture.means, mixture.std, mixture.weights)
    key_x, key_e = jax.random.split(key)
    x0 = build().params.sample(key_x, (batch,))[0]
    return x0, jax.random.normal(key_e, x0.shape), build


@pytest.mark.parametrize("name", ["vp_cosine", "flow"])
def test_mixture_loss_is_its_quadrature(name):
    process, batch = PROCESSES[name], 1_000_000
    times = middle(process, 4, 0.1)
    x0, eps, build = draw(jax.random.key(5), batch)
    loss = jax.jit(lambda x0, eps: losses.score_matching(
        build(prediction="v"), process, x0, jnp.repeat(times, batch // 4), eps
    ))(x0, eps)  # fmt: skip
    loss = np.asarray(loss, np.float64).reshape(4, -1)
    want = [eps_error(float(process.alpha(t)), float(process.sigma(t))) for t in times]
    error = loss.std(1) / np.sqrt(loss.shape[1])
    assert np.all(np.abs(loss.mean(1) - want) < 4 * error), (loss.mean(1), want, error)
    assert np.all(error < 0.01 * np.array(want))


@pytest.mark.parametrize("name", ["vp_linear", "ve", "flow"])
def test_elbo_is_a_mutual_information(name):
    # I-MMSE: the integral of the noise error over lam is 0.5 log(1 + v SNR), whatever the process.
    process = PROCESSES[name] if name != "flow" else jd.processes.flow(1.0, 0.02, 0.98)
    batch, std = 400_000, 0.8
    denoiser = jd.gaussian_mixture(np.zeros((1, 1)), [std], [1.0], process, "x0")
    keys = jax.random.split(jax.random.key(6), 3)
    x0 = std * jax.random.normal(keys[0], (batch, 1))
    eps = jax.random.normal(keys[1], (batch, 1))

    @jax.jit
    def run(x0, eps):
        t = losses.sample_times("uniform", keys[2], batch, process, stratified=True)
        return losses.score_matching(denoiser, process, x0, t, eps, weighting="elbo")

    loss = (process.t_max - process.t_min) * np.asarray(run(x0, eps), np.float64)
    snr = [np.exp(2 * process.half_log_snr(np.float64(t))) for t in (process.t_min, process.t_max)]
    want = 0.5 * np.log((1 + std**2 * snr[0]) / (1 + std**2 * snr[1]))
    error = loss.std() / np.sqrt(batch)
    assert abs(loss.mean() - want) < 4 * error, (loss.mean(), want, error)
    assert error < 0.01 * want


@pytest.mark.parametrize(
    ("prediction", "weighting", "law"),
    [("x0", "edm", "log_normal_sigma"), ("eps", "min_snr", "uniform"), ("v", "simple", "cosmap"),
     ("flow", "flow", "logit_normal"), ("score", "sigmoid", "uniform")],
)  # fmt: skip
def test_gradient_vanishes_at_the_exact_mixture_alone(prediction, weighting, law):
    process, batch = PROCESSES["vp_linear"], 40_000
    x0, eps, build = draw(jax.random.key(7), batch)
    t = losses.sample_times(law, jax.random.key(8), batch, process)
    exact = build(prediction=prediction)

    def loss(mixture, x0, t, eps):
        return losses.score_matching(
            jd.Denoiser(exact.fn, prediction, mixture, exact.time),
            process, x0[None], t[None], eps[None], weighting=weighting,
        )[0]  # fmt: skip

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0)))

    def scores(mixture):
        """Means of the gradient in standard errors, for the means and the log-weights."""
        g = gradients(mixture, x0, t, eps)
        g = np.concatenate([g.means[..., 0], g.log_weights], 1).astype(np.float64)
        return g.mean(0) / (g.std(0) / np.sqrt(batch))

    at = np.abs(scores(exact.params))
    assert at.shape == (6,) and np.all(at < 4), at
    moved = dataclass_replace(exact.params, means=exact.params.means + jnp.array([[0.3], [0], [0]]))
    assert np.abs(scores(moved))[0] > 10
    heavier = exact.params.log_weights + jnp.array([0.0, 0.7, 0.0])
    assert np.abs(scores(dataclass_replace(exact.params, log_weights=heavier))[3:]).max() > 10


def dataclass_replace(mixture, **changes):
    import dataclasses

    return dataclasses.replace(mixture, **changes)


# --- shapes and dtypes ----------------------------------------------------------------------------


def test_pytrees_average_over_all_elements():
    process, t = PROCESSES["flow"], jnp.array([0.1, 0.5, 0.8])
    a = jax.random.normal(jax.random.key(9), (3, 3, 7))  # x0, eps, output

    def tree(a):
        return {"image": a[:, :4].reshape(3, 2, 2), "label": a[:, 4:]}

    for prediction in ("flow", "score"):
        flat, split = (
            losses.score_matching(
                jd.Denoiser(first, prediction, params=f(a[2])), process, f(a[0]), t, f(a[1])
            )
            for f in (lambda a: a, tree)
        )
        np.testing.assert_allclose(split, flat, rtol=1e-6)


def test_scalar_time_and_condition_reach_the_network():
    process = PROCESSES["vp_linear"]
    x0, eps = jax.random.normal(jax.random.key(10), (2, 3, 2))
    seen = []

    def fn(x, t, cond):
        seen.append((jnp.shape(t), cond))
        return cond * x

    denoiser = jd.Denoiser(fn, "eps")
    loss = losses.score_matching(denoiser, process, x0, 0.3, eps, cond=2.0)
    assert seen == [((), 2.0)]
    x = process.perturb(x0, eps, 0.3)
    np.testing.assert_allclose(loss, np.mean((2 * x - eps) ** 2, 1), rtol=1e-5)


def test_bfloat16_output_is_compared_in_float32():
    process, t = PROCESSES["flow"], jnp.full(2, 0.4)
    x0, eps, out = jax.random.normal(jax.random.key(11), (3, 2, 4096))
    rounded = out.astype(jnp.bfloat16)
    got = losses.score_matching(jd.Denoiser(first, "x0", params=rounded), process, x0, t, eps,
                                weighting="x0")  # fmt: skip
    want = np.mean((np.asarray(rounded, np.float64) - np.asarray(x0, np.float64)) ** 2, 1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


# --- time laws ------------------------------------------------------------------------------------


def sd3_mode_cdf(t, scale):
    """P(f(U) <= t) for SD3's decreasing map f, by root finding."""

    def f(u):
        return 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)

    return np.array([1 - brentq(lambda u: f(u) - a, 0, 1) for a in np.atleast_1d(t)])


# law, options, CDF of (t - t_min) / (t_max - t_min)
SPAN_LAWS = [
    ("uniform", {}, stats.uniform.cdf),
    ("logit_normal", {}, lambda t: stats.norm.cdf(np.log(t / (1 - t)))),
    ("logit_normal", {"mean": -0.5, "std": 0.6},
     lambda t: stats.norm.cdf((np.log(t / (1 - t)) + 0.5) / 0.6)),
    ("mode", {}, lambda t: sd3_mode_cdf(t, 1.29)),
    ("mode", {"scale": -0.8}, lambda t: sd3_mode_cdf(t, -0.8)),
    # The integral of SD3's density 2 / (pi (1 - 2 t + 2 t^2)).
    ("cosmap", {}, lambda t: 0.5 + 2 / np.pi * np.arctan(2 * t - 1)),
]  # fmt: skip


@pytest.mark.parametrize(("law", "options", "cdf"), SPAN_LAWS)
def test_span_laws_have_their_distribution(law, options, cdf, x64):
    for process in (PROCESSES["flow"], PROCESSES["ddpm"]):
        length = process.t_max - process.t_min
        # The quantile function inverts the CDF ...
        s = np.linspace(0.02, 0.98, 25)
        t = losses.TIME_LAWS[law](jnp.asarray(cdf(s)), process, **options)
        np.testing.assert_allclose((t - process.t_min) / length, s, atol=1e-9)
        # ... and the draws follow it.
        t = losses.sample_times(law, jax.random.key(12), 4000, process, **options)
        assert t.shape == (4000,)
        assert stats.kstest(np.asarray((t - process.t_min) / length), cdf).pvalue > 0.01


def test_log_normal_sigma_is_edms_for_every_process(x64):
    assert set(losses.TIME_LAWS) == {law for law, _, _ in SPAN_LAWS} | {"log_normal_sigma"}
    for name, process in PROCESSES.items():
        t = np.asarray(losses.sample_times("log_normal_sigma", jax.random.key(13), 4000, process))
        log_sigma = -process.half_log_snr(t)
        low, high = (-process.half_log_snr(s) for s in (process.t_min, process.t_max))
        assert process.t_min <= t.min() and t.max() <= process.t_max, name
        inside = (log_sigma > low + 1e-6) & (log_sigma < high - 1e-6)
        # Within the span the normal law, its tails on the ends.
        share = stats.norm.cdf((np.array([low, high]) + 1.2) / 1.2)
        for count, p in ((np.sum(log_sigma <= low + 1e-6), share[0]),
                         (np.sum(log_sigma >= high - 1e-6), 1 - share[1])):  # fmt: skip
            assert abs(count - 4000 * p) < 4 * np.sqrt(4000 * p + 1), name
        u = (stats.norm.cdf((log_sigma[inside] + 1.2) / 1.2) - share[0]) / (share[1] - share[0])
        assert stats.kstest(u, "uniform").pvalue > 0.01, name
    edm = losses.sample_times("log_normal_sigma", jax.random.key(14), 4000, PROCESSES["edm"],
                              mean=0.4, std=0.9)  # fmt: skip
    assert stats.kstest(np.log(edm), stats.norm(0.4, 0.9).cdf).pvalue > 0.01


def test_a_law_can_be_a_function():
    process = PROCESSES["flow"]
    key = jax.random.key(15)
    mine = losses.sample_times(lambda u, process, power: u**power, key, 8, process, power=2)
    np.testing.assert_allclose(mine, losses.sample_times("uniform", key, 8, process) ** 2, rtol=1e-6)


def test_every_law_stays_open_and_finite_in_float32():
    # u = 0 is drawn once in 2^23 times: the quantile functions get the nearest interior point.
    zero = jnp.zeros(2)
    for law in losses.TIME_LAWS:
        process = PROCESSES["flow"]
        ends = losses.sample_times(lambda u, p, law=law: losses.TIME_LAWS[law](
            jnp.clip(0 * u + jnp.array([0.0, 1.0]), u.min() * 0 + 2**-24, 1 - 2**-24), p
        ), jax.random.key(0), 2, process)  # fmt: skip
        assert np.all((ends >= 0) & (ends <= 1)) and ends[0] < 0.01 < 0.99 < ends[1], law
    del zero


def test_stratified_times_hold_one_sample_a_stratum():
    process, batch = PROCESSES["flow"], 64
    gaps = []
    for seed in range(20):
        t = losses.sample_times("uniform", jax.random.key(seed), batch, process, stratified=True)
        np.testing.assert_allclose(np.diff(np.sort(t)), 1 / batch, atol=3e-7)
        gaps.append(float(t[5]))
    assert np.ptp(gaps) > 0.5  # each sample still wanders over the whole span
    many = jax.vmap(lambda k: losses.sample_times("uniform", k, 4, process, stratified=True))
    t = np.asarray(many(jax.random.split(jax.random.key(16), 3000)))
    for i in range(4):
        assert stats.kstest(t[:, i], "uniform").pvalue > 0.01


def test_stratification_reduces_the_variance_of_the_loss():
    # The exact denoiser's expected loss as a function of t; batch means over 400 keys.
    process, batch = jd.processes.flow(), 64
    grid = np.linspace(0, 1, 401)
    curve = np.array([eps_error(1 - t, t) for t in grid[1:-1]])
    curve = np.concatenate([[1.0], curve, [0.0]])
    truth = np.trapezoid(curve, grid)
    keys = jax.random.split(jax.random.key(17), 400)
    means = {}
    for stratified in (False, True):
        draw_times = jax.vmap(
            lambda k, s=stratified: losses.sample_times("uniform", k, batch, process, stratified=s)
        )
        means[stratified] = np.interp(draw_times(keys), grid, curve).mean(1)
        error = means[stratified].std() / np.sqrt(400)
        assert abs(means[stratified].mean() - truth) < 4 * error + 1e-6
    assert means[True].var() < means[False].var() / 100


@pytest.mark.parametrize("stratified", [False, True])
def test_pieces_of_a_batch_draw_the_whole_batchs_times(stratified):
    process, key = PROCESSES["vp_linear"], jax.random.key(18)
    options = {"stratified": stratified, "mean": -0.3}
    whole = losses.sample_times("logit_normal", key, 8, process, **options)
    pieces = [
        losses.sample_times("logit_normal", key, 2, process, ids=ids, total=8, **options)
        for ids in np.arange(8).reshape(4, 2)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    if not stratified:
        keys = jd.sample_keys(key, np.arange(8))
        own = losses.sample_times("logit_normal", keys[3:5], 2, process, mean=-0.3)
        np.testing.assert_array_equal(own, whole[3:5])

    mesh = jax.make_mesh((4,), ("data",))
    spec = jax.sharding.PartitionSpec("data")

    def local(ids):
        return losses.sample_times("logit_normal", key, 2, process, ids=ids, total=8, **options)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(mapped(jnp.arange(8)), whole, rtol=1e-6)

    def careless(ids):
        return losses.sample_times("logit_normal", key, 2, process, **options)

    with pytest.raises(ValueError, match="manual mesh axes"):
        jax.shard_map(careless, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.arange(8))


# --- bad input ------------------------------------------------------------------------------------


def call(prediction="eps", x0=None, t=0.5, eps=None, out=None, **options):
    x0 = jnp.ones((2, 3)) if x0 is None else x0
    eps = jnp.ones((2, 3)) if eps is None else eps
    denoiser = jd.Denoiser(first, prediction, params=jnp.ones((2, 3)) if out is None else out)
    return losses.score_matching(denoiser, PROCESSES["flow"], x0, t, eps, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weighting": "min_snrr"}, ValueError, "'min_snrr'; did you mean min_snr.*choose from"),
        ({"weighting": 3}, ValueError, "unknown weighting 3"),
        ({"weighting": "min_snr", "k": 5}, ValueError, r"no option 'k'; it takes \['gamma'\]"),
        ({"weighting": "min_snr", "gamma": -1.0}, ValueError, "gamma must be positive, got -1.0"),
        ({"weighting": "edm", "sigma_data": 0.0}, ValueError, "sigma_data must be positive"),
        ({"weighting": "p2", "k": 0.0}, ValueError, "k must be positive"),
        ({"t": jnp.ones(3)}, ValueError, r"scalar or of shape \(2,\), got \(3,\)"),
        ({"eps": jnp.ones((2, 4))}, ValueError, r"eps has shape \(2, 4\), x0 \(2, 3\)"),
        ({"eps": {"a": jnp.ones((2, 3))}}, ValueError, "eps has structure"),
        ({"out": jnp.ones((2, 1))}, ValueError, r"output has shape \(2, 1\), x_t \(2, 3\)"),
        ({"prediction": ("x0", "eps")}, ValueError, "one prediction"),
        ({"x0": np.ones((2, 3), np.uint8)}, TypeError, "floating point.*uint8"),
    ],
)  # fmt: skip
def test_bad_losses_say_what_is_accepted(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"law": "logitnormal"}, "'logitnormal'; did you mean logit_normal.*choose from"),
        ({"law": "uniform", "std": 1.0}, r"time law 'uniform' has no option 'std'; it takes \[\]"),
        ({"law": "logit_normal", "std": 0.0}, "std must be positive"),
        ({"law": "mode", "scale": 2.0}, r"\[-1, 2 / \(pi - 2\)\], got 2.0"),
        ({"batch": 0}, "at least 1, got 0"),
        ({"ids": np.arange(3)}, r"4 integers, got int64 of shape \(3,\)"),
        ({"ids": np.ones(4)}, "4 integers, got float64"),
        ({"ids": np.arange(4), "stratified": True}, "need total"),
        ({"ids": np.arange(4), "stratified": True, "total": 3}, "0 to 2, got 0 to 3"),
        ({"total": 8, "stratified": True}, "need ids and total"),
        ({"key": jax.random.split(jax.random.key(0), 4), "stratified": True}, "one key for the"),
        ({"key": jax.random.split(jax.random.key(0), 5)}, "5 keys for 4 samples"),
    ],
)
def test_bad_time_draws_say_what_is_accepted(arguments, message):
    full = {"law": "uniform", "key": jax.random.key(0), "batch": 4, "process": PROCESSES["flow"]}
    with pytest.raises(ValueError, match=message):
        losses.sample_times(**{**full, **arguments})
