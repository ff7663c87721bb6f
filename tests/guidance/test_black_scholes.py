"""Black-Scholes: the option's value against the integral that it is, and digits between 3 and 5."""

import clean_cnn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from flax.traverse_util import flatten_dict, unflatten_dict
from trained import digits

import jaxdiff as jd
from jaxdiff import guidance

PROCESS = jd.processes.vp_cosine()
OPTION = np.array([80.0, 100.0, 123.0]), 100.0, 0.02, 0.15, 7.0


def discounted_payoff(spot, strike, rate, volatility, maturity):
    """exp(-r tau) E max(S_tau - K, 0) of geometric Brownian motion, by quadrature."""
    spread = volatility * np.sqrt(maturity)
    drift = (rate - volatility**2 / 2) * maturity
    law = scipy.stats.lognorm(spread, scale=spot * np.exp(drift))
    value = scipy.integrate.quad(
        lambda s: (s - strike) * law.pdf(s), strike, strike * 40, limit=500, epsabs=1e-11
    )[0]
    return np.exp(-rate * maturity) * value


def test_the_value_is_the_discounted_payoff(x64):
    """Kothandaraman et al.'s "works when": to 1e-8, in NumPy and in JAX, and the code's variant too."""
    spots, *rest = OPTION
    want = [discounted_payoff(s, *rest) for s in spots]
    np.testing.assert_allclose(guidance.option_value(*OPTION), want, atol=1e-8)
    traced = jax.jit(guidance.option_value, static_argnums=5)
    np.testing.assert_allclose(traced(*OPTION, "cdf"), want, atol=1e-8)
    strike, rate, sigma, tau = rest
    d1 = (np.log(spots / strike) + (rate + sigma**2 / 2) * tau) / (sigma * tau**0.5)
    d2 = d1 - sigma * tau**0.5
    published = np.exp(-0.5 * d1 * d1) * spots
    published -= np.exp(-0.5 * d2 * d2) * strike * np.exp(-tau * rate)
    # Identically 0: S exp(-d1^2 / 2) is K exp(-r tau) exp(-d2^2 / 2).
    np.testing.assert_allclose(published, 0.0, atol=1e-12)
    np.testing.assert_allclose(guidance.option_value(*OPTION, mode="density"), 0.0, atol=1e-12)


def test_it_rises_with_the_spot_and_has_its_limits(x64):
    """A call is worth 0 at spot 0 and S - K exp(-r tau) far above the strike."""
    spots = np.append(0.0, np.geomspace(1, 1e6, 50))
    value = guidance.option_value(spots, *OPTION[1:])
    assert value[0] == 0 and np.all(np.diff(value) >= 0)
    assert value[-1] == pytest.approx(1e6 - 100 * np.exp(-0.02 * 7.0))


def test_the_volatility_is_that_of_ddpms_posterior(x64):
    """DDPM's beta tilde of neighbouring steps, in NumPy."""
    process = jd.processes.ddpm("linear", 1000)
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    t = np.array([0, 10, 500, 998])
    beta = 1 - bar[t + 1] / bar[t]
    want = np.sqrt(beta * (1 - bar[t]) / (1 - bar[t + 1]))
    np.testing.assert_allclose(guidance.step_volatility(process, t), want, rtol=1e-6)


def first_coordinates(params, x0):
    """Scores: the coordinates, which the network below sets."""
    return 100 * x0


def towards(x, t, cond):
    """Denoises to the condition, and so scores low on the other concept."""
    return 0.4 * x + 0.6 * cond


