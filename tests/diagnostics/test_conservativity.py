"""Exact scores are gradients; a network's is not; and what that does to samples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import BROAD
from scipy.stats import multivariate_normal

import jaxdiff as jd
from jaxdiff import diagnostics, losses

PROCESS = jd.processes.vp_linear()
TURN = np.array([[0.0, 1.5], [-1.5, 0.0]])
T = 0.3


def broad(prediction="eps"):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, prediction=prediction)


def points(count=32, seed=0):
    return BROAD.sample(np.random.default_rng(seed), count, *at(T))


def at(t):
    return float(PROCESS.alpha(t)), float(PROCESS.sigma(t))


def triangle(x):
    return np.stack([x, x + [0.8, 0.1], x + [0.2, 0.9]])


# --- the diagnostics themselves -------------------------------------------------------------------


class Linear:
    """x -> M x, known in closed form."""

    def __init__(self, matrix):
        self.matrix = np.asarray(matrix)

    def __call__(self, x):
        return x @ jnp.asarray(self.matrix, x.dtype).T


def test_a_linear_field_in_closed_form(x64):
    """J = M; around a triangle the circulation is (M_21 - M_12) times its area (Green)."""
    matrix = np.array([[0.4, 1.3], [-0.2, 0.7]])
    field, x = Linear(matrix), points(5)
    np.testing.assert_allclose(diagnostics.jacobian(field, x), np.tile(matrix, (5, 1, 1)))
    want = np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix)
    np.testing.assert_allclose(diagnostics.asymmetry(field, x), want)
    estimate = diagnostics.asymmetry(field, x, probes=2000, key=jax.random.key(0))
    np.testing.assert_allclose(estimate, want, rtol=0.1)
    assert np.max(np.abs(estimate - want)) > 1e-6
    area = 0.5 * (0.8 * 0.9 - 0.1 * 0.2)
    loop = diagnostics.loop_integral(field, triangle(x), nodes=2)
    np.testing.assert_allclose(loop, (matrix[1, 0] - matrix[0, 1]) * area, rtol=1e-10)
    start, via, end = triangle(x)
    straight = np.einsum("ij,bj,bi->b", matrix, 0.5 * (start + end), end - start)
    np.testing.assert_allclose(
        diagnostics.line_integral(field, np.stack([start, end]), nodes=2), straight, rtol=1e-10
    )
    around = straight - np.asarray(diagnostics.loop_integral(field, np.stack([start, end, via])))
    want = np.abs(straight - around) / (np.abs(straight) + np.abs(around))
    np.testing.assert_allclose(diagnostics.path_dependence(field, start, end, via), want, rtol=1e-8)


def test_integer_vertices_are_points():
    """Around the unit square the circulation is M_21 - M_12, whatever the type of the corners."""
    field, square = Linear([[0.4, 1.5], [-1.5, 0.7]]), np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    loop = diagnostics.loop_integral(field, square[:, None])
    np.testing.assert_allclose(loop, [-3.0], rtol=1e-5)
    found = diagnostics.path_dependence(field, *square[[0, 2, 1], None])
    # 1/2 x^T M x straight, and by the corner 1.5 less.
    np.testing.assert_allclose(found, [1.5 / (0.55 + 0.95)], rtol=1e-5)


def test_an_exact_score_is_a_gradient(x64):
    """Asymmetry and circulation below 1e-6, and line integrals are differences of log p."""
    field = diagnostics.ScoreField(broad("v"), PROCESS, T)
    x = points()
    assert np.max(diagnostics.asymmetry(field, x)) < 1e-6
    assert np.max(np.abs(diagnostics.loop_integral(field, triangle(x)))) < 1e-6
    start, via, end = triangle(x)
    assert np.max(diagnostics.path_dependence(field, start, end, via)) < 1e-6
    gain = BROAD.log_density(end, *at(T)) - BROAD.log_density(start, *at(T))
    found = diagnostics.line_integral(field, np.stack([start, end]))
    np.testing.assert_allclose(found, gain, rtol=1e-7, atol=1e-9)


def test_the_velocity_is_flow_matchings(x64):
    """f x - g^2 / 2 score = E[alpha' x_0 + sigma' eps | x], the mean over the components."""
    x = points()
    alpha, sigma = at(T)
    step = 1e-6
    slopes = [(np.array(at(T + step)) - np.array(at(T - step)))[i] / (2 * step) for i in (0, 1)]
    variance, delta, log_joint = BROAD._parts(x, alpha, sigma)
    share = np.exp(log_joint - BROAD.log_density(x, alpha, sigma)[:, None])
    x_0 = BROAD.means + (alpha * BROAD.std**2 / variance)[:, None] * delta
    eps = (x[:, None] - alpha * x_0) / sigma
    want = np.einsum("bk,bkd->bd", share, slopes[0] * x_0 + slopes[1] * eps)
    found = diagnostics.VelocityField(broad(), PROCESS, T)(jnp.asarray(x))
    np.testing.assert_allclose(found, want, rtol=1e-7, atol=1e-8)


# --- gauge freedom --------------------------------------------------------------------------------


def test_the_gauge_condition(x64):
    """A score's rotation A s obeys it, x -> A x does not (except around a Gaussian at 0)."""
    score = diagnostics.ScoreField(broad(), PROCESS, T)
    x = points()
    turned = diagnostics.ScoreField(diagnostics.rotated(broad("v"), TURN), PROCESS, T)

    def remainder(x):
        return turned(x) - score(x)

    want = np.asarray(score(jnp.asarray(x))) @ TURN.T
    np.testing.assert_allclose(remainder(jnp.asarray(x)), want, rtol=1e-8, atol=1e-9)
    assert np.max(np.abs(diagnostics.gauge_residual(remainder, score, x))) < 1e-10
    # div(A x) = 0, and <A x, score> is what is left.
    found = diagnostics.gauge_residual(Linear(TURN), score, x)
    np.testing.assert_allclose(found, np.sum(x @ TURN.T * BROAD.score(x, *at(T)), 1), rtol=1e-9)
    assert np.median(np.abs(found)) > 0.1
    assert np.max(diagnostics.asymmetry(turned, x)) > 0.5
    # Every trace of a 2 x 2 matrix by signs is off by the same size, of the two off-diagonal terms.
    estimate = diagnostics.gauge_residual(score, score, x, probes=4000, key=jax.random.key(1))
    exact = diagnostics.gauge_residual(score, score, x)
    np.testing.assert_allclose(estimate, exact, atol=0.2)


