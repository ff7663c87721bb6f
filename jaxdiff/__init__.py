"""jaxdiff: diffusion models in JAX. A sampler is data: a table of coefficients."""

import importlib as _importlib

from jaxdiff import grids as grids
from jaxdiff import guidance as guidance
from jaxdiff import inverse as inverse
from jaxdiff import inversion as inversion
from jaxdiff import losses as losses
from jaxdiff import ode as ode
from jaxdiff import predictions as predictions
from jaxdiff import processes as processes
from jaxdiff import solvers as solvers
from jaxdiff.boundary import consistency_boundary as consistency_boundary
from jaxdiff.boundary import latent_consistency_boundary as latent_consistency_boundary
from jaxdiff.denoisers import Denoiser as Denoiser
from jaxdiff.denoisers import clip_x0 as clip_x0
from jaxdiff.denoisers import dynamic_threshold as dynamic_threshold
from jaxdiff.denoisers import precondition as precondition
from jaxdiff.integrator import Carry as Carry
from jaxdiff.integrator import Control as Control
from jaxdiff.integrator import State as State
from jaxdiff.mixtures import GaussianMixture as GaussianMixture
from jaxdiff.mixtures import gaussian_mixture as gaussian_mixture
from jaxdiff.noise import BrownianPath as BrownianPath
from jaxdiff.noise import sample_keys as sample_keys
from jaxdiff.sampling import sample as sample

# Loaded on first use: they import flax, scikit-learn or grain, which the core does without.
_LAZY = (
    "ablation", "acceleration", "calibration", "controls", "data", "diagnostics", "editing",
    "gradients", "learned_variance", "metrics", "models", "parallel", "steering", "training",
)  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY:
        return _importlib.import_module(f"jaxdiff.{name}")
    raise AttributeError(f"module 'jaxdiff' has no attribute {name!r}")
