"""Losses against closed forms: posterior variances, the papers' weights, the time laws' CDFs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Mixture

import jaxdiff as jd
from jaxdiff import losses
from jaxdiff.denoisers import level
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
SPANS = ("vp_linear", "edm", "flow")  # one of each family, for the slower tests


def middle(process, n, margin=0.05):
    """n times inside the span, evenly spaced in t."""
    return jnp.linspace(*np.interp([margin, 1 - margin], [0, 1], [process.t_min, process.t_max]), n)


def first(params, x, t, cond=None):
    return params


jitted = jax.jit(losses.score_matching, static_argnames=("weighting", "sigma_data"))


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
            got = losses.score_matching(denoiser, process, x0, t, eps, weighting=name, **options)
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
        _, alpha, sigma = levels
        lam = jnp.log(alpha / sigma)[:, None]
        eps = jnp.tanh(x / jnp.hypot(alpha, sigma)[:, None] @ params["w"] + params["b"] * lam)
        return convert(eps, x, "eps", self.prediction, alpha, sigma)


@pytest.mark.parametrize("name", SPANS)
def test_predictions_agree_in_value_and_gradient(name, x64):
    # [weighting, prediction, batch], one compilation for the values and the Jacobian.
    process, t = PROCESSES[name], middle(PROCESSES[name], 6)
    x0, eps = jax.random.normal(jax.random.key(1), (2, 6, 2))

    def table(params):
        value = jnp.stack([
            jnp.stack([
                losses.score_matching(
                    jd.Denoiser(_Converted(p), p, params, level), process, x0, t, eps, None, w
                )
                for p in PREDICTIONS
            ])
            for w in losses.WEIGHTINGS
        ])  # fmt: skip
        return value, value

    point = {"w": jnp.array([[0.3, -1.0], [0.8, 0.2]]), "b": jnp.array([0.5, -0.2])}
    jacobian, value = jax.jit(jax.jacfwd(table, has_aux=True))(point)
    np.testing.assert_allclose(value, jnp.broadcast_to(value[:, :1], value.shape), rtol=1e-10)
    for g in jax.tree.leaves(jacobian):
        g = np.asarray(g).reshape(*value.shape, -1)
        scale = np.abs(g).max(axis=(1, 3), keepdims=True)
        assert np.all(scale > 1e-6 * value[:, :1, :, None])  # every sample has a gradient
        np.testing.assert_allclose(g / scale, np.broadcast_to((g / scale)[:, :1], g.shape),
                                   rtol=0, atol=1e-10)  # fmt: skip


def test_both_ends_take_their_limits():
    # alpha = 0 at t = 1 and sigma = 0 at t = 0, float32: weights of an error of 1.
    process, t = jd.processes.flow(), jnp.array([0.0, 1.0])
    x0, eps = jax.random.normal(jax.random.key(2), (2, 2, 4))
    alpha, sigma = process.alpha(t), process.sigma(t)

    def weights(prediction, weighting):
        missed = target(prediction, x0, eps, alpha, sigma) + 1.0
        denoiser = jd.Denoiser(first, prediction, params=missed)
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
                np.testing.assert_allclose(
                    g, w, rtol=2e-5, atol=1e-6, err_msg=(prediction, weighting)
                )
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
        loss = jitted(zero, process, x0, t, eps, weighting="edm", sigma_data=s)
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


LINE = Mixture(
    np.array([[-1.5], [0.5], [2.0]]), np.array([0.3, 0.5, 0.2]), np.array([0.3, 0.5, 0.2])
)


def eps_error(alpha, sigma, mixture=LINE):
    """E |E[eps | x_t] - eps|^2 = 1 - E |E[eps | x_t]|^2, by quadrature in one dimension."""
    spread = 8 * np.sqrt(alpha**2 * 5.0 + sigma**2)
    x = np.linspace(-spread, spread, 4001)[:, None]
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


@pytest.mark.parametrize(
    "process",
    [jd.processes.vp_linear(t_min=0.03), jd.processes.ve(), jd.processes.flow(1.0, 0.02, 0.98)],
    ids=["vp_linear", "ve", "flow"],
)
def test_elbo_is_a_mutual_information(process):
    # I-MMSE: the integral of the noise error over lam is 0.5 log(1 + v SNR), whatever the process.
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
    moved = dataclasses.replace(
        exact.params, means=exact.params.means + jnp.array([[0.3], [0], [0]])
    )
    assert np.abs(scores(moved))[0] > 10
    heavier = exact.params.log_weights + jnp.array([0.0, 0.7, 0.0])
    assert np.abs(scores(dataclasses.replace(exact.params, log_weights=heavier))[3:]).max() > 10


# --- shapes and dtypes ----------------------------------------------------------------------------


def test_pytrees_average_over_all_elements():
    process, t = PROCESSES["flow"], jnp.array([0.1, 0.5, 0.8])
    a = jax.random.normal(jax.random.key(9), (3, 3, 7))  # x0, eps, output

    def tree(a):
        return {"image": a[:, :4].reshape(3, 2, 2), "label": a[:, 4:]}

    for prediction in ("flow", "score"):
        flat, split = (
            jitted(jd.Denoiser(first, prediction, params=f(a[2])), process, f(a[0]), t, f(a[1]))
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


def test_bfloat16_is_compared_in_float32():
    process, t = PROCESSES["flow"], jnp.full(2, 0.4)
    x0, eps, out = jax.random.normal(jax.random.key(11), (3, 2, 4096), jnp.bfloat16)
    denoiser = jd.Denoiser(first, "x0", params=out)
    got = jitted(denoiser, process, x0, t, eps, weighting="x0")
    want = np.mean((np.asarray(out, np.float64) - np.asarray(x0, np.float64)) ** 2, 1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


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
        ({"weighting": "min_snr", "gamma": "five"}, TypeError, "'min_snr': gamma.*'five'"),
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
