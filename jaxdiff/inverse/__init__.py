"""Inverse problems: operators, measurements, and samplers of p(x_0 | y) from a prior's denoiser.

`operators` are what measures; `Measurement` is what was measured; the methods are functions from
denoisers to denoisers wherever they can be. The exact posterior of a Gaussian mixture
(`mixture_posterior`) is what they are measured against.
"""

from jaxdiff.inverse.active import acquisition_times as acquisition_times
from jaxdiff.inverse.active import active_dps as active_dps
from jaxdiff.inverse.active import active_sample as active_sample
from jaxdiff.inverse.covariance import mmps as mmps
from jaxdiff.inverse.covariance import tmpd as tmpd
from jaxdiff.inverse.daps import Langevin as Langevin
from jaxdiff.inverse.daps import daps as daps
from jaxdiff.inverse.daps import gaussian_posterior as gaussian_posterior
from jaxdiff.inverse.ddnm import ddnm as ddnm
from jaxdiff.inverse.ddnm import ddnm_plus as ddnm_plus
from jaxdiff.inverse.ddrm import ddrm as ddrm
from jaxdiff.inverse.diffpir import diffpir as diffpir
from jaxdiff.inverse.diffpir import partial_renewal as partial_renewal
from jaxdiff.inverse.dps import dps as dps
from jaxdiff.inverse.dps import dps_step as dps_step
from jaxdiff.inverse.dps import mcg as mcg
from jaxdiff.inverse.flowchef import flowchef as flowchef
from jaxdiff.inverse.forward_models import forward_model_loss as forward_model_loss
from jaxdiff.inverse.forward_models import observation_denoiser as observation_denoiser
from jaxdiff.inverse.forward_models import sample_signal as sample_signal
from jaxdiff.inverse.imaging import bicubic_down as bicubic_down
from jaxdiff.inverse.imaging import blur as blur
from jaxdiff.inverse.imaging import box_down as box_down
from jaxdiff.inverse.imaging import gaussian_kernel as gaussian_kernel
from jaxdiff.inverse.imaging import motion_kernel as motion_kernel
from jaxdiff.inverse.imaging import radon as radon
from jaxdiff.inverse.joint import MixedMeasurement as MixedMeasurement
from jaxdiff.inverse.joint import joint_dps as joint_dps
from jaxdiff.inverse.joint import joint_pigdm as joint_pigdm
from jaxdiff.inverse.joint import joint_prior as joint_prior
from jaxdiff.inverse.joint import joint_projection as joint_projection
from jaxdiff.inverse.joint import mixed_measurement as mixed_measurement
from jaxdiff.inverse.mbir import SliceTV as SliceTV
from jaxdiff.inverse.mbir import mbir as mbir
from jaxdiff.inverse.mbir import total_variation as total_variation
from jaxdiff.inverse.measurement import Measurement as Measurement
from jaxdiff.inverse.measurement import measure as measure
from jaxdiff.inverse.operators import LinearOperator as LinearOperator
from jaxdiff.inverse.operators import compose as compose
from jaxdiff.inverse.operators import fourier as fourier
from jaxdiff.inverse.operators import inpainting as inpainting
from jaxdiff.inverse.operators import matrix as matrix
from jaxdiff.inverse.posterior import MixturePosterior as MixturePosterior
from jaxdiff.inverse.posterior import mixture_posterior as mixture_posterior
from jaxdiff.inverse.pseudo_inverse import pigdm as pigdm
from jaxdiff.inverse.pseudo_inverse import pigdm_step as pigdm_step
from jaxdiff.inverse.repaint import repaint as repaint
from jaxdiff.inverse.residual import residual_denoiser as residual_denoiser
from jaxdiff.inverse.residual import residual_loss as residual_loss
from jaxdiff.inverse.residual import restore as restore
from jaxdiff.inverse.second_order import hessian_trace as hessian_trace
from jaxdiff.inverse.second_order import stsl as stsl
from jaxdiff.inverse.spectra import Spectrum as Spectrum
from jaxdiff.inverse.tweedie import corrected as corrected
