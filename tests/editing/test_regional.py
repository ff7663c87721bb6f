"""DiffEditor's sampler against its published step, and a digit that moves."""

import exact_digits
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxdiff as jd
from jaxdiff import editing

PROCESS = jd.processes.vp_cosine()
KEY = jax.random.key(0)
MASK = np.array([1.0, 0.0])


def _tilt(params, x, levels, cond):
    """Two energies with known gradients: params[0] in both coordinates, and params[1] x^2 / 2."""
    return params[0] * jnp.sum(x, -1), 0.5 * params[1] * jnp.sum(x * x, -1)


@pytest.mark.parametrize("repeats", [[1, 1, 1, 1], [1, 3, 1, 1]])
def test_it_is_the_published_step(x64, repeats):
    """In NumPy: guidance in x_0 alone, noise in the mask alone, and inversion steps back up."""
    o, k = oracles.BROAD, 0.3
    grid = jd.grids.half_log_snr(PROCESS, 4, t_max=0.9, t_min=0.05)
    x = rng_x = np.random.default_rng(1).normal(size=(5, 2))
    tableau = editing.regional_sde(grid, MASK, eta=0.6, steps=[1, 2], outside=0.2, repeats=repeats)
    rows = sum(repeats) * 2 - 4
    assert tableau.rows == rows and tableau.draws == sum(repeats[1:3])
    noise, drawn = np.random.default_rng(2).normal(size=(tableau.draws, 5, 2)), 0
    for i in range(4):
        (t, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        for repeat in range(repeats[i]):
            eps = o.eps(x, a, s)
            # At the two middle nodes guidance acts.
            guidance = k * np.where(MASK, 2.0, 3.0 * x) if 0.3 <= t <= 0.8 else 0.0
            x0_hat = (x - s * (eps + guidance)) / a
            eta = np.where(MASK, 0.6, 0.2) if i in (1, 2) else 0.0
            std = eta * s1 / s * np.sqrt(1 - a**2 / a1**2) if i in (1, 2) else 0.0
            x = a1 * x0_hat + np.sqrt(s1**2 - std**2) * eps
            if i in (1, 2):
                x, drawn = x + std * noise[drawn], drawn + 1
            if repeat < repeats[i] - 1:
                back = o.eps(x, a1, s1)
                x = a * (x - s1 * back) / a1 + s * back
    assert any(0.3 <= t <= 0.8 for t in grid.t[:-1]) and not 0.3 <= grid.t[0] <= 0.8
    net = jd.gaussian_mixture(o.means, o.std, o.weights, PROCESS, "eps", dtype=jnp.float64)
    energies = jnp.asarray([2.0, 3.0])
    guided = editing.energy_guided(net, _tilt, energies, MASK, k, window=(0.3, 0.8))
    got = jd.sample(guided, tableau, jnp.asarray(rng_x), noise=jnp.asarray(noise))
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


def test_noise_is_drawn_by_default():
    """In the published 11 to 19 of 50 steps, and in one at least of short grids."""
    counts = {}
    for n in (*range(1, 16), 50):
        grid = jd.grids.half_log_snr(PROCESS, n, t_max=0.9, t_min=0.1)
        counts[n] = editing.regional_sde(grid, MASK).draws
    assert counts[50] == 9 and min(counts.values()) == 1
    to_zero = jd.grids.half_log_snr(PROCESS, 2, t_max=0.9, end="zero")
    assert editing.regional_sde(to_zero, MASK).draws == 1


def test_a_seed_acts_inside_the_mask_alone():
    """One step with two seeds: the states differ where there is noise, and nowhere else."""
    grid = jd.grids.half_log_snr(PROCESS, 1, t_max=0.6, t_min=0.3)
    mask = np.zeros((8, 8, 1))
    mask[2:5, 3:7] = 1
    net = exact_digits.denoiser(jd.data.digits("train").x[:50], np.zeros(50, int))
    tableau = editing.regional_sde(grid, mask, eta=0.4, steps=[0])
    guided = editing.energy_guided(net, _none, jnp.zeros(()), mask, 0.0)
    x = jax.random.normal(KEY, (3, 8, 8, 1))
    one, two = (jd.sample(guided, tableau, x, key=jax.random.key(k)) for k in (1, 2))
    apart = np.abs(np.asarray(one - two))
    assert apart[:, mask == 0].max() == 0.0
    assert apart[:, mask == 1].min(initial=1.0) > 0.0


def _none(params, x, levels, cond):
    return jnp.zeros(len(x)), jnp.zeros(len(x))


SIDE, SHIFT = 12, (0, 2)


def placed(images, down, right):
    """Digits on a larger canvas."""
    out = np.full((len(images), SIDE, SIDE, 1), -1.0, np.float32)
    out[:, 2 + down : 10 + down, 2 + right : 10 + right] = images
    return out


def patches(params, x, levels, cond):
    """Features: the 3 x 3 neighbourhood of each pixel of the denoised x_0, background 0."""
    x0 = params.predict("x0", x, *levels)
    wide = jnp.pad(x0, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1.0)
    cut = [wide[:, i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)]
    return [jnp.concatenate(cut, -1) + 1.0]


def test_a_digit_moves():
    """By two pixels: correlation with the moved digit from below 0 to 0.7, and a quiet background.

    Without energy and noise it is DDIM's round trip. The edit is by the energies alone: eta = 0, no time
    travel and 50 steps, where the paper has its regional SDE in the middle, and 100.
    """
    digits = jd.data.digits("train").x[:60]
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-2, -1, 0, 1, 2)]
    images = np.concatenate([placed(digits, *shift) for shift in shifts])
    net = exact_digits.denoiser(images, np.zeros(len(images), int))
    x0 = placed(digits[:4], 0, -1)
    mask = np.zeros((SIDE, SIDE))
    mask[2:10, 1:9] = 1
    moved = np.roll(mask, SHIFT, (0, 1))
    grid = jd.grids.half_log_snr(PROCESS, 50, t_max=0.99, t_min=0.01)
    back = grid.reversed()
    states = jd.sample(net, jd.solvers.ddim(back), jnp.asarray(x0), save="nodes")
    energy, params = editing.move_energy(patches, SHIFT, net, back.t, states, mask)
    region = np.maximum(mask, moved)

    def edit(scale, eta):
        guided = editing.energy_guided(net, energy, params, moved[..., None], scale, (0.1, 0.99))
        tableau = editing.regional_sde(grid, region[..., None], eta)
        return np.asarray(jd.sample(guided, tableau, states[-1], key=KEY))

    assert np.sqrt(np.mean((edit(0.0, 0.0) - x0) ** 2)) <= 1e-2
    edited, wanted = edit(10.0, 0.0), np.roll(x0, SHIFT, (1, 2))
    inside = moved > 0

    def alike(a, b):
        return [np.corrcoef(p[inside].ravel(), q[inside].ravel())[0, 1] for p, q in zip(a, b)]

    assert max(alike(x0, wanted)) < 0.0 and min(alike(edited, wanted)) >= 0.7
    assert np.mean((edited - x0)[:, region == 0] ** 2) <= 0.02


