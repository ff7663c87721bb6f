"""RDDM's steps: the residual and the noise are each removed by what their own network predicts."""

from numbers import Real

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.first_order import posterior_share
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def residual(grid: Grid, eta: float = 0.0, variance: str = "sum") -> Tableau:
    """RDDM: x' = x + (alpha' - alpha) x0 + (sqrt(sigma'^2 - s^2) - sigma) eps + s z.

    With alpha = 1 - A, sigma = B, x = I - I_in and x0 = -I_res (see `jaxdiff.processes.residual`) that
    is I' = I - (A - A') I_res - (B - sqrt(B'^2 - s^2)) eps + s z of Liu et al., "Residual Denoising
    Diffusion Models" (2024). x itself is carried on, so the two predictions need not fit together;
    where they do (x = alpha x0 + sigma eps, so for every single prediction) this is DDIM, number for
    number, and so it is no entry of the catalogue. One evaluation a step; every grid end is supported.

    Arguments:
      eta: noise, in [0, 1]: with 0 nothing is drawn.
      variance: "sum", the paper's s^2 = eta (sigma^2 - sigma'^2) sigma'^2 / sigma^2, for processes
        whose sigma grows towards the noise; "posterior", DDIM's s^2 = eta^2 sigma'^2 (1 - exp(-2 h)).

    For a denoiser that predicts ("x0", "eps"), such as `jaxdiff.inverse.residual_denoiser` makes.
    Raises ValueError for other options, or noise on a grid that runs from data to noise.
    """
    if isinstance(eta, bool) or not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise ValueError(f"eta must be a number in [0, 1], got {eta!r}")
    if variance not in ("sum", "posterior"):
        raise ValueError(f"variance must be 'sum' or 'posterior', got {variance!r}")
    if grid.backward and eta > 0:
        raise ValueError(f"a grid from data to noise takes eta = 0, got {eta}")
    check_ends(grid, "residual", noise=True, data=True)
    xp, rows = grid.xp, []
    for i in range(grid.steps):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        z, along = None, s1
        if eta > 0 and not (grid.ends[1] and i == grid.steps - 1):
            if variance == "sum":
                share = eta * (1.0 - (s1 / s) ** 2)
                if xp is np and share < 0:
                    raise ValueError(
                        "variance 'sum' needs a sigma that falls from noise to data, but nodes "
                        f"{i} and {i + 1} have {s:.6g} and {s1:.6g}"
                    )
            else:
                share = eta**2 * posterior_share(grid, i)
            z, along = s1 * xp.sqrt(share), s1 * xp.sqrt(1.0 - share)
        rows.append(Row(grid.node(i), [Update([1.0], [(a1 - a, along - s)], z)]))
    return assemble(rows, ("x0", "eps"), xp)
