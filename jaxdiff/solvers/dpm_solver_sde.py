"""SDE-DPM-Solver and SDE-DPM-Solver++: exponential integrators of the reverse SDE.

In y = x / alpha, rho = sigma / alpha and lambda = -log(rho), for every process, the SDEs

    dy = (1 + eta) (x0 - y) dlambda + sqrt(2 eta) rho dW = -(1 + eta) rho eps dlambda + ...

have the process's marginals; eta = 0 is the probability flow, eta = 1 the reverse SDE (in terms of
DDIM's eta this one is its square, in the limit of small steps): `jaxdiff.solvers.reverse_sde` with
tau^2 = eta. From node i to i + 1, with h =
lambda' - lambda and G = 1 + eta, the linear part and the noise are exact in two ways:

    x' = (sigma' / sigma) exp(-eta h) x + alpha' G int_0^h exp(-G (h - s)) x0(lambda + s) ds
         + sigma' sqrt(1 - exp(-2 eta h)) z
    x' = (alpha' / alpha) x - sigma' G int_0^h exp(h - s) eps(lambda + s) ds
         + sigma' sqrt(eta (exp(2 h) - 1)) z

and x0 or eps is replaced by a polynomial (Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling
of Diffusion Probabilistic Models", 2022, which has the orders 1 and 2 at eta = 1). Rows carry the
clock of `jaxdiff.BrownianPath`: "x0", exp(2 lambda), in the first form (the integral's own at eta
= 1, with the same limit at any other), and "eps", exp(-2 lambda), in the second. The strong order
is 1 whatever the polynomial's degree: more would need the path's time integrals.
"""

import math
from typing import Any

from jaxdiff.grids import Grid
from jaxdiff.solvers.ancestral import check_noise_options
from jaxdiff.solvers.clocks import Level, check_choice, check_order, coordinate
from jaxdiff.solvers.dpm_solver import differences
from jaxdiff.solvers.first_order import x0_clock
from jaxdiff.solvers.phi import phi
from jaxdiff.solvers.reverse_sde import at_end, noise_levels, path_form, step, step_clock
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

SOLVER_TYPES = ("midpoint", "heun")


def dpm_solver_pp_sde_multistep(
    grid: Grid, order: int = 2, eta: float = 1.0, s_noise: float = 1.0,
    solver_type: str = "midpoint", variant: str = "corrected",
    lower_order_final: bool | None = None, euler_at_final: bool = False,
) -> Tableau:  # fmt: skip
    """SDE-DPM-Solver++ multistep of order 1, 2 or 3: "DPM++ 2M SDE", "DPM++ 3M SDE".

    The module's first form with the polynomial through the last `order` evaluations, order 1, 2, 3
    over the first steps. One evaluation a step; weak order min(order, 2), the start's first step
    being first order; every grid end is supported. Order 1 with eta = 1 is DDPM with the small
    variance. No noise in a step to sigma = 0, which is first order.

    Arguments:
      order: 1, 2 or 3.
      eta: g^2 in units of the reverse SDE's, >= 0: k-diffusion's eta of its 2M and 3M SDE samplers,
        SA-Solver's tau^2. diffusers has eta = 1 only.
      s_noise: factor on the noise's standard deviation, >= 0; any but 1 leaves the marginals.
      solver_type: the second-order step, "midpoint" or "heun" (the exact integral), as in
        `dpm_solver_pp_multistep`. k-diffusion's 3M SDE starts with "heun".
      variant: the third-order step, with H = G h and D the second divided difference in units of h:
        "corrected" integrates the quadratic exactly, a term 2 (1/2 - phi_2(-H)) D; "published" is
        k-diffusion's 3M SDE, half that term; "diffusers" is DPMSolverMultistepScheduler's
        sde-dpmsolver++, where the 1/2 has the wrong sign: (-1/2 - phi_2(-H)) D tends to -D, not
        to 0, for small steps. The weak order is 1 at best, and where the denoiser's slope dx0 / dy
        is above 1, as between two modes, the recursion is unstable: paths part as steps are
        added, so its rows carry no clock.
      lower_order_final: lower the order to 2 and 1 over the last steps; None does so below 15 steps
        (as the DPM-Solver authors' code; k-diffusion never does).
      euler_at_final: first order in the last step.
    """
    check_choice("variant", variant, ("corrected", "published", "diffusers"))
    return _multistep(
        grid, order, eta, s_noise, solver_type, variant, lower_order_final, euler_at_final, "x0"
    )