def test_the_energies_are_as_written():
    """Random features and a mask, by loops over pixels."""
    rng = np.random.default_rng(0)
    f, g = rng.normal(size=(2, 2, 4, 5, 3))
    mask = np.zeros((4, 5))
    mask[1:3, 0:3] = 1
    here = np.zeros((4, 5))
    here[2:4, 1:4] = 1
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    pixels = [(i, j) for i in range(4) for j in range(5)]
    left = [p for p in pixels if mask[p] and not here[p]]
    other = [p for p in pixels if not mask[p] and not here[p]]
    want = []
    for a, b in zip(f, g):
        moved = np.mean([cos(a[i, j], b[i - 1, j - 1]) for i, j in pixels if here[i, j]])
        same = np.mean([cos(a[p], b[p]) for p in other])
        unlike = np.mean([(cos(a[p], b[p]) + 1) / 2 for p in left])
        filled = (cos(np.mean([a[p] for p in left], 0), np.mean([b[p] for p in other], 0)) + 1) / 2
        content = 6 / (1 + 4 * same) + 0.2 * unlike + 0.8 / (1 + 4 * filled)
        want.append((4 / (1 + 4 * moved), content))
    energy, params = editing.move_energy(
        _itself, (1, 1), None, np.array([0.1, 0.5]), np.stack([np.zeros_like(g), g]), mask
    )
    got = jax.jit(lambda x: energy(params, x, (0.45, 0.8, 0.6), None))(jnp.asarray(f, jnp.float32))
    np.testing.assert_allclose(np.stack(got, -1), want, rtol=1e-4)


def _itself(params, x, levels, cond):
    return [x]


def test_bad_input_is_named():
    grid = jd.grids.half_log_snr(PROCESS, 5, end="zero")
    with pytest.raises(ValueError, match=r"eta must be a number in \[0, 1\], got 1.5"):
        editing.regional_sde(grid, MASK, eta=1.5)
    with pytest.raises(ValueError, match=r"mask must lie in \[0, 1\]"):
        editing.regional_sde(grid, 2 * MASK)
    with pytest.raises(ValueError, match=r"steps must be among 0..4"):
        editing.regional_sde(grid, MASK, steps=[5])
    with pytest.raises(ValueError, match="step 4 goes to sigma = 0"):
        editing.regional_sde(grid, MASK, repeats=[1, 1, 1, 1, 2])
    with pytest.raises(ValueError, match="from noise to data"):
        editing.regional_sde(jd.grids.half_log_snr(PROCESS, 5).reversed(), MASK)
    states, mask = np.zeros((3, 1, 4, 4, 1)), np.eye(4)
    with pytest.raises(ValueError, match="as many times"):
        editing.move_energy(_itself, (1, 0), None, np.zeros(2), states, mask)
    with pytest.raises(ValueError, match="takes the mask out of the image"):
        editing.move_energy(_itself, (1, 0), None, np.zeros(3), states, mask)
    with pytest.raises(ValueError, match="the mask is empty"):
        editing.move_energy(_itself, (1, 0), None, np.zeros(3), states, 0 * mask)
