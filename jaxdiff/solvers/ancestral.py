"""Ancestral samplers: a deterministic step past the next node, and noise back up to it.

In y = x / alpha and rho = sigma / alpha, for every process: follow the probability flow from rho
to a level `down` below the next node's rho', then add noise of variance rho'^2 - down^2. The exact
flow takes marginal to marginal and so does the noise: in distribution a step is as accurate as the
flow's own solver. As steps are added the path tends to that of the SDE

    dy = (1 + q) (x0 - y) dlambda + sqrt(2 q) rho dW,

q = 1 the reverse SDE, with strong order 1. The samplers are Katherine Crowson's (k-diffusion);
x0 and eps are the network's.
"""

from typing import Any

import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import Level, check_choice
from jaxdiff.solvers.first_order import x0_clock
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

DOWNS = ("posterior", "flow")


def check_noise_options(grid: Grid, name: str, eta: Any, s_noise: Any) -> None:
    """Raise unless `eta` and `s_noise` are numbers >= 0, and eta is 0 on a backward grid."""
    for option, value in (("eta", eta), ("s_noise", s_noise)):
        number = isinstance(value, (int, float, np.integer, np.floating))
        if not number or isinstance(value, bool):
            raise TypeError(f"{option} must be a number known on the host, got {value!r}")
        if not 0 <= value < np.inf:
            raise ValueError(f"{option} must be finite and not negative, got {value!r}")
    if grid.backward and eta:
        raise ValueError(f"{name} on a grid from data to noise takes eta = 0, got {eta!r}")


class _Step:
    """Step i: from `rho` down to `down`, and up again by noise of standard deviation `up`, in y.

    `to_zero`: the step ends at sigma = 0. `no_flow`: `down` is 0 although the step does not end
    there, so that the flow part is first order.
    """

    def __init__(self, grid: Grid, i: int, eta: float, s_noise: float, down: str):
        xp = grid.xp
        (_, self.alpha, sigma), (_, self.alpha1, sigma1) = grid.node(i), grid.node(i + 1)
        self.level, self.sigma, self.rho1 = grid.node(i), sigma, sigma1 / self.alpha1
        self.to_zero = grid.ends[1] and i == grid.steps - 1
        self.from_noise = grid.ends[0] and i == 0
        noisy = bool(eta) and not self.to_zero
        # down / rho', and the step's flow part in x: x_down / alpha_down = carry x + kept x0.
        ratio = 1.0
        if noisy and down == "flow":
            tau, tau1 = sigma / (self.alpha + sigma), sigma1 / (self.alpha1 + sigma1)
            fraction = 1.0 - eta * (1.0 - tau1 / tau)
            ratio = fraction * (1.0 - tau1) / (1.0 - tau1 * fraction)
        elif noisy:
            shrink = self.rho1 * self.alpha / sigma
            ratio = shrink if eta == 1 else xp.sqrt(_positive(xp, 1 - eta**2 + (eta * shrink) ** 2))
        if is_concrete(ratio):
            ratio = max(ratio, 0.0)
        self.no_flow = self.to_zero or (is_concrete(ratio) and bool(ratio == 0.0))
        self.down = self.rho1 * ratio
        self.noise = None
        if noisy:
            self.noise = s_noise * sigma1 * xp.sqrt((1.0 - ratio) * (1.0 + ratio))

    def euler(self) -> Update:
        """The whole step at first order, the x0 form: every end is a finite case of it."""
        kept = self.alpha1 * self.down / self.sigma
        return Update([kept], [self.alpha1 - kept * self.alpha], self.noise)


def _positive(xp: Any, value: Any) -> Any:
    return np.maximum(value, 0.0) if is_concrete(value) else xp.where(value > 0, value, 0.0)


def _checked(grid: Grid, name: str, eta: float, s_noise: float, down: str, noise_end: bool):
    check_choice("down", down, DOWNS)
    check_noise_options(grid, name, eta, s_noise)
    check_ends(grid, name, noise=noise_end, data=True)
    if eta > 1 and grid.xp is not np:
        raise ValueError(f"eta above 1 needs a grid with nodes known on the host, got eta={eta!r}")
    return [_Step(grid, i, eta, s_noise, down) for i in range(grid.steps)]


