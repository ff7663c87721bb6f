"""UniPC: a predictor and a corrector that costs no evaluation."""

from collections.abc import Sequence
from math import factorial
from typing import Any

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import Level, carry, check_choice, check_order, coordinate, weights
from jaxdiff.solvers.corrector import correct
from jaxdiff.solvers.phi import phis
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

HIGHEST_ORDER = 6
VARIANTS = ("bh1", "bh2", "vary_coeff", "vary_coeff_published")


def unipc(
    grid: Grid, order: int = 2, variant: str = "bh2", integrand: str = "x0",
    corrector: bool | Sequence[bool] = True, lower_order_final: bool | None = None,
) -> Tableau:  # fmt: skip
    """UniPC of any order with B(h) = h ("bh1"), exp(h) - 1 ("bh2") or varying coefficients.

    Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
    Models" (2023), with noise and with data prediction. The evaluation at the predicted x' first
    corrects the step that led there, then predicts the next: one evaluation a step. A
    predictor of order p corrected by UniC-p converges at order p + 1; `order` is p, 1 to 6. The order
    grows 1, 2, ... over the first steps; the corrected first step's error is of order h^3, so order 3
    is kept.

    Arguments:
      variant: with three evaluations or more the paper's equations for the differences are those of
        polynomial interpolation, whatever B is; B decides steps of two, whose difference has the
        coefficient B(h) / 2. "vary_coeff" integrates the line through two evaluations exactly as
        well. "vary_coeff_published" is the authors' code, whose corrector leaves terms of the sum
        out: above order 1 it converges at order 1.
      integrand: "x0" (data prediction) or "eps" (noise prediction).
      corrector: whether to correct; or one flag a step, for the step that leaves node i (diffusers
        names the steps that are not corrected, `disable_corrector`).
      lower_order_final: lower the order to ..., 2 and 1 over the last steps; None does so below 15
        steps. The authors' code does so always, which costs the last step's order.

    The step to sigma = 0 is first order (diffusers is NaN there with "bh1", with "eps", and above order
    1 without lower_order_final; also, with order 3, in its last step of length 0). alpha = 0 at the
    noise end is supported with "x0": that step is first order, uncorrected, and its node left out of
    later differences. `exponential_adams` has the orders of predictor and corrector, and the variable
    of their polynomials, as options of their own; `corrected` puts a corrector over any method.
    """
    check_order(order, HIGHEST_ORDER)
    check_choice("variant", variant, VARIANTS)
    check_choice("integrand", integrand, ("x0", "eps"))
    steps = grid.steps
    if not isinstance(corrector, (bool, np.bool_, Sequence, np.ndarray)):
        raise TypeError(f"corrector must be one flag or a sequence of {steps}, got {corrector!r}")
    flags = [corrector] * steps if np.ndim(corrector) == 0 else list(corrector)
    if len(flags) != steps:
        raise ValueError(f"corrector must be one flag or {steps}, got {len(flags)}")
    check_ends(grid, "unipc", noise=integrand == "x0", data=True)
    lowered = steps < 15 if lower_order_final is None else lower_order_final
    first_finite = int(grid.ends[0])

    def order_of(i: int) -> int:
        if (grid.ends[0] and i == 0) or (grid.ends[1] and i == steps - 1):
            return 1
        known = i - first_finite + 1
        return min(order, known, steps - i if lowered else order)

    def rule(level: Level, end: Level, places: list[Level], pure_noise: bool) -> list[Any]:
        return _weights(grid, level, end, places, variant, integrand, correct=True)

    rows = []
    for i in range(steps):
        level, end = grid.node(i), grid.node(i + 1)
        places = [grid.node(i - k) for k in range(order_of(i))]
        kept = carry(grid.xp, integrand, level, end)
        found = _weights(grid, level, end, places, variant, integrand, correct=False)
        rows.append(Row(level, [Update([kept], found)]))
    predictor = assemble(rows, integrand, grid.xp)
    if not any(flags):
        return predictor
    orders = [order_of(i) + 1 if flags[i] else 0 for i in range(steps)]
    return correct(predictor, grid, orders, integrand, rule, skip_pure_noise=True)


def _weights(
    grid: Grid, level: Level, end: Level, places: list[Level], variant: str, integrand: str,
    correct: bool,
) -> list[Any]:  # fmt: skip
    """Weights of the evaluations at `places`, newest first: the newest is at `end` if `correct`."""
    xp = grid.xp
    lam = [coordinate(xp, "lambda", place) for place in (level, end, *places)]
    h = lam[1] - lam[0]
    hh, size = (-h, end[1]) if integrand == "x0" else (h, end[2])
    if variant == "vary_coeff_published" and correct and len(places) > 1:
        return _published_corrector(xp, [(at - lam[0]) / h for at in lam[2:]], hh, size)
    if len(places) != 2 or variant.startswith("vary_coeff"):
        return weights(grid, level, end, places, integrand)
    # x' = carry x - scale (expm1(hh) m + B(h) (difference of m over the step) / 2), m at `level`.
    half = -size * (hh if variant == "bh1" else xp.expm1(hh)) * 0.5 * h / (lam[2] - lam[3])
    whole = -size * xp.expm1(hh)
    return [half, whole - half] if correct else [whole + half, -half]


def _published_corrector(xp: Any, ratios: list[Any], hh: Any, size: Any) -> list[Any]:
    """The authors' corrector; `ratios` (lambda_k - lambda) / h of the evaluations, the new one first.

    With D_k = (m_k - m) / r_k and A the inverse of r_k^j / (j + 1)!, the whole sum is
    sum_jk phi_{j+2} A_jk D_k. Theirs has the new D only in the last term, with the row before it.
    """
    others = ratios[2:]
    r = xp.stack([*others, ratios[0]])
    count = len(ratios) - 1
    inverse = xp.linalg.inv(
        xp.stack([xp.ones_like(r), *(r**j / factorial(j + 1) for j in range(1, count))], 1)
    )
    found = phis(count + 1, hh)
    of_others = [
        sum(found[j + 1] * inverse[j, k] for j in range(count - 1)) / others[k]
        for k in range(count - 1)
    ]
    of_new = found[count] * inverse[max(count - 2, 0), count - 1]
    differences = [of_new, *of_others]
    first = -size * hh * (found[0] - sum(differences))
    new, *rest = [-size * hh * d for d in differences]
    return [new, first, *rest]