def dpm_solver_sde_multistep(
    grid: Grid, order: int = 2, eta: float = 1.0, s_noise: float = 1.0,
    solver_type: str = "midpoint", lower_order_final: bool | None = None,
    euler_at_final: bool = False,
) -> Tableau:  # fmt: skip
    """SDE-DPM-Solver multistep of order 1, 2 or 3: the module's second form, in eps.

    Lu et al. (2022), DPM-Solver++, orders 1 and 2 at eta = 1; diffusers' sde-dpmsolver, which has
    no third order. Arguments as in `dpm_solver_pp_sde_multistep`; weak order min(order, 2). A step
    to sigma = 0 ends in the denoised state: the formula's own limit there is noisy, of standard
    deviation sqrt(eta) sigma / alpha. Needs alpha > 0 at the noise end.
    """
    final = lower_order_final, euler_at_final
    return _multistep(grid, order, eta, s_noise, solver_type, "corrected", *final, "eps")


def _multistep(
    grid: Grid, order: int, eta: float, s_noise: float, solver_type: str, variant: str,
    lower_order_final: bool | None, euler_at_final: bool, integrand: str,
) -> Tableau:  # fmt: skip
    data = integrand == "x0"
    name = "dpm_solver_pp_sde_multistep" if data else "dpm_solver_sde_multistep"
    check_order(order, 3)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    check_noise_options(grid, name, eta, s_noise)
    check_ends(grid, name, noise=data, data=True)
    xp, steps, taus = grid.xp, grid.steps, noise_levels(grid, math.sqrt(eta))
    lowered = steps < 15 if lower_order_final is None else lower_order_final
    rows: list[Row] = []
    seen: list[Level] = []
    for i in range(steps):
        level = grid.node(i)
        # The node at alpha = 0 leaves the history, where lambda is infinite.
        seen = [level] if grid.ends[0] and i == 1 else [level, *seen][:3]
        limit = 1 if euler_at_final and i == steps - 1 else order
        places = seen[: min(limit, steps - i) if lowered else limit]
        carry, weights, noise = step(grid, i, places, integrand, taus[i])
        if not at_end(grid, i) and (
            (len(places) == 2 and solver_type == "midpoint")
            or (len(places) == 3 and variant != "corrected")
        ):
            weights = _as_published(grid, i, places, integrand, eta, variant)
        noise = None if noise is None else s_noise * noise
        rows.append(Row(level, [Update([carry], weights, noise)], step_clock(grid, i, integrand)))
    converges = variant != "diffusers" or order < 3
    return assemble(rows, integrand, xp, brownian=path_form(integrand, taus) if converges else None)


def _as_published(
    grid: Grid, i: int, places: list[Level], integrand: str, eta: float, variant: str
) -> list[Any]:
    """Weights of the formulas that do not integrate the polynomial through `places` exactly."""
    xp, lam, rate = grid.xp, grid.lam, 1.0 + eta
    # In units of 1 / G the kernel of x0 is exp(-(h - s)); that of eps is exp(h - s).
    factor, unit, sign = grid.alpha[i + 1], rate, -1.0
    if integrand == "eps":
        factor, unit, sign = -rate * grid.sigma[i + 1], 1.0, 1.0
    h = unit * (lam[i + 1] - lam[i])
    offsets = [unit * (coordinate(xp, "lambda", place) - lam[i]) for place in places]
    if len(places) == 2:
        half = 0.5 * h * phi(1, sign * h) * h / -offsets[1]
        found = [h * phi(1, sign * h) + half, -half]
    else:
        found = _third_order_as_published(h, offsets, variant)
    return [factor * weight for weight in found]


def _third_order_as_published(h: Any, offsets: list[Any], variant: str) -> list[Any]:
    first, second = differences(h, offsets)
    of_second = (0.5 if variant == "published" else -0.5) - phi(2, -h)
    values = (1.0, 0.0, 0.0)
    return [
        h * (phi(1, -h) * v + phi(2, -h) * f) + of_second * c
        for v, f, c in zip(values, first, second)
    ]


