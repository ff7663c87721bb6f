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
"""

from jaxdiff.ode.dpm_solver import DPMSolver12 as DPMSolver12
from jaxdiff.ode.dpm_solver import DPMSolver23 as DPMSolver23
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
