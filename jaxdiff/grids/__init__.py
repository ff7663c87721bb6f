"""Grids: the noise levels a sampler visits."""

from jaxdiff.grids.grid import Grid as Grid
from jaxdiff.grids.grid import from_arrays as from_arrays
from jaxdiff.grids.grid import from_times as from_times
from jaxdiff.grids.published import published as published
from jaxdiff.grids.published import resized as resized
from jaxdiff.grids.spacings import arctan as arctan
from jaxdiff.grids.spacings import half_log_snr as half_log_snr
from jaxdiff.grids.spacings import karras as karras
from jaxdiff.grids.spacings import logistic as logistic
from jaxdiff.grids.spacings import power as power
from jaxdiff.grids.spacings import quadratic as quadratic
from jaxdiff.grids.spacings import shifted as shifted
from jaxdiff.grids.spacings import truncated_karras as truncated_karras
from jaxdiff.grids.spacings import uniform as uniform
from jaxdiff.grids.timesteps import leading as leading
from jaxdiff.grids.timesteps import linspace as linspace
from jaxdiff.grids.timesteps import trailing as trailing
