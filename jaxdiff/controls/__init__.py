"""Steps that depend on the state: a tableau, and a control that changes what it does between rows."""

from jaxdiff.controls.density import DensityState as DensityState
from jaxdiff.controls.density import ItoDensity as ItoDensity
from jaxdiff.controls.density import ito_density as ito_density
from jaxdiff.controls.density import ito_increment as ito_increment
from jaxdiff.controls.diff_ier import DiffIER as DiffIER
from jaxdiff.controls.diff_ier import DiffIERState as DiffIERState
from jaxdiff.controls.diff_ier import diff_ier as diff_ier
from jaxdiff.controls.evodiff import EVODiff as EVODiff
from jaxdiff.controls.evodiff import evodiff as evodiff
from jaxdiff.controls.time_shift import Levels as Levels
from jaxdiff.controls.time_shift import TimeShift as TimeShift
from jaxdiff.controls.time_shift import coupled as coupled
from jaxdiff.controls.time_shift import time_shift as time_shift
