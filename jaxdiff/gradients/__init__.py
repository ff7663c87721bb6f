"""Gradients through sampling: which adjoint to choose is in docs/gradients.md.

`jaxdiff.sample` takes `diffrax.RecursiveCheckpointAdjoint`, `DirectAdjoint`, `ForwardMode` and, for
invertible tableaux, `ReversibleAdjoint`; `jaxdiff.ode.solve` takes diffrax's own, `adjoint_dpm` among
them. `optimize` runs any of them under an optax optimizer.
"""

from jaxdiff.gradients.backsolve import adjoint_dpm as adjoint_dpm
from jaxdiff.gradients.optimize import Optimized as Optimized
from jaxdiff.gradients.optimize import optimize as optimize
from jaxdiff.gradients.reversible import ReversibleAdjoint as ReversibleAdjoint
