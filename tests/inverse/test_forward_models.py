"""Diffusion with forward models (Tewari et al. 2023): digits that were never seen whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdiff as jd
from jaxdiff.inverse import forward_model_loss, observation_denoiser, sample_signal

KEY = jax.random.key(0)
PROCESS = jd.processes.vp_cosine()
NOISE, HIDDEN, BATCH, STEPS = 0.2, 192, 96, 700

# View k: the image turned by k quarters, of which the upper half is seen.
VIEWS = np.stack(
    [np.eye(64)[np.rot90(np.arange(64).reshape(8, 8), k)[:4].ravel()] for k in range(4)]
).astype(np.float32)


def render(signal, view):
    return jnp.einsum("bij,bj->bi", jnp.asarray(VIEWS)[view], signal)


def back(observed, view):
    return jnp.einsum("bij,bi->bj", jnp.asarray(VIEWS)[view], observed)


def network(params, x, t, cond):
    """An MLP on the context and the noised target, both laid where they were seen."""
    context, view = cond["context"]
    t = jnp.broadcast_to(t, x.shape[:1])[:, None]
    parts = [
        back(a, v) for o, v in ((context, view), (x, cond["view"])) for a in (o, jnp.ones_like(o))
    ]
    h = jnp.concatenate([*parts, jnp.cos(np.pi * t * np.arange(1, 5))], 1)
    for w, b in params[:-1]:
        h = jax.nn.silu(h @ w + b)
    return h @ params[-1][0] + params[-1][1]


def weights(key):
    sizes = [260, HIDDEN, HIDDEN, 64]
    keys = jax.random.split(key, 3)
    return [
        (jax.random.normal(k, (m, n)) / np.sqrt(m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:])
    ]


def losses(params, images, key):
    """The sampler's loss and a deterministic regressor's, on one batch of pairs of observations."""
    keys = jax.random.split(key, 6)
    signal = images[jax.random.randint(keys[0], (BATCH,), 0, len(images))]
    views = jnp.argsort(jax.random.uniform(keys[1], (BATCH, 4)), 1)[:, :2]
    seen = [
        render(signal, views[:, i]) + NOISE * jax.random.normal(keys[2 + i], (BATCH, 32))
        for i in range(2)
    ]
    t = jax.random.uniform(keys[4], (BATCH,), minval=PROCESS.t_min, maxval=PROCESS.t_max)
    eps = jax.random.normal(keys[5], (BATCH, 32))
    cond = {"context": (seen[0], views[:, 0]), "view": views[:, 1]}
    denoiser = observation_denoiser(network, render, params[0])
    first = forward_model_loss(
        denoiser, PROCESS, seen[1], t, eps, cond, ((views[:, 0], seen[0]),), weighting="min_snr"
    )
    guess = network(params[1], 0 * eps, 0 * t, cond)
    second = jnp.mean((render(guess, views[:, 1]) - seen[1]) ** 2)
    return jnp.mean(first) + second + jnp.mean((render(guess, views[:, 0]) - seen[0]) ** 2)


@pytest.fixture(scope="module")
def trained():
    """(sampler's weights, regressor's): seconds of Adam on noisy halves of digits."""
    images = jnp.asarray(jd.data.digits("train").x.reshape(-1, 64))
    optimiser = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(losses)(params, images, key)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    params = (weights(KEY), weights(KEY))
    start = (params, optimiser.init(params))
    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.jit(lambda s, k: jax.lax.scan(step, s, k))(start, keys)[0][0]


def energy_distance(a, b):
    def mean(x, y, same):
        apart = np.linalg.norm(x[:, None] - y[None], axis=-1)
        return apart.sum() / (len(x) * (len(y) - same))

    return 2 * mean(a, b, 0) - mean(a, a, 1) - mean(b, b, 1)


def test_signals_from_one_observation(trained):
    """Works when (forward models): re-projection within 1.1 noise floors, held-out views nearer the
    truth's law than a deterministic regressor's, and signals that differ from seed to seed.
    """
    truth = jd.data.digits("test").x.reshape(-1, 64)[:200]
    count, floor = len(truth), NOISE
    zero, two = jnp.zeros(count, int), jnp.full(count, 2)
    context = render(truth, zero) + NOISE * jax.random.normal(jax.random.key(5), (count, 32))
    cond = {"context": (context, zero), "view": two}
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 20, end="zero"))
    denoiser = observation_denoiser(network, render, trained[0])
    draw = jax.jit(lambda x_T: sample_signal(denoiser, tableau, x_T, cond=cond))
    first, second = (draw(PROCESS.prior(jax.random.key(s), (count, 32))) for s in (1, 2))
    assert first.shape == truth.shape
    off = float(jnp.sqrt(jnp.mean((render(first, zero) - context) ** 2)))
    assert off < 1.1 * floor
    guess = jax.jit(network)(trained[1], jnp.zeros((count, 32)), jnp.zeros(count), cond)
    for view in (1, 2, 3):
        at = jnp.full(count, view)
        real, ours, theirs = (np.asarray(render(s, at)) for s in (truth, first, guess))
        gaps = energy_distance(ours, real), energy_distance(theirs, real)
        assert gaps[0] < 0.5 * gaps[1], (view, gaps)
    assert jnp.mean(jnp.abs(first - second)) > 0.1


def test_the_signal_is_the_one_of_the_last_evaluation():
    """The observation that `sample` returns is its rendering; guidance of scale 1 changes nothing."""
    params, cond = (
        weights(KEY),
        {"context": (jnp.ones((3, 32)), jnp.zeros(3, int)), "view": jnp.ones(3, int)},
    )
    denoiser = observation_denoiser(network, render, params)
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 5, end="zero"))
    x_T = PROCESS.prior(KEY, (3, 32))
    signal = jax.jit(lambda: sample_signal(denoiser, tableau, x_T, cond=cond))()
    observed = jd.sample(denoiser, tableau, x_T, cond=cond)
    np.testing.assert_allclose(render(signal, cond["view"]), observed, atol=1e-5)
    none = {"context": (jnp.zeros((3, 32)), jnp.zeros(3, int)), "view": cond["view"]}

    def guided(scale):
        net = jd.guidance.classifier_free(denoiser, scale, none)
        return sample_signal(denoiser, tableau, x_T, None, cond, net)

    same, more = jax.jit(jax.vmap(guided))(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(same, signal, atol=1e-5)
    assert np.abs(more - signal).max() > 1e-3


def test_the_loss_is_of_observations():
    rng = np.random.default_rng(0)
    target, context, eps = rng.normal(size=(3, 4, 32)).astype(np.float32)
    views = [np.array([0, 1, 2, 3]), np.array([1, 2, 3, 0])]
    t = np.array([0.1, 0.4, 0.6, 0.9], np.float32)
    params = weights(KEY)
    cond = {"context": (jnp.asarray(context), views[0]), "view": views[1]}
    alpha, sigma = (np.asarray(c)[:, None] for c in (PROCESS.alpha(t), PROCESS.sigma(t)))
    noised = jnp.asarray(alpha * target + sigma * eps, jnp.float32)
    signal = jax.jit(network)(params, noised, jnp.asarray(t), cond)
    first = np.mean((render(signal, views[1]) - target) ** 2, 1)
    second = np.mean((render(signal, views[0]) - context) ** 2, 1)
    denoiser = observation_denoiser(network, render, params)
    got = jax.jit(
        lambda: forward_model_loss(
            denoiser,
            PROCESS,
            target,
            t,
            eps,
            cond,
            ((views[0], context),),
            0.3,
            "min_snr",
            gamma=5.0,
        )
    )()
    snr = np.minimum((alpha / sigma)[:, 0] ** 2, 5.0)
    np.testing.assert_allclose(got, snr * first + 0.3 * second, rtol=2e-4)


def test_wrong_arguments_are_named():
    denoiser = observation_denoiser(network, render, weights(KEY))
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 2))
    with pytest.raises(
        ValueError, match='cond must be {"context": ..., "view": ...}, got NoneType'
    ):
        sample_signal(denoiser, tableau, jnp.zeros((2, 32)))
    with pytest.raises(ValueError, match=r"cond must be .* got \['context'\]"):
        jd.sample(denoiser, tableau, jnp.zeros((2, 32)), cond={"context": 1})
    plain = jd.gaussian_mixture(np.zeros((1, 2)), [1.0], [1.0])
    with pytest.raises(TypeError, match="sample_signal takes an observation_denoiser"):
        sample_signal(plain, tableau, jnp.zeros((2, 2)), cond={"context": 1, "view": 1})