def euler_ancestral(
    grid: Grid, eta: float = 1.0, s_noise: float = 1.0, down: str = "posterior"
) -> Tableau:
    """Euler-ancestral ("Euler a"): y' = x0 + (down / rho) (y - x0) + sqrt(rho'^2 - down^2) z.

    k-diffusion's sample_euler_ancestral, for any (alpha, sigma). With down="posterior" it is DDIM
    with the same eta (Song, Meng & Ermon 2021), DDPM with the small variance at eta = 1; `ddim`
    raises where eta > 1 asks for more noise than there is, here the noise is clipped at rho'. One
    evaluation a step, weak order 1; every grid end is supported.

    Arguments:
      eta: amount of noise, >= 0; 0 is Euler.
      s_noise: factor on the noise's standard deviation, >= 0; any but 1 leaves the marginals.
      down: the level before the noise.
        "posterior"  down^2 = rho'^2 (1 - eta^2 (1 - exp(-2 h))), the noise eta times the standard
                     deviation of the posterior q(x' | x, x0), at most rho'; q = eta^2;
        "flow"       in tau = sigma / (alpha + sigma), down = tau' (1 - eta (1 - tau' / tau)); q =
                     eta. ComfyUI's samplers for rectified flow (sample_euler_ancestral_RF), where
                     tau = sigma; also defined for every other process.
    """
    steps = _checked(grid, "euler_ancestral", eta, s_noise, down, True)
    rows = [
        Row(step.level, [step.euler()], x0_clock(grid, i)) for i, step in enumerate(steps)
    ]  # fmt: skip
    return assemble(rows, "x0", grid.xp, brownian="x0" if eta else None)


def kdpm2_ancestral(
    grid: Grid, eta: float = 1.0, s_noise: float = 1.0, down: str = "posterior"
) -> Tableau:
    """KDPM2-ancestral ("DPM2 a"): the flow to `down` by the midpoint rule in rho, eps integrated.

    y_m = y + (m - rho) eps, m = sqrt(rho down); y' = y + (down - rho) eps(y_m, m) + noise. At eta
    = 1 with down="posterior" m is rho' itself. k-diffusion's sample_dpm_2_ancestral. Two
    evaluations a step (one in the step to sigma = 0), weak order 2. Needs alpha > 0 at the noise
    end.

    Arguments as in `euler_ancestral`; eta large enough for down = 0 makes an Euler step (without
    noise in k-diffusion, which leaves the marginals).
    """
    return _two_stage(grid, eta, s_noise, down, "eps")


def dpm_solver_pp_2s_ancestral(
    grid: Grid, eta: float = 1.0, s_noise: float = 1.0, down: str = "posterior"
) -> Tableau:
    """DPM-Solver++(2S)-ancestral ("DPM++ 2S a"): the flow to `down` by DPM-Solver++(2S).

    y_m = (m / rho) y + (1 - m / rho) x0, m = sqrt(rho down), halfway in lambda; y' = (down / rho) y
    + (1 - down / rho) x0(y_m, m) + noise. k-diffusion's sample_dpmpp_2s_ancestral, and with
    down="flow" ComfyUI's sample_dpmpp_2s_ancestral_RF; the flow's solver is Lu et al. (2022),
    DPM-Solver++. Two evaluations a step (one in the step to sigma = 0 and from alpha = 0, where
    ComfyUI takes sigma = 0.9999 for the midpoint), weak order 2; every grid end is supported.

    Arguments as in `euler_ancestral`; eta large enough for down = 0 makes an Euler step.
    """
    return _two_stage(grid, eta, s_noise, down, "x0")


def _two_stage(grid: Grid, eta: float, s_noise: float, down: str, integrand: str) -> Tableau:
    data, xp = integrand == "x0", grid.xp
    name = "dpm_solver_pp_2s_ancestral" if data else "kdpm2_ancestral"
    rows, nodes = [], [(0, 0)]
    for i, step in enumerate(_checked(grid, name, eta, s_noise, down, data)):
        if step.no_flow or step.from_noise:
            update = step.euler()
            if not data:  # only where down = 0: y' = y - rho eps
                update = Update(
                    [step.alpha1 / step.alpha], [-step.alpha1 * step.sigma / step.alpha], step.noise
                )
            rows.append(Row(step.level, [update], x0_clock(grid, i)))
        else:
            rho = step.sigma / step.alpha
            middle = grid.at(-0.5 * (xp.log(rho) + xp.log(step.down)))
            to_middle, to_end = _midpoint(step, middle, rho, data)
            rows.append(Row(step.level, [to_middle, Update([1.0])]))
            rows.append(Row(middle, [to_end], x0_clock(grid, i)))
        nodes.append((len(rows), 0))
    return assemble(rows, integrand, xp, nodes=nodes, brownian="x0" if eta else None)


def _midpoint(step: _Step, middle: Level, rho: Any, data: bool) -> tuple[Update, Update]:
    _, alpha_m, sigma_m = middle
    if data:
        carry, end = sigma_m / step.sigma, step.alpha1 * step.down / step.sigma
        to_middle = Update([carry], [alpha_m - carry * step.alpha])
        return to_middle, Update([0.0, end], [step.alpha1 - end * step.alpha], step.noise)
    to_middle = Update([alpha_m / step.alpha], [sigma_m - alpha_m * rho])
    kept = step.alpha1 / step.alpha
    return to_middle, Update([0.0, kept], [step.alpha1 * (step.down - rho)], step.noise)
