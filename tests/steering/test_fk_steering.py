"""FK steering against targets in closed form, and its potentials against the published loop's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.steering import GaussianProposal, best, fk_steering

PROCESS = jd.processes.vp_linear()
MEANS = np.array([[-1.5, 0.0], [1.0, 1.0], [1.5, -1.0]])
STDS, SHARES = np.array([0.4, 0.5, 0.3]), np.array([0.5, 0.3, 0.2])
NET = jd.gaussian_mixture(MEANS, STDS, SHARES, PROCESS, "v")
DIRECTION, LAMBDA = np.array([1.2, -0.8]), 2.0
GRID = jd.grids.half_log_snr(PROCESS, 150, t_min=1e-3, end="zero")
TABLE = jd.solvers.ddpm(GRID)
GROUPS, K = 100, 64
X_T = PROCESS.prior(jax.random.key(1), (GROUPS * K, 2))


def linear(direction, x):
    return x @ direction


def tilted_mean(strength):
    """E x under p(x) exp(strength <direction, x>), a mixture again."""
    shift = strength * STDS[:, None] ** 2 * DIRECTION
    log_share = strength * MEANS @ DIRECTION + 0.5 * strength * shift @ DIRECTION
    share = SHARES * np.exp(log_share - log_share.max())
    return share / share.sum() @ (MEANS + shift)


def log_normaliser(strength):
    shift = strength * STDS[:, None] ** 2 * DIRECTION
    return np.log(SHARES @ np.exp(strength * (MEANS + 0.5 * shift) @ DIRECTION))


def run(table=TABLE, x=X_T, **options):
    options = {"particles": K, "strength": LAMBDA, **options}
    control = fk_steering(NET, table, linear, params=DIRECTION, **options)
    state = jd.sample(NET, table, x, jax.random.key(2), control=control, save="state")
    return np.asarray(state.registers[0]), state.aux


def group_means(x, log_weights):
    w = np.exp(np.asarray(log_weights, np.float64).reshape(-1, K))
    w /= w.sum(1, keepdims=True)
    return np.einsum("gk,gkd->gd", w, x.reshape(-1, K, 2))


@pytest.fixture(scope="module")
def steered():
    return run(rows=range(14, 149, 15), finish="weights")


@pytest.fixture(scope="module")
def importance():
    return run(rows=(), finish="weights")


def test_64_particles_reach_the_tilted_mean_with_less_variance(steered, importance):
    """Singhal et al. (2025), FK steering, difference potential: mean error at most 0.05.

    The mean of 100 groups' means; the variance is theirs, at the same number of evaluations.
    """
    wanted = tilted_mean(LAMBDA)
    assert np.linalg.norm(wanted - SHARES @ MEANS) > 1.0
    (x, aux), (x_is, aux_is) = steered, importance
    found, plain = group_means(x, aux.log_weights), group_means(x_is, aux_is.log_weights)
    assert np.linalg.norm(found.mean(0) - wanted) <= 0.05
    assert np.sum(found.var(0)) < 0.8 * np.sum(plain.var(0))
    assert np.min(aux.resamplings) >= 1 and np.max(aux_is.resamplings) == 0


def test_the_normaliser_is_an_estimate_of_the_expected_reward(steered, importance):
    """E exp(lambda r), unbiased in both: means over the groups within four standard errors."""
    for _, aux in (steered, importance):
        estimates = np.exp(np.asarray(aux.log_normaliser, np.float64))
        error = estimates.std() / np.sqrt(GROUPS)
        assert abs(estimates.mean() - np.exp(log_normaliser(LAMBDA))) < 4 * error


def test_resampled_at_the_end_the_weights_are_equal():
    x, aux = run(x=X_T[: 10 * K], rows=range(14, 149, 15))
    assert np.all(np.asarray(aux.log_weights) == 0)
    # What belongs to a particle went with it.
    np.testing.assert_allclose(aux.reward, x @ DIRECTION, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aux.log_potentials, LAMBDA * aux.reward, rtol=1e-4, atol=1e-4)
    assert np.all(np.asarray(aux.ancestor) // K == np.arange(10 * K) // K)


def test_best_of_k_is_the_highest_reward(importance):
    x, aux = importance
    found = np.asarray(best(jnp.asarray(x), aux.reward, K))
    grouped = x.reshape(GROUPS, K, 2)
    rewards = grouped @ DIRECTION
    np.testing.assert_array_equal(found, grouped[np.arange(GROUPS), rewards.argmax(1)])


@pytest.mark.parametrize(
    "potential, proposal",
    [("max", None), ("sum", None), ("difference", GaussianProposal(0.5))],
)
def test_the_product_of_potentials_is_the_reward_s(x64, potential, proposal):
    """exp(lambda r(x0)) to 1e-6, for a sampler with history and two registers too."""
    grid = jd.grids.half_log_snr(PROCESS, 6)
    table = jd.solvers.sa_solver(grid)
    assert table.registers > 1 and table.history > 1
    net = jd.gaussian_mixture(MEANS, STDS, SHARES, PROCESS, "x0", dtype=jnp.float64)
    control = fk_steering(
        net, table, linear, 3.0, DIRECTION, potential=potential, particles=4, threshold=1.0,
        finish="weights", proposal=proposal, samples=1 if proposal is None else 3,
    )  # fmt: skip
    x_T = jax.random.normal(jax.random.key(0), (8, 2), jnp.float64)
    state = jd.sample(net, table, x_T, jax.random.key(0), control=control, save="state")
    assert np.all(np.asarray(state.aux.resamplings) == 5)
    exact = 3.0 * np.asarray(state.registers[0]) @ DIRECTION
    np.testing.assert_allclose(np.exp(state.aux.log_potentials - exact), 1.0, rtol=1e-6)


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_the_potentials_are_the_published_ones(potential):
    """zacharyhorvitz/Fk-Diffusion-Steering's weights for a run of rewards, in NumPy.

    Its initial reward is 0 (reward_min_value), so rewards start above; its running rewards are those of
    paths, here of one particle a group, so nothing moves.
    """
    rewards = np.array([0.3, 0.8, 0.5, 0.9])
    weights, kept, product = [], 0.0, 1.0
    for r in rewards:
        w = r - kept
        if potential != "difference":
            r = w = max(r, kept) if potential == "max" else r + kept
        w = np.exp(2.0 * w)
        weights.append(w)
        kept, product = r, product * w
    final = np.exp(2.0 * 0.7) / product  # the paper's last potential
    table = jd.solvers.ddpm(jd.grids.half_log_snr(PROCESS, 5))
    net = jd.Denoiser(lambda x, t: x, "x0")
    control = fk_steering(
        net, table, _itself, 2.0, potential=potential, particles=1, threshold=0.0, finish="weights"
    )
    info = jd.integrator.RowInfo
    after, aux, found = jax.jit(control.after), control.init(jnp.zeros(1)), []
    for r, x0 in enumerate([*rewards, 0.7]):
        row = info(jnp.asarray(r), *(jnp.float32(v) for v in (0.5, 0.6, 0.8, 1.0)))
        out = jnp.full(1, x0, jnp.float32)
        before = aux.log_weights
        # The last row's reward is that of the state.
        _, aux = after(aux, row, out, out, out, jd.Carry((out,), ()), jax.random.key(0))
        found.append(float(jnp.exp(aux.log_weights - before)[0]))
    np.testing.assert_allclose(found, [*weights, final], rtol=1e-5)


def _itself(x):
    return x


def test_a_copy_has_its_own_noise_at_once():
    """All but one particle of no weight: its copies leave the row apart, by the row's own noise."""
    table = jd.solvers.ddpm(jd.grids.half_log_snr(PROCESS, 2, t_max=0.5, t_min=0.1))
    net = jd.Denoiser(_half, "x0")
    control = fk_steering(net, table, _far, 1.0, rows=[0], particles=4, finish="weights")
    x = jnp.asarray([[0.0], [0.0], [2.0], [0.0]])
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 1)), jnp.float32)
    path = jd.sample(
        net, table, x, jax.random.key(0), noise=noise, control=control, save="trajectory"
    )
    a, b, c = table.A[0, 0, 0], table.B[0, 0, 0, 0], table.C[0, 0]
    want = a * 2.0 + b * 1.0 + c * np.asarray(noise[0])
    np.testing.assert_allclose(path[1], want, rtol=1e-5)