def test_turns_are_those_of_a_loop(x64):
    """The published loop in NumPy: the first step has the first concept, the lower value comes next."""
    x = start = np.array([[0.9, 0.3], [0.2, 0.7], [0.8, 0.5]])
    concepts = np.array([np.tile([1.0, 0.1], (3, 1)), np.tile([0.1, 1.0], (3, 1))])
    grid = jd.grids.uniform(PROCESS, 6, t_max=0.9, t_min=0.1)
    chosen, seen = np.zeros(3, int), []
    for i in range(6):
        (t, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        seen.append(chosen)
        x0 = 0.4 * x + 0.6 * concepts[chosen, np.arange(3)]
        spot, tau, rate = 100 * x0, 6 - i, 1 / 6
        sigma = guidance.step_volatility(PROCESS, t)
        d1 = (np.log(spot / 100) + (rate + sigma**2 / 2) * tau) / (sigma * tau**0.5)
        d2 = d1 - sigma * tau**0.5
        value = scipy.stats.norm.cdf(d1) * spot
        value -= scipy.stats.norm.cdf(d2) * 100 * np.exp(-tau * rate)
        chosen = np.where(value[:, 0] < value[:, 1], 0, 1)
        x = a1 * x0 + s1 * (x - a * x0) / s
    net = jd.Denoiser(towards, "x0")
    blended = guidance.black_scholes(net, concepts, first_coordinates, None, PROCESS, 6)
    assert blended.cost == 1 and len({tuple(c) for c in seen}) > 1
    tableau = jd.solvers.ddim(grid)
    state = jd.sample(blended, tableau, jnp.asarray(start), save="state")
    np.testing.assert_allclose(state.registers[0], x, rtol=1e-9)
    assert int(state.memory.call) == 6
    np.testing.assert_array_equal(state.memory.concept, chosen)


# --- Kothandaraman et al. 2024 on digits ----------------------------------------------------------


def probabilities(variables, x0):
    """100 p(3), 100 p(5) of the clean classifier."""
    logits = clean_cnn.CNN().apply(variables, jnp.clip(x0, -1, 1))
    return 100 * jax.nn.softmax(logits)[:, jnp.array([3, 5])]


def in_turn(params, x, levels, *, memory):
    """Alternating prompts."""
    denoiser, concepts = params
    return denoiser(x, *levels, concepts[memory % 2]), memory + 1


def test_blends_of_digits_have_more_of_both():
    """The "works when": min(p_3, p_5), by a classifier that did not steer, is on average higher than
    with the embeddings' mean and with alternating prompts."""
    count, steps = 40, 15
    net = digits.denoiser("small")
    threes, fives = (jnp.full(count, c, jnp.int32) for c in (3, 5))
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, steps, t_max=0.99, t_min=0.01))
    x_T = PROCESS.prior(jax.random.key(0), (count, 8, 8, 1))
    flat = flatten_dict(net.params["params"], sep="/")
    (table,) = [k for k in flat if k.endswith("embedding") and flat[k].shape[0] == 11]
    flat[table] = flat[table].copy()
    flat[table][3] = (flat[table][3] + flat[table][5]) / 2
    mean = jd.Denoiser(net.fn, net.prediction, {"params": unflatten_dict(flat, sep="/")}, net.time)

    def alternating(denoiser, *concepts):
        params = denoiser, jnp.stack(concepts)
        zero = jnp.zeros((), jnp.int32)
        return jd.Denoiser(in_turn, denoiser.prediction, params, jd.denoisers.level, zero)

    def both(denoiser):
        y = np.clip(jd.sample(denoiser, tableau, x_T), -1, 1)
        logits = jd.metrics.digit_classifier().logits(y)
        p = np.asarray(jax.nn.softmax(logits))[:, [3, 5]]
        return float(p.min(1).mean())

    args = (threes, fives), probabilities, clean_cnn.variables(), PROCESS, steps
    found = both(guidance.black_scholes(net, *args))
    mean, turns = both(alternating(mean, threes, threes)), both(alternating(net, threes, fives))
    print("blended", found, "mean of embeddings", mean, "in turn", turns)
    assert found > turns and found > mean


def test_bad_input_is_named():
    net = jd.Denoiser(towards, "x0")
    concepts = np.ones((2, 3, 2))
    args = first_coordinates, None, PROCESS
    with pytest.raises(ValueError, match="two concepts or more, of one shape"):
        guidance.black_scholes(net, concepts[:1], *args, 5)
    with pytest.raises(ValueError, match=r"concepts must have leaves \[batch, ...\] of one batch"):
        guidance.black_scholes(net, [1, 2], *args, 5)
    with pytest.raises(ValueError, match="strike must be positive, got 0"):
        guidance.black_scholes(net, concepts, *args, 5, strike=0)
    with pytest.raises(ValueError, match="steps must be an integer from 1"):
        guidance.black_scholes(net, concepts, *args, 0)
    with pytest.raises(ValueError, match="mode must be one of"):
        guidance.black_scholes(net, concepts, *args, 5, mode="normal")
    with pytest.raises(ValueError, match="maturity must be positive, got 0"):
        guidance.option_value(90.0, 100.0, 0.1, 0.2, 0)
    with pytest.raises(ValueError, match="spot must be at least 0, got -1"):
        guidance.option_value(-1, 100.0, 0.1, 0.2, 1)
    blended = guidance.black_scholes(net, concepts, *args, 2)
    tableau = jd.solvers.ddim(jd.grids.uniform(PROCESS, 2))
    with pytest.raises(ValueError, match="the concepts are for a batch of 3, the state has 4"):
        jd.sample(blended, tableau, jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match="sample without cond="):
        jd.sample(blended, tableau, jnp.zeros((3, 2)), cond=jnp.zeros(3))
