"""O-BELM: the published coefficients, there and back, and the clocks that keep rounding small."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD
from round_trips import largest_errors

import jaxdiff as jd
from jaxdiff.solvers.belm import belm

PROCESS = jd.processes.vp_linear()
FLOW = jd.processes.flow()


def mixture(process=PROCESS):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, process, "x0")


def start(grid, count=16):
    return BROAD.sample(np.random.default_rng(0), count, grid.alpha[0], grid.sigma[0])


def published(x, grid):
    """The authors' `rev_forward`, with the same names: p, t, s are the nodes i - 1, i, i + 1."""
    xis = [x]
    for i in range(grid.steps):
        alpha_t, sigma_t = grid.alpha[i], grid.sigma[i]
        alpha_s, sigma_s = grid.alpha[i + 1], grid.sigma[i + 1]
        eps = BROAD.eps(xis[-1], alpha_t, sigma_t)
        if i == 0:
            coef_xt = alpha_s / alpha_t
            xis.append(coef_xt * x + (sigma_s - sigma_t * coef_xt) * eps)
            continue
        alpha_p, sigma_p = grid.alpha[i - 1], grid.sigma[i - 1]
        t_p, t_t, t_s = sigma_p / alpha_p, sigma_t / alpha_t, sigma_s / alpha_s
        delta_1, delta_2, delta_3 = t_t - t_p, t_s - t_t, t_s - t_p
        coef_1 = delta_2 * delta_3 * alpha_s / delta_1
        coef_2 = (delta_2 / delta_1) ** 2 * (alpha_s / alpha_p)
        coef_3 = (delta_1 - delta_2) * delta_3 / (delta_1**2) * (alpha_s / alpha_t)
        xis.append(coef_1 * eps + coef_2 * xis[-2] + coef_3 * xis[-1])
    return xis


def published_inverse(last, before, grid):
    """`latent_to_intermediate` from a pair: i - 2, i - 1, i are three nodes from data to noise."""
    xis = [last, before]
    for n in range(grid.steps - 1, 0, -1):
        a2, s2 = grid.alpha[n + 1], grid.sigma[n + 1]
        a1, s1 = grid.alpha[n], grid.sigma[n]
        a, s = grid.alpha[n - 1], grid.sigma[n - 1]
        h_i, h_1 = s / a - s1 / a1, s1 / a1 - s2 / a2
        eps = BROAD.eps(xis[-1], a1, s1)
        xis.append(
            a / a2 * h_i**2 / h_1**2 * xis[-2]
            + a / a1 * (h_1**2 - h_i**2) / h_1**2 * xis[-1]
            + a * (h_1 + h_i) * h_i / h_1 * eps
        )
    return xis[-1]


@functools.cache
def errors():
    """{(spacing, integrand, steps): largest error of x_T found again in (float32, float64)}."""
    cases = [
        (spacing, integrand, steps) for spacing in ("uniform", "half_log_snr")
        for integrand in ("eps", "flow", "v") for steps in (10, 20, 50, 100, 200)
    ]  # fmt: skip
    tables = [belm(getattr(jd.grids, s)(PROCESS, steps), m) for s, m, steps in cases]
    x = start(jd.grids.uniform(PROCESS, 1))
    found = [largest_errors(mixture, tables, x, d) for d in (np.float32, np.float64)]
    return dict(zip(cases, zip(*found)))


@pytest.mark.parametrize("end", ["t_min", "zero"])
def test_it_is_the_published_step(x64, end):
    grid = jd.grids.quadratic(PROCESS, 7, end=end)
    x = start(grid)
    xis = published(x, grid)
    state = jd.sample(mixture(), belm(grid), x, save="state")
    np.testing.assert_allclose(state.registers[0], xis[-1], rtol=1e-9)
    np.testing.assert_allclose(state.registers[1], xis[-2], rtol=1e-9)
    pair = jd.State(tuple(jnp.asarray(a) for a in xis[:-3:-1]), ())
    back = jd.inversion.invert(mixture(), belm(grid), pair)
    np.testing.assert_allclose(back.registers[0], x, atol=1e-11)
    np.testing.assert_allclose(published_inverse(xis[-1], xis[-2], grid), x, atol=1e-11)


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 200])
@pytest.mark.parametrize("integrand", ["eps", "flow", "v"])
def test_a_round_trip_is_exact(integrand, steps):
    single, double = errors()["uniform", integrand, steps]
    assert single <= 1e-5 and double <= 1e-10


def test_steps_that_shrink_in_rho_cost_digits():
    """Half-log-SNR's first step in rho is 1e4 times its last: not so in the clock of v."""
    for steps in (50, 100, 200):
        single, double = errors()["half_log_snr", "eps", steps]
        assert single > 1e-4 and double < 1e-10
        assert errors()["half_log_snr", "v", steps][0] < 1e-5


def test_from_pure_noise_to_the_data_and_back():
    """Both ends: alpha = 0 and sigma = 0."""
    grid = jd.grids.uniform(FLOW, 20)
    assert grid.ends == (True, True)
    tables = [belm(grid, "flow"), belm(grid, "v")]
    flow = functools.partial(mixture, FLOW)
    assert largest_errors(flow, tables, start(grid), np.float64).max() < 1e-11


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: belm(g, "x0"), "integrand must be one of .* got 'x0'"),
        (lambda g: belm(g, start="two"), "start must be one of .* got 'two'"),
        (lambda g: belm(jd.grids.uniform(PROCESS, 1), start="pair"), "at least 2 steps, got 1"),
        (lambda g: belm(jd.grids.uniform(FLOW, 4)), "belm over eps does not .*alpha = 0"),
        (lambda g: belm(jd.grids.uniform(FLOW, 4).reversed()), "alpha = 0: use flow or v"),
        (
            lambda g: belm(jd.grids.uniform(PROCESS, 4, end="zero").reversed()),
            "from sigma = 0 only from a pair .*end the grid at sigma > 0",
        ),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(jd.grids.uniform(PROCESS, 4))
