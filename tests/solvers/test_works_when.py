"""What papers say of few steps on images, on digits whose denoiser is known in closed form.

No network is trained. Its place takes the exact denoiser of the 1,797 real digits, each spread by
a normal of one standard deviation, given a class or not: the one that makes digits not seen the
likeliest, for a density that generalises, as a trained network's does, and is no list of images.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.denoisers import level

DIGITS = jd.data.digits("all")
IMAGES = np.asarray(DIGITS.x, np.float64).reshape(len(DIGITS), -1)
NONE = 10
STD, SHARP = 0.25, 0.05
COUNT = 500


def expected_image(params, x, levels, cond):
    """E[x_0 | x_t = x], over the digits of class `cond`, or all of them (NONE)."""
    means, labels, std = params
    _, a, s = levels
    variance = (a * std) ** 2 + s**2
    log_joint = (a * x @ means.T - 0.5 * a**2 * jnp.sum(means**2, 1)) / variance
    allowed = (labels == cond[:, None]) | (cond[:, None] == NONE)
    mean = jax.nn.softmax(jnp.where(allowed, log_joint, -jnp.inf), 1) @ means
    return mean + a * std**2 / variance * (x - a * mean)


def digits_denoiser(std):
    return jd.Denoiser(expected_image, "x0", (jnp.asarray(IMAGES), DIGITS.label, std), level)


def starts(seed, count=COUNT):
    return np.random.default_rng(seed).normal(size=(count, IMAGES.shape[1])).astype(np.float32)


@functools.cache
def kernel():
    return jd.metrics.rbf(jd.metrics.median_bandwidth(IMAGES, IMAGES))


def mmd(samples, images=IMAGES):
    """The squared maximum mean discrepancy, unbiased, from all digits."""
    return jd.metrics.mmd(np.asarray(samples), images, kernel())


@pytest.mark.parametrize("label", [NONE, 3])
def test_the_stand_in_is_the_exact_denoiser_of_the_digits(x64, label):
    chosen = IMAGES if label == NONE else IMAGES[DIGITS.label == label]
    exact = jd.gaussian_mixture(chosen, np.full(len(chosen), STD), np.ones(len(chosen)))
    x = jnp.asarray(IMAGES[:4] + starts(0, 4))
    for at in ((0.0, 0.3, 0.95), (0.0, 0.9, 0.4)):
        got = digits_denoiser(STD)(x, *at, cond=jnp.full(4, label))
        np.testing.assert_allclose(got, exact(x, *at), rtol=0, atol=1e-9)


def test_the_spread_is_the_one_that_makes_new_digits_likeliest(x64):
    train, test = (jd.data.digits(part).x.reshape(-1, 64) for part in ("train", "test"))

    def likelihood(std):
        density = jd.gaussian_mixture(train, np.full(len(train), std), np.ones(len(train))).params
        return np.mean(jax.lax.map(lambda x: density.log_density(x[None], 1.0, 0.0), test))

    assert max((SHARP, 0.15, 0.2, STD, 0.3, 0.4), key=likelihood) == STD


# --- truncated and respaced Karras grid (row 43) --------------------------------------------------

STABLE_DIFFUSION = jd.processes.ddpm("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012)


@functools.cache
def guided(std, kind):
    """500 samples, fifty a class, guidance scale 5: DPM-Solver++(2M), eight steps."""
    grid = {
        "truncated": jd.grids.truncated_karras(STABLE_DIFFUSION, 8),
        "karras": jd.grids.karras(STABLE_DIFFUSION, 8),
        "karras to zero": jd.grids.karras(STABLE_DIFFUSION, 8, end="zero"),
    }[kind.removesuffix(", projected")]
    table = jd.solvers.dpm_solver_pp_multistep(grid)
    if kind.endswith("projected"):
        table = jd.solvers.denoise_to_zero(table, grid)
    denoiser = jd.guidance.classifier_free(digits_denoiser(std), 5.0, NONE)
    return jd.sample(denoiser, table, starts(0), cond=np.arange(COUNT) % 10)


def guided_mmd(std, images=IMAGES):
    """(truncated and projected, truncated, the better of the two whole grids)."""
    kinds = ("truncated, projected", "truncated", "karras", "karras to zero")
    ours, unprojected, *whole = (mmd(guided(std, kind), images) for kind in kinds)
    return ours, unprojected, min(whole)


def test_a_truncated_grid_and_a_projection_come_nearer_to_the_digits_than_the_whole_grid():
    """0.0034 against 0.0047, with the residual noise, sigma = 0.29 alpha, left in 0.0171.

    The projection is a ninth evaluation.
    """
    ours, unprojected, whole = guided_mmd(STD)
    assert ours <= 0.9 * whole
    assert unprojected > 3 * ours


def test_what_they_gain_is_the_spread_that_the_projection_leaves_out():
    """Not from the law that the denoiser belongs to: 0.0013 against 0.0011.

    Nor where there is no spread to leave out, 0.0012 against 0.0005.
    """
    rng = np.random.default_rng(5)
    law = IMAGES[rng.choice(len(IMAGES), 3000)] + STD * rng.normal(size=(3000, IMAGES.shape[1]))
    ours, _, whole = guided_mmd(STD, law)
    assert whole < ours < 1.5 * whole
    ours, unprojected, whole = guided_mmd(SHARP)
    assert ours > 1.2 * whole
    assert unprojected > 3 * ours


# --- teleportation (row 74) -----------------------------------------------------------------------

VP = jd.processes.vp_linear()


@functools.cache
def skipping(spacing, steps):
    """(samples, evaluations) of DPM-Solver++(2M) with 50 steps, the first `steps` in closed form."""
    grid = getattr(jd.grids, spacing)(VP, 50)
    table = jd.solvers.dpm_solver_pp_multistep(jd.grids.from_times(VP, grid.t[steps:]))
    if steps:
        mean, cov = IMAGES.mean(0), np.cov(IMAGES.T, bias=True) + STD**2 * np.eye(IMAGES.shape[1])
        table = jd.solvers.teleport(table, grid.alpha[0], grid.sigma[0], mean, cov)
    samples = jd.sample(digits_denoiser(STD), table, starts(0), cond=np.full(COUNT, NONE))
    return np.asarray(samples), table.nfe


def changes(spacing, steps):
    """(ratio of MMDs, median distance between samples) of the skipping run and the whole one."""
    whole, found = skipping(spacing, 0)[0], skipping(spacing, steps)[0]
    return mmd(found) / mmd(whole), np.median(np.linalg.norm(found - whole, axis=1))


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("uniform", 15), ("uniform", 20), ("karras", 15), ("karras", 20), ("half_log_snr", 15)],
)
def test_the_first_steps_are_those_of_a_gaussian(spacing, steps):
    """30% and 40% of 50 steps: MMD 0.999, 0.998, 1.000, 0.998 and 0.983 of the whole run's.

    MMD is the claim's measure and nearly blind to the covariance (1.005 and 1.008 with the identity),
    so the samples are compared one by one too: two digits are some 6 apart.
    """
    assert skipping(spacing, 0)[1] == 50 and skipping(spacing, steps)[1] == 50 - steps
    ratio, distance = changes(spacing, steps)
    assert abs(ratio - 1) < 0.03
    assert distance < 0.008


@pytest.mark.parametrize(("spacing", "steps"), [("half_log_snr", 20), ("uniform", 35)])
def test_later_ones_are_not(spacing, steps):
    """0.93 where 40% of the steps, even in lambda, lead to t = 0.49; 0.58 to t = 0.3.

    The figures that keep it within 3% skip to t = 0.6 or more.
    """
    ratio, distance = changes(spacing, steps)
    assert abs(ratio - 1) > 0.05
    assert distance > 0.02