MEAN, COVARIANCE = np.array([0.7, -0.4]), np.array([[1.2, 0.5], [0.5, 0.6]])
COUNT = 8000


def gaussian():
    """One Gaussian as three equal components: the shapes, and so the programs, of `BROAD`'s."""
    return jd.gaussian_mixture(np.tile(MEAN, (3, 1)), np.tile(COVARIANCE, (3, 1, 1)), np.ones(3))


def flowed(denoiser, matrix, x_T):
    """Where the probability flow with score s + A s ends."""
    turned = diagnostics.rotated(denoiser, np.asarray(matrix, np.float32))
    return np.asarray(jd.ode.sample(turned, PROCESS, x_T.astype(np.float32)).x, np.float64)


def test_a_rotated_gaussian_keeps_mean_and_covariance():
    """r = A Sigma_t^-1 (x - mu_t): mean and covariance within 4 standard errors."""
    alpha, sigma = at(PROCESS.t_max)
    total = alpha**2 * COVARIANCE + sigma**2 * np.eye(2)
    x_T = np.random.default_rng(3).multivariate_normal(alpha * MEAN, total, COUNT)
    x, plain = (flowed(gaussian(), matrix, x_T) for matrix in (-TURN, 0 * TURN))
    assert np.median(np.linalg.norm(x - plain, axis=1)) > 0.5  # another map
    error = np.sqrt(np.diag(COVARIANCE) / COUNT)
    assert np.all(np.abs(x.mean(0) - MEAN) < 4 * error)
    spread = np.sqrt((COVARIANCE**2 + np.outer(*[np.diag(COVARIANCE)] * 2)) / COUNT)
    assert np.all(np.abs(np.cov(x.T) - COVARIANCE) < 4 * spread)


def test_a_rotation_of_a_mixtures_score_keeps_the_marginal():
    """Another map from noise to data, the same distribution: sliced W2 like the plain one's."""
    mixture = jd.gaussian_mixture(
        BROAD.means, BROAD.std[:, None, None] ** 2 * np.eye(2), BROAD.weights
    )
    x_T = BROAD.sample(np.random.default_rng(6), COUNT, *at(PROCESS.t_max))
    real = BROAD.sample(np.random.default_rng(5), 20_000)
    plain, turned = (flowed(mixture, matrix, x_T) for matrix in (0 * TURN, TURN))
    assert np.median(np.linalg.norm(plain - turned, axis=1)) > 0.3
    plain, turned = (
        jd.metrics.sliced_wasserstein(x, real, jax.random.key(0), 64) for x in (plain, turned)
    )
    assert turned < 1.3 * plain + 0.01, (plain, turned)


def test_a_rotated_gaussian_keeps_the_density(x64):
    """log p along the rotated flow, its divergence included: within 1e-4 of the closed form."""
    x = np.random.default_rng(4).multivariate_normal(MEAN, COVARIANCE, 4)

    def law(t):
        alpha, sigma = at(t)
        return alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * np.eye(2)

    def prior(x_T):
        return jax.scipy.stats.multivariate_normal.logpdf(x_T, *law(PROCESS.t_max))

    found = jd.ode.log_likelihood(diagnostics.rotated(gaussian(), -TURN), PROCESS, x, prior=prior)
    want = multivariate_normal(*law(PROCESS.t_min)).logpdf(x)
    np.testing.assert_allclose(found.log_prob, want, atol=1e-4)


# --- learned scores -------------------------------------------------------------------------------

WIDTH = 48


