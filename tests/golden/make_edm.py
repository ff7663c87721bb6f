"""EDM's own augmentation and networks on small inputs, for the parity tests: edm_training.npz.

    git clone https://github.com/NVlabs/edm
    pip install torch numpy
    python tests/golden/make_edm.py edm

Needed only to make the file again: the tests read it with NumPy. Nothing of that repository is kept
here. In the file:

- "augment/...": images [6, 3, 16, 12], the numbers drawn for them (named as by
  `jaxdiff.data.Augmentation.draw`), the images that come out and their labels; float64.
- "<network>/...": a tiny network's inputs and output in float64, channels first. Its weights are
  not kept: parameter `name` is `golden_edm.weights(name, shape)`, which the tests call too.
- "info": the commit, the versions, each network's options, and the numbers of parameters of the
  networks at the sizes of the papers.
"""

import json
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden_edm import FILE, weights  # noqa: E402

# Tiny networks: (class, options). 64 channels are the least that attend in DhariwalUNet.
SMALL = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 4,
         "augment_dim": 9, "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0}  # fmt: skip
NCSN_PP = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
           "resample_filter": [1, 3, 3, 1]}  # fmt: skip
NETWORKS = {
    "ddpm_pp": ("SongUNet", SMALL | {"model_channels": 8, "channel_mult": [1, 2]}),
    "ncsn_pp": ("SongUNet", SMALL | NCSN_PP | {"model_channels": 8, "channel_mult": [1, 2]}),
    "skip": (
        "SongUNet",
        SMALL | {"encoder_type": "skip", "decoder_type": "skip", "model_channels": 8,
                 "channel_mult": [1, 2]},
    ),
    "adm": ("DhariwalUNet", SMALL | {"model_channels": 64, "channel_mult": [1, 2]}),
}  # fmt: skip

# The sizes of the papers, as the repository's train.py makes them; DDPM++ of Song et al. too.
CIFAR = {"img_resolution": 32, "in_channels": 3, "out_channels": 3, "augment_dim": 9,
         "model_channels": 128, "channel_mult": [2, 2, 2]}  # fmt: skip
FULL = {
    "ddpm_pp": ("SongUNet", CIFAR),
    "ddpm_pp_classes": ("SongUNet", CIFAR | {"label_dim": 10}),
    "ncsn_pp": ("SongUNet", CIFAR | NCSN_PP),
    "ddpm_pp_song": ("SongUNet", {"img_resolution": 32, "in_channels": 3, "out_channels": 3}),
    "adm": (
        "DhariwalUNet",
        {"img_resolution": 64, "in_channels": 3, "out_channels": 3, "label_dim": 1000},
    ),
}


def import_repository(checkout):
    """(training.augment, training.networks), without what they import for downloads and pickles."""
    import torch

    def constant(value, shape=None, dtype=None, device=None):
        made = torch.as_tensor(np.array(value), dtype=dtype or torch.get_default_dtype())
        return made if shape is None else torch.broadcast_to(made, shape)

    package = types.ModuleType("torch_utils")
    package.persistence = types.SimpleNamespace(persistent_class=lambda cls: cls)
    package.misc = types.SimpleNamespace(constant=constant)
    sys.path.insert(0, str(checkout))
    with mock.patch.dict(sys.modules, {"torch_utils": package}):
        from training import augment, networks
    return augment, networks


def run_augment(augment):
    """Every transformation at a rate of 0.6, on one batch."""
    import torch

    # A stream with which each of them is applied to two images or more, and not to one.
    rate, (count, height, width), stream = 0.6, (6, 16, 12), np.random.RandomState(35)
    calls = []

    def answer(kind):
        def draw(*args, **kwargs):
            shape = [n for a in args for n in (a if isinstance(a, (list, tuple)) else [a])]
            shape = shape[1:] if kind == "randint" else shape
            made = {
                "rand": lambda: stream.random_sample(shape),
                "randn": lambda: stream.standard_normal(shape),
                "randint": lambda: stream.randint(0, args[0], shape),
            }[kind]()
            calls.append(made)
            return torch.as_tensor(made)

        return draw

    images = np.random.RandomState(6).uniform(-1, 1, (count, 3, height, width))
    pipe = augment.AugmentPipe(
        p=rate, xflip=1, yflip=1, translate_int=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1
    )
    with (
        mock.patch.object(torch, "rand", answer("rand")),
        mock.patch.object(torch, "randn", answer("randn")),
        mock.patch.object(torch, "randint", answer("randint")),
    ):
        result, labels = pipe(torch.as_tensor(images))
    x, x_on, y, y_on, shift, shift_on, scale, scale_on, turn, turn_on = calls[:10]
    stretch, angle, stretch_on, angle_on, move, move_on = calls[10:]
    applied = [np.ravel(on) < rate for on in (x_on, y_on, shift_on, scale_on, turn_on, stretch_on,
                                              move_on)]  # fmt: skip
    angle = (2 * angle - 1) * np.pi * (angle_on < 0.5)
    drawn = {
        "x_flip": np.ravel(x) * applied[0],
        "y_flip": np.ravel(y) * applied[1],
        "translate_int": (2 * shift.reshape(2, count).T - 1) * applied[2][:, None],
        "scale": scale * applied[3],
        "rotate": (2 * turn - 1) * np.pi * applied[4],
        "anisotropy": np.stack([stretch * applied[5], angle], 1),
        "translate": move.T * applied[6][:, None],
    }
    return {"images": images, "result": result.numpy(), "labels": labels.numpy(), **drawn}


def run_network(networks, kind, options):
    """The network's output for three samples, one without a class and one without augmentation."""
    import torch

    module = getattr(networks, kind)(**options).double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.as_tensor(weights(name, tuple(parameter.shape))))
        stream = np.random.RandomState(1)
        x = stream.standard_normal((3, 3, options["img_resolution"], options["img_resolution"]))
        t = np.array([-0.7, 0.2, 1.1])
        label = np.array([2, 0, options["label_dim"]])  # the last is no class: zeros
        augment = stream.standard_normal((3, 9)) * [[1], [0], [1]]
        one_hot = np.eye(options["label_dim"] + 1)[label, :-1]
        out = module(*map(torch.as_tensor, (x, t, one_hot)), torch.as_tensor(augment))
    found = {"x": x, "t": t, "label": label, "augment": augment, "out": out.numpy()}
    if options.get("embedding_type") == "fourier":
        found["frequencies"] = module.map_noise.freqs.numpy()
    return found


def main(checkout):
    import torch

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    augment, networks = import_repository(checkout)
    arrays = {f"augment/{key}": value for key, value in run_augment(augment).items()}
    for name, (kind, options) in NETWORKS.items():
        for key, value in run_network(networks, kind, options).items():
            arrays[f"{name}/{key}"] = value
    counts = {}
    for name, (kind, options) in FULL.items():
        with torch.device("meta"):
            module = getattr(networks, kind)(**options)
        counts[name] = sum(p.numel() for p in module.parameters())
    commit = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    info = {
        "repository": "https://github.com/NVlabs/edm", "commit": commit,
        "torch": torch.__version__, "numpy": np.__version__,
        "networks": {name: options for name, (_, options) in NETWORKS.items()},
        "parameters": counts,
    }  # fmt: skip
    arrays["info"] = np.frombuffer(json.dumps(info).encode(), np.uint8)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
