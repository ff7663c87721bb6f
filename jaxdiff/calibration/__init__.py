"""Samplers fitted to a network: what a few trajectories of it tell about the coefficients."""

from jaxdiff.calibration.aligned_steps import aligned_grid as aligned_grid
from jaxdiff.calibration.aligned_steps import kl_bound as kl_bound
from jaxdiff.calibration.compensation import CompensationFit as CompensationFit
from jaxdiff.calibration.compensation import ddim_trajectory as ddim_trajectory
from jaxdiff.calibration.compensation import fit_compensation as fit_compensation
from jaxdiff.calibration.evolution import Evolved as Evolved
from jaxdiff.calibration.evolution import evolve as evolve
from jaxdiff.calibration.learned import Freedom as Freedom
from jaxdiff.calibration.learned import Learned as Learned
from jaxdiff.calibration.learned import learn as learn
from jaxdiff.calibration.learned import learned_tableau as learned_tableau
from jaxdiff.calibration.learned import no_freedom as no_freedom
from jaxdiff.calibration.solver_search import SolverSearch as SolverSearch
from jaxdiff.calibration.solver_search import search_solver as search_solver
from jaxdiff.calibration.solver_space import SolverSpace as SolverSpace
from jaxdiff.calibration.statistics import estimate_statistics as estimate_statistics
from jaxdiff.calibration.statistics import noised_states as noised_states
from jaxdiff.calibration.step_search import StepSearch as StepSearch
from jaxdiff.calibration.step_search import frechet_to as frechet_to
from jaxdiff.calibration.step_search import kept_fraction as kept_fraction
from jaxdiff.calibration.step_search import mmd_to as mmd_to
from jaxdiff.calibration.step_search import search_steps as search_steps
from jaxdiff.calibration.step_space import StepSpace as StepSpace
from jaxdiff.calibration.trajectory_grid import cheapest_path as cheapest_path
from jaxdiff.calibration.trajectory_grid import trajectory_costs as trajectory_costs
from jaxdiff.calibration.trajectory_grid import trajectory_grid as trajectory_grid
