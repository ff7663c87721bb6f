"""Joint sampling of two priors (Stevens et al. 2023, 2024): steps, exact posteriors, and hazy digits."""

import dataclasses

import exact_digits
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxdiff as jd
from jaxdiff.inverse import (
    corrected,
    dps_step,
    inpainting,
    joint_dps,
    joint_pigdm,
    joint_prior,
    joint_projection,
    matrix,
    mixed_measurement,
)

KEY = jax.random.key(0)
PROCESS = jd.processes.vp_cosine()
LEVEL = (0.5, 0.8, 0.6)


def gaussian(mean, covariance):
    return jd.gaussian_mixture(np.asarray(mean)[None], np.asarray(covariance)[None], [1.0])


def test_the_steps_are_the_published_ones(x64):
    """x_0hat, and -strength grad |y - A x_0hat - h_0hat| in closed form for Gaussian priors."""
    rng = np.random.default_rng(0)
    covariance = {"x": np.diag([0.5, 1.0, 2.0]), "h": np.array([[1.0, 0.6], [0.6, 1.5]])}
    mean = {"x": rng.normal(size=3), "h": rng.normal(size=2)}
    a, y = rng.normal(size=(2, 3)), rng.normal(size=(4, 2))
    state = {"x": rng.normal(size=(4, 3)), "h": rng.normal(size=(4, 2))}
    _, alpha, sigma = LEVEL
    x0, jacobian = {}, {}
    for k, v in covariance.items():
        gain = v @ np.linalg.inv(alpha**2 * v + sigma**2 * np.eye(len(v)))
        x0[k] = mean[k] + alpha * (state[k] - alpha * mean[k]) @ gain
        jacobian[k] = alpha * gain
    residual = y - x0["x"] @ a.T - x0["h"]
    unit = residual / np.linalg.norm(residual, axis=1, keepdims=True)
    want = {"x": 0.7 * unit @ a @ jacobian["x"], "h": 0.2 * unit @ jacobian["h"]}
    denoisers = {k: gaussian(mean[k], covariance[k]) for k in mean}
    known = mixed_measurement(y, 0.1, "h", x=matrix(a))
    net = joint_dps(denoisers, known, {"x": 0.7, "h": 0.2})
    assert net.cost == 2
    got, correction = jax.jit(lambda s: net(s, *LEVEL))(jax.tree.map(jnp.asarray, state))
    for k in mean:
        np.testing.assert_allclose(got[k], x0[k], rtol=1e-10)
        np.testing.assert_allclose(correction[k], want[k], rtol=1e-9, atol=1e-12)


def test_the_projection_is_the_published_one(x64):
    """x <- x - strength A^T (A x + h - y_hat) after a row, y_hat noised to where it ends."""
    rng = np.random.default_rng(1)
    a, y = rng.normal(size=(2, 3)), rng.normal(size=(4, 2))
    grid = jd.grids.half_log_snr(PROCESS, 1, t_max=0.7, t_min=0.2)
    known = mixed_measurement(y, 0.0, "h", x=matrix(a))
    strengths = {"x": 0.3, "h": 0.5}
    prior = joint_prior(
        {"x": gaussian(np.zeros(3), np.eye(3)), "h": gaussian(np.ones(2), np.eye(2))}
    )
    start = {"x": jnp.asarray(rng.normal(size=(4, 3))), "h": jnp.asarray(rng.normal(size=(4, 2)))}
    tableau, control = joint_projection(grid, known, strengths, jd.solvers.ddim)
    plain = jd.sample(prior, tableau, start)
    # y_hat is random: the two sources tell the same one.
    got = jd.sample(prior, tableau, start, KEY, control=control)
    apart = (plain["h"] - got["h"]) / 0.5
    np.testing.assert_allclose(plain["x"] - got["x"], 0.3 * apart @ a, rtol=1e-9, atol=1e-12)
    z = plain["x"] @ a.T + plain["h"] - apart - grid.alpha[1] * y
    assert 0.3 < np.std(z) / grid.sigma[1] < 1.9
    with pytest.raises(ValueError, match="sample needs key="):
        jd.sample(prior, tableau, start, control=control)


