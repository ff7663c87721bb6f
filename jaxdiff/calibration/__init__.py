"""Samplers fitted to a network: what a few trajectories of it tell about the coefficients."""

from jaxdiff.calibration.compensation import CompensationFit as CompensationFit
from jaxdiff.calibration.compensation import ddim_trajectory as ddim_trajectory
from jaxdiff.calibration.compensation import fit_compensation as fit_compensation
from jaxdiff.calibration.learned import Freedom as Freedom
from jaxdiff.calibration.learned import Learned as Learned
from jaxdiff.calibration.learned import learn as learn
from jaxdiff.calibration.learned import learned_tableau as learned_tableau
from jaxdiff.calibration.learned import no_freedom as no_freedom
from jaxdiff.calibration.statistics import estimate_statistics as estimate_statistics
from jaxdiff.calibration.statistics import noised_states as noised_states
from jaxdiff.calibration.trajectory_grid import cheapest_path as cheapest_path
from jaxdiff.calibration.trajectory_grid import trajectory_costs as trajectory_costs
from jaxdiff.calibration.trajectory_grid import trajectory_grid as trajectory_grid
