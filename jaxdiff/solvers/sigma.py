"""Runge-Kutta in sigma: Euler and Heun with EDM's churn.

In y = x / alpha and rho = sigma / alpha the probability flow is dy / drho = eps for every process;
for alpha = 1 this is EDM's dx / dsigma.
"""

from typing import Any

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

_MAX_GAMMA = 2.0**0.5 - 1.0


class _Churn:
    """EDM's churn at each node: raise rho to (1 + gamma) rho by adding noise (algorithm 2)."""

    def __init__(self, grid: Grid, s_churn, s_min, s_max, s_noise):
        if not (s_churn >= 0 and s_noise >= 0 and s_min <= s_max):
            raise ValueError(
                "need s_churn >= 0, s_noise >= 0 and s_min <= s_max, got "
                f"s_churn={s_churn!r}, s_noise={s_noise!r}, s_min={s_min!r}, s_max={s_max!r}"
            )
        self.grid, self.on = grid, s_churn > 0
        rho = grid.sigma / grid.alpha
        gamma = min(s_churn / grid.steps, _MAX_GAMMA)
        inside = (rho >= s_min) & (rho <= s_max) & (np.arange(len(grid)) < grid.steps)
        self.levels, self.noise = [], []
        for i in range(len(grid)):
            level, extra = grid.node(i), None
            if self.on and inside[i]:
                raised = rho[i] * (1.0 + gamma)
                level = grid.at(-np.log(raised))
                extra = level[1] * s_noise * np.sqrt(raised**2 - rho[i] ** 2)
            self.levels.append(level)
            self.noise.append(extra)

    def enter(self, i: int, s: list[Any], m: list[Any], solution: Update) -> list[Update]:
        """Updates that arrive at node i with `s`, `m` in y-units, churned, and keep the solution."""
        alpha = self.levels[i][1]
        arrived = Update([c * alpha for c in s], [c * alpha for c in m], self.noise[i])
        return [arrived, solution] if self.on else [arrived]


def _start(churn: _Churn) -> Update | None:
    if churn.noise[0] is None:
        return None
    return Update([churn.levels[0][1] / churn.grid.alpha[0]], (), churn.noise[0])


def _prepare(grid: Grid, name: str, s_churn, s_min, s_max, s_noise) -> _Churn:
    check_ends(grid, name, noise=False, data=True)
    if s_churn and (grid.backward or grid.xp is not np):
        raise ValueError("churn needs a grid from noise to data with nodes known on the host")
    return _Churn(grid, s_churn, s_min, s_max, s_noise)


def euler(
    grid: Grid, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf,
    s_noise: float = 1.0,
) -> Tableau:  # fmt: skip
    """Euler in rho: x' / alpha' = x / alpha + (rho' - rho) eps.

    Karras et al. (2022), algorithm 2 without the second-order correction; without churn the same map
    as DDIM. Churn at node i, if s_min <= rho_i <= s_max: gamma = min(s_churn / steps, sqrt(2) - 1),
    noise of standard deviation s_noise sqrt(rho_hat^2 - rho^2) raises rho to rho_hat =
    (1 + gamma) rho, where the network is then evaluated (s_min, s_max, s_noise are the paper's
    S_tmin, S_tmax, S_noise, all in units of sigma / alpha). One evaluation a step, order 1. Needs
    alpha > 0 at the noise end.
    """
    churn = _prepare(grid, "euler", s_churn, s_min, s_max, s_noise)
    rho, rows = grid.sigma / grid.alpha, []
    for i in range(grid.steps):
        _, a, s = churn.levels[i]
        step = rho[i + 1] - s / a
        end = grid.alpha[i + 1]
        solution = Update([end / a], [end * step])
        rows.append(Row(churn.levels[i], churn.enter(i + 1, [1.0 / a], [step], solution)))
    nodes = [(0, 0)] + [(i + 1, int(churn.on)) for i in range(grid.steps)]
    return assemble(rows, "eps", grid.xp, nodes=nodes, start=_start(churn))


def heun(
    grid: Grid, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf,
    s_noise: float = 1.0,
) -> Tableau:  # fmt: skip
    """Heun in rho: EDM's sampler, deterministic (algorithm 1) or with churn (algorithm 2).

    An Euler step to rho', then x' / alpha' = x / alpha + (rho' - rho) (eps + eps') / 2 (Karras et al.
    2022); the step to sigma = 0 is Euler's. Churn as in `euler`. Two evaluations a step (one in the
    step to sigma = 0), order 2. Needs alpha > 0 at the noise end.
    """
    churn = _prepare(grid, "heun", s_churn, s_min, s_max, s_noise)
    rho, rows, nodes = grid.sigma / grid.alpha, [], [(0, 0)]
    for i in range(grid.steps):
        _, a, s = churn.levels[i]
        step, end = rho[i + 1] - s / a, grid.alpha[i + 1]
        predicted = Update([end / a], [end * step])
        if grid.ends[1] and i == grid.steps - 1:
            rows.append(Row(churn.levels[i], [predicted]))
            nodes.append((len(rows), 0))
            continue
        rows.append(Row(churn.levels[i], [predicted, Update([1.0])]))
        solution = Update([0.0, end / a], [end * step / 2] * 2)
        updates = churn.enter(i + 1, [0.0, 1.0 / a], [step / 2] * 2, solution)
        rows.append(Row(grid.node(i + 1), updates))
        nodes.append((len(rows), int(churn.on)))
    return assemble(rows, "eps", grid.xp, nodes=nodes, start=_start(churn))
