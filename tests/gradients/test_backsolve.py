"""AdjointDPM: the continuous adjoint in (rho, y) against autodiff through a fine discretisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import BROAD

import jaxdiff as jd
from jaxdiff.gradients import adjoint_dpm, optimize

VP = jd.processes.vp_linear()


def agreement(got, exact):
    """(cosine, relative error) of two gradients."""
    got, exact = (np.ravel(np.asarray(a, np.float64)) for a in (got, exact))
    size = np.linalg.norm(exact)
    assert size > 0
    return got @ exact / (np.linalg.norm(got) * size), np.linalg.norm(got - exact) / size


def assert_agree(got, exact):
    """Cosine > 0.999 and a relative error below 1%, as two solvers of one flow should have."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(exact)):
        cosine, error = agreement(a, b)
        assert cosine > 0.999 and error < 0.01, (jax.tree_util.keystr(path), cosine, error)


def shifted_mixture(params, x, levels, cond):
    """A mixture with learned means and scales whose condition moves the data: x_0 = c + mixture."""
    means, log_scales = params
    mixture = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, VP, "eps").params
    mixture = dataclasses.replace(
        mixture, means=means, variances=jnp.exp(2 * log_scales)[:, None] * jnp.ones(2)
    )
    _, alpha, sigma = levels
    return mixture.expected_noise(x - alpha * cond, alpha, sigma)


def test_on_a_mixture(x64):
    x_T = VP.prior(jax.random.key(0), (8, 2), jnp.float64)
    t = jd.grids.half_log_snr(VP, 64).t

    def loss(inputs, sampler):
        params, x_T, cond = inputs
        learned = jd.Denoiser(shifted_mixture, "eps", params, jd.denoisers.level)
        return jnp.sum(jnp.sin(sampler(learned, x_T, cond)) * jnp.arange(1.0, 3.0))

    def continuous(learned, x_T, cond):
        options = adjoint_dpm(VP, t)
        return jd.ode.solve(learned, VP, x_T, t[0], t[-1], cond=cond, **options).x

    def fine(learned, x_T, cond):
        tableau = jd.solvers.dpm_solver_pp_multistep(jd.grids.half_log_snr(VP, 300), order=2)
        return jd.sample(learned, tableau, x_T, cond=cond)

    params = jnp.asarray(BROAD.means), jnp.log(jnp.asarray(BROAD.std))
    inputs = params, x_T, jnp.array([0.3, -0.5])
    assert_agree(*(jax.grad(loss)(inputs, sampler) for sampler in (continuous, fine)))


def digit_network(params, x, t, embedding):
    """v of 8 x 8 digits: three layers, the embedding of the label and cos, sin of the time."""
    clock = jnp.pi * t * jnp.arange(4) / 2
    extra = jnp.concatenate([embedding, *(jnp.broadcast_to(f(clock), (len(x), 4))
                                          for f in (jnp.cos, jnp.sin))], 1)  # fmt: skip
    hidden = jnp.concatenate([x, extra], 1)
    for w in params[:-1]:
        hidden = jax.nn.silu(hidden @ w)
    return hidden @ params[-1]


def error_of_v(value, process, images, labels, key):
    """Of 64 digits at one level each; `value` is (params, embedding of every label)."""
    params, table = value
    chosen, level, noise = jax.random.split(key, 3)
    chosen = jax.random.choice(chosen, len(images), (64,))
    t = jax.random.uniform(level, (64, 1), minval=0.02, maxval=0.98)
    alpha, sigma, eps = process.alpha(t), process.sigma(t), jax.random.normal(noise, (64, 64))
    x_0 = images[chosen]
    one = lambda x, t, c: digit_network(params, x[None], t, c[None])[0]  # noqa: E731
    v = jax.vmap(one)(alpha * x_0 + sigma * eps, t, table[labels[chosen]])
    return jnp.mean((v - (alpha * eps - sigma * x_0)) ** 2)


def test_on_a_digits_network():
    """Trained on the spot; c is the embedding of the labels that are asked for."""
    process, digits = jd.processes.vp_cosine(), jd.data.digits("train")
    rng = np.random.default_rng(0)
    sizes = [(80, 96), (96, 96), (96, 64)]
    params = [rng.normal(size=s).astype(np.float32) / np.sqrt(s[0]) for s in sizes]
    table = rng.normal(size=(10, 8)).astype(np.float32)
    images = digits.x.reshape(-1, 64)
    (params, table), losses = optimize(
        error_of_v, (params, table), optax.adam(3e-3), 250, args=(process, images, digits.label),
        key=jax.random.key(0),
    )  # fmt: skip
    assert losses[-50:].mean() < losses[0] / 2  # it learned something of digits
    x_T = process.prior(jax.random.key(1), (4, 64))
    t = jd.grids.half_log_snr(process, 48, t_max=0.98, t_min=0.02).t

    def loss(inputs, sampler):
        params, x_T, embedding = inputs
        out = sampler(jd.Denoiser(digit_network, "v", params), x_T, embedding)
        return jnp.mean((out - 0.3) ** 2)

    def continuous(learned, x_T, embedding):
        options = adjoint_dpm(process, t)
        return jd.ode.solve(learned, process, x_T, t[0], t[-1], cond=embedding, **options).x

    def fine(learned, x_T, embedding):
        grid = jd.grids.half_log_snr(process, 150, t_max=0.98, t_min=0.02)
        tableau = jd.solvers.dpm_solver_pp_multistep(grid, order=2)
        return jd.sample(learned, tableau, x_T, cond=embedding)

    inputs = params, x_T, table[jnp.array([3, 5, 0, 8])]
    assert_agree(*(jax.grad(loss)(inputs, sampler) for sampler in (continuous, fine)))


def temporary_bytes(steps):
    t = jd.grids.half_log_snr(VP, steps).t

    def loss(params, x_T):
        learned = jd.Denoiser(lambda p, x, t: jnp.tanh(x @ p + t), "v", params)
        return jnp.sum(jd.ode.solve(learned, VP, x_T, t[0], t[-1], **adjoint_dpm(VP, t)).x)

    inputs = jnp.eye(64), jnp.ones((32, 64))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_from_20_to_200_steps():
    short, long = temporary_bytes(20), temporary_bytes(200)
    assert long - short <= 180 * 4 * 8  # the times themselves; a state has 8192 bytes


def test_the_ladder_may_run_towards_the_noise(x64):
    """The gradient of encoding a Gaussian, in closed form: d x_T / d x_0 is one number."""
    std, t = 0.7, jd.grids.half_log_snr(VP, 100).t[::-1]
    gaussian = jd.gaussian_mixture(np.zeros((1, 2)), np.array([std]), np.ones(1), VP)

    def loss(x):
        return jnp.sum(jd.ode.solve(gaussian, VP, x, t[0], t[-1], **adjoint_dpm(VP, t)).x)

    v0, v1 = (VP.alpha(s) ** 2 * std**2 + VP.sigma(s) ** 2 for s in (t[0], t[-1]))
    np.testing.assert_allclose(jax.grad(loss)(jnp.ones((3, 2))), np.sqrt(v1 / v0), rtol=1e-2)


@pytest.mark.parametrize(
    "process, t, message",
    [
        (VP, [0.5, 0.7, 0.6], "rising or falling, got"),
        (VP, [0.5], "two times or more"),
        (jd.processes.flow(), [1.0, 0.5, 0.1], r"lambda must be finite.*\[1.0\]"),
    ],
)
def test_errors_say_what_to_do(process, t, message):
    with pytest.raises(ValueError, match=message):
        adjoint_dpm(process, t)
