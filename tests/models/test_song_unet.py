import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_edm import golden, info, our_parameters

from jaxdiff.models import SongUNet, UNet
from jaxdiff.models.song_unet import resampled


def count(module, shape):
    made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape), 0.0)
    return sum(a.size for a in jax.tree.leaves(made["params"]))


FULL = {
    "ddpm_pp": SongUNet(augment_dim=9),
    "ncsn_pp": SongUNet.ncsn_pp(augment_dim=9),
}  # the others are those of configs/


@pytest.mark.parametrize("name", FULL)
def test_parameter_counts_are_the_authors(name):
    assert count(FULL[name], (1, 32, 32, 3)) == info()["parameters"][name]


@pytest.mark.parametrize("name", ["ddpm_pp", "ncsn_pp", "skip", "adm"])
def test_the_forward_pass_is_the_authors(name, jit):
    """With the same weights, on images with a class, an augmentation, or none."""
    given, options = golden(name), info()["networks"][name]
    common = {
        "width": options["model_channels"], "multipliers": tuple(options["channel_mult"]),
        "num_blocks": 1, "attention_resolutions": (4,), "num_classes": 4, "time_scale": 1.0,
        "augment_dim": 9,
    }  # fmt: skip
    if name == "adm":
        module = UNet(**common, head_channels=64, label_dropout=0.0)
    else:
        chosen = {"encoder": options.get("encoder_type", "standard"),
                  "decoder": options.get("decoder_type", "standard"),
                  "resample_filter": tuple(options.get("resample_filter", (1, 1))),
                  "noise_multiplier": options.get("channel_mult_noise", 1)}  # fmt: skip
        if "frequencies" in given:
            chosen |= {"embedding": "fourier", "fourier_frequencies": given["frequencies"].tolist()}
        module = SongUNet(**common, **chosen)
    x = given["x"].transpose(0, 2, 3, 1).astype(np.float32)
    label, augment = given["label"].astype(np.int32), given["augment"].astype(np.float32)
    rows = slice(0, 2) if name == "adm" else slice(None)  # without a null row in the table
    cond = {"label": label[rows], "augment": augment[rows]}
    args = x[rows], given["t"][rows].astype(np.float32), cond
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    heads = (lambda channels: channels // 64) if name == "adm" else (lambda channels: 1)
    params = our_parameters(shapes, (8, 4), heads, options.get("encoder_type"))
    params = jax.tree.map(lambda a, s: jnp.asarray(a, jnp.float32).reshape(s.shape), params, shapes)
    out = jit(module.apply)({"params": params}, *args)
    expected = given["out"].transpose(0, 2, 3, 1)[rows]
    assert expected.std() > 0.1
    np.testing.assert_allclose(out, expected, atol=2e-4 * expected.std(), rtol=2e-4)


def test_resampling_is_the_mean_the_copy_and_the_bilinear_filter():
    x = np.random.default_rng(0).standard_normal((1, 6, 4, 2)).astype(np.float32)
    mean = x.reshape(1, 3, 2, 2, 2, 2).mean((2, 4))
    np.testing.assert_allclose(resampled(x, (1, 1)), mean, atol=1e-6)
    np.testing.assert_allclose(resampled(x, (1, 1), up=True), x.repeat(2, 1).repeat(2, 2), atol=1e-6)
    bilinear = jax.image.resize(x, (1, 12, 8, 2), "bilinear")
    inside = np.s_[:, 1:-1, 1:-1]  # at the edges zeros come in
    up = resampled(x, (1, 3, 3, 1), up=True)
    np.testing.assert_allclose(up[inside], bilinear[inside], atol=1e-6)
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1])[..., None] / 64
    down = resampled(x, (1, 3, 3, 1))
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    by_hand = [[(taps * wide[0, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]).sum((0, 1))
                for j in range(2)] for i in range(3)]  # fmt: skip
    np.testing.assert_allclose(down[0], by_hand, atol=1e-6)


def test_bad_options_and_conditions():
    for option, value in (("embedding", "sine"), ("encoder", "pool"), ("decoder", "residual")):
        with pytest.raises(ValueError, match=rf"{option} must be one of .*, got '{value}'"):
            SongUNet(**{option: value})
    for taps in ((1,), (1, 2, 1), (1, 2), (1, -1, -1, 1)):
        with pytest.raises(ValueError, match="resample_filter must be an even number of taps"):
            SongUNet(resample_filter=taps)
    x = jnp.zeros((2, 8, 8, 3))
    tiny = SongUNet(width=8, multipliers=(1, 2), num_blocks=1, attention_resolutions=())

    def refuses(match, module, cond):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(module.init, jax.random.key(0), x, 0.0, cond)

    refuses("network with augment_dim=0", tiny, {"augment": jnp.zeros((2, 9))})
    refuses(r"must have shape \(2, 9\), got \(2, 8\)", tiny.clone(augment_dim=9),
            {"augment": jnp.zeros((2, 8))})  # fmt: skip
    refuses("no null label", tiny.clone(num_classes=3, label_dropout=0.0), None)
