"""Runge-Kutta in sigma: Euler and Heun with EDM's churn.

In y = x / alpha and rho = sigma / alpha the probability flow is dy / drho = eps for every process;
for alpha = 1 this is EDM's dx / dsigma.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

_MAX_GAMMA = 2.0**0.5 - 1.0


def rho_clock(level: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """(alpha, rho): the scale of y, and the clock in which dy / drho = eps."""
    _, alpha, sigma = level
    return alpha, sigma / alpha


def _tau(level: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """(alpha + sigma, tau): the scale of y, and the clock in which dy / dtau = eps - x0."""
    _, alpha, sigma = level
    return alpha + sigma, sigma / (alpha + sigma)


class Churn:
    """EDM's churn at each node: raise rho to (1 + gamma) rho by adding noise (algorithm 2)."""

    def __init__(self, grid: Grid, s_churn, s_min, s_max, s_noise, coordinates: Callable = rho_clock):
        numbers = {"s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number known on the host, got {value!r}")
        if not (s_churn >= 0 and s_noise >= 0 and s_min <= s_max):
            raise ValueError(
                "need s_churn >= 0, s_noise >= 0 and s_min <= s_max, got "
                f"s_churn={s_churn!r}, s_noise={s_noise!r}, s_min={s_min!r}, s_max={s_max!r}"
            )
        if s_churn and (grid.backward or grid.xp is not np):
            raise ValueError("churn needs a grid from noise to data with nodes known on the host")
        self.grid, self.coordinates, self.on, self.s_max = grid, coordinates, s_churn > 0, s_max
        # Raised rho and the noise's standard deviation in y, for each node that is churned.
        self.raised: dict[int, tuple[Any, Any]] = {}
        gamma = min(s_churn / grid.steps, _MAX_GAMMA)
        for i in range(grid.steps if self.on else 0):
            rho = grid.sigma[i] / grid.alpha[i]
            if s_min <= rho <= s_max:
                raised = rho * (1.0 + gamma)
                self.raised[i] = raised, s_noise * np.sqrt(raised**2 - rho**2)

    def level(self, i: int) -> tuple[Any, Any, Any]:
        """(t, alpha, sigma) of node i after its churn."""
        if i not in self.raised:
            return self.grid.node(i)
        raised = self.raised[i][0]
        try:
            return self.grid.at(-np.log(raised))
        except ValueError as error:
            raise ValueError(
                f"churn raises sigma / alpha at node {i} to {raised:.6g}, a level that the grid's "
                f"process or arrays do not have: lower s_max (now {self.s_max:g}) below that "
                "node's sigma / alpha, or start the grid at less noise"
            ) from error

    def enter(self, i: int, s: list[Any], m: list[Any], solution: Update) -> list[Update]:
        """Updates that arrive at node i with `s`, `m` in y-units, churned, and keep the solution."""
        scale, _ = self.coordinates(self.level(i))
        noise = scale * self.raised[i][1] if i in self.raised else None
        arrived = Update([c * scale for c in s], [c * scale for c in m], noise)
        return [arrived, solution] if self.on else [arrived]

    def start(self) -> Update | None:
        """The churn of the first node, before any evaluation."""
        if 0 not in self.raised:
            return None
        return self.enter(0, [1.0 / self.grid.alpha[0]], [], Update())[0]


