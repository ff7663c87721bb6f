"""The continuous view: probability flow and reverse SDE as diffrax terms, adaptive sampling.

The probability flow  dx/dt = f x - g^2 score / 2  (Song et al., "Score-Based Generative Modeling
through SDEs", 2021, equation 13) carries the marginals of the process without noise. Two forms of
it, each a change of variables in which the process's own scale is gone:

    "rho"     y = x / alpha,  rho = sigma / alpha = exp(-lambda):  dy/drho = eps(x, t)
    "lambda"  x itself,  lambda = log(alpha / sigma):  dx/dlambda = c x - sigma eps(x, t)

with c = d log(alpha) / d lambda = -2 sigma^2 f / g^2. The rho form (Song, Meng & Ermon, "DDIM",
2021, equation 14) has no linear drift left; the lambda form keeps the state at the data's scale,
and for a variance-preserving process is dx/dlambda = -alpha sigma v, which fades out at both ends.

`sample` and `encode` solve either with any diffrax ODE solver, controller and adjoint. For events,
dense output and SDE solvers give the terms to `diffrax.diffeqsolve` yourself: `probability_flow` or
`reverse_sde`, with `clock` for times and a `Problem` as `args`.

Likelihood (docs/likelihood.md): `log_likelihood` by the same flow, `discrete_bound` and
`continuous_bound` from below, and the dequantisation of integer data; `jaxdiff.controls.ito_density`
follows the density along a stochastic sampler.
"""

from jaxdiff.ode.bound import Bound as Bound
from jaxdiff.ode.bound import ImportanceLaw as ImportanceLaw
from jaxdiff.ode.bound import continuous_bound as continuous_bound
from jaxdiff.ode.bound import discrete_bound as discrete_bound
from jaxdiff.ode.bound import importance_law as importance_law
from jaxdiff.ode.bound import uniform_half_log_snr as uniform_half_log_snr
from jaxdiff.ode.dequantisation import SigmoidNormal as SigmoidNormal
from jaxdiff.ode.dequantisation import bin_width as bin_width
from jaxdiff.ode.dequantisation import bits_per_dim as bits_per_dim
from jaxdiff.ode.dequantisation import discrete_log_prob as discrete_log_prob
from jaxdiff.ode.dequantisation import discretised_normal as discretised_normal
from jaxdiff.ode.dequantisation import from_levels as from_levels
from jaxdiff.ode.dequantisation import sigmoid_normal as sigmoid_normal
from jaxdiff.ode.dequantisation import to_levels as to_levels
from jaxdiff.ode.dequantisation import uniform_dequantisation as uniform_dequantisation
from jaxdiff.ode.dequantisation import variational_dequantisation as variational_dequantisation
from jaxdiff.ode.dpm_solver import DPMSolver12 as DPMSolver12
from jaxdiff.ode.dpm_solver import DPMSolver23 as DPMSolver23
from jaxdiff.ode.likelihood import LogLikelihood as LogLikelihood
from jaxdiff.ode.likelihood import log_likelihood as log_likelihood
from jaxdiff.ode.solve import Solution as Solution
from jaxdiff.ode.solve import encode as encode
from jaxdiff.ode.solve import sample as sample
from jaxdiff.ode.solve import sample_norm as sample_norm
from jaxdiff.ode.solve import solve as solve
from jaxdiff.ode.terms import FORMS as FORMS
from jaxdiff.ode.terms import Problem as Problem
from jaxdiff.ode.terms import SamplePaths as SamplePaths
from jaxdiff.ode.terms import clock as clock
from jaxdiff.ode.terms import probability_flow as probability_flow
from jaxdiff.ode.terms import reverse_sde as reverse_sde
from jaxdiff.ode.traces import Exact as Exact
from jaxdiff.ode.traces import Hutchinson as Hutchinson
from jaxdiff.ode.traces import HutchPP as HutchPP
from jaxdiff.ode.traces import exact as exact
from jaxdiff.ode.traces import hutch_pp as hutch_pp
from jaxdiff.ode.traces import hutchinson as hutchinson
from jaxdiff.ode.traces import value_and_trace as value_and_trace
