"""Sampling from consistency models in several steps: jump towards the data, add noise, repeat.

A consistency model's "denoised" x0 is not the posterior mean but where the probability flow ends:
each step is as good as the model, however long. With a posterior mean in its place more steps do
not help (the variance of Gaussian data tends to half its own under `consistency`), and none of
these samplers has an order.
"""

from numbers import Real
from typing import Any

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.processes.discrete import is_discrete
from jaxdiff.solvers.clocks import check_choice
from jaxdiff.solvers.first_order import ddim
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def consistency(grid: Grid) -> Tableau:
    """Multistep consistency sampling: x' = alpha' x0 + sigma' z; a step to sigma = 0 ends at x0.

    Song, Dhariwal, Chen & Sutskever, "Consistency Models" (2023), algorithm 1; the sampler of
    latent consistency models (Luo et al. 2023) and diffusers' LCMScheduler. `ddim` with eta = 1 and
    noise_scale="full" by another name. The boundary condition x0 = c_skip x + c_out F belongs to
    the network, not to the sampler: `jaxdiff.consistency_boundary`, and for latent consistency
    models `jaxdiff.latent_consistency_boundary`. One evaluation a step, no order; every grid end is
    supported.
    """
    return ddim(grid, 1.0, noise_scale="full")


def tcd(grid: Grid, gamma: float = 0.3, variable: str = "t") -> Tableau:
    """Trajectory consistency: jump along the flow past the next node t' to s, add noise back to t'.

        x_s / alpha_s = x0 + (rho_s / rho) (x / alpha - x0),
        x' / alpha' = x_s / alpha_s + sqrt(rho'^2 - rho_s^2) z,      rho = sigma / alpha

    Zheng et al., "Trajectory Consistency Distillation" (2024): strategic stochastic sampling, for
    any process. gamma = 0 is DDIM and gamma = 1 `consistency`, where s is a level without noise
    (a discrete process has none: s is then timestep 0). diffusers' TCDScheduler, which calls gamma
    eta; it adds no noise in the last step, here there is none where s = t', as at timestep 0. One
    evaluation a step, no order; every grid end is supported.

    Arguments:
      gamma: share of the noise that is renewed, in [0, 1].
      variable: in which s is a share of t': "t", s = (1 - gamma) t', rounded down for a discrete
        process; or "rho", rho_s = (1 - gamma) rho', the same for EDM's process, where t is rho.

    Raises ValueError for gamma outside [0, 1], or above 0 on a grid from data to noise, and for
    variable="t" on a grid from arrays, which does not know the level at s; TypeError for a gamma
    that is not a number.
    """
    check_choice("variable", variable, ("t", "rho"))
    if isinstance(gamma, bool) or not isinstance(gamma, Real):
        raise TypeError(f"gamma must be a number known on the host, got {gamma!r}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}")
    if grid.backward and gamma > 0:
        raise ValueError(f"a grid from data to noise takes gamma = 0, got {gamma!r}")
    check_ends(grid, "tcd", noise=True, data=True)
    xp, rows = grid.xp, []
    for i in range(grid.steps):
        (_, alpha, sigma), (t1, alpha1, sigma1) = grid.node(i), grid.node(i + 1)
        rho, z = sigma1 / alpha1, None
        if gamma > 0 and not (grid.ends[1] and i == grid.steps - 1):
            between = (1.0 - gamma) * rho if variable == "rho" else _earlier(grid, gamma, t1)
            if between is not None:
                rho = between
                z = xp.sqrt((sigma1 - alpha1 * rho) * (sigma1 + alpha1 * rho))
        kept = alpha1 * rho / sigma
        rows.append(Row(grid.node(i), [Update([kept], [alpha1 - kept * alpha], z)]))
    return assemble(rows, "x0", xp)


def _earlier(grid: Grid, gamma: float, t: Any) -> Any:
    """sigma / alpha at the time (1 - gamma) t; None if that is t itself."""
    process = grid.process
    if process is None:
        raise ValueError(
            "variable='t' needs the grid's process, which one from arrays does not have: take "
            "variable='rho', or build the grid by jaxdiff.grids.from_times(process, t)"
        )
    s = (1.0 - gamma) * t
    if is_discrete(process):
        s = grid.xp.floor(s + 1e-6)  # 0.7 * 10 is 7
    if is_concrete(s, t) and s == t:
        return None
    return process.sigma(s) / process.alpha(s)
