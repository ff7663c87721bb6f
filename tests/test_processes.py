"""Forward processes against the published formulas, in extended precision."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import processes

pytestmark = pytest.mark.filterwarnings("error:.*:RuntimeWarning")

L = np.longdouble
PI = 4 * np.arctan(L(1))


# --- the published formulas: t -> (alpha, sigma) -----------------------------------------------


def linear_beta(t, low="0.1", high="20"):
    """Song et al. 2021, equation 33: mean coefficient and std of the VP SDE."""
    low, high = L(low), L(high)
    alpha = np.exp(-t * t * (high - low) / 4 - t * low / 2)
    return alpha, np.sqrt(1 - alpha**2)


def cosine(t, s="0.008"):
    """Nichol & Dhariwal 2021, equation 17."""
    s = L(s)
    alpha = np.cos((t + s) / (1 + s) * PI / 2) / np.cos(s / (1 + s) * PI / 2)
    return alpha, np.sqrt(1 - alpha**2)


def simple_diffusion(t, base, resolution):
    """Hoogeboom et al. 2023: logsnr = -2 log tan(pi t / 2) + 2 log(base / resolution)."""
    log_snr = -2 * np.log(np.tan(PI * t / 2)) + 2 * np.log(L(base) / L(resolution))
    return 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))


def from_betas(betas):
    """alpha_bar = cumprod(1 - beta) at the integers, half-log-SNR linear between them."""
    bar = np.cumprod(1 - np.asarray(betas, L))
    lam = (np.log(bar) - np.log(1 - bar)) / 2

    def levels(t):
        i = np.minimum(np.floor(t).astype(int), len(bar) - 2)
        between = lam[i] + (t - i) * (lam[i + 1] - lam[i])
        return 1 / np.sqrt(1 + np.exp(-2 * between)), 1 / np.sqrt(1 + np.exp(2 * between))

    return levels


def linear_betas(n, start, end):
    return [L(start) + (L(end) - L(start)) * i / (n - 1) for i in range(n)]


def scaled_linear_betas(n, start, end):
    return [b**2 for b in linear_betas(n, np.sqrt(L(start)), np.sqrt(L(end)))]


def squaredcos_betas(n):
    bar = [np.cos((L(i) / n + L("0.008")) / L("1.008") * PI / 2) ** 2 for i in range(n + 1)]
    return [min(1 - b / a, L("0.999")) for a, b in zip(bar[:-1], bar[1:])]


def rescaled(levels, clean, t_max):
    """Lin et al. 2024, algorithm 1, on a schedule of any t."""

    def out(t):
        (first, _), (last, _), (alpha, _) = levels(np.array(L(clean))), levels(L(t_max)), levels(t)
        alpha = (alpha - last) * (first / (first - last))
        return alpha, np.sqrt(1 - alpha**2)

    return out


def flow(t, shift=1):
    """Esser et al. 2024: the interpolation (1 - u) x + u eps with u of equation 23."""
    u = shift * t / (1 + (shift - 1) * t)
    return 1 - u, u


LINEAR, SCALED, SQUARED = (
    from_betas(b)
    for b in (linear_betas(1000, "1e-4", "0.02"), scaled_linear_betas(1000, "0.00085", "0.012"),
              squaredcos_betas(1000))
)  # fmt: skip

CASES = {
    "vp_linear": (processes.vp_linear(), linear_beta),
    "vp_linear_other": (
        processes.vp_linear(0.5, 12.0, t_min=0.01, t_max=0.9),
        lambda t: linear_beta(t, "0.5", "12"),
    ),
    "vp_cosine": (processes.vp_cosine(), cosine),
    "vp_cosine_s": (processes.vp_cosine(s=0.02), lambda t: cosine(t, "0.02")),
    "shifted_cosine": (processes.shifted_cosine(256), lambda t: simple_diffusion(t, 64, 256)),
    "shifted_down": (
        processes.shifted_cosine(16, base=32, t_max=0.99),
        lambda t: simple_diffusion(t, 32, 16),
    ),
    "sub_vp": (
        processes.sub_vp(),
        lambda t: (linear_beta(t)[0], 1 - linear_beta(t)[0] ** 2),  # Song et al., equation 36
    ),
    "ddpm_linear": (processes.ddpm(), LINEAR),
    "ddpm_scaled_linear": (processes.ddpm("scaled_linear"), SCALED),
    "ddpm_squaredcos": (processes.ddpm("squaredcos"), SQUARED),
    "ddpm_50": (
        processes.ddpm(num_steps=50, beta_start=0.002, beta_end=0.3),
        from_betas(linear_betas(50, "0.002", "0.3")),
    ),
    "ddpm_betas": (processes.ddpm(betas=[0.01, 0.3, 0.2, 0.5]), from_betas([0.01, 0.3, 0.2, 0.5])),
    "ve": (
        processes.ve(),
        lambda t: (np.ones_like(t), L("0.01") * (L(50) / L("0.01")) ** t),  # equation 31
    ),
    "edm": (processes.edm(), lambda t: (np.ones_like(t), t)),
    "flow": (processes.flow(), flow),
    "flow_shift": (processes.flow(3.0), lambda t: flow(t, 3)),
    "zero_ddpm_linear": (
        processes.zero_terminal_snr(processes.ddpm()), rescaled(LINEAR, 0, 999)
    ),
    "zero_ddpm_scaled": (
        processes.zero_terminal_snr(processes.ddpm("scaled_linear")), rescaled(SCALED, 0, 999)
    ),
    "zero_vp_linear": (
        processes.zero_terminal_snr(processes.vp_linear()), rescaled(linear_beta, 0, 1)
    ),
    "zero_vp_cosine": (
        processes.zero_terminal_snr(processes.vp_cosine()), rescaled(cosine, 0, L(0.9946))
    ),
}  # fmt: skip
DISCRETE = [name for name, (process, _) in CASES.items() if "ddpm" in name]
every_case = pytest.mark.parametrize("name", CASES)


def times(process, count=201):
    """The span, dense near both ends and without them."""
    near = np.geomspace(1e-6, 0.1, 20, endpoint=False)
    u = np.concatenate([near, np.linspace(0.1, 0.9, count), 1 - near[::-1]])
    return process.t_min + u * (process.t_max - process.t_min)


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


# --- on a device --------------------------------------------------------------------------------


def everything(process, t):
    lam = process.half_log_snr(t)
    return process.alpha(t), process.sigma(t), lam, process.time(lam), *process.rates(t)


# Cases that are one program compile once.
DEVICE_CASES = [
    "vp_linear", "vp_cosine", "shifted_cosine", "sub_vp", "ddpm_linear", "ddpm_squaredcos", "ve",
    "edm", "flow", "flow_shift", "zero_ddpm_linear", "zero_ddpm_scaled", "zero_vp_cosine",
]  # fmt: skip
on_device = jax.jit(everything)


@functools.cache
def float32_results():
    """name -> (t, results); the first and the last t are the exact ends of the span."""
    out = {}
    for name in DEVICE_CASES:
        process, _ = CASES[name]
        t = np.concatenate([[process.t_min], times(process, 31), [process.t_max]])
        t = t.astype(np.float32)
        out[name] = t, on_device(process, jnp.asarray(t))
    return out


@pytest.mark.parametrize("name", DEVICE_CASES)
def test_float32_on_a_device_is_float32_accurate(name):
    """Levels to a few float32 roundings, the inverse to what rounding lambda leaves."""
    process, _ = CASES[name]
    t, results = float32_results()[name]
    inside = slice(15, -15)  # 3e-3 of the span from either end
    t = t.astype(np.float64)[inside]
    assert {a.dtype for a in results} == {np.dtype(np.float32)}
    assert not any(np.any(np.isnan(a)) for a in results)
    alpha, sigma, lam, back, f, g2 = (a[inside] for a in results)
    expected = everything(process, t)
    np.testing.assert_allclose(alpha, expected[0], rtol=2e-5)
    np.testing.assert_allclose(sigma, expected[1], rtol=2e-5)
    np.testing.assert_allclose(lam, expected[2], rtol=0, atol=2e-5)
    scale = np.maximum(t, 1e-2 * process.t_max)
    assert np.max(np.abs(back - t) / scale) < 1e-5
    if name not in DISCRETE:  # there the slope jumps at integers, which t may round to
        np.testing.assert_allclose(f, expected[4], rtol=2e-5)
        np.testing.assert_allclose(g2, expected[5], rtol=2e-5)


def test_processes_with_the_same_fields_are_different_programs():
    """One jitted function must not run the program of another class (see `register`)."""
    linear, sub_vp = processes.vp_linear(), processes.sub_vp()
    assert jax.tree.structure(linear) != jax.tree.structure(sub_vp)
    assert jax.tree.structure(linear) == jax.tree.structure(processes.vp_linear(0.2, 10.0))
    sigma = jax.jit(lambda process: process.sigma(jnp.asarray(0.5)))
    for process in (linear, sub_vp, linear):
        np.testing.assert_allclose(sigma(process), process.sigma(0.5), rtol=1e-5)


def test_exact_ends_survive_compilation():
    """A compiled alpha(t_max) must not come out as a rounding error, nor its logarithm as NaN."""
    seen = []
    for name in DEVICE_CASES:
        process, _ = CASES[name]
        alpha, sigma, lam = float32_results()[name][1][:3]
        if process.noise_time == process.t_max:
            assert alpha[-1] == 0 and lam[-1] == -np.inf and abs(sigma[-1] - 1) < 1e-6, name
            seen.append("noise")
        if process.data_time == process.t_min:
            assert sigma[0] == 0 and lam[0] == np.inf and alpha[0] == 1, name
            seen.append("data")
    assert seen.count("noise") == 5 and seen.count("data") == 2


@pytest.mark.parametrize("name", ["vp_cosine", "ddpm_linear", "zero_vp_linear", "flow_shift"])
def test_float64_on_a_device_is_the_host(x64, name):
    process, _ = CASES[name]
    t = times(process, 31)
    for got, want in zip(on_device(process, jnp.asarray(t)), everything(process, t)):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)
        assert isinstance(got, jax.Array) and isinstance(want, np.ndarray)


def test_host_numbers_stay_on_the_host():
    """Python numbers and NumPy arrays of any type give float64 NumPy, of the same shape."""
    for name, (process, _) in CASES.items():
        middle = 1 if process.t_max > 1 else 0.5
        for t in (middle, np.float32(middle), np.full((2, 3), middle), np.array([middle])):
            for value in everything(process, t):
                assert isinstance(value, (np.ndarray, np.floating)), name
                assert value.dtype == np.float64 and value.shape == np.shape(t), name


def test_parameters_may_be_traced(x64):
    """Gradients with respect to the schedule's own parameters, against differences of NumPy."""
    given = {
        "sub_vp": (processes.sub_vp, (0.2, 15.0)),
        "vp_cosine": (processes.vp_cosine, (0.01, 0.4)),
        "ve": (processes.ve, (0.02, 30.0)),
        "flow": (processes.flow, (2.5,)),
        "zero": (lambda a, b: processes.zero_terminal_snr(processes.vp_linear(a, b)), (0.2, 15.0)),
    }
    t, lam = np.array([0.2, 0.5, 0.8]), np.array([-1.0, 0.3, 2.0])

    def value(factory, parameters, t, lam):
        process = factory(*parameters)
        f, g2 = process.rates(t)
        each = process.alpha(t), process.sigma(t), process.half_log_snr(t), process.time(lam), f, g2
        return [(k + 1.0) * a.sum() for k, a in enumerate(each)]

    @jax.jit
    def gradients(parameters, t):
        return {
            n: jax.jacrev(lambda p, f=f: jnp.stack(value(f, p, t, lam)))(parameters[n])
            for n, (f, _) in given.items()
        }

    got = gradients({n: p for n, (_, p) in given.items()}, t)
    for name, (factory, parameters) in given.items():
        for i, p in enumerate(parameters):
            step = 1e-5 * p
            ends = []
            for sign in (1, -1):
                moved = list(parameters)
                moved[i] = p + sign * step
                ends.append(np.array(value(factory, moved, t, lam)))
            expected = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(got[name][i], expected, rtol=2e-6, atol=1e-7, err_msg=name)


