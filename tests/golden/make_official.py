"""Golden trajectories of the authors' own sampling codes in float64, for the parity tests.

    pip install torch diffusers numpy scipy tqdm     # jax instead of the first two for deis
    git clone https://github.com/crowsonkb/k-diffusion ...
    python tests/golden/make_official.py --k-diffusion k-diffusion --dpm-solver dpm-solver ...

Every option names a checkout of one repository and writes one official_*.npz. Needed only to make the
files again: the tests read them with NumPy. Nothing of those repositories is copied here; the names,
commits and package versions are written inside each file, and OFFICIAL.md describes the contents.

The network is the exact one of diffusers_*.npz: E[x0 | x] or E[eps | x] of its Gaussian mixture at
the (alpha, sigma) of the call. float64 everywhere: torch's default type is set to it, `Tensor.float`
keeps it, and a dispatch mode raises if a float32 tensor appears. Modules that the samplers do not
use (image, network and download code) are replaced by empty ones.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import platform
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import official_runs

HERE = Path(__file__).parent
BATCH, DIM = 3, 4
START = np.random.default_rng(20231107).standard_normal((BATCH, DIM))


def load_mixture():
    """The mixture of diffusers_*.npz: {"weights", "means", "scales"} as lists."""
    with np.load(HERE / "diffusers_ddim.npz") as z:
        return json.loads(z["info"].tobytes())["mixture"]


MIXTURE = load_mixture()
