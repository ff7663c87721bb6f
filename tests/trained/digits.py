"""Two trained digit networks: `denoiser("large")`, and `denoiser("small")` with a tenth of the weights.

Class-conditional UNets on the "train" split of scikit-learn's digits (1,442 images; the other 355
were never seen); label 10 is none. The weights beside this file, float16, are made by

    python tests/trained/digits.py            # about 10 minutes on two cores
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxdiff import Denoiser
from jaxdiff import config as configuration
from jaxdiff.experiment import Experiment, make_experiment
from jaxdiff.settings import SECTIONS

WIDTHS = {"large": 24, "small": 7}
NULL = 10


def _file(name: str) -> Path:
    return Path(__file__).parent / f"digits_{name}.npz"


def digits_config(width: int) -> ConfigDict:
    """A v-prediction UNet on the cosine process, with dropout, as 1,442 images are few."""
    config = ConfigDict()
    config.data = {"name": "digits", "split": "train"}
    config.process = {"name": "vp_cosine"}
    config.model = {
        "name": "unet", "width": width, "multipliers": (1, 2), "num_blocks": 1,
        "attention_resolutions": (4,), "head_channels": 16, "dropout": 0.1,
    }  # fmt: skip
    config.denoiser = {"prediction": "v"}
    config.loss = {"weighting": "v", "time_law": "uniform", "time_options": {"stratified": True}}
    config.optimizer = {"learning_rate": 2e-3, "warmup_steps": 100, "schedule": "cosine"}
    config.train = {"steps": 4000, "batch_size": 64, "ema_decay": 0.999, "checkpoint_every": 1000}
    config.sample = {
        "solver": "dpm_solver_pp_multistep", "steps": 10, "grid": "half_log_snr", "count": 4,
    }  # fmt: skip
    config.evaluate = {"count": 10}
    return configuration.complete(config, SECTIONS)


@functools.cache
def experiment(name: str) -> Experiment:
    """Process, network and shapes of a network."""
    return make_experiment(digits_config(WIDTHS[name]), (8, 8, 1), 10)


@functools.cache
def variables(name: str) -> dict:
    """{"params": float32 weights} of a network."""
    with np.load(_file(name)) as stored:
        flat = {key: stored[key].astype(np.float32) for key in stored.files}
    return {"params": unflatten_dict(flat, sep="/")}


def denoiser(name: str) -> Denoiser:
    """The trained denoiser: x [n, 8, 8, 1], cond [n] labels 0 to 9, or 10 for none."""
    return experiment(name).denoiser(variables(name))


def _make() -> None:
    from jaxdiff.training import prepare, train

    for name, width in WIDTHS.items():
        with tempfile.TemporaryDirectory() as folder:
            weights = train(prepare(digits_config(width)), folder).ema["params"]
        flat = flatten_dict(weights, sep="/")
        np.savez_compressed(_file(name), **{k: np.asarray(v, np.float16) for k, v in flat.items()})
        size = _file(name).stat().st_size
        print(name, sum(v.size for v in flat.values()), "parameters,", size, "bytes")


if __name__ == "__main__":
    _make()
