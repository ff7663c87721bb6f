"""Editing of data with a diffusion model: stochastic and virtual inversion, boundaries, regions."""

from jaxdiff.editing.boundary import Boundary as Boundary
from jaxdiff.editing.boundary import cross_boundary as cross_boundary
from jaxdiff.editing.boundary import fit_boundary as fit_boundary
from jaxdiff.editing.boundary import mixing_step as mixing_step
from jaxdiff.editing.cyclic import cyclic_one_way as cyclic_one_way
from jaxdiff.editing.cyclic import cyclic_sde as cyclic_sde
from jaxdiff.editing.ddcm import SourceLayout as SourceLayout
from jaxdiff.editing.ddcm import ddcm as ddcm
from jaxdiff.editing.ddcm import virtual_inversion as virtual_inversion
from jaxdiff.editing.edit_friendly import NoiseCode as NoiseCode
from jaxdiff.editing.edit_friendly import edit_friendly as edit_friendly
from jaxdiff.editing.edit_friendly import extract as extract
from jaxdiff.editing.edit_friendly import replay as replay
from jaxdiff.editing.edit_friendly import tail as tail
from jaxdiff.editing.encoder import cycle as cycle
from jaxdiff.editing.encoder import dpm_encoder as dpm_encoder
from jaxdiff.editing.encoder import langevin_codes as langevin_codes
from jaxdiff.editing.encoder import posterior_chain as posterior_chain
from jaxdiff.editing.features import block_outputs as block_outputs
from jaxdiff.editing.features import replace_block as replace_block
from jaxdiff.editing.regional import MoveEnergy as MoveEnergy
from jaxdiff.editing.regional import energy_guided as energy_guided
from jaxdiff.editing.regional import move_energy as move_energy
from jaxdiff.editing.regional import regional_sde as regional_sde
