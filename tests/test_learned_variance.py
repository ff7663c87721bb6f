"""Learned variances against the formula in NumPy, DDPM's own, and a network that has one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import bound_by_the_book

import jaxdiff as jd
from jaxdiff.learned_variance import hybrid_loss, learned_variance, with_variance
from jaxdiff.losses import score_matching
from jaxdiff.predictions import convert

PROCESS = jd.processes.ddpm()
GRID = jd.grids.leading(PROCESS, 5)


def network(params, x, t):
    """A prediction, and a v in [-1, 1] that depends on both."""
    return jnp.sin(params * x + 0.001 * t), jnp.tanh(x - 0.002 * t)


def positive(params, x, t):
    return jnp.sin(params * x + 0.001 * t), 0.1 + jnp.tanh(x) ** 2


def logarithm(params, x, t):
    prediction, variance = positive(params, x, t)
    return prediction, jnp.log(variance)


def constant(value, params, x, t):
    return network(params, x, t)[0], jnp.full_like(x, value)


def pair(fn):
    return jd.Denoiser(fn, ("eps", "eps"), 0.7)


@pytest.fixture
def start():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 4)), rng.normal(size=(4, 3, 4))


def by_the_formula(grid, x, noise, fn, std):
    """Ancestral sampling in alpha-bar and beta, as Nichol & Dhariwal write it."""
    draws = iter(noise)
    for i in range(grid.steps):
        eps, v = (np.asarray(a) for a in fn(0.7, x, grid.t[i]))
        bar, bar1 = grid.alpha[i] ** 2, grid.alpha[i + 1] ** 2
        beta = 1.0 - bar / bar1
        x0 = (x - np.sqrt(1.0 - bar) * eps) / np.sqrt(bar)
        x = (np.sqrt(bar1) * beta * x0 + np.sqrt(bar / bar1) * (1.0 - bar1) * x) / (1.0 - bar)
        if grid.sigma[i + 1] > 0:
            small = (1.0 - bar1) / (1.0 - bar) * beta
            x = x + std(v, small, beta) * next(draws)
    return x


@pytest.mark.parametrize(
    ("kind", "fn", "std"),
    [
        ("range", network, lambda v, a, b: np.sqrt(b ** ((1 + v) / 2) * a ** ((1 - v) / 2))),
        ("variance", positive, lambda v, a, b: np.sqrt(v)),
        ("log_variance", logarithm, lambda v, a, b: np.exp(v / 2)),
    ],
)
def test_each_kind_is_the_formula(kind, fn, std, start, x64):
    x, noise = start
    tableau, control = learned_variance(GRID, kind)
    assert tableau.nfe == 5 and tableau.draws == 4
    out = jd.sample(pair(fn), tableau, x, noise=noise, control=control)
    np.testing.assert_allclose(out, by_the_formula(GRID, x, noise, fn, std), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("value", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_ends_of_the_range_are_the_fixed_variances(value, variance, start, x64):
    """Also from alpha = 0, where the network must not predict eps."""
    x, noise = start
    for grid in (GRID, jd.grids.uniform(jd.processes.flow(), 5)):
        tableau, control = learned_variance(grid)
        fn = functools.partial(constant, value)
        out = jd.sample(
            jd.Denoiser(fn, ("v", "v"), 0.7), tableau, x, noise=noise, control=control
        )
        plain = jd.solvers.ddpm(grid, variance)
        single = jd.Denoiser(lambda params, x, t: network(params, x, t)[0], "v", 0.7)
        expected = jd.sample(single, plain, x, noise=noise)
        np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-12)


def test_variance_of_gaussian_data_with_the_exact_posterior(x64):
    """With the exact variance of the reverse step the marginals are exact, in any number of steps.

    For data N(0, c) the step x -> x' is Gaussian, with variance beta~ + (alpha' (1 - exp(-2 h)))^2
    times the variance of x0 given x.
    """
    c, process = 0.25, jd.processes.vp_linear()
    grid = jd.grids.uniform(process, 3)

    def exact(params, x, t):
        i = jnp.argmin(jnp.abs(jnp.asarray(grid.t[:-1]) - t))
        (a, a1), (s, s1) = ((v[i], v[i + 1]) for v in map(jnp.asarray, (grid.alpha, grid.sigma)))
        share = 1.0 - (a * s1 / (a1 * s)) ** 2
        posterior = c * s**2 / (a**2 * c + s**2)
        variance = s1**2 * share + (a1 * share) ** 2 * posterior
        v = 2.0 * jnp.log(variance / (s1**2 * share)) / jnp.log(s**2 / s1**2) - 1.0
        return a * c * x / (a**2 * c + s**2), jnp.full_like(x, v)

    tableau, control = learned_variance(grid)
    basis = np.eye(1 + tableau.draws)
    denoiser = jd.Denoiser(exact, ("x0", "x0"), 0.0)
    # Linear in (x_T, z_1, ...): row k carries a 1 in place of the k-th of these normals.
    out = jd.sample(denoiser, tableau, basis[:, :1], noise=basis[1:, :, None], control=control)
    first, last = (grid.alpha[i] ** 2 * c + grid.sigma[i] ** 2 for i in (0, -1))
    variance = out[0, 0] ** 2 * first + (out[1:, 0] ** 2).sum()
    np.testing.assert_allclose(variance, last, rtol=1e-10)


def test_padding_and_gradients(start, x64):
    """A stacked tableau's padding rows draw nothing; the variance can be trained through."""
    x, noise = start
    tableau, control = learned_variance(GRID)
    longer, _ = learned_variance(jd.grids.leading(PROCESS, 8))
    both = jd.solvers.stack([tableau, longer])
    padded = jax.tree.map(lambda a: a[0], both)
    run = functools.partial(jd.sample, pair(network), x_T=x, noise=noise, control=control)
    np.testing.assert_allclose(run(padded), run(tableau), rtol=1e-12)

    def loss(params):
        denoiser = jd.Denoiser(network, ("eps", "eps"), params)
        return jnp.sum(jd.sample(denoiser, tableau, x, noise=noise, control=control) ** 2)

    h = 1e-6
    slope = (loss(0.7 + h) - loss(0.7 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(0.7)), slope, rtol=1e-6)


