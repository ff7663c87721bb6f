"""Steering: particles, weights and densities along a sampled path, all through `control`.

Every function here makes a `jaxdiff.Control`, some with the tableau that it belongs to; weights and the
like come back in `sample(..., save="state").aux`.
"""

from jaxdiff.steering.correctors import Corrector as Corrector
from jaxdiff.steering.correctors import CorrectorState as CorrectorState
from jaxdiff.steering.correctors import corrector as corrector
from jaxdiff.steering.correctors import start as start
from jaxdiff.steering.fk_steering import POTENTIALS as POTENTIALS
from jaxdiff.steering.fk_steering import FKSteering as FKSteering
from jaxdiff.steering.fk_steering import GaussianProposal as GaussianProposal
from jaxdiff.steering.fk_steering import SteeringState as SteeringState
from jaxdiff.steering.fk_steering import best as best
from jaxdiff.steering.fk_steering import fk_steering as fk_steering
from jaxdiff.steering.resampling import SCHEMES as SCHEMES
from jaxdiff.steering.resampling import Resampler as Resampler
from jaxdiff.steering.resampling import ancestors as ancestors
from jaxdiff.steering.resampling import effective_sample_size as effective_sample_size
from jaxdiff.steering.superposition import Superposition as Superposition
from jaxdiff.steering.superposition import SuperpositionState as SuperpositionState
from jaxdiff.steering.superposition import superposition as superposition
