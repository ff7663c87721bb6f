"""DPS, PiGDM, MMPS, TMPD, MCG and STSL against dense algebra and the exact posterior, in float64.

The Jacobian of a mixture's E[x_0 | x_t] is alpha / sigma^2 times its Cov[x_0 | x_t], which is known.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inverse_cases import (
    DIM,
    LEVEL,
    MEANS,
    SEEN,
    STD,
    WEIGHTS,
    A,
    X,
    Y,
    measurement,
    moments,
    prior,
)

import jaxdiff as jd
from jaxdiff import inverse
from jaxdiff.denoisers import level

_, ALPHA, SIGMA = LEVEL
KEY = jax.random.key(0)
FROM_NOISE = jd.grids.uniform(jd.processes.flow(), 2)
call = jax.jit(lambda denoiser, x: denoiser(x, *LEVEL))


def solved(weight):
    """x_0hat + Cov A^T weight(residual, A Cov A^T), sample by sample."""
    found = []
    for mean, covariance in zip(*moments()):
        residual, spread = Y - A @ mean, A @ covariance @ A.T
        found.append(mean + covariance @ A.T @ weight(residual, spread))
    return np.stack(found)


def pigdm_variance(data_std):
    return (SIGMA * data_std) ** 2 / ((ALPHA * data_std) ** 2 + SIGMA**2)


# name -> (what makes it, its weight by dense algebra)
SCORES = {
    "dps": (lambda d, m: inverse.dps(d, m, 0.7), lambda r, s: 0.7 * r / STD**2),
    "pigdm": (
        lambda d, m: inverse.pigdm(d, m, 1.3),
        lambda r, s: np.linalg.solve(pigdm_variance(1.3) * A @ A.T + STD**2 * np.eye(SEEN), r),
    ),
    "mmps, gmres": (
        lambda d, m: inverse.mmps(d, m, SEEN), lambda r, s: np.linalg.solve(s + STD**2 * np.eye(SEEN), r)
    ),
    "mmps, cg": (
        lambda d, m: inverse.mmps(d, m, SEEN, "cg"),
        lambda r, s: np.linalg.solve(s + STD**2 * np.eye(SEEN), r),
    ),
    "mmps, one step of gmres": (inverse.mmps, lambda r, s: one_step(r, s + STD**2 * np.eye(SEEN))),
    "tmpd": (inverse.tmpd, lambda r, s: r / (np.maximum(s.sum(1), 0) + STD**2)),
}  # fmt: skip


def one_step(b, M):
    """The multiple of b whose image is nearest to b."""
    return b * (b @ M @ b) / np.sum((M @ b) ** 2)


@pytest.mark.parametrize("name", SCORES)
def test_the_guided_denoiser_by_dense_algebra(name, x64):
    make, weight = SCORES[name]
    got = call(make(prior(), measurement()), jnp.asarray(X))
    np.testing.assert_allclose(got, solved(weight), atol=1e-9)


def test_every_prediction_serves(x64):
    for prediction in ("eps", "v"):
        guided = inverse.dps(prior(prediction), measurement())
        got = call(guided, jnp.asarray(X))
        np.testing.assert_allclose(got, solved(lambda r, s: r / STD**2), atol=1e-9)


def test_what_is_exact_for_gaussians(x64):
    """PiGDM for isotropic ones, TMPD for independent ones seen one by one, MMPS for any."""
    x, full = jnp.asarray(X), np.diag([0.3, 0.9, 0.5, 0.2, 0.7])
    mask = np.array([1, 0, 1, 1, 0])
    rotated = full + 0.1 * np.ones((DIM, DIM))
    cases = [
        (lambda d, m: inverse.pigdm(d, m, 0.8), 0.64 * np.eye(DIM), inverse.matrix(A), Y),
        (inverse.tmpd, full, inverse.inpainting(mask), mask * X[1]),
        (lambda d, m: inverse.mmps(d, m, SEEN), rotated, inverse.matrix(A), Y),
    ]
    for make, covariance, operator, y in cases:
        d = jd.gaussian_mixture(MEANS[:1], covariance[None], [1.0])
        exact = inverse.mixture_posterior(d, operator, y, STD).denoiser()
        guided = make(d, inverse.Measurement(operator, y, STD))
        np.testing.assert_allclose(call(guided, x), call(exact, x), atol=1e-9)


def test_a_solved_sample_stays_solved():
    """No residual, and more iterations than dimensions: neither divides by 0."""
    d = jd.gaussian_mixture(MEANS, np.full(3, 0.5), WEIGHTS)
    x = jnp.asarray(X, jnp.float32)
    x0 = call(d, x)
    seen = jnp.concatenate([x0[:2] @ A.T, jnp.broadcast_to(jnp.asarray(Y, jnp.float32), (2, SEEN))])
    for solver in ("cg", "gmres"):
        both = inverse.Measurement(inverse.matrix(A), seen, STD)
        got = call(inverse.mmps(d, both, 6, solver), x)
        np.testing.assert_allclose(got[:2], x0[:2], atol=1e-5)
        exact = call(inverse.mmps(d, both, 3, solver), x)
        np.testing.assert_allclose(got[2:], exact[2:], atol=2e-4)


# --- published steps ------------------------------------------------------------------------------


def dense_norm_gradient():
    """grad_x |y - A x_0hat| and x_0hat."""
    mean, covariance = moments()
    residual = Y - mean @ A.T
    pulled = np.einsum("bij,bj->bi", covariance, residual @ A) * ALPHA / SIGMA**2
    return -pulled / np.linalg.norm(residual, axis=1, keepdims=True), mean


def test_dps_step_and_pigdm_step_by_dense_algebra(x64):
    gradient, mean = dense_norm_gradient()
    x0, correction = call(inverse.dps_step(prior(), measurement(), 0.4), jnp.asarray(X))
    np.testing.assert_allclose(x0, mean, atol=1e-10)
    np.testing.assert_allclose(correction, -0.4 * gradient, atol=1e-10)
    _, covariance = moments()
    weight = np.linalg.inv(A @ A.T + STD**2 / pigdm_variance(1.0) * np.eye(SEEN))
    pulled = np.einsum("bij,bj->bi", covariance, (Y - mean @ A.T) @ weight @ A) * ALPHA / SIGMA**2
    _, correction = call(inverse.pigdm_step(prior(), measurement()), jnp.asarray(X))
    np.testing.assert_allclose(correction, ALPHA * pulled, atol=1e-10)
    # Without noise it is J^T A^+ (y - A x_0hat).
    pulled = np.einsum("bij,bj->bi", covariance, (Y - mean @ A.T) @ np.linalg.pinv(A).T)
    _, correction = call(inverse.pigdm_step(prior(), measurement(0.0)), jnp.asarray(X))
    np.testing.assert_allclose(correction, ALPHA**2 / SIGMA**2 * pulled, atol=1e-9)


PROCESS = jd.processes.vp_linear()
GRID = jd.grids.half_log_snr(PROCESS, 4)


def by_hand(zeta, x, noise):
    """Algorithm 1 of DPS, written out with jax.grad."""
    d, seen = prior(), measurement()

    def error(x, levels):
        x0 = d(x, *levels)
        return jnp.sum(jnp.linalg.norm(seen.residual(x0), axis=1)), x0

    value_and_gradient = jax.jit(jax.value_and_grad(error, has_aux=True))
    for i, z in zip(range(GRID.steps), noise):
        (_, a, s), (_, a1, s1) = GRID.node(i), GRID.node(i + 1)
        (_, x0), gradient = value_and_gradient(x, GRID.node(i))
        share = 1 - (a * s1 / (a1 * s)) ** 2
        mean = a / a1 * (s1 / s) ** 2 * x + a1 * share * x0
        x = mean + s1 * np.sqrt(share) * z - zeta * gradient
    return x


def test_the_sampler_is_algorithm_1_of_dps(x64):
    noise = jnp.asarray(np.random.default_rng(2).normal(size=(GRID.steps, *X.shape)))
    stepped, tableau = inverse.dps_step(prior(), measurement(), 0.3), jd.solvers.ddpm(GRID)
    got = jd.sample(stepped, inverse.corrected(tableau), jnp.asarray(X), noise=noise)
    np.testing.assert_allclose(got, by_hand(0.3, jnp.asarray(X), noise), atol=1e-10)
    # Works when, STSL (Rout et al. 2024): eta = 0 reduces to DPS exactly.
    refined = inverse.stsl(prior(), measurement(), KEY, 0.3, 0.0, refinements=1)
    same = jd.sample(refined, inverse.corrected(tableau, moves=True), jnp.asarray(X), noise=noise)
    np.testing.assert_allclose(same, got, atol=1e-12)


def test_mcg_projects_dps_onto_the_noised_measurement(x64):
    """Within A's range a step ends at a y noised anew, outside it is DPS's."""
    one = jd.grids.from_arrays(GRID.t[2:4], GRID.alpha[2:4], GRID.sigma[2:4])
    d, tableau, control = inverse.mcg(prior(), one, measurement(), 0.1)
    x = jnp.asarray(np.repeat(X[:1], 1000, 0))
    got = np.asarray(jd.sample(d, tableau, x, key=KEY, control=control))
    plain = np.asarray(jd.sample(d, tableau, x, key=KEY))
    null = np.eye(DIM) - np.linalg.pinv(A) @ A
    np.testing.assert_allclose(got @ null, plain @ null, atol=1e-9)
    _, alpha, sigma = one.node(1)
    np.testing.assert_allclose((got @ A.T).mean(0), alpha * Y, atol=4 * sigma / np.sqrt(len(x)))
    np.testing.assert_allclose(np.cov(got @ A.T, rowvar=False), sigma**2 * A @ A.T, atol=0.15 * sigma**2)


# --- STSL -----------------------------------------------------------------------------------------


def hessian_trace(x):
    """tr grad^2 log p_t(x), by automatic differentiation of the exact density."""
    mixture = prior().params

    def log_density(x):
        return mixture.log_density(x[None], ALPHA, SIGMA)[0]

    return jax.vmap(lambda x: jnp.trace(jax.hessian(log_density)(x)))(x)


def test_the_trace_of_stsl(x64):
    """Works when, STSL: within 3% of the exact trace over 1e4 small probes."""
    x = jnp.asarray(X[:2])
    wide = jnp.repeat(x, 10_000, 0)
    trace = jax.jit(lambda d, x: inverse.hessian_trace(d, x, LEVEL, KEY, probe=0.02))
    got = trace(prior("eps"), wide).reshape(2, -1).mean(1)
    np.testing.assert_allclose(got, jax.jit(hessian_trace)(x), rtol=0.03)


def test_the_correction_of_stsl_is_a_gradient(x64):
    """-zeta grad |y - A x_0hat| - eta grad tr H in the mean over probes, and then x has moved by it."""
    x = jnp.repeat(jnp.asarray(X[:1]), 5_000, 0)
    exact = np.asarray(jax.jit(jax.grad(lambda x: hessian_trace(x).sum()))(x[:1]))[0]
    gradient, mean = dense_norm_gradient()
    once = inverse.stsl(prior(), measurement(), KEY, 0.2, 0.05, 1, 0.02)
    x0, moved, correction = call(once, x)
    np.testing.assert_allclose(x0[0], mean[0], atol=1e-10)
    assert np.all(np.asarray(moved) == 0)
    trace = (np.asarray(correction) + 0.2 * gradient[0]) / -0.05
    error = trace.std(0) / np.sqrt(len(trace))
    assert np.all(np.abs(trace.mean(0) - exact) < 4 * error + 0.01 * np.abs(exact))
    # The same probes, in the first refinement of two: x moved by it, here with the other weighting.
    twice = inverse.stsl(prior(), measurement(), KEY, 0.2, 0.05, 2, 0.02, "covariance")
    _, moved, _ = call(twice, x)
    want = -0.2 * gradient[0] - 0.05 * SIGMA**4 / ALPHA**2 * trace
    np.testing.assert_allclose(moved, want, atol=1e-10)


def test_stsl_at_a_quarter_of_the_evaluations():
    """Works when, STSL: the posterior mean's error at most that of DPS at a quarter of its evaluations,
    on 2 of 3 seeds; here within 5% of it on 2 of 3 (at most it on one), each at its best zeta.

    96 evaluations, 24 levels with two refinements of twice the batch, against 384. The exact claim does
    not hold on mixtures, nor is the trace what helps: eta = 0 is as near. (The paper compares with PSLD
    at 1,000 steps.)
    """
    rng = np.random.default_rng(0)
    d = jd.gaussian_mixture(rng.normal(size=(4, 16)), np.full(4, 0.4), np.ones(4))
    operator = inverse.matrix(rng.normal(size=(6, 16)) / 4)
    y = inverse.measure(operator, d.params.sample(KEY, (3,))[0], 0.1, jax.random.key(1)).y
    exact = [inverse.mixture_posterior(d, operator, row, 0.1).mean for row in y]
    x_T = PROCESS.prior(jax.random.key(2), (256, 16))

    def errors(make, steps, strengths, moves=False):
        """Of the posterior's mean, relative: [strength, measurement]."""
        tableau = jd.solvers.ddpm(jd.grids.half_log_snr(PROCESS, steps))
        tableau = inverse.corrected(tableau, moves)

        def one(strength, y):
            guided = make(d, inverse.Measurement(operator, y, 0.1), strength)
            return jnp.mean(jd.sample(guided, tableau, x_T, key=KEY), 0)

        means = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(jnp.asarray(strengths), y)
        return np.linalg.norm(means - np.stack(exact), axis=-1) / np.linalg.norm(exact, axis=-1)

    # The best zeta of 0.3, 1 and 2, and of 2 and 3.
    (dps,) = errors(inverse.dps_step, 384, [0.3])
    first, second = errors(
        lambda d, m, eta: inverse.stsl(d, m, KEY, 2.0, eta, 2), 24, [0.0, 0.002], moves=True
    )
    assert np.sum(second <= 1.05 * dps) >= 2
    np.testing.assert_allclose(second, first, rtol=0.02)