def test_a_network_of_the_library():
    module = jd.models.DiT(patch_size=2, width=16, depth=1, num_heads=2, learn_sigma=True)
    x = jnp.ones((2, 4, 4, 1))
    params = module.init(jax.random.key(0), x, jnp.zeros(2))
    tableau, control = learned_variance(GRID)
    denoiser = with_variance(module, params)
    out = jd.sample(denoiser, tableau, x, jax.random.key(1), control=control)
    level = [a[0] for a in (GRID.t, GRID.alpha, GRID.sigma)]
    prediction, _ = denoiser(x, *level)
    np.testing.assert_allclose(prediction, module.apply(params, x, level[0]), rtol=1e-6)
    assert out.shape == x.shape and np.all(np.isfinite(out))


def test_what_does_not_fit_is_named(start):
    x, _ = start
    with pytest.raises(ValueError, match="kind must be one of .*'range'.*got 'fixed'"):
        learned_variance(GRID, "fixed")
    tableau, control = learned_variance(GRID)
    single = jd.Denoiser(lambda params, x, t: network(params, x, t)[0], "eps", 0.7)
    with pytest.raises(ValueError, match="denoiser of two outputs"):
        jd.sample(single, tableau, x, jax.random.key(0), control=control)
    with pytest.raises(ValueError, match="learn_sigma=True"):
        with_variance(jd.models.DiT(patch_size=2, width=16, depth=1, num_heads=2), {"params": {}})


# --- training -------------------------------------------------------------------------------------


def pairs_of(name, x, eps):
    """Denoisers of one answer a sample, near eps, in terms of `name`; params: (its error, v)."""

    def fn(params, x_t, levels):
        error, v = params
        alpha, sigma = levels[1:]
        return convert(eps + error, x_t, "eps", name, alpha, sigma), v

    return lambda params: jd.Denoiser(fn, (name, name), params, jd.denoisers.level)


@pytest.mark.parametrize("name", ["eps", "v"])
def test_the_hybrid_loss_is_the_simple_one_and_the_bound(name, x64):
    steps = 500
    process = jd.processes.ddpm(num_steps=steps)
    rng = np.random.default_rng(3)
    t = np.asarray([0, 0, 1, 2, 250, 499])
    shape = (len(t), 3, 4)
    x0 = np.clip(rng.normal(size=shape), -1, 1)  # a third at the ends
    eps, v = rng.normal(size=shape), rng.uniform(-1, 1, size=shape)
    error = 0.3 * rng.normal(size=shape)
    error[0] *= 10  # beyond the least probability of a level
    x = np.asarray(process.perturb(x0, eps, t))
    make = pairs_of(name, x, eps)
    found = hybrid_loss(make((error, v)), process, x0, t, eps)
    betas = np.linspace(1e-4, 0.02, steps)
    bits = [bound_by_the_book(betas, *row) for row in zip(t, x0, x, eps + error, v, strict=True)]
    simple = (error**2).mean(axis=(1, 2))
    np.testing.assert_allclose(found, simple + 0.5 * np.asarray(bits), rtol=1e-8)

    # The bound moves v alone, the error of the noise the prediction alone.
    def total(params, loss):
        return loss(make(params), process, x0, t, eps).sum()

    def plain(denoiser, *arguments):
        first = jd.Denoiser(lambda p, *a: denoiser.fn(p, *a)[0], name, denoiser.params, denoiser.time)
        return score_matching(first, *arguments)

    by_error, by_v = jax.grad(total)((error, v), hybrid_loss)
    np.testing.assert_allclose(by_error, jax.grad(total)((error, v), plain)[0], rtol=1e-10)
    h = 1e-6
    slope = (total((error, v + h), hybrid_loss) - total((error, v - h), hybrid_loss)) / (2 * h)
    np.testing.assert_allclose(by_v.sum(), slope, rtol=1e-5)


def test_a_hybrid_loss_that_does_not_fit_is_named():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="for a ddpm process, got VPLinear"):
        hybrid_loss(pair(network), jd.processes.vp_linear(), x, 0.5, x)
    with pytest.raises(ValueError, match="two outputs.*predicts 'eps'"):
        hybrid_loss(jd.Denoiser(network, "eps", 0.7), PROCESS, x, 0.5, x)
