"""Faster inference with what is there: smaller or distilled networks for a part of the way, features
used again, starts nearer to the data.

- `stitch`, `row_switches`, `average_cost`: several denoisers, each on its own noise levels (T-Stitch).
- `propagate_encoder`, `key_rows`, `PriorNoise`: a UNet's encoder at a few rows only (Faster Diffusion).
- `hybrid`: a base model's first steps, a distilled model's last ones (diversity distillation).
- `fit_map`: an optimal-transport map from noise to noised data (DPM-OT).
- `denoising_langevin_gibbs`: a chain in data and noise level, then any integrator (Denoising MCMC).
- `optimal_boundary_condition`: the best of many x_T for a conditional sampler.
"""

from jaxdiff.acceleration.boundary_condition import BoundaryCondition as BoundaryCondition
from jaxdiff.acceleration.boundary_condition import (
    optimal_boundary_condition as optimal_boundary_condition,
)
from jaxdiff.acceleration.boundary_condition import squared_distance as squared_distance
from jaxdiff.acceleration.denoising_mcmc import Chain as Chain
from jaxdiff.acceleration.denoising_mcmc import Denoised as Denoised
from jaxdiff.acceleration.denoising_mcmc import denoising_langevin_gibbs as denoising_langevin_gibbs
from jaxdiff.acceleration.denoising_mcmc import exact_levels as exact_levels
from jaxdiff.acceleration.denoising_mcmc import langevin_gibbs as langevin_gibbs
from jaxdiff.acceleration.denoising_mcmc import start_chain as start_chain
from jaxdiff.acceleration.denoising_mcmc import train_levels as train_levels
from jaxdiff.acceleration.encoder_propagation import KEY_SETS as KEY_SETS
from jaxdiff.acceleration.encoder_propagation import PriorNoise as PriorNoise
from jaxdiff.acceleration.encoder_propagation import Propagated as Propagated
from jaxdiff.acceleration.encoder_propagation import key_rows as key_rows
from jaxdiff.acceleration.encoder_propagation import propagate_encoder as propagate_encoder
from jaxdiff.acceleration.hybrid import Hybrid as Hybrid
from jaxdiff.acceleration.hybrid import hybrid as hybrid
from jaxdiff.acceleration.optimal_transport import Fit as Fit
from jaxdiff.acceleration.optimal_transport import SemidiscreteMap as SemidiscreteMap
from jaxdiff.acceleration.optimal_transport import cell_masses as cell_masses
from jaxdiff.acceleration.optimal_transport import fit_map as fit_map
from jaxdiff.acceleration.optimal_transport import transport_error as transport_error
from jaxdiff.acceleration.stitch import average_cost as average_cost
from jaxdiff.acceleration.stitch import row_shares as row_shares
from jaxdiff.acceleration.stitch import row_switches as row_switches
from jaxdiff.acceleration.stitch import stitch as stitch
