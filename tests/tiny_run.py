"""A run that trains in a second: three clusters of points in the plane, a small MLP."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxdiff import config as configuration
from jaxdiff.settings import SECTIONS

CONFIG_FILE = '''
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.data = {"name": "arrays", "data": %r}
    config.process = {"name": "flow"}
    config.model = {"name": "mlp", "width": 16, "depth": 1}
    config.denoiser = {"prediction": "flow"}
    config.loss = {"weighting": "flow"}
    config.optimizer = {"learning_rate": 3e-3}
    config.train = {"steps": 12, "batch_size": 16, "log_every": 4, "checkpoint_every": 3, "keep": 3}
    config.sample = {"solver": "ddim", "steps": 4, "grid": "uniform", "count": 4}
    config.evaluate = {"count": 24}
    return config
'''


def write_config(folder: Path) -> Path:
    """Write data and a configuration file into `folder`; returns the latter."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 96)
    centres = np.array([[-0.5, 0.0], [0.5, 0.5], [0.5, -0.5]])
    x = np.clip(centres[label] + 0.1 * rng.standard_normal((96, 2)), -1, 1).astype(np.float32)
    np.savez(folder / "points.npz", x=x, label=label)
    file = folder / "tiny.py"
    file.write_text(CONFIG_FILE % str(folder / "points.npz"))
    return file


def tiny_config(folder: Path, *overrides: str) -> ConfigDict:
    """The completed configuration, with overrides such as "--config.train.steps=3"."""
    config = configuration.load(write_config(folder), SECTIONS)
    return configuration.complete(configuration.override(config, overrides), SECTIONS)
