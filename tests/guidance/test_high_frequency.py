"""PromptFix: the edge maps in SciPy, and digits restored beside a hole with their edges kept."""

import conditional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import jaxdiff as jd
from jaxdiff import guidance
from jaxdiff.guidance.high_frequency import high_pass, luminance, sobel

PROCESS = jd.processes.vp_cosine()
RNG = np.random.default_rng(0)


def published_maps(x, cutoff):
    """PromptFix's maps of one image [h, w, c], in NumPy and SciPy."""
    grey = (x + 1) / 2
    grey = grey @ [0.299, 0.587, 0.114] if x.shape[-1] == 3 else grey[..., 0]
    h, w = grey.shape
    spectrum = np.fft.fftshift(np.fft.fft2(grey))
    away = np.hypot(np.arange(h)[:, None] - h // 2, np.arange(w) - w // 2)
    left = np.abs(np.fft.ifft2(np.fft.ifftshift(spectrum * (away > cutoff))))
    kernel = np.array([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    edges = [scipy.ndimage.correlate(grey, k, mode="constant") for k in (kernel, kernel.T)]
    size = np.sqrt(edges[0] ** 2 + edges[1] ** 2 + 1e-8)
    return left / left.max(), size / size.max()


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 6, 3)])
def test_the_maps_and_the_loss_are_the_published_ones(x64, shape):
    x, y = RNG.uniform(-1, 1, (2, 4, *shape))
    maps = [np.stack(m) for m in zip(*(published_maps(image, 2.0) for image in x))]
    np.testing.assert_allclose(high_pass(x, 2.0), maps[0], atol=1e-10)
    np.testing.assert_allclose(sobel(x), maps[1], atol=1e-10)
    target = [np.stack(m) for m in zip(*(published_maps(image, 2.0) for image in y))]
    mask = RNG.integers(0, 2, shape[:2])
    want = sum(np.mean(mask * (a - b) ** 2, (1, 2)) for a, b in zip(maps, target)) / 2
    np.testing.assert_allclose(guidance.high_frequency_loss(x, y, 2.0, mask), want, atol=1e-10)


def test_flat_images_have_no_edges(x64):
    """And finite gradients, where the published code divides 0 by 0."""
    flat, y = np.zeros((1, 8, 8, 1)), RNG.uniform(-1, 1, (1, 8, 8, 1))
    assert np.abs(high_pass(flat, 1.0)).max() < 1e-6
    slope = jax.jit(jax.grad(lambda x: guidance.high_frequency_loss(x, y, 1.0).sum()))
    assert np.all(np.isfinite(slope(flat)))


def shrink(params, x, t):
    return params * x


def test_the_state_is_moved_as_many_times(x64):
    """Two inner steps by hand, for a network whose Jacobian is a number; and 0 steps of size 0."""
    x, y = RNG.uniform(-1, 1, (2, 3, 8, 8, 1))
    net = jd.Denoiser(shrink, "x0", 0.7)

    def loss(x):
        each = guidance.high_frequency_loss(jnp.clip(0.7 * x, -1, 1), y, 2.0)
        return jnp.exp(-2.0 * 0.4) * jnp.sum(each)

    slope, want = jax.jit(jax.grad(loss)), x
    for _ in range(2):
        want = want - 3.0 * slope(want)
    guided = guidance.high_frequency_guidance(net, y, 2.0, repeats=2, step=3.0, decay=2.0)
    assert guided.cost == 3
    np.testing.assert_allclose(guided(x, 0.4, 0.8, 0.6), 0.7 * want, rtol=1e-10)
    still = guidance.high_frequency_guidance(net, y, 2.0, step=0.0)
    np.testing.assert_allclose(still(x, 0.4, 0.8, 0.6), 0.7 * x, rtol=1e-12)


# --- Yu et al. 2024 on digits ---------------------------------------------------------------------


