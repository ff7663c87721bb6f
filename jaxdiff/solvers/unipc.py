"""UniPC: a predictor and a corrector that costs no evaluation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.phi import interpolation_weights
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def unipc(
    grid: Grid, order: int = 2, variant: str = "bh2", integrand: str = "x0",
    corrector: bool | Sequence[bool] = True, lower_order_final: bool | None = None,
) -> Tableau:  # fmt: skip
    """UniPC of order 1, 2 or 3 with B(h) = h ("bh1") or exp(h) - 1 ("bh2").

    Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
    Models" (2023), algorithms 1-4 and 5-8 (data prediction). The evaluation at the predicted x'
    first corrects the step that led there, then predicts the next: one evaluation a step. A
    predictor of order p corrected by UniC-p converges at order p + 1; `order` is p. The order grows
    1, 2, 3 over the first steps; the corrected first step's error is of order h^3, so order 3 is
    kept. The first-order step's two-point coefficient is 1/2, as is UniP-2's and UniC-1's.

    Arguments:
      integrand: "x0" (data prediction) or "eps" (noise prediction).
      corrector: whether to correct; or one flag a step, for the step that leaves node i (diffusers
        names the steps that are not corrected, `disable_corrector`).
      lower_order_final: lower the order to 2 and 1 over the last steps; None does so below 15 steps.
        The authors' code does so always, which costs the last step's order.

    The step to sigma = 0 is first order (diffusers is NaN there with "bh1", with "eps", and above order
    1 without lower_order_final; also, with order 3, in its last step of length 0). alpha = 0 at the
    noise end is supported with "x0": that step is first order, uncorrected, and its node left out of
    later differences.
    """
    if isinstance(order, (bool, float)) or order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant must be 'bh1' or 'bh2', got {variant!r}")
    if integrand not in ("x0", "eps"):
        raise ValueError(f"integrand must be 'x0' or 'eps', got {integrand!r}")
    steps, lam = grid.steps, grid.lam
    if not isinstance(corrector, (bool, np.bool_, Sequence, np.ndarray)):
        raise TypeError(f"corrector must be one flag or a sequence of {steps}, got {corrector!r}")
    flags = [corrector] * steps if np.ndim(corrector) == 0 else list(corrector)
    if len(flags) != steps:
        raise ValueError(f"corrector must be one flag or {steps}, got {len(flags)}")
    check_ends(grid, "unipc", noise=integrand == "x0", data=True)
    lowered = steps < 15 if lower_order_final is None else lower_order_final
    first_finite = int(grid.ends[0])

    def effective_order(i):
        if (grid.ends[0] and i == 0) or (grid.ends[1] and i == steps - 1):
            return 1
        known = i - first_finite + 1
        return min(order, known, steps - i if lowered else order)

    def offsets_of(i):
        return [0.0] + [lam[i - k] - lam[i] for k in range(1, effective_order(i))]

    rows, nodes = [], [(0, 0)]
    for i in range(steps):
        # s_0 is the predicted state at node i, s_1 the corrected one at node i - 1.
        s, m = [1.0, 0.0], []
        if i > first_finite and flags[i - 1]:
            offsets = offsets_of(i - 1)
            carry, weights = _weights(grid, i - 1, offsets, variant, integrand, correct=True)
            s, m = [0.0, carry], weights
        corrected = Update(s, m)
        offsets = offsets_of(i)
        carry, weights = _weights(grid, i, offsets, variant, integrand, correct=False)
        m = [carry * c for c in m] + [0.0] * (len(weights) - len(m))
        predicted = Update(
            [carry * c for c in s],
            [a + b for a, b in zip(m, weights + [0.0] * (len(m) - len(weights)))],
        )
        rows.append(Row(grid.node(i), [predicted, corrected]))
        if i > 0:
            nodes.append((i + 1, 1))
    return assemble(rows, integrand, grid.xp, nodes=[*nodes, (steps, 0)])


def _weights(
    grid: Grid, i: int, offsets: list[Any], variant: str, integrand: str, correct: bool
) -> tuple[Any, list[Any]]:
    """(coefficient of x, weights of the integrands, newest first) of the step from node i.

    `offsets` are the half-log-SNRs of the evaluations m_0, m_1, ... relative to node i's. With
    `correct`, the newest integrand is that of node i + 1 and comes first.
    """
    xp = grid.xp
    (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
    data = integrand == "x0"
    h = grid.lam[i + 1] - grid.lam[i]
    carry, hh, scale = (s1 / s, -h, a1) if data else (a1 / a, h, s1)
    if len(offsets) == 1 and not correct:
        # -alpha' expm1(-h) or -sigma' expm1(h), the latter finite at sigma' = 0.
        return carry, [-a1 * xp.expm1(-h) if data else s1 - a1 * s / a]
    if len(offsets) + correct == 2:
        # x' = carry x - scale (expm1(hh) m_0 + B(h) (m_1 - m_0) / (2 r)): only here B matters.
        r = 1.0 if correct else offsets[1] / h
        base = xp.expm1(hh)
        other = -scale * (hh if variant == "bh1" else base) * 0.5 / r
        first = -scale * base - other
        return carry, [other, first] if correct else [first, other]
    # With more, the paper's equations for the differences are those of polynomial interpolation.
    places = ([h] if correct else []) + offsets
    factor, sign = (a1, -1.0) if data else (-s1, 1.0)
    return carry, [factor * weight for weight in interpolation_weights(places, h, sign)]
