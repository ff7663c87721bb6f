"""AdjointDPM: the continuous adjoint of the probability flow, on a fixed ladder of times."""

from __future__ import annotations

from typing import Any

import diffrax
import numpy as np
from jaxtyping import ArrayLike, Float

from jaxdiff.ode import clock
from jaxdiff.processes import Process


def adjoint_dpm(
    process: Process, t: Float[ArrayLike, " n"], solver: diffrax.AbstractSolver | None = None
) -> dict[str, Any]:
    """Options of `jaxdiff.ode.solve` for AdjointDPM: one step between two times, both ways.

    In y = x / alpha and rho = sigma / alpha the probability flow is dy/drho = eps(alpha y, t), and a
    loss L of its end has the adjoint a = dL/dy,

        da/drho = -a^T d eps/dy,   dL/dtheta = -int a^T (d eps/dtheta) drho from the end to the start,

    solved from the data to the noise together with y itself, which is not stored: memory does not
    depend on the number of steps (Pan et al., "AdjointDPM: Adjoint Sensitivity Method for Gradient
    Backpropagation of Diffusion Probabilistic Models", 2024, section 3.2). Gradients with respect to
    x_T, cond and every float leaf of the denoiser; not to the process or the times.

        options = adjoint_dpm(process, jaxdiff.grids.half_log_snr(process, 32).t)
        x_0 = jaxdiff.ode.solve(denoiser, process, x_T, t[0], t[-1], **options).x

    The gradient is that of the flow, not of the steps taken: it errs by the discretisation of both
    solves, and by how far y drifts on its way back. For tolerances instead of a ladder pass
    `adjoint=diffrax.BacksolveAdjoint()` and `form="rho"` to `jaxdiff.ode.sample`. For the exact
    gradient of a discrete sampler in the same memory see `ReversibleAdjoint`.

    Arguments:
      t: times from t_start to t_end of `solve`, strictly monotone, where lambda is finite.
      solver: default `diffrax.Heun()`, of order 2; the authors' code takes `diffrax.Euler()`, which in
        rho is DDIM.

    Raises ValueError for times that are not monotone, or at which lambda is not finite.
    """
    t = np.asarray(t, np.float64)
    if t.ndim != 1 or t.size < 2 or not (np.all(np.diff(t) < 0) or np.all(np.diff(t) > 0)):
        raise ValueError(f"t must be two times or more, rising or falling, got {t.tolist()}")
    rho = np.asarray(clock(process, t, "rho"))
    if not np.all(np.isfinite(rho) & (rho > 0)):
        raise ValueError(
            f"lambda must be finite at every t, got {t[~np.isfinite(rho) | (rho <= 0)].tolist()}"
        )
    # diffrax runs a falling rho as a rising -rho, and back from there.
    back = diffrax.StepTo(np.sign(rho[-1] - rho[0]) * rho[::-1])
    return {
        "form": "rho",
        "solver": diffrax.Heun() if solver is None else solver,
        "stepsize_controller": diffrax.StepTo(rho),
        "adjoint": diffrax.BacksolveAdjoint(stepsize_controller=back),
        "max_steps": t.size - 1,
    }