def as_images(flat, x, levels, cond):
    return flat(x.reshape(len(x), -1), *levels, cond).reshape(x.shape)


def test_digits_keep_their_edges_beside_a_hole():
    """PromptFix's "works when": the high-pass error to the input outside the region made anew falls by
    30% or more, class accuracy by at most 2 points, and 90% of the gradient steps or more lower L.

    Class-conditional digits with an exact denoiser of width 0.3 (a smooth one: a narrow mixture's
    denoised image is one of its images and barely moves with the state), asked for the class of an
    input whose middle is a hole.
    """
    train = jd.data.digits("train")
    kept, label = train.x[:300], train.label[:300]
    flat = conditional.conditional_mixture(
        kept.reshape(300, -1), np.full(300, 0.3), label == np.arange(10)[:, None]
    )
    net = jd.Denoiser(as_images, "eps", flat, jd.denoisers.level)
    image, asked = train.x[400:500].copy(), train.label[400:500]
    outside = np.ones((8, 8))
    outside[3:5, 3:5] = 0
    image[:, outside == 0] = -1
    grid = jd.grids.half_log_snr(PROCESS, 12, t_max=0.95, t_min=0.02)
    tableau = jd.solvers.ddim(grid)
    x_T = PROCESS.prior(jax.random.key(0), image.shape)
    options = dict(cutoff=2.0, mask=outside)

    def figures(step):
        guided = guidance.high_frequency_guidance(net, image, step=step, **options)
        states = jd.sample(guided, tableau, x_T, cond=asked, save="nodes")
        y = np.clip(states[-1], -1, 1)
        gap = outside * (np.asarray(high_pass(y, 2.0)) - np.asarray(high_pass(image, 2.0))) ** 2
        accuracy = jd.metrics.conditional_accuracy(jd.metrics.digit_classifier(), y, asked)
        return gap.mean(), accuracy, states

    step = 10.0
    plain, accuracy_plain, _ = figures(0.0)
    error, accuracy, states = figures(step)

    @jax.jit
    def falls(x, t, alpha, sigma):
        def loss(x):
            x0 = jnp.clip(net.predict("x0", x, t, alpha, sigma, asked), -1, 1)
            return guidance.high_frequency_loss(x0, image, 2.0, outside)

        slope = jax.grad(lambda x: jnp.sum(loss(x)))(x)
        return loss(x - step * jnp.exp(-t) * slope) < loss(x)

    down = np.mean([falls(states[i], *map(np.float32, grid.node(i))) for i in range(grid.steps)])
    print("high-pass error", plain, error, "accuracy", accuracy_plain, accuracy, "falls", down)
    assert error <= 0.7 * plain and accuracy >= accuracy_plain - 0.02 and down >= 0.9


def test_bad_input_is_named():
    net, image = jd.Denoiser(shrink, "x0", 0.7), np.zeros((2, 8, 8, 1))
    with pytest.raises(ValueError, match="cutoff must be at least 0 and below 5.657"):
        guidance.high_frequency_guidance(net, image)
    with pytest.raises(ValueError, match=r"images must be \[batch, h, w, 1 or 3\]"):
        guidance.high_frequency_guidance(net, image[..., 0], 2.0)
    with pytest.raises(ValueError, match="repeats must be an integer from 1"):
        guidance.high_frequency_guidance(net, image, 2.0, repeats=0)
    with pytest.raises(ValueError, match=r"mask must be \(8, 8\), got shape \(4, 4\)"):
        guidance.high_frequency_guidance(net, image, 2.0, mask=np.ones((4, 4)))
    with pytest.raises(ValueError, match="takes none with memory"):
        kept = jd.Denoiser(lambda x, t, memory: (x, memory), "x0", memory=jnp.zeros(()))
        guidance.high_frequency_guidance(kept, image, 2.0)
    assert luminance(np.ones((1, 2, 2, 3))).shape == (1, 2, 2)
