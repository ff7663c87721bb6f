import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from jaxdiff.models import UNet
from jaxdiff.models.unet import AttentionBlock, ResBlock, _down, _up, num_groups, num_heads


def random_variables(module, *args):
    rng = np.random.default_rng(0)
    made = jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a), *args)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype), made)


def shapes(module, shape, cond=None):
    made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape), 0.0, cond)
    return made["params"]


def count(params):
    return sum(a.size for a in jax.tree.leaves(params))


# --- parameter counts -----------------------------------------------------------------------------

# Dhariwal & Nichol (2021), model sizes in millions of ADM for ImageNet 64, 128, 256 and 512.
ADM = {
    64: (296, {"width": 192, "multipliers": (1, 2, 3, 4), "num_blocks": 3}),
    128: (422, {"width": 256, "multipliers": (1, 1, 2, 3, 4)}),
    256: (554, {"width": 256, "multipliers": (1, 1, 2, 2, 4, 4)}),
    512: (559, {"width": 256, "multipliers": (0.5, 1, 1, 2, 2, 4, 4)}),
}


def by_hand(size, width, multipliers, num_blocks, attention, classes, resample, outputs):
    """Parameters of ADM's UNet for 3 channels, walking down and up again."""
    e = 4 * width

    def conv(i, o, k=3):
        return k * k * i * o + o

    def block(i, o):
        skip = 0 if i == o else conv(i, o, 1)
        return 2 * i + conv(i, o) + (e * 2 * o + 2 * o) + 2 * o + conv(o, o) + skip

    def attend(c, size):
        return 2 * c + (3 * c * c + 3 * c) + (c * c + c) if size in attention else 0

    widths = [int(m * width) for m in multipliers]
    total = (width * e + e) + (e * e + e) + classes * e + conv(3, widths[0])
    stack, channels = [widths[0]], widths[0]
    for level, o in enumerate(widths):
        for _ in range(num_blocks):
            total += block(channels, o) + attend(o, size // 2**level)
            channels = o
            stack.append(o)
        if level + 1 < len(widths):
            total += block(o, o) if resample == "block" else conv(o, o)
            stack.append(o)
    total += 2 * block(channels, channels) + attend(channels, attention[0])
    for level, o in reversed(list(enumerate(widths))):
        for _ in range(num_blocks + 1):
            total += block(channels + stack.pop(), o) + attend(o, size // 2**level)
            channels = o
        if level:
            total += block(o, o) if resample == "block" else conv(o, o)
    assert not stack
    return total + 2 * channels + conv(channels, outputs)


@pytest.mark.parametrize("size", ADM)
def test_parameter_counts_are_adm_s(size):
    millions, options = ADM[size]
    options = {"num_blocks": 2, "attention_resolutions": (32, 16, 8)} | options
    module = UNet(**options, num_classes=1000, label_dropout=0.0, learn_sigma=True)
    total = count(shapes(module, (1, size, size, 3), jnp.zeros(1, int)))
    hand = by_hand(
        size, options["width"], options["multipliers"], options["num_blocks"], (32, 16, 8), 1000,
        "block", 6,
    )  # fmt: skip
    assert total == hand
    assert round(total / 1e6) == millions


def test_parameter_count_with_plain_resampling():
    module = UNet(width=32, multipliers=(1, 2), attention_resolutions=(8,), resample="conv")
    hand = by_hand(16, 32, (1, 2), 2, (8,), 0, "conv", 3)
    assert count(shapes(module, (1, 16, 16, 3))) == hand


# --- the blocks, against NumPy and SciPy ----------------------------------------------------------


def silu(h):
    return h / (1 + np.exp(-h))


def group_norm(layer, h, groups):
    out = np.zeros_like(h)
    size = h.shape[-1] // groups
    for b in range(h.shape[0]):
        for g in range(groups):
            part = h[b, ..., g * size : (g + 1) * size]
            out[b, ..., g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(
                part.var() + 1e-5
            )
    return out * layer["scale"] + layer["bias"]


def conv(layer, h):
    kernel = layer["kernel"]
    out = np.zeros((*h.shape[:3], kernel.shape[-1])) + layer["bias"]
    for b in range(h.shape[0]):
        for o in range(kernel.shape[-1]):
            for i in range(h.shape[-1]):
                out[b, ..., o] += correlate2d(h[b, ..., i], kernel[:, :, i, o], mode="same")
    return out


def mean_of_four(h):
    return (h[:, ::2, ::2] + h[:, 1::2, ::2] + h[:, ::2, 1::2] + h[:, 1::2, 1::2]) / 4


def four_copies(h):
    return np.kron(h, np.ones((1, 2, 2, 1)))


@pytest.mark.parametrize(
    "channels, resample, plain",
    [(8, None, lambda h: h), (12, _down, mean_of_four), (8, _up, four_copies)],
)
def test_residual_block_is_adm_s(channels, resample, plain):
    module = ResBlock(channels, resample, 0.0, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 4, 6, 8))
    c = jax.random.normal(jax.random.key(2), (2, 5))
    variables = random_variables(lambda_module := module, x, c, False) if False else None
    variables = random_variables(_Plain(module), x, c)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    x64, c64 = np.asarray(x, np.float64), np.asarray(c, np.float64)
    h = plain(silu(group_norm(p["norm_in"], x64, 2)))
    h = conv(p["conv_in"], h)
    modulation = silu(c64) @ p["modulation"]["kernel"] + p["modulation"]["bias"]
    scale, shift = modulation[:, None, None, :channels], modulation[:, None, None, channels:]
    h = group_norm(p["norm_out"], h, {8: 2, 12: 3}[channels]) * (1 + scale) + shift
    expected = conv(p["conv_out"], silu(h))
    expected += conv(p["skip"], plain(x64)) if channels != 8 else plain(x64)
    out = jax.jit(module.apply, static_argnums=3)(variables, x, c, False)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
