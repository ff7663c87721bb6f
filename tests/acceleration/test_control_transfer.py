"""Row 152's other half: an adapter trained on the base model steers the model distilled from it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdiff as jd
from jaxdiff.models import MLP, add_lora, from_linen, lora

PROCESS = jd.processes.vp_cosine()
ANGLES = np.arange(8) * np.pi / 4
MEANS = 1.5 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
SHIFT = np.array([0.6, 0.0])
MODULE = MLP(width=64, depth=2)
MANY, FEW = jd.grids.uniform(PROCESS, 20), jd.grids.uniform(PROCESS, 4)
BATCH = 256


def model(variables):
    return from_linen(MODULE, variables, "v")


def fit(loss, params, rate, steps):
    """Adam on loss(params, key)."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, key):
        updates, state = optimizer.update(jax.grad(loss)(carry[0], key), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys)[0][0])(params)


def denoising(shift):
    """The base's training loss, on the ring moved by `shift`."""

    def loss(variables, key):
        keys = jax.random.split(key, 4)
        which = jax.random.randint(keys[0], (BATCH,), 0, 8)
        x0 = jnp.asarray(MEANS + shift)[which] + 0.1 * jax.random.normal(keys[1], (BATCH, 2))
        t = jd.losses.sample_times("uniform", keys[2], BATCH, PROCESS, stratified=True)
        eps = jax.random.normal(keys[3], x0.shape)
        return jnp.mean(jd.losses.score_matching(model(variables), PROCESS, x0, t, eps, weighting="v"))

    return loss


def distillation(base):
    """Each of the 4 steps of DDIM ends where 5 of the base's do."""
    x_T = PROCESS.prior(jax.random.key(2), (2048, 2))
    states = jd.sample(model(base), jd.solvers.ddim(MANY), x_T, save="nodes")[::5]
    level = [jnp.asarray(a, jnp.float32) for a in FEW.node(slice(None))]

    def loss(variables, key):
        i = jax.random.randint(key, (2048,), 0, 4)
        now, end = ([a[i + k] for a in level] for k in (0, 1))
        rows = jnp.arange(2048)
        x, wanted = states[i, rows], states[i + 1, rows]
        (t, a, s), (_, a1, s1) = now, end
        v = model(variables)(x, t, a, s)
        a, s, a1, s1 = (c[:, None] for c in (a, s, a1, s1))
        # DDIM of a v prediction, where alpha^2 + sigma^2 = 1.
        found = a1 * (a * x - s * v) + s1 * (s * x + a * v)
        return jnp.mean((found - wanted) ** 2)

    return loss


@pytest.fixture(scope="module")
def trained():
    """(base, distilled, adapter of the base)."""
    base = MODULE.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))
    base = fit(denoising(0.0), base, 3e-3, 800)
    distilled = fit(distillation(base), base, 2e-3, 300)
    moved = denoising(SHIFT)
    adapter = fit(
        lambda a, key: moved(add_lora(base, a), key), lora(jax.random.key(3), base), 1e-2, 300
    )
    return base, distilled, adapter


def displacement(variables, adapter, grid, strength=1.0):
    """What the adapter does to each sample of the same noise."""
    x_T = PROCESS.prior(jax.random.key(4), (1000, 2))
    table = jd.solvers.ddim(grid)
    plain, steered = (
        np.asarray(jd.sample(model(add_lora(variables, adapter, s)), table, x_T))
        for s in (0.0, strength)
    )
    return steered - plain


def cosine(a, b):
    return np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2))


def test_an_adapter_of_the_base_moves_the_distilled_model_the_same_way(trained):
    base, distilled, adapter = trained
    ours, theirs = (
        displacement(v, adapter, grid) for v, grid in ((base, MANY), (distilled, FEW))
    )
    assert cosine(ours.mean(0), SHIFT) > 0.95 and abs(ours.mean(0)[0] - 0.6) < 0.15
    assert cosine(theirs.mean(0), ours.mean(0)) > 0.5
    assert np.median([cosine(a, b) for a, b in zip(theirs, ours)]) > 0.5


def test_the_strength_is_a_slider(trained):
    _, distilled, adapter = trained
    moves = [displacement(distilled, adapter, FEW, s).mean(0)[0] for s in (-0.5, 0.5, 1.0)]
    assert moves[0] < 0 < moves[1] < moves[2]