def _half(x, t):
    return 0.5 * x


def _far(x):
    return 1e3 * x[:, 0]


def after_rows(control, *predicted):
    """The control's state after rows whose network says these x_0; the last one's state is that."""
    after, aux = jax.jit(control.after), control.init(jnp.zeros(len(predicted[0])))
    for r, x0 in enumerate(predicted):
        row = jd.integrator.RowInfo(jnp.asarray(r), *map(jnp.float32, (0.5, 0.6, 0.8, 1.0)))
        out = jnp.asarray(x0, jnp.float32)
        carry = jd.Carry((out,), ())
        carry, aux = after(aux, row, out, out, out, carry, jax.random.key(0))
    return carry.registers[0], aux


def _infinite_beyond_5(x):
    return jnp.where(jnp.abs(x) > 5, jnp.copysign(jnp.inf, x), x)


@pytest.mark.parametrize("potential, sign", [("difference", 1.0), ("max", -1.0), ("sum", 1.0)])
def test_a_reward_of_minus_infinity_ends_the_particle(potential, sign):
    """Without resampling it keeps no weight, whatever its rewards are later, and the others keep theirs:
    exp(lambda r(x_0)), a quarter of whose sum is the estimate of the normaliser. For lambda < 0 it is a
    reward of infinity. Resampled, it goes.
    """
    table = jd.solvers.ddpm(jd.grids.half_log_snr(PROCESS, 3))
    net = jd.Denoiser(_half, "x0")
    ended, final = sign * np.array([0.1, -9.0, 0.3, 0.2]), np.array([1.0, 2.0, 0.5, 0.0])
    rows, power = (ended, [0.0, 0.5, 1.0, 0.0]), sign * 2.0
    args, options = (net, table, _infinite_beyond_5, power), dict(potential=potential, particles=4)
    control = fk_steering(*args, threshold=0.0, finish="weights", **options)
    _, aux = after_rows(control, *rows, final)
    want = np.exp(power * final) * [1, 0, 1, 1]
    np.testing.assert_allclose(np.exp(aux.log_weights), want, rtol=1e-5)
    np.testing.assert_allclose(np.exp(aux.log_normaliser), want.mean(), rtol=1e-5)
    assert not any(np.any(np.isnan(leaf)) for leaf in aux)
    if potential == "difference":
        control = fk_steering(*args, threshold=1.0, **options)
        _, aux = after_rows(control, *rows, final)
        assert 1 not in np.asarray(aux.ancestor) and np.all(np.isfinite(aux.log_potentials))