def test_processes_vmap(x64):
    """A batch of processes, and a table as a traced leaf."""
    shifts = np.array([0.5, 1.0, 4.0])
    got = jax.vmap(lambda s: processes.flow(s).half_log_snr(jnp.asarray(0.3)))(jnp.asarray(shifts))
    np.testing.assert_allclose(got, np.log(0.7 / (shifts * 0.3)), rtol=1e-14)

    process = processes.ddpm(num_steps=10, beta_start=0.01, beta_end=0.3)
    gradient = jax.grad(lambda p: p.half_log_snr(jnp.asarray(3.25)))(
        jax.tree.map(jnp.asarray, process)
    )
    expected = np.zeros(10)
    expected[[3, 4]] = 0.75, 0.25
    np.testing.assert_allclose(gradient.table, expected, atol=1e-15)


def test_no_gradient_is_poisoned_at_exact_ends(x64):
    """alpha and sigma of a whole grid, ends included, have finite slopes where the formulas do."""
    cases = (
        (processes.flow(2.0), [1.0, 0.5, 0.0]),
        (processes.vp_cosine(t_max=1.0), [1.0, 0.5]),
        (processes.zero_terminal_snr(processes.vp_linear()), [1.0, 0.5]),
    )

    @jax.jit
    def slopes(all_times):
        return [
            jax.grad(lambda t, p=p: p.alpha(t).sum() + 0.5 * p.sigma(t).sum())(t)
            for (p, _), t in zip(cases, all_times)
        ]

    for (process, t), got in zip(cases, slopes([jnp.asarray(t) for _, t in cases])):
        assert np.all(np.isfinite(got)), process
        f, g2 = process.rates(np.array(t[1]))
        alpha, sigma = process.alpha(t[1]), process.sigma(t[1])
        expected = f * alpha + 0.5 * (g2 + 2 * f * sigma**2) / (2 * sigma)
        np.testing.assert_allclose(got[1], expected, rtol=1e-12)


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
