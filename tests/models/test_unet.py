import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from jaxdiff.models import UNet
from jaxdiff.models.unet_blocks import (
    DDPM,
    AttentionBlock,
    ResBlock,
    doubled,
    halved,
    num_groups,
    num_heads,
)


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
            normal = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
            out[b, ..., g * size : (g + 1) * size] = normal
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
    [(8, None, lambda h: h), (12, halved, mean_of_four), (8, doubled, four_copies)],
)
def test_residual_block_is_adm_s(channels, resample, plain, random_variables, jit):
    module = ResBlock(channels, resample, 0.0, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 4, 6, 8))
    c = jax.random.normal(jax.random.key(2), (2, 5))
    variables = random_variables(module, x, c, static=(False,))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    x64, c64 = np.asarray(x, np.float64), np.asarray(c, np.float64)
    h = conv(p["conv_in"], plain(silu(group_norm(p["norm_in"], x64, 2))))
    modulation = silu(c64) @ p["modulation"]["kernel"] + p["modulation"]["bias"]
    scale, shift = np.split(modulation[:, None, None], 2, axis=-1)
    h = group_norm(p["norm_out"], h, channels // 4) * (1 + scale) + shift
    expected = conv(p["conv_out"], silu(h))
    expected += plain(x64) if channels == 8 else conv(p["skip"], plain(x64))
    out = jit(module.apply, static_argnums=3)(variables, x, c, False)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_residual_block_is_ddpm_s(random_variables, jit):
    """The embedding is added before the second norm."""
    module = ResBlock(12, None, 0.0, jnp.float32, DDPM)
    x = jax.random.normal(jax.random.key(1), (2, 4, 6, 8))
    c = jax.random.normal(jax.random.key(2), (2, 5))
    variables = random_variables(module, x, c, static=(False,))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    x64, c64 = np.asarray(x, np.float64), np.asarray(c, np.float64)
    h = conv(p["conv_in"], silu(group_norm(p["norm_in"], x64, 2)))
    h = h + (silu(c64) @ p["modulation"]["kernel"] + p["modulation"]["bias"])[:, None, None]
    expected = conv(p["conv_out"], silu(group_norm(p["norm_out"], h, 3))) + conv(p["skip"], x64)
    out = jit(module.apply, static_argnums=3)(variables, x, c, False)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_attention_block_attends_over_all_pixels(random_variables, jit):
    module = AttentionBlock(4, jax.nn.dot_product_attention, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 2, 3, 8))
    variables = random_variables(module, x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    h = group_norm(p["norm"], np.asarray(x, np.float64), 2).reshape(2, 6, 8)
    qkv = h @ p["attention"]["qkv"]["kernel"] + p["attention"]["qkv"]["bias"]
    mixed = np.zeros_like(h)
    for b in range(2):
        for head in (slice(0, 4), slice(4, 8)):
            q, k, v = (qkv[b, :, 8 * i : 8 * i + 8][:, head] for i in range(3))
            weights = np.exp(q @ k.T / 2)
            mixed[b, :, head] = weights / weights.sum(-1, keepdims=True) @ v
    out = mixed @ p["attention"]["out"]["kernel"] + p["attention"]["out"]["bias"]
    np.testing.assert_allclose(
        jit(module.apply)(variables, x), x + out.reshape(x.shape), rtol=1e-4, atol=1e-4
    )


def test_groups_and_heads_adapt_to_the_channels():
    for channels in range(1, 300):
        groups = num_groups(channels)
        assert channels % groups == 0 and groups <= 32
        assert groups == 1 or channels // groups >= 4
    known = {1: 1, 8: 2, 12: 3, 40: 10, 100: 25, 128: 32, 192: 32, 144: 24}
    assert {c: num_groups(c) for c in known} == known
    assert [num_heads(c, 64) for c in (16, 64, 192)] == [1, 1, 3]
    with pytest.raises(ValueError, match="head_channels 64 does not divide 96 channels"):
        num_heads(96, 64)


# --- the whole ------------------------------------------------------------------------------------

TINY = {"width": 8, "num_blocks": 1, "head_channels": 8}


def test_attention_sits_at_the_chosen_sizes_and_in_the_middle():
    module = UNet(**TINY, multipliers=(1, 2, 2), attention_resolutions=(4, 2))
    # The shorter side counts: 8 x 16, 4 x 8 and 2 x 4.
    params = shapes(module, (1, 8, 16, 3))
    assert sorted(name for name in params if "attention" in name) == [
        "down_1_attention_0", "down_2_attention_0", "middle_attention",
        "up_1_attention_0", "up_1_attention_1", "up_2_attention_0", "up_2_attention_1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"\[5\] are not among the feature map sizes \[8, 4, 2\]"):
        shapes(module.clone(attention_resolutions=(8, 5)), (1, 8, 8, 3))


def test_an_image_is_seen_and_its_bad_shapes_are_refused(random_variables, jit):
    module = UNet(**TINY, multipliers=(1,), attention_resolutions=(), image_channels=2)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    image = jax.random.normal(jax.random.key(2), (2, 4, 4, 2))
    plain = module.clone(image_channels=0)
    # With no weight on the image's channels it is the network without them.
    variables = random_variables(plain, x, 0.5)
    kernel = variables["params"]["in"]["kernel"]
    wide = jnp.concatenate([kernel, jnp.zeros((3, 3, 2, 8))], axis=2)
    layer = variables["params"]["in"] | {"kernel": wide}
    blind = {"params": variables["params"] | {"in": layer}}
    apply = jit(module.apply)
    out = apply(blind, x, 0.5, {"image": image})
    expected = jit(plain.apply)(variables, x, 0.5)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    layer = variables["params"]["in"] | {"kernel": wide.at[:, :, 3:].set(0.3)}
    seeing = {"params": variables["params"] | {"in": layer}}
    changed = apply(seeing, x, 0.5, {"image": image})
    assert np.abs(changed - out).max() > 1e-2

    def refuses(match, module, cond):
        with pytest.raises(ValueError, match=match):
            module.apply(seeing, x, 0.5, cond)

    refuses(r'cond\["image"\] of shape \(2, 4, 4, 2\) is needed, got none', module, None)
    refuses(r"shape \(2, 4, 4, 2\), got \(2, 4, 4, 1\)", module, {"image": image[..., :1]})
    refuses(r"shape \(2, 4, 4, 2\), got \(2, 2, 4, 2\)", module, {"image": image[:, :2]})
    refuses("network with image_channels=0", plain, {"image": image})


def test_variance_is_the_second_half(random_variables, jit):
    module = UNet(**TINY, multipliers=(1,), attention_resolutions=(), learn_sigma=True)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    variables = random_variables(module, x, 0.5)
    apply = jit(module.apply, static_argnames="method")
    prediction, variance = apply(variables, x, 0.5, method="with_variance")
    np.testing.assert_allclose(apply(variables, x, 0.5), prediction, rtol=1e-5, atol=1e-6)
    # The network of the first (second) half of the last layer's filters.
    plain = jit(module.clone(learn_sigma=False).apply)
    for part, expected in ((slice(0, 3), prediction), (slice(3, 6), variance)):
        layer = {name: a[..., part] for name, a in variables["params"]["out"].items()}
        half = {"params": variables["params"] | {"out": layer}}
        np.testing.assert_allclose(plain(half, x, 0.5), expected, rtol=1e-4, atol=1e-4)


def test_lists_are_as_good_as_tuples():
    module = UNet(multipliers=[1, 2], attention_resolutions=[8])
    same = UNet(multipliers=(1, 2), attention_resolutions=(8,))
    assert module == same and hash(module) == hash(same)


def test_bad_sizes_and_options():
    with pytest.raises(ValueError, match="3 levels need a size divisible by 4, got 8 x 6"):
        shapes(UNet(**TINY, multipliers=(1, 1, 1)), (1, 8, 6, 3))
    with pytest.raises(ValueError, match=r"one of \('block', 'conv'\), got 'pool'"):
        UNet(resample="pool")
    with pytest.raises(ValueError, match=r"got shape \(8, 8, 3\)"):
        shapes(UNet(**TINY), (8, 8, 3))


@pytest.mark.parametrize("resample", ["block", "conv"])
def test_blocks_are_those_with_a_residual_in_the_order_of_the_call(resample):
    options = {"width": 8, "head_channels": 8, "resample": resample}
    module = UNet(multipliers=(1, 2, 2), num_blocks=2, attention_resolutions=(8, 4), **options)
    made = shapes(module, (1, 16, 16, 1))
    blocks = module.blocks((1, 16, 16, 1))
    assert sorted(blocks) == sorted(n for n, p in made.items() if {"conv_out", "attention"} & {*p})
    small = UNet(multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,), **options)
    assert small.blocks((1, 8, 8, 1)) == (
        "down_0_block_0", *["down_0_resample"] * (resample == "block"),
        "down_1_block_0", "down_1_attention_0",
        "middle_block_0", "middle_attention", "middle_block_1",
        "up_1_block_0", "up_1_attention_0", "up_1_block_1", "up_1_attention_1",
        *["up_1_resample"] * (resample == "block"),
        "up_0_block_0", "up_0_block_1",
    )  # fmt: skip