@pytest.mark.parametrize("finish", ["resample", "weights"])
def test_rewards_that_leave_no_weight_are_an_error(finish):
    """Not a number, or none of a group above -inf; without intermediate rows too."""
    table = jd.solvers.ddpm(jd.grids.half_log_snr(PROCESS, 1))
    control = fk_steering(
        jd.Denoiser(_half, "x0"), table, _itself, 1.0, rows=(), particles=2, finish=finish
    )
    for rewards in ([0.0, np.nan, 0.0, 0.0], [0.0, 0.0, -np.inf, -np.inf]):
        with pytest.raises(Exception, match="degenerate weights"):
            after_rows(control, rewards)


def test_another_denoiser_than_the_control_s_is_noticed():
    """Read as what it is not, its output would be rewarded for a wrong x_0."""
    control = fk_steering(NET, TABLE, linear, 1.0, DIRECTION, particles=2)
    other = jd.gaussian_mixture(MEANS, STDS, SHARES, PROCESS, "eps")
    with pytest.raises(ValueError, match="predicts 'v', and the one to sample predicts 'eps'"):
        jd.sample(other, TABLE, X_T[:4], jax.random.key(0), control=control)


def test_rewards_are_evaluated_where_they_are_asked_for():
    calls = []

    def counting(x):
        jax.debug.callback(lambda: calls.append(1))
        return x[:, 0]

    table = jd.solvers.ddpm(jd.grids.half_log_snr(PROCESS, 20))
    control = fk_steering(NET, table, counting, 1.0, rows=[5, 10], particles=2)
    jax.block_until_ready(jd.sample(NET, table, X_T[:4], jax.random.key(0), control=control))
    jax.effects_barrier()
    assert len(calls) == 3


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"particles": 0}, ValueError, "particles must be an integer from 1"),
        ({"potential": "min"}, ValueError, "potential must be one of .* got 'min'"),
        ({"finish": "all"}, ValueError, "finish must be one of"),
        ({"rows": [150]}, ValueError, r"rows must be among 0..149, got 150"),
        ({"strength": np.inf}, ValueError, "strength must be a finite number, got inf"),
        ({"table": jd.solvers.ddim(GRID)}, ValueError, "never parts the copies"),
        ({"table": GRID}, TypeError, "expected one Tableau, got Grid"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_bad_rewards_and_denoisers_are_named():
    with pytest.raises(TypeError, match="reward must be a function, got 3"):
        fk_steering(NET, TABLE, 3, 1.0)
    with pytest.raises(TypeError, match="expected a jaxdiff.Denoiser"):
        fk_steering(None, TABLE, linear, 1.0)
    kept = jd.Denoiser(NET.fn, "v", NET.params, memory=jnp.zeros(3))
    with pytest.raises(ValueError, match="memory holds no array"):
        fk_steering(kept, TABLE, linear, 1.0)
    control = fk_steering(NET, TABLE, _itself, 1.0, rows=())
    with pytest.raises(ValueError, match=r"must return \[batch\] = \(4,\), got \(4, 2\)"):
        jd.sample(NET, TABLE, X_T[:4], jax.random.key(0), control=control)
    control = fk_steering(NET, TABLE, linear, 1.0, DIRECTION, particles=3)
    with pytest.raises(ValueError, match="groups of 3 particles .* multiple, got 4"):
        jd.sample(NET, TABLE, X_T[:4], jax.random.key(0), control=control)