def dpm_solver_pp_sde(
    grid: Grid, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5, variant: str = "corrected"
) -> Tableau:
    """SDE-DPM-Solver++ with an inner stage: "DPM++ SDE".

    The module's first form over a stage at lambda + r h, then over the step with x0 replaced by
    (1 - 1 / (2 r)) x0 + x0_stage / (2 r). k-diffusion's sample_dpmpp_sde (diffusers:
    DPMSolverSDEScheduler). Two evaluations a step (one in the step to sigma = 0 and from alpha =
    0), weak order 2; every grid end is supported.

    The stage's noise is part of the step's: both are increments of one martingale, the stage's over
    the step's first part. Its two parts have independent normals z1, z2, drawn by the two rows:

        stage    sigma_m sqrt(1 - exp(-2 eta r h)) z1
        step     sigma' (exp(-eta (1 - r) h) sqrt(1 - exp(-2 eta r h)) z1
                         + sqrt(1 - exp(-2 eta (1 - r) h)) z2)

    Arguments:
      eta: g^2 in units of the reverse SDE's, >= 0; see the module. k-diffusion's eta of this
        sampler is its square root.
      s_noise: factor on the noise's standard deviation, >= 0; any but 1 leaves the marginals.
      r: where the stage is, in (0, 1).
      variant: "corrected", as above. "published": k-diffusion's formula, for eta <= 1: its
        Brownian path runs in rho, so that the noises' correlation is sqrt((rho - rho_m) / (rho -
        rho')) where the SDE has sqrt((S_m - S) / (S' - S)), S = exp(2 lambda) (for a long step 1
        where the SDE has 0); and exp(-eta h) is replaced by the ancestral sqrt(1 - eta (1 - exp(-2
        h))), equal at eta = 1. "independent": the two noises independent, as in diffusers'
        DPMSolverSinglestepScheduler with sde-dpmsolver++: weak order 1, and no Brownian clock.
    """
    name = "dpm_solver_pp_sde"
    check_choice("variant", variant, ("corrected", "published", "independent"))
    check_noise_options(grid, name, eta, s_noise)
    if isinstance(r, bool) or not isinstance(r, (int, float)) or not 0 < r < 1:
        raise ValueError(f"r must be a number in (0, 1), got {r!r}")
    if variant == "published" and eta > 1:
        raise ValueError(f"variant='published' takes eta <= 1, got {eta!r}")
    check_ends(grid, name, noise=True, data=True)
    xp, lam = grid.xp, grid.lam
    rows, nodes = [], [(0, 0)]

    def ratio(h):
        """The factor of x beyond the flow's, over h."""
        if not eta:
            return 1.0
        if variant != "published" or eta == 1:
            return xp.exp(-eta * h)
        return xp.sqrt(1.0 + eta * xp.expm1(-2.0 * h))

    def spread(h):
        """sqrt(1 - ratio^2): the noise's standard deviation over h in units of sigma."""
        share = -eta * xp.expm1(-2.0 * h) if variant == "published" else -xp.expm1(-2.0 * eta * h)
        return s_noise * xp.sqrt(share) if eta else None

    for i in range(grid.steps):
        (_, alpha, sigma), (_, alpha1, sigma1) = grid.node(i), grid.node(i + 1)
        h, begin = lam[i + 1] - lam[i], lam[i]
        if grid.ends[1] and i == grid.steps - 1:
            rows.append(Row(grid.node(i), [Update([0.0], [alpha1])]))
        elif grid.ends[0] and i == 0:
            noise = spread(h)
            update = Update(
                [sigma1 / sigma * ratio(h)], [alpha1], None if noise is None else sigma1 * noise
            )
            rows.append(Row(grid.node(i), [update], x0_clock(grid, i)))
        else:
            middle = grid.at(begin + r * h)
            _, alpha_m, sigma_m = middle
            inner, whole = spread(r * h), spread(h)
            noises: list[Any] = [None, None, None]
            if eta:
                first, second = _split(xp, h, r, eta, variant)
                noises = [sigma_m * inner, sigma1 * whole * first, sigma1 * whole * second]
            carry_m, carry1 = sigma_m / sigma * ratio(r * h), sigma1 / sigma * ratio(h)
            # The weight of a constant x0, which the exact integral keeps.
            kept = alpha1 - alpha * carry1
            early = Update([carry1], [kept * (1.0 - 0.5 / r)], noises[1])
            to_middle = Update([carry_m], [alpha_m - alpha * carry_m], noises[0])
            late = Update([0.0, 1.0], [kept * 0.5 / r], noises[2])
            clocks = [xp.exp(2.0 * place) for place in (begin, begin + r * h, lam[i + 1])]
            rows.append(Row(grid.node(i), [to_middle, early], (clocks[0], clocks[1])))
            rows.append(Row(middle, [late], (clocks[1], clocks[2])))
        nodes.append((len(rows), 0))
    path = "x0" if eta and variant != "independent" else None
    return assemble(rows, "x0", xp, nodes=nodes, brownian=path)


def _split(xp: Any, h: Any, r: float, eta: float, variant: str) -> tuple[Any, Any]:
    """The step's normal as first z1 + second z2, z1 being the stage's."""
    if variant == "independent":
        return 0.0, 1.0
    if variant == "published":
        # Shares of the step's length in rho.
        whole = -xp.expm1(-h)
        late = xp.exp(-r * h) * -xp.expm1(-(1 - r) * h) / whole
        return xp.sqrt(-xp.expm1(-r * h) / whole), xp.sqrt(late)
    whole = -xp.expm1(-2.0 * eta * h)
    late = -xp.expm1(-2.0 * eta * (1 - r) * h) / whole
    early = xp.exp(-2.0 * eta * (1 - r) * h) * -xp.expm1(-2.0 * eta * r * h) / whole
    return xp.sqrt(early), xp.sqrt(late)
