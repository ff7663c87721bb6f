"""Cyclic One-Way diffusion: its loop in NumPy, and digits grown around their left halves."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from trained.digits import denoiser

import jaxdiff as jd
from jaxdiff import editing
from jaxdiff.editing.cyclic import Overwritten

PROCESS = jd.processes.vp_cosine()
KEY = jax.random.key(0)


def test_it_is_the_published_loop(x64):
    """Noise to t_2, DDIM with eta = 1 under replacement at every level, twice; then down."""
    o, cycles, mask = oracles.BROAD, 2, np.array([True, False])
    grid = jd.grids.uniform(PROCESS, 9, t_min=0.05, t_max=0.95)
    # t = 0.75, 0.65, 0.55 down to 0.05: nodes 2, 4 and 6 are t_2, t_1 and the last replacement.
    table = editing.cyclic_sde(grid, cycles, low=0.55, high=0.75, eta=1.0, final_eta=0.1)
    assert table.nfe == 2 * 2 + 5
    states = np.random.default_rng(1).normal(size=(8, 3, 2))
    noise = np.random.default_rng(2).normal(size=(table.draws, 3, 2))
    start = np.random.default_rng(3).normal(size=(3, 2))
    x, draws = start, iter(noise)

    def replaced(x, node):
        return np.where(mask, states[node - 2], x)

    def step(x, i, eta, z):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        eps = o.eps(x, a, s)
        std = eta * s1 / s * np.sqrt(1 - a**2 / a1**2)
        return a1 * (x - s * eps) / a + np.sqrt(s1**2 - std**2) * eps, std * z

    (_, a1, s1), (_, a2, s2) = grid.node(4), grid.node(2)
    last = 0.0  # noise that the step before left undrawn: it and the way up are one draw
    for _ in range(cycles):
        up = np.sqrt((s2**2 - (a2 / a1 * s1) ** 2) + (a2 / a1 * last) ** 2)
        x = a2 / a1 * x + up * next(draws)
        x, z = step(replaced(x, 2), 2, 1.0, next(draws))
        x, _ = step(replaced(x + z, 3), 3, 1.0, 0.0)
        (_, a, s), (_, b, u) = grid.node(3), grid.node(4)
        last = u / s * np.sqrt(1 - a**2 / b**2)
    x = replaced(x + last * next(draws), 4)
    for i in range(4, 9):
        x, z = step(replaced(x, 6) if i == 6 else x, i, 0.1, next(draws))
        x = x + z
    assert next(draws, None) is None
    nodes = np.array([2, 3, 2, 3, 4, 5, 6, 7, 8])
    chosen = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0], bool)
    control = Overwritten(jnp.asarray(states), jnp.asarray(mask), nodes - 2, chosen)
    net = jd.gaussian_mixture(o.means, o.std, o.weights, PROCESS, "eps", dtype=jnp.float64)
    got = jd.sample(net, table, start, noise=noise, control=control)
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


def probability(x, labels):
    """What the classifier gives the label, mean over images."""
    logits = jd.metrics.digit_classifier().logits(np.clip(x, -1, 1))
    share = np.exp(logits - logits.max(1, keepdims=True))
    return np.mean((share / share.sum(1, keepdims=True))[np.arange(len(x)), labels])


def test_digits_grow_around_their_left_halves():
    """Wang et al., "Diffusion in Diffusion: Cyclic One-Way Diffusion" (2023): given left halves,
    the region's error is below 0.1 RMS, the gradient at the boundary at most 0.7 of a single
    pass's, and from 1 to 10 cycles a classifier's confidence does not fall (but by noise).

    A single pass is replacement from the seed, without cycles. Replacement from pure noise has no
    seam on digits (gradient 0.61, that of real digits 0.63), so there is nothing to win over it.
    The region is overwritten last at t = 0.1: at the paper's 0.4 its error is 0.17, digits of 8 x 8
    pixels being decided later than photographs.
    """
    digits = jd.data.digits("test")
    x0, labels = digits.x[:32], digits.label[:32]
    mask = np.zeros((8, 8, 1))
    mask[:, :4] = 1
    grid = jd.grids.uniform(PROCESS, 10, t_min=0.01, t_max=0.99)
    net = denoiser("large")
    found, seam = {}, {}
    for cycles in (0, 1, 10):
        x = np.asarray(editing.cyclic_one_way(
            net, grid, x0, mask, KEY, jnp.asarray(labels), background=-1.0, cycles=cycles, last=0.1
        ))  # fmt: skip
        seam[cycles] = np.mean(np.abs(x[:, :, 4] - x[:, :, 3]))
        found[cycles] = probability(x, labels)
        assert np.sqrt(np.mean((x - x0)[:, :, :4] ** 2)) < 0.1
    assert seam[10] <= 0.7 * seam[0]
    # 32 images: 0.03 is about a standard error of their mean
    assert found[1] > found[0] + 0.2 and found[10] > found[1] - 0.03 and found[10] > 0.85


def test_bad_input_is_named():
    grid = jd.grids.uniform(PROCESS, 10, t_min=0.01, t_max=0.99)
    net, x, mask = jd.Denoiser(_half, "x0"), np.zeros((2, 3), np.float32), np.array([1, 0, 0])
    run = lambda **options: editing.cyclic_one_way(net, grid, x, mask, KEY, **options)  # noqa: E731
    with pytest.raises(ValueError, match="low = 0.7 and high = 0.5 must be two times"):
        run(low=0.7, high=0.5)
    with pytest.raises(ValueError, match="low = 0.5 and high = 0.52 must be two times"):
        run(high=0.52)
    with pytest.raises(ValueError, match="last = 0.6 is no node between"):
        run(last=0.6)
    with pytest.raises(ValueError, match="cycles must be an integer of at least 0, got -1"):
        run(cycles=-1)
    with pytest.raises(ValueError, match="a mask is 0 or 1"):
        editing.cyclic_one_way(net, grid, x, 0.5 * mask, KEY)
    with pytest.raises(ValueError, match="do not fit a condition"):
        editing.cyclic_one_way(net, grid, x, np.ones((4, 2, 3)), KEY)
    with pytest.raises(ValueError, match="a last sigma above 0"):
        zero = jd.grids.uniform(PROCESS, 10, end="zero")
        editing.cyclic_one_way(net, zero, x, mask, KEY)


def _half(x, t):
    return 0.5 * x