# --- cost -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Counted:
    """A linear denoiser of ("x0") that counts, while it is traced, calls and pullbacks."""

    calls: int = 0
    pulls: int = 0

    def denoiser(self, memory=None):
        @jax.custom_vjp
        def network(x):
            self.calls += 1
            return 0.5 * x

        def forward(x):
            self.calls += 1
            return 0.5 * x, None

        def backward(_, g):
            self.pulls += 1
            return (0.5 * g,)

        network.defvjp(forward, backward)
        if memory is None:
            return jd.Denoiser(lambda x, levels: network(x), "x0", time=level)
        return jd.Denoiser(
            lambda x, levels, memory: (network(x), memory + 1), "x0", time=level, memory=memory
        )


# name -> (what makes it, evaluations, pullbacks)
COSTS = {
    "dps": (inverse.dps, 1, 1),
    "dps_step": (inverse.dps_step, 1, 1),
    "pigdm": (inverse.pigdm, 1, 1),
    "pigdm_step": (inverse.pigdm_step, 1, 1),
    "mmps": (lambda d, m: inverse.mmps(d, m, 3), 1, 4),
    "mmps, cg": (lambda d, m: inverse.mmps(d, m, 3, "cg"), 1, 4),
    "tmpd": (inverse.tmpd, 1, 2),
    "stsl": (lambda d, m: inverse.stsl(d, m, KEY, refinements=2), 2, 2),
    "flowchef": (lambda d, m: inverse.flowchef(d, m, repeats=3), 1, 0),
}


