"""Inversion: the noise that a sampler turns into a given sample.

Three ways, from exact to iterative: a table's own inverse (`invert`; BDIA, BELM, EDICT and others that
meet the condition of `jaxdiff.solvers.inverse`), equations solved step by step (`solve_back`; DDIM and
multistep methods), and Newton's method on the whole run (`shoot`; any deterministic sampler). Naive
DDIM inversion needs none of them: `sample(denoiser, ddim(grid.reversed()), x_0)`.
"""

from jaxdiff.inversion.exact import invert as invert
from jaxdiff.inversion.roots import METHODS as METHODS
from jaxdiff.inversion.roots import NotConvergedError as NotConvergedError
from jaxdiff.inversion.shooting import Shot as Shot
from jaxdiff.inversion.shooting import shoot as shoot
from jaxdiff.inversion.step_by_step import Inversion as Inversion
from jaxdiff.inversion.step_by_step import solve_back as solve_back