def network(params, x, levels, cond=None):
    """A small MLP of x and lambda, [batch, 2] to [batch, 2]; for training and for sampling."""
    _, alpha, sigma = levels
    lam = jnp.broadcast_to(jnp.log(alpha / sigma), x.shape[:1])[:, None]
    h = jnp.concatenate([x, lam / 3.0, jnp.sin(lam), jnp.cos(lam)], 1)
    for w, b in params[:-1]:
        h = jax.nn.silu(h @ w + b)
    w, b = params[-1]
    return h @ w + b


def start_params(key):
    sizes = [5, WIDTH, WIDTH, 2]
    return [
        (jax.random.normal(k, (m, n)) / np.sqrt(m), jnp.zeros(n))
        for k, m, n in zip(jax.random.split(key, 3), sizes, sizes[1:])
    ]


def plain(params):
    return jd.Denoiser(network, "eps", params, jd.denoisers.level)


def energy(params):
    return diagnostics.conservative(plain(params))


MAKE = {"plain": plain, "energy": energy}


@pytest.fixture(scope="module")
def trained():
    """{name: four denoisers}: score networks, and energies of equal size, trained alike."""
    mixture = broad().params
    steps, batch = 1000, 192

    def fit(make, key):
        params = start_params(key)
        optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

        def loss(params, key):
            a, b, c = jax.random.split(key, 3)
            x0, _ = mixture.sample(a, (batch,))
            t = losses.sample_times("uniform", b, batch, PROCESS, stratified=True)
            eps = jax.random.normal(c, x0.shape)
            return losses.score_matching(make(params), PROCESS, x0, t, eps).mean()

        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    found = {}
    for name, make in MAKE.items():
        keys = jax.random.split(jax.random.key(3), 4)
        params = jax.jit(jax.vmap(lambda key: fit(make, key)))(keys)  # noqa: B023
        found[name] = [make(jax.tree.map(lambda a: a[i], params)) for i in range(4)]  # noqa: B023
    return found


def test_a_network_is_no_gradient(trained):
    """Asymmetry > 1e-2, and line integrals that depend on the way; an energy's are float32's."""
    x = points(256).astype(np.float32)
    fields = {
        name: [diagnostics.ScoreField(d, PROCESS, T) for d in some]
        for name, some in trained.items()
    }
    lack = {
        name: [float(np.median(diagnostics.asymmetry(f, x))) for f in some]
        for name, some in fields.items()
    }
    assert min(lack["plain"]) > 1e-2 and max(lack["energy"]) < 1e-4
    loops = {
        name: [np.abs(diagnostics.loop_integral(f, triangle(x))) for f in some]
        for name, some in fields.items()
    }
    assert np.median(loops["plain"]) > 1e-3 and np.max(loops["energy"]) < 1e-4


def test_a_network_samples_as_well_as_an_energy(trained):
    """Sliced W2 to the data within 1.1 of an energy's of equal size, the mean of four of each."""
    tableau = jd.solvers.dpm_solver_pp_multistep(jd.grids.half_log_snr(PROCESS, 20))
    x_T = PROCESS.prior(jax.random.key(9), (8000, 2))
    real = BROAD.sample(np.random.default_rng(5), 20_000)
    error = {
        name: np.mean([
            jd.metrics.sliced_wasserstein(jd.sample(d, tableau, x_T), real, jax.random.key(0), 64)
            for d in some
        ])
        for name, some in trained.items()
    }  # fmt: skip
    assert error["plain"] < 1.1 * error["energy"], error
    assert error["energy"] < 0.1, error


def test_a_square_potential_is_a_gradient_of_its_energy():
    params = start_params(jax.random.key(2))
    x, level = jnp.asarray(points(3), jnp.float32), (0.3, 0.8, 0.6)
    found = diagnostics.conservative(plain(params), "square")(x, *level)

    def value(x):
        return 0.5 * np.sum(np.square(x - np.asarray(network(params, jnp.asarray(x), level))), 1)

    step = 1e-2
    for i in range(2):
        e = step * np.eye(2, dtype=np.float32)[i]
        slope = (value(np.asarray(x) + e) - value(np.asarray(x) - e)) / (2 * step)
        np.testing.assert_allclose(found[:, i], slope, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: diagnostics.rotated(broad(), np.eye(2)), ValueError, "antisymmetric"),
    (lambda: diagnostics.rotated(broad(), np.ones(2)), ValueError, "dim, dim"),
    (lambda: diagnostics.conservative(broad(), "norm"), ValueError, "potential must be one of"),
    (lambda: diagnostics.asymmetry(Linear(TURN), points(2), probes=0, key=jax.random.key(0)),
     ValueError, "at least 1"),
    (lambda: diagnostics.asymmetry(Linear(TURN), points(2), probes=2), ValueError, "go together"),
    (lambda: diagnostics.line_integral(Linear(TURN), points(2)), ValueError, "vertices must be"),
    (lambda: diagnostics.ScoreField(broad(), None, T), TypeError, "expected a process"),
    (lambda: diagnostics.ScoreField(None, PROCESS, T), TypeError, "jaxdiff.Denoiser"),
])  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