@pytest.mark.parametrize("name", COSTS)
def test_one_activation_set(name):
    """Calls of the network (STSL's are of twice the batch) and products with its Jacobian; memory of
    the denoiser passes through."""
    make, calls, pulls = COSTS[name]
    counted = Counted()
    guided = make(counted.denoiser(jnp.zeros(())), measurement())
    _, memory = jax.eval_shape(
        lambda x: guided.evaluate(x, *LEVEL, None, guided.memory), jnp.asarray(X, jnp.float32)
    )
    assert (counted.calls, counted.pulls) == (calls, pulls)
    assert jax.tree.structure(memory) == jax.tree.structure(guided.memory)
    assert guided.cost == (4 if name == "stsl" else 1)


def test_strengths_are_data():
    """vmap over strengths, and memory counted through a sampler."""
    x = jnp.asarray(X, jnp.float32)
    guided = jax.jit(jax.vmap(lambda s: inverse.dps(prior(), measurement(), s)(x, *LEVEL)))
    none, half, whole = guided(jnp.asarray([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(none, moments()[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole - none, 2 * (half - none), rtol=1e-4, atol=1e-4)
    counting = Counted().denoiser(jnp.zeros(()))
    state = jd.sample(
        inverse.pigdm(counting, measurement()), jd.solvers.ddim(GRID), x, save="state"
    )
    assert float(state.memory) == GRID.steps


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: inverse.dps(prior(), "y"), TypeError, "Measurement"),
        (lambda: inverse.dps("d", measurement()), TypeError, "Denoiser"),
        (lambda: inverse.dps(jd.clip_x0(prior(), keep_eps=True), measurement()), ValueError, "one pred"),
        (lambda: inverse.dps(prior(), measurement(), -1.0), ValueError, "-1"),
        (lambda: inverse.dps(prior(), measurement(0.0)), ValueError, "dps_step"),
        (lambda: inverse.dps_step(prior(), measurement(), np.nan), ValueError, "zeta"),
        (lambda: inverse.pigdm(prior(), measurement(), 0.0), ValueError, "data_std"),
        (lambda: inverse.mmps(prior(), measurement(), 0), ValueError, "iterations"),
        (lambda: inverse.mmps(prior(), measurement(), 1, "lu"), ValueError, "choose from"),
        (lambda: inverse.stsl(prior(), measurement(), 3), TypeError, "key"),
        (lambda: inverse.stsl(prior(), measurement(), KEY, probe=0.0), ValueError, "probe"),
        (lambda: inverse.stsl(prior(), measurement(), KEY, weighting="x"), ValueError, "weighting"),
        (
            lambda: jd.sample(  # a grid from alpha = 0, where sigma^4 / alpha^2 is infinite
                inverse.stsl(prior(), measurement(), KEY, weighting="covariance"),
                inverse.corrected(jd.solvers.ddim(FROM_NOISE), moves=True), jnp.asarray(X),
            ),
            ValueError, "stsl .* at alpha = 0",
        ),
        (lambda: inverse.mcg(prior(), "g", measurement()), ValueError, "grid"),
        (
            lambda: inverse.mcg(prior(), GRID, measurement(), 1.0, jd.solvers.heun(GRID)),
            ValueError, "rows",
        ),
        (lambda: inverse.corrected(jd.solvers.heun(GRID)), ValueError, "one register"),
        (
            lambda: inverse.corrected(jd.solvers.dpm_solver_pp_multistep(GRID, order=2), True),
            ValueError, "no history",
        ),
        (
            lambda: jd.sample(
                inverse.pigdm(prior("v"), measurement()),
                jd.solvers.ddim(jd.grids.uniform(jd.processes.flow(), 2)), jnp.asarray(X),
            ),
            ValueError, "alpha = 0",
        ),
        (
            lambda: inverse.pigdm(prior(), measurement())(jnp.ones((2, 4)), *LEVEL),
            ValueError, "state has shape",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