def test_gaussians_have_their_exact_posterior(x64):
    """`joint_pigdm` is E[x_0, h_0 | x_t, h_t, y] for isotropic Gaussians, by one big Gaussian."""
    rng = np.random.default_rng(2)
    a, y, std = rng.normal(size=(2, 3)), rng.normal(size=(5, 2)), {"x": 0.8, "h": 1.4}
    mean = {"x": rng.normal(size=3), "h": rng.normal(size=2)}
    state = {"x": rng.normal(size=(5, 3)), "h": rng.normal(size=(5, 2))}
    _, alpha, sigma = LEVEL
    prior = np.diag([0.8**2] * 3 + [1.4**2] * 2)
    m = np.concatenate([mean["x"], mean["h"]])
    # All that is seen: the noised sources, and y.
    see = np.concatenate([alpha * np.eye(5), np.concatenate([a, np.eye(2)], 1)])
    noise = np.diag([sigma**2] * 5 + [0.3**2] * 2)
    seen = np.concatenate([state["x"], state["h"], y], 1)
    gain = prior @ see.T @ np.linalg.inv(see @ prior @ see.T + noise)
    want = m + (seen - m @ see.T) @ gain.T
    denoisers = {k: gaussian(mean[k], std[k] ** 2 * np.eye(len(mean[k]))) for k in mean}
    net = joint_pigdm(denoisers, mixed_measurement(y, 0.3, "h", x=matrix(a)), std)
    got = jax.jit(lambda s: net(s, *LEVEL))(jax.tree.map(jnp.asarray, state))
    np.testing.assert_allclose(np.concatenate([got["x"], got["h"]], 1), want, rtol=1e-4, atol=1e-5)


def test_swapped_priors_swap_the_outputs():
    """Works when (dehazing): the two sources are treated alike."""
    o = oracles.BROAD
    nets = [jd.gaussian_mixture(o.means, o.std, o.weights), gaussian(np.zeros(2), 0.3 * np.eye(2))]
    y = np.array([[0.3, -0.4], [1.2, 0.1]])
    x_T = np.random.default_rng(0).normal(size=(2, 2, 2)).astype(np.float32)
    tableau = corrected(jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 6)))

    def run(first, second):
        pair = {"x": nets[first], "h": nets[second]}
        net = joint_dps(pair, mixed_measurement(y, 0.1, "x", "h"), {"x": 0.4, "h": 0.4})
        return jd.sample(net, tableau, {"x": x_T[first], "h": x_T[second]})

    ours, swapped = run(0, 1), run(1, 0)
    np.testing.assert_allclose(ours["x"], swapped["h"], atol=1e-5)
    np.testing.assert_allclose(ours["h"], swapped["x"], atol=1e-5)
    assert np.abs(ours["x"] - ours["h"]).max() > 0.1


def test_digits_without_their_haze():
    """Works when (dehazing): PSNR 3 dB above y and above one prior's DPS; residual below 2 noise_std.

    y = digit + correlated Gaussian haze + noise of 0.05, both scores exact. Single-model DPS takes the
    haze for white noise (the best of three step sizes).
    """
    count, std = 24, 0.05
    images = jd.data.digits("train").x[:300].reshape(300, 64)
    rng = np.random.default_rng(0)
    digit = images[100 : 100 + count] + exact_digits.WIDTH * rng.normal(size=(count, 64))
    at = np.stack(np.meshgrid(*[np.arange(8)] * 2, indexing="ij"), -1).reshape(64, 2)
    apart = np.sum((at[:, None] - at) ** 2, -1)
    covariance = 0.8**2 * np.exp(-apart / 8.0) + 1e-4 * np.eye(64)
    haze = rng.multivariate_normal(np.zeros(64), covariance, size=count)
    y = (digit + haze + std * rng.normal(size=digit.shape)).astype(np.float32)
    net = exact_digits.denoiser(images, np.zeros(300, int))
    pair = {"x": net, "h": gaussian(np.zeros(64), covariance)}
    x_T = {k: PROCESS.prior(jax.random.key(i), y.shape) for i, k in enumerate(pair)}
    grid = jd.grids.half_log_snr(PROCESS, 100, end="zero")
    tableau = corrected(jd.solvers.ddim(grid))
    joint = joint_dps(pair, mixed_measurement(y, std, "x", "h"), {"x": 0.5, "h": 0.5})
    found = jax.tree.map(np.asarray, jd.sample(joint, tableau, x_T))

    def psnr(x):
        return float(10 * np.log10(4 / np.mean((x - digit) ** 2)))

    def alone(zeta):
        known = jd.inverse.Measurement(inpainting(np.ones(64)), y, std)
        return jd.sample(dps_step(net, known, zeta), tableau, x_T["x"])

    single = max(psnr(x) for x in np.asarray(jax.vmap(alone)(jnp.array([0.15, 0.3, 1.0]))))
    assert psnr(found["x"]) > psnr(y) + 3 and psnr(found["x"]) > single + 3
    assert np.std(y - found["x"] - found["h"]) < 2 * std