def euler(
    grid: Grid, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf,
    s_noise: float = 1.0, churn_evaluation: str = "after_noise",
) -> Tableau:  # fmt: skip
    """Euler in rho: x' / alpha' = x / alpha + (rho' - rho) eps.

    Karras et al. (2022), algorithm 2 without the second-order correction; without churn the same map
    as DDIM, and as Euler for rectified flow's dx / dsigma = eps - x0. Churn at node i, if s_min <=
    rho_i <= s_max: gamma = min(s_churn / steps, sqrt(2) - 1), noise of standard deviation s_noise
    sqrt(rho_hat^2 - rho^2) raises rho to rho_hat = (1 + gamma) rho (s_min, s_max, s_noise are the
    paper's S_tmin, S_tmax, S_noise, all in units of sigma / alpha). One evaluation a step, order 1.
    Needs alpha > 0 at the noise end (`ddim` is the same map and does not). Raises ValueError where
    the noised level is one that the process does not have, as above the last timestep of `ddpm`.

    Arguments:
      churn_evaluation: with y^ the noised y = x / alpha,
        "after_noise"       y' = y^ + (rho' - rho_hat) eps(y^, rho_hat), the paper's;
        "before_noise"      y' = y^ + (rho' - rho_hat) eps(y, rho): the network has not seen the
                            noise (diffusers' Euler for networks that predict eps);
        "before_noise_x0"   y' = y^ + (rho' - rho_hat) (y^ - x0(y, rho)) / rho_hat (diffusers' for
                            networks that predict x0).
        diffusers' v networks convert y^ with the level before the noise, and its EDM networks keep
        the raw output F: two more samplers, which are not offered.
    """
    accepted = ("after_noise", "before_noise", "before_noise_x0")
    if churn_evaluation not in accepted:
        raise ValueError(f"churn_evaluation must be one of {accepted}, got {churn_evaluation!r}")
    check_ends(grid, "euler", noise=False, data=True)
    churn, rows = Churn(grid, s_churn, s_min, s_max, s_noise), []
    if churn_evaluation != "after_noise":
        data = churn_evaluation == "before_noise_x0"
        rows = [Row(grid.node(i), [_late_churn(churn, i, data)]) for i in range(grid.steps)]
        return assemble(rows, "x0" if data else "eps", grid.xp)
    for i in range(grid.steps):
        (a, rho), (a1, rho1) = rho_clock(churn.level(i)), rho_clock(grid.node(i + 1))
        step = rho1 - rho
        solution = Update([a1 / a], [a1 * step])
        rows.append(Row(churn.level(i), churn.enter(i + 1, [1.0 / a], [step], solution)))
    # With churn the solution at a node is register 1: register 0 has the node's noise already.
    nodes = [(i, int(churn.on)) for i in range(grid.steps + 1)]
    return assemble(rows, "eps", grid.xp, nodes=nodes, start=churn.start())


def _late_churn(churn: Churn, i: int, data: bool) -> Update:
    """Step i with the network evaluated before the noise; `data` keeps its x0, else its eps."""
    (a, rho), (a1, rho1) = rho_clock(churn.grid.node(i)), rho_clock(churn.grid.node(i + 1))
    raised, noise = churn.raised.get(i, (rho, None))
    carry = rho1 / raised if data else 1.0
    kept = 1.0 - carry if data else rho1 - raised
    z = None if noise is None else a1 * carry * noise
    return Update([a1 * carry / a], [a1 * kept], z)


def heun(
    grid: Grid, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf,
    s_noise: float = 1.0, clock: str = "rho",
) -> Tableau:  # fmt: skip
    """Heun: EDM's sampler, deterministic (algorithm 1) or with churn (algorithm 2).

    An Euler step to rho', then x' / alpha' = x / alpha + (rho' - rho) (eps + eps') / 2 (Karras et al.
    2022); the step to sigma = 0 is Euler's. Churn as in `euler`, the network evaluated after the
    noise. Two evaluations a step (one in the step to sigma = 0), order 2. Needs alpha > 0 at the
    noise end.

    Arguments:
      clock: "rho"; or "flow", Heun for rectified flow's ODE: for every process y = x / (alpha +
        sigma) and tau = sigma / (alpha + sigma) obey dy / dtau = eps - x0, which for alpha + sigma =
        1 is dx / dsigma (Liu et al., "Flow Straight and Fast", 2023). alpha = 0 at the noise end is
        supported; it takes no churn (diffusers' churn for flow Heun adds noise but leaves alpha
        alone, which leaves the process's marginals).
    """
    if clock not in ("rho", "flow"):
        raise ValueError(f"clock must be 'rho' or 'flow', got {clock!r}")
    if clock == "flow" and s_churn:
        raise ValueError(f"clock='flow' takes no churn, got s_churn={s_churn!r}")
    check_ends(grid, "heun", noise=clock == "flow", data=True)
    coordinates = _tau if clock == "flow" else rho_clock
    churn = Churn(grid, s_churn, s_min, s_max, s_noise, coordinates)
    rows, nodes = [], [(0, int(churn.on))]
    for i in range(grid.steps):
        (scale, place), (end, place1) = coordinates(churn.level(i)), coordinates(grid.node(i + 1))
        step = place1 - place
        predicted = Update([end / scale], [end * step])
        if grid.ends[1] and i == grid.steps - 1:
            rows.append(Row(churn.level(i), [predicted] * (2 if churn.on else 1)))
            nodes.append((len(rows), 0))
            continue
        rows.append(Row(churn.level(i), [predicted, Update([1.0])]))
        solution = Update([0.0, end / scale], [end * step / 2] * 2)
        updates = churn.enter(i + 1, [0.0, 1.0 / scale], [step / 2] * 2, solution)
        rows.append(Row(grid.node(i + 1), updates))
        nodes.append((len(rows), int(churn.on)))
    integrand = "flow" if clock == "flow" else "eps"
    return assemble(rows, integrand, grid.xp, nodes=nodes, start=churn.start())
