"""Forward processes on a device: precision, exact ends, compilation, gradients, batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedules import CASES, DISCRETE, times

from jaxdiff import processes

pytestmark = pytest.mark.filterwarnings("error:.*:RuntimeWarning")


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
