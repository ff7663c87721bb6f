"""What tests/golden/make_edm.py recorded of EDM's own training code, and its weights in ours."""

import functools
import json
import re
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "golden" / "edm_training.npz"


@functools.cache
def _arrays():
    with np.load(FILE) as archive:
        return dict(archive)


def golden(case):
    """The arrays of a case, by name."""
    return {k.removeprefix(f"{case}/"): v for k, v in _arrays().items() if k.startswith(f"{case}/")}


def info():
    return json.loads(_arrays()["info"].tobytes())


def weights(name, shape):
    """A parameter: normal numbers of a stream of its name, of a size that keeps sums' size."""
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    is_scale = len(shape) == 1 and name.endswith("weight")  # of a norm: about 1
    return is_scale + drawn / np.sqrt(fan_in)


_WHOLE = {
    "condition/hidden": "map_layer0", "condition/out": "map_layer1",
    "condition/time/hidden": "map_layer0", "condition/time/out": "map_layer1",
    "condition/label": "map_label", "condition/label/table": "map_label",
    "condition/augment/linear": "map_augment", "condition/time/augment/linear": "map_augment",
    "norm_out": "out_norm", "out": "out_conv",
}  # fmt: skip
_INNER = {
    "norm_in": "norm0", "conv_in": "conv0", "modulation": "affine", "norm_out": "norm1",
    "conv_out": "conv1", "skip": "skip", "norm": "norm2", "attention/qkv": "qkv",
    "attention/out": "proj",
}  # fmt: skip


def _their_layer(layer, sizes, encoder):
    """Their name of one of our layers: "down_0_block_1/conv_in" -> "enc.8x8_block1.conv0"."""
    if layer in _WHOLE:
        return _WHOLE[layer]
    top, _, inner = layer.partition("/")
    size = [f"{n}x{n}" for n in sizes]
    if top == "in":
        return f"enc.{size[0]}_conv"
    if top.startswith("middle"):
        return f"dec.{size[-1]}_in{int(top.endswith('block_1'))}.{_INNER[inner]}"
    side, level, what, number = re.fullmatch(
        r"(down|up|norm_out|out)_(\d+)_?([a-z]*)_?(\d*)", top
    ).groups()
    level = int(level)
    if side in ("norm_out", "out"):
        return f"dec.{size[level]}_aux_{'norm' if side == 'norm_out' else 'conv'}"
    if what == "input":
        return f"enc.{size[level + 1]}_aux_{encoder}"
    if what == "resample":
        block = f"enc.{size[level + 1]}_down" if side == "down" else f"dec.{size[level - 1]}_up"
    else:
        block = f"{'enc' if side == 'down' else 'dec'}.{size[level]}_block{number}"
    return f"{block}.{_INNER[inner]}"


def our_parameters(shapes, sizes, heads, encoder="residual"):
    """Our parameters, of these shapes, with the weights that theirs have.

    `sizes` are those of the levels; `heads(channels)` how many an attention has.
    """

    def leaf(path, shape):
        *layer, kind = (key.key for key in path)
        layer = "/".join(layer)
        name = _their_layer(layer, sizes, encoder)
        shape = shape.shape
        if kind in ("bias", "scale"):
            value = weights(f"{name}.{'bias' if kind == 'bias' else 'weight'}", shape)
        elif kind == "embedding":
            return weights(f"{name}.weight", shape[::-1]).T
        else:
            theirs = (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]
            value = weights(f"{name}.weight", theirs)
        if layer.endswith("attention/qkv"):  # theirs: heads, channels, (q, k, v)
            channels = shape[-1] // 3
            count = heads(channels)
            value = value.reshape(count, channels // count, 3, *value.shape[1:])
            value = np.moveaxis(value, 2, 0).reshape(3 * channels, *value.shape[3:])
        return np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim > 1 else value

    import jax

    return jax.tree_util.tree_map_with_path(leaf, shapes)
