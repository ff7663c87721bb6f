"""Forward processes against the published formulas, in extended precision."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedules import (
    CASES,
    DISCRETE,
    L,
    linear_beta,
    linear_betas,
    scaled_linear_betas,
    squaredcos_betas,
    times,
)

import jaxdiff as jd
from jaxdiff import processes

pytestmark = pytest.mark.filterwarnings("error:.*:RuntimeWarning")
every_case = pytest.mark.parametrize("name", CASES)


def relative(got, expected):
    expected = np.asarray(expected, L)
    return np.abs((np.asarray(got, L) - expected) / expected).astype(float)


def at_noise(process, t):
    """How far a rounding of t, or of alpha(t_max), moves log(alpha) where alpha goes to 0."""
    return 2e-15 * process.t_max / (process.t_max - t) if process.noise_time is not None else 0.0


def test_extended_precision_is_more_than_double():
    assert np.finfo(L).eps < 1e-18


@every_case
def test_levels_are_the_published_ones(name):
    process, formula = CASES[name]
    t = times(process)
    alpha, sigma = formula(np.asarray(t, L))
    # The betas of squaredcos are differences from 1, rounded to float64 themselves.
    rounded = 2e-11 if "squaredcos" in name else 3e-13
    assert np.all(relative(process.alpha(t), alpha) < 1e-13 + at_noise(process, t))
    assert np.all(relative(process.sigma(t), sigma) < rounded)
    lam = process.half_log_snr(t)
    error = np.abs(lam - np.log(alpha / sigma)).astype(float)
    assert np.all(error < rounded + at_noise(process, t))
    assert np.all(np.diff(lam) < 0)
    assert alpha.dtype == L and process.alpha(t).dtype == process.sigma(t).dtype == np.float64


@every_case
def test_time_inverts_half_log_snr(name):
    process, _ = CASES[name]
    t = times(process)
    back = process.time(process.half_log_snr(t))
    # A node near t = 0 of a table, or of VE's exponent, is known to eps x the span.
    scale = np.maximum(t, 1e-3 * process.t_max)
    assert np.max(np.abs(back - t) / scale) < 1e-12
    lam = np.linspace(*process.half_log_snr(t[[-1, 0]]), 301)[1:-1]
    t = process.time(lam)
    assert np.all(np.abs(process.half_log_snr(t) - lam) < 1e-12 + at_noise(process, t))


@every_case
def test_the_span_s_ends(name):
    process, formula = CASES[name]
    for t, end_time, index, limit in (
        (process.t_max, process.noise_time, 0, -np.inf),
        (process.t_min, process.data_time, 1, np.inf),
    ):
        levels = process.alpha(t), process.sigma(t)
        lam = process.half_log_snr(t)
        if t == end_time:
            assert levels[index] == 0.0 and lam == limit
            np.testing.assert_allclose(levels[1 - index], 1.0, rtol=3e-16)
        else:
            alpha, sigma = formula(np.array(L(t)))
            np.testing.assert_allclose(levels, np.array([alpha, sigma], float), rtol=2e-11)
            assert np.isfinite(lam)
        np.testing.assert_allclose(process.time(lam), t, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("t_min", [0.0])
def test_processes_that_may_start_at_data(t_min):
    for process in (
        processes.vp_linear(t_min=t_min), processes.sub_vp(t_min=t_min),
        processes.vp_cosine(t_min=t_min, t_max=1.0), processes.flow(),
        processes.edm(sigma_min=t_min), processes.shifted_cosine(128, t_min=t_min, t_max=1.0),
    ):  # fmt: skip
        assert process.data_time == 0.0
        assert process.sigma(0.0) == 0.0 and process.alpha(0.0) == 1.0
        assert process.half_log_snr(0.0) == np.inf and process.time(np.inf) == 0.0
        f, g2 = process.rates(0.0)
        assert np.isfinite(f) and np.isfinite(g2) and g2 >= 0
    for process in (processes.vp_cosine(t_max=1.0), processes.shifted_cosine(128, t_max=1.0)):
        assert process.noise_time == 1.0 and process.alpha(1.0) == 0.0 and process.sigma(1.0) == 1.0
        np.testing.assert_allclose(process.time(-np.inf), 1.0, rtol=1e-15)
        assert process.rates(1.0)[0] == -np.inf


def derivative(function, t, step):
    """Central differences of order 8, in extended precision."""
    weights = (L(4) / 5, L(-1) / 5, L(4) / 105, L(-1) / 280)
    return sum(
        w * (function(t + k * step) - function(t - k * step)) for k, w in enumerate(weights, 1)
    ) / step


@every_case
def test_rates_are_derivatives_of_the_levels(name):
    process, formula = CASES[name]
    if name in DISCRETE:
        t = np.unique(np.floor(times(process)[5:-5])) + 0.5
        t, step = np.asarray(t[t < process.t_max], L), L("0.02")
    else:
        span = process.t_max - process.t_min
        t = np.asarray(process.t_min + np.linspace(0.05, 0.95, 60) * span, L)
        step = t[0] / 50
    f, g2 = process.rates(np.asarray(t, float))
    expected_f = derivative(lambda s: np.log(formula(s)[0]), t, step)
    sigma2 = formula(t)[1] ** 2
    expected_g2 = derivative(lambda s: formula(s)[1] ** 2, t, step) - 2 * expected_f * sigma2
    np.testing.assert_allclose(f, expected_f.astype(float), rtol=2e-9, atol=1e-13)
    np.testing.assert_allclose(g2, expected_g2.astype(float), rtol=2e-9)
    # The two other forms of g^2.
    slope = derivative(lambda s: np.log(formula(s)[0] / formula(s)[1]), t, step)
    np.testing.assert_allclose(g2, (-2 * sigma2 * slope).astype(float), rtol=2e-9)
    x = np.arange(2.0 * len(t)).reshape(len(t), 2)
    np.testing.assert_allclose(process.drift(x, np.asarray(t, float)), f[:, None] * x)
    np.testing.assert_allclose(process.diffusion(np.asarray(t, float)) ** 2, g2)


def test_linear_beta_rates_are_the_papers():
    """Song et al. 2021, equations 11 and 12: f = -beta / 2; g^2 = beta, discounted for sub-VP."""
    t = np.linspace(0.0, 1.0, 11)
    beta = 0.1 + t * (20.0 - 0.1)
    integral = 0.1 * t + t**2 * (20.0 - 0.1) / 2
    f, g2 = processes.vp_linear(t_min=0.0).rates(t)
    np.testing.assert_allclose(f, -beta / 2, rtol=1e-15)
    np.testing.assert_allclose(g2, beta, rtol=1e-15)
    f, g2 = processes.sub_vp(t_min=0.0).rates(t)
    np.testing.assert_allclose(f, -beta / 2, rtol=1e-15)
    np.testing.assert_allclose(g2, beta * (1 - np.exp(-2 * integral)), rtol=1e-13)


@pytest.mark.parametrize(
    "schedule, betas",
    [
        ("linear", linear_betas(1000, "1e-4", "0.02")),
        ("scaled_linear", scaled_linear_betas(1000, "0.00085", "0.012")),
        ("squaredcos", squaredcos_betas(1000)),
    ],
)
def test_ddpm_at_integers_is_the_cumulative_product(schedule, betas):
    process = processes.ddpm(schedule)
    t = np.arange(1000)
    bar = np.cumprod(1 - np.asarray(betas, L))
    assert np.all(relative(process.alpha(t) ** 2, bar) < 2e-12)
    assert np.all(relative(process.sigma(t) ** 2, 1 - bar) < 2e-11)
    assert (process.t_min, process.t_max) == (0.0, 999.0)
    assert isinstance(process.alpha(7), float) and process.alpha(7) == process.alpha(7.0)


def test_known_end_points_of_published_schedules():
    """What is left of the data at the last timestep, as Lin et al. 2024 tabulate it."""
    published = {"squaredcos": 4.928e-5, "linear": 0.006353, "scaled_linear": 0.068265}
    for schedule, alpha in published.items():
        np.testing.assert_allclose(processes.ddpm(schedule).alpha(999), alpha, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos"])
def test_zero_terminal_snr_is_the_algorithm_on_the_table(schedule):
    """Lin et al. 2024, algorithm 1: betas to betas."""
    betas = {
        "linear": linear_betas(1000, "1e-4", "0.02"),
        "scaled_linear": scaled_linear_betas(1000, "0.00085", "0.012"),
        "squaredcos": squaredcos_betas(1000),
    }[schedule]
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, L)))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    bar = root**2
    new_betas = 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    bar = np.cumprod(1 - new_betas)

    process = processes.zero_terminal_snr(processes.ddpm(schedule))
    t = np.arange(1000.0)
    # From float64 betas the smallest alphas keep 1e-10: they are differences from the last.
    assert np.all(relative(process.alpha(t[:-1]), np.sqrt(bar[:-1])) < 1e-9)
    assert np.all(relative(process.sigma(t) ** 2, 1 - bar) < 2e-11)
    assert process.alpha(999.0) == 0.0 and abs(process.sigma(999.0) - 1.0) < 3e-16
    assert process.noise_time == process.t_max == 999.0
    np.testing.assert_allclose(process.alpha(0.0) ** 2, 1 - float(betas[0]), rtol=1e-15)


def test_zero_terminal_snr_twice_is_once():
    once = processes.zero_terminal_snr(processes.ddpm())
    twice = processes.zero_terminal_snr(once)
    t = np.linspace(0.0, 999.0, 57)
    np.testing.assert_allclose(twice.alpha(t), once.alpha(t), rtol=1e-13)
    np.testing.assert_allclose(twice.sigma(t), once.sigma(t), rtol=1e-13)
    assert twice.rates(999.0)[0] == -np.inf


def test_a_shift_moves_half_log_snr():
    """Flow by -log(shift) (Esser et al., section 5.3.2), cosine by the given amount."""
    t = np.linspace(0.01, 0.99, 50)
    base = processes.flow()
    for shift in (0.5, 3.0):
        moved = processes.flow(shift)
        np.testing.assert_allclose(
            moved.half_log_snr(t), base.half_log_snr(t) - math.log(shift), rtol=0, atol=1e-13
        )
        np.testing.assert_allclose(moved.alpha(t) + moved.sigma(t), 1.0, rtol=1e-15)
    cosine, moved = processes.vp_cosine(), processes.vp_cosine(shift=-1.3)
    np.testing.assert_allclose(
        moved.half_log_snr(t), cosine.half_log_snr(t) - 1.3, rtol=0, atol=1e-13
    )
    np.testing.assert_allclose(
        processes.shifted_cosine(512).half_log_snr(t),
        processes.shifted_cosine(64).half_log_snr(t) - math.log(8), rtol=0, atol=1e-13,
    )  # fmt: skip


# --- perturb and prior --------------------------------------------------------------------------


def test_perturb():
    process, rng = processes.vp_linear(), np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 3, 4, 5))
    t = np.array([0.1, 0.5, 0.9])
    alpha, sigma = (a.astype(float) for a in linear_beta(np.asarray(t, L)))
    expected = np.stack([a * x + s * e for a, s, x, e in zip(alpha, sigma, x0, eps)])
    np.testing.assert_allclose(process.perturb(x0, eps, t), expected, rtol=1e-14)
    tree = process.perturb({"a": x0, "b": x0[:, 0]}, {"a": eps, "b": eps[:, 0]}, t)
    np.testing.assert_allclose(tree["a"], expected, rtol=1e-14)
    np.testing.assert_allclose(tree["b"], expected[:, 0], rtol=1e-14)
    one = process.perturb(x0, eps, 0.5)
    np.testing.assert_allclose(one, alpha[1] * x0 + sigma[1] * eps, rtol=1e-14)


@pytest.mark.parametrize(
    "process, std",
    [(processes.vp_linear(), 1.0), (processes.sub_vp(), 1.0), (processes.flow(3.0), 1.0),
     (processes.ve(0.01, 50.0), 50.0), (processes.edm(0.002, 80.0), 80.0)],
)  # fmt: skip
def test_prior_has_the_span_s_noise(process, std):
    """Mean 0 and standard deviation sigma(t_max), within 5 standard errors of 12,000 numbers."""
    x = np.asarray(process.prior(jax.random.key(0), (4000, 3)), np.float64)
    assert x.shape == (4000, 3)
    assert abs(x.mean()) < 5 * std / math.sqrt(x.size)
    assert abs(x.std() / std - 1) < 5 / math.sqrt(2 * x.size)
    assert abs(std - float(process.sigma(process.t_max))) < 1e-4 * std


@pytest.mark.parametrize(
    "process, std",
    [(processes.flow(t_max=0.9), math.hypot(0.1, 0.9)),
     (processes.flow(3.0, t_max=0.5), math.hypot(0.25, 0.75)),
     (processes.vp_linear(t_max=0.3), 1.0), (processes.vp_cosine(t_max=0.5), 1.0),
     (processes.sub_vp(t_max=0.3),
      math.hypot(math.exp(-0.09 * 19.9 / 4 - 0.015), 1 - math.exp(-0.09 * 19.9 / 2 - 0.03)))],
)  # fmt: skip
def test_prior_of_a_span_that_stops_short_of_noise(process, std):
    """sqrt(alpha^2 + sigma^2): what data of unit variance have at t_max."""
    assert float(process.prior_std) == pytest.approx(std, rel=1e-12)
    x0, eps = np.random.default_rng(0).normal(size=(2, 100_000))
    assert np.std(process.perturb(x0, eps, process.t_max)) == pytest.approx(std, rel=0.01)
    x = process.prior(jax.random.key(0), (100_000,))
    assert np.std(np.asarray(x)) == pytest.approx(std, rel=0.01)


def test_prior_belongs_to_each_sample():
    process = processes.edm()
    keys = jd.sample_keys(jax.random.key(1), np.arange(6))
    whole = process.prior(keys, (6, 2, 2))
    np.testing.assert_array_equal(process.prior(keys[2:4], (2, 2, 2)), whole[2:4])
    np.testing.assert_array_equal(process.prior(jax.random.key(1), (6, 2, 2)), whole)
    assert np.unique(np.asarray(whole)).size == 24
    assert process.prior(keys, (6, 1), jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="6 keys for 3 samples"):
        process.prior(keys, (3, 2))
    with pytest.raises(ValueError, match=r"shape must be \[batch, ...\], got \(\)"):
        process.prior(jax.random.key(0), ())
    with pytest.raises(TypeError, match="expected a PRNG key.*got 0"):
        process.prior(0, (3, 2))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory, kwargs, message",
    [
        ("vp_linear", dict(beta_min=20.0, beta_max=0.1), "beta_min < beta_max, got 20.0 and 0.1"),
        ("vp_linear", dict(beta_min=-1.0), "0 <= beta_min < beta_max, got -1.0"),
        ("vp_linear", dict(beta_max=math.nan), "got 0.1 and nan"),
        ("vp_linear", dict(t_max=1.5), "t_max <= 1, got t_min=0.001, t_max=1.5"),
        ("vp_linear", dict(t_min=-0.1), "0 <= t_min < t_max"),
        ("sub_vp", dict(beta_min=2.0, beta_max=1.0), "got 2.0 and 1.0"),
        ("sub_vp", dict(t_min=0.5, t_max=0.5), "t_min < t_max"),
        ("vp_cosine", dict(t_max=1.1), "t_max=1.1"),
        ("vp_cosine", dict(s=-0.1), "s must not be negative, got -0.1"),
        ("shifted_cosine", dict(resolution=0), "resolution must be positive, got 0"),
        ("shifted_cosine", dict(resolution=64, base=-1), "base must be positive, got -1"),
        ("shifted_cosine", dict(resolution=64, t_min=2.0), "t_min=2.0"),
        ("ddpm", dict(schedule="quadratic"), "'quadratic'; choose from .*'squaredcos'"),
        ("ddpm", dict(num_steps=1), "at least 2, got 1"),
        ("ddpm", dict(schedule="squaredcos", beta_end=0.1), "takes no beta_start or beta_end"),
        ("ddpm", dict(beta_start=-0.1), r"must lie in \(0, 1\), got -0.1, 0.02"),
        ("ddpm", dict(schedule="scaled_linear", beta_start=-0.1), r"got -0.1, 0.012"),
        ("ddpm", dict(beta_end=1.0), "got 0.0001, 1.0"),
        ("ddpm", dict(betas=[0.1, 1.2]), r"in \(0, 1\), got \[0.1 1.2\]"),
        ("ddpm", dict(betas=[0.1, math.nan]), "got .*nan"),
        ("ddpm", dict(betas=[0.1]), "at least 2 numbers"),
        ("ddpm", dict(betas=[[0.1, 0.2]]), "a vector"),
        ("ve", dict(sigma_min=0.0), "sigma_min must be positive, got 0.0"),
        ("ve", dict(sigma_min=50.0, sigma_max=0.01), "sigma_min < sigma_max, got 50.0 and 0.01"),
        ("edm", dict(sigma_min=80.0, sigma_max=0.002), "t_min=80.0, t_max=0.002"),
        ("edm", dict(sigma_min=-1.0), "t_min=-1.0"),
        ("flow", dict(shift=0.0), "shift must be positive, got 0.0"),
        ("flow", dict(t_max=1.01), "t_max=1.01"),
    ],
)
def test_bad_arguments_are_named(factory, kwargs, message):
    with pytest.raises(ValueError, match=message):
        getattr(processes, factory)(**kwargs)


@pytest.mark.parametrize("process", [processes.flow(), processes.edm(), processes.sub_vp(), "vp"])
def test_zero_terminal_snr_takes_variance_preserving_processes(process):
    with pytest.raises(TypeError, match=f"got {type(process).__name__}"):
        processes.zero_terminal_snr(process)


def test_processes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        processes.flow().shift = 2.0