PAIR = {"x": gaussian(np.ones(3), np.eye(3)), "h": gaussian(np.zeros(3), np.eye(3))}
KNOWN = mixed_measurement(np.ones((4, 3)), 0.1, "x", "h")
ONES = {"x": 1.0, "h": 1.0}
FLOW = jd.grids.uniform(jd.processes.flow(), 2)


def states(batch):
    return {k: jax.random.normal(jax.random.key(i), (batch, 3)) for i, k in enumerate(PAIR)}


def test_pure_noise_is_a_start():
    """At alpha = 0 the denoised x_0 does not depend on x_t: the step is the unguided one."""
    base = jd.solvers.ddim(FLOW)
    first = dict(t=1.0, alpha=0.0, sigma=1.0)
    x0, correction = joint_dps(PAIR, KNOWN, ONES)(states(4), **first)
    np.testing.assert_allclose(x0["x"], 1.0, atol=1e-6)
    np.testing.assert_allclose(correction["x"], 0.0, atol=1e-6)
    x = jd.sample(joint_dps(PAIR, KNOWN, ONES), corrected(base), states(4))
    assert np.all(np.isfinite(x["x"])) and np.abs(x["x"] + x["h"] - 1).max() < 3
    with pytest.raises(ValueError, match="joint_pigdm: .* at alpha = 0"):
        jd.sample(joint_pigdm(PAIR, KNOWN, ONES), base, states(4))


def _counted(params, x, levels, cond=None, memory=None):
    return params * x, memory + 1


def _refuse(params, batch, cond, alpha):
    if cond is None:
        raise ValueError("this source needs cond")


def test_sources_keep_their_memory_and_their_checks():
    """A source's memory goes on from call to call, and what it asks of a call is asked."""
    counts = jd.Denoiser(_counted, "x0", jnp.asarray(0.5), jd.denoisers.level, jnp.zeros(()))
    prior = joint_prior({"x": counts, "h": PAIR["h"]})
    state = jd.sample(prior, jd.solvers.ddim(FLOW), states(4), save="state")
    assert state.memory["x"] == 2
    asks = dataclasses.replace(PAIR["x"], fn=Asks())
    with pytest.raises(ValueError, match="this source needs cond"):
        jd.sample(joint_prior({"x": asks, "h": PAIR["h"]}), jd.solvers.ddim(FLOW), states(4))


class Asks:
    check = staticmethod(_refuse)

    def __call__(self, params, x, levels, cond=None):
        return x


def test_the_state_is_that_of_the_measurement():
    tableau, control = joint_projection(FLOW, KNOWN, ONES)
    assert tableau.rows == 2
    for run in (
        lambda x: jd.sample(joint_dps(PAIR, KNOWN, ONES), corrected(jd.solvers.ddim(FLOW)), x),
        lambda x: jd.sample(joint_prior(PAIR), tableau, x, KEY, control=control),
    ):
        with pytest.raises(ValueError, match=r"source 'h' has shape \(3, 3\), .* of \(4, 3\)"):
            run(states(3))
        with pytest.raises(ValueError, match=r"dictionary of \['h', 'x'\], got \['x'\]"):
            run({"x": jnp.zeros((4, 3))})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: joint_projection(FLOW, KNOWN, {"x": -5.0, "h": 1.0}), ValueError, "'x'.*-5.0"),
        (lambda: joint_projection(FLOW, KNOWN, {"x": 1.0, "h": np.nan}), ValueError, "'h'.*nan"),
        (
            lambda: joint_projection(
                FLOW, KNOWN, ONES, lambda grid: jd.solvers.time_travel(grid, 2)
            ),
            ValueError, "one row a step, 2 here; got 1 registers and",
        ),
        (lambda: mixed_measurement(np.ones((2, 3)), 0.1, "x"), ValueError, "at least two sources"),
        (
            lambda: mixed_measurement(np.ones((2, 3)), 0.1, "h", x=matrix(np.eye(2))),
            ValueError, r"source 'x' measures \(2,\), y is of \(3,\)",
        ),
        (
            lambda: joint_dps(
                {"x": gaussian(np.zeros(3), np.eye(3))},
                mixed_measurement(np.ones((2, 3)), 0.1, "x", "h"), {"x": 1.0, "h": 1.0},
            ),
            ValueError, r"sources are \['h', 'x'\], the denoisers \['x'\]",
        ),
        (lambda: joint_dps({}, 3.0, {}), TypeError, "joint_dps takes a mixed_measurement, got float"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
