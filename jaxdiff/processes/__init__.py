"""Forward processes: alpha(t), sigma(t) and what follows from them; see `Process`."""

from jaxdiff.processes.base import Process as Process
from jaxdiff.processes.base import VariancePreserving as VariancePreserving
from jaxdiff.processes.discrete import DDPM as DDPM
from jaxdiff.processes.discrete import ZeroTerminalSNR as ZeroTerminalSNR
from jaxdiff.processes.discrete import ddpm as ddpm
from jaxdiff.processes.discrete import zero_terminal_snr as zero_terminal_snr
from jaxdiff.processes.exploding import EDM as EDM
from jaxdiff.processes.exploding import VE as VE
from jaxdiff.processes.exploding import edm as edm
from jaxdiff.processes.exploding import ve as ve
from jaxdiff.processes.flow import Flow as Flow
from jaxdiff.processes.flow import flow as flow
from jaxdiff.processes.residual import Residual as Residual
from jaxdiff.processes.residual import residual as residual
from jaxdiff.processes.residual import retimed as retimed
from jaxdiff.processes.vp import SubVP as SubVP
from jaxdiff.processes.vp import VPCosine as VPCosine
from jaxdiff.processes.vp import VPLinear as VPLinear
from jaxdiff.processes.vp import shifted_cosine as shifted_cosine
from jaxdiff.processes.vp import sub_vp as sub_vp
from jaxdiff.processes.vp import vp_cosine as vp_cosine
from jaxdiff.processes.vp import vp_linear as vp_linear
