"""Langevin dynamics at fixed noise levels: corrector of any predictor, or a sampler of its own.

One step of size e at a level (alpha, sigma),  x <- x + e score + sqrt(2 e) z,  with the share
s = e / sigma^2, is

    x <- (1 - s) x + s alpha x0 + sqrt(2 s) sigma z,

which for data N(0, c) settles at the variance V / (1 - q / 2) instead of V = alpha^2 c + sigma^2,
with q = s sigma^2 / V: a bias of half the share at pure noise, vanishing towards the data.
"""

import dataclasses
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.first_order import ddpm
from jaxdiff.solvers.tableau import Row, Start, Tableau, Update, assemble, check_ends

StepSize = float | Callable[[Any, Any, Any], Any]


def predictor_corrector(
    grid: Grid, predictor: Callable[[Grid], Tableau] = ddpm, steps: int = 1, snr: StepSize = 0.16,
    rule: str = "level",
) -> Tableau:  # fmt: skip
    """Predictor-corrector: a step of `predictor` to the next node, then Langevin steps there.

    Song et al., "Score-Based Generative Modeling through SDEs" (2021), algorithm 1, with a step
    size e that is a function of the level alone: score_sde's "ald" corrector, but for a factor
    1 - beta_i close to 1. (Its "langevin" corrector divides by norms of the score and the noise,
    which no table can.) The loop of score_sde runs the corrector before the predictor, and so
    corrects x_T but not the result. 1 + `steps` evaluations a step, one in a step to sigma = 0.
    Ends as the predictor's.

    Arguments:
      predictor: a builder with one evaluation a step and no memory: `ddpm`, `ddim`, `euler`,
        `reverse_diffusion`, `functools.partial(ddim, eta=0.5)`.
      steps: Langevin steps at a node, at least 1.
      snr: r >= 0, or a function of the level (t, alpha, sigma).
      rule: "level", e = 2 (r sigma)^2: the paper's rule with the score's expected norm,
        sqrt(dim) / sigma. Its bias stays as steps are added: no order.
        "step", for a time r h sigma^2, h the half-log-SNR length of the predictor's step, the
        dynamics' exact solution with x0 held:  x <- alpha x0 + exp(-r h) (x - alpha x0) +
        sqrt(1 - exp(-2 r h)) sigma z.  As steps are added it adds `steps` r to the tau^2 of the
        SDE (0 for DDIM, 1 for DDPM): weak order 1.

    Raises ValueError for a predictor that is not of this kind, a negative r or one whose steps are
    sigma^2 or longer, a backward grid or steps < 1; TypeError for an snr that is no number.
    """
    check_choice("rule", rule, ("level", "step"))
    _check(grid, "predictor_corrector", steps, snr)
    table = predictor(grid)
    _check_predictor(table, grid)
    corrected = grid.steps - int(grid.ends[1])
    if corrected == 0:
        return _renumbered(table, np.arange(1), np.asarray([(0, 0), (1, 0)]))
    rows = []
    for i in range(1, corrected + 1):
        rows += [_langevin(grid, i, snr, rule)] * steps
    both = _appended(table, assemble(rows, "x0", namespace(grid.t, rows)))
    order, nodes = [], [(0, 0)]
    for i in range(grid.steps):
        order.append(i)
        if i < corrected:
            order += range(grid.steps + i * steps, grid.steps + (i + 1) * steps)
        nodes.append((len(order), 0))
    return _renumbered(both, np.asarray(order), np.asarray(nodes))


def annealed_langevin(grid: Grid, steps: int = 10, snr: StepSize = 0.16) -> Tableau:
    """Annealed Langevin dynamics: Langevin steps at every node after the first, and no predictor.

    Song & Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution" (2019),
    algorithm 1, for any process: x / alpha is kept from node to node. e = 2 (snr sigma)^2; their
    step size is 2 e, their epsilon 4 (snr sigma_L)^2 with sigma_L the last level. A step to sigma
    = 0 is the denoised state (Jolicoeur-Martineau et al. 2021). `steps` evaluations a step, one in
    a step to sigma = 0; no order: it follows the levels with the lag of the dynamics and its bias.
    Needs alpha > 0 at the noise end.

    Arguments and errors as in `predictor_corrector`.
    """
    _check(grid, "annealed_langevin", steps, snr)
    check_ends(grid, "annealed_langevin", noise=False, data=True)
    rows, nodes = [], [(0, 0)]
    zero = grid.ends[1]
    for i in range(1, len(grid) - int(zero)):
        rows += [_langevin(grid, i, snr, "level")] * steps
        nodes.append((len(rows), 0))
        if i + 1 < len(grid) - int(zero):
            # On to the next node.
            update = rows[-1].updates[0]
            grow = grid.alpha[i + 1] / grid.alpha[i]
            grown = Update([update.s[0] * grow], [update.m[0] * grow], update.z * grow)
            rows[-1] = rows[-1]._replace(updates=[grown])
    if zero:
        rows.append(Row(grid.node(grid.steps - 1), [Update([0.0], [grid.alpha[-1]])]))
        nodes.append((len(rows), 0))
    table = assemble(rows, "x0", namespace(grid.t, rows), nodes=nodes)
    if grid.steps == int(zero):
        return table
    return dataclasses.replace(table, start=Start(grid.alpha[1:2] / grid.alpha[:1]))


def _check(grid: Grid, name: str, steps: int, snr: StepSize) -> None:
    check_order(steps, 10_000, "steps")
    if grid.backward:
        raise ValueError(f"{name} runs from noise to data only")
    number = isinstance(snr, Real) or (hasattr(snr, "dtype") and np.shape(snr) == ())
    if not callable(snr) and (isinstance(snr, bool) or not number):
        raise TypeError(f"snr must be a number, or a function of the level, got {snr!r}")


def _langevin(grid: Grid, i: int, snr: StepSize, rule: str) -> Row:
    """One Langevin step at node i."""
    t, alpha, sigma = grid.node(i)
    r = snr(t, alpha, sigma) if callable(snr) else snr
    xp = namespace(grid.t, r)
    if rule == "step":
        length = r * (grid.lam[i] - grid.lam[i - 1])
        share, noise = -xp.expm1(-length), -xp.expm1(-2.0 * length)
    else:
        share, noise = 2.0 * r**2, 4.0 * r**2
    if is_concrete(r) and (not r >= 0 or (rule == "level" and share >= 1)):
        raise ValueError(
            f"snr must be at least 0, and below 0.7 under rule 'level' (steps of sigma^2 diverge); "
            f"got {r!r} at t = {t}"
        )
    return Row(grid.node(i), [Update([1.0 - share], [share * alpha], xp.sqrt(noise) * sigma)])


def _check_predictor(table: Tableau, grid: Grid) -> None:
    if (table.registers, table.history, table.outputs, table.rows) != (1, 1, 1, grid.steps):
        raise ValueError(
            "the predictor must have one register, one integrand, one output and one evaluation a "
            f"step; this one has {table.registers}, {table.history}, {table.outputs} and "
            f"{table.rows} for {grid.steps} steps"
        )
    if table.d is not None:
        raise ValueError("the predictor's rows must have no shift d")


def _appended(table: Tableau, other: Tableau) -> Tableau:
    """The rows of `table`, then those of `other`, without noise numbers and nodes."""
    xp = namespace(table, other)
    noise = [xp.zeros((t.rows, 1)) if t.C is None else t.C for t in (table, other)]
    fields = ("A", "B", "u", "w", "t", "alpha", "sigma", "active")
    joined = {f: xp.concatenate([getattr(table, f), getattr(other, f)]) for f in fields}
    blind = tuple(tuple(sorted({*a, *b})) for a, b in zip(table.blind, other.blind))
    return dataclasses.replace(
        table, **joined, C=xp.concatenate(noise), clock=None, brownian=None, blind=blind
    )


def _renumbered(table: Tableau, order: np.ndarray, nodes: np.ndarray) -> Tableau:
    """The rows of `table` in another order, their noise draws numbered anew; no Brownian clock."""
    fields = ("A", "B", "C", "u", "w", "t", "alpha", "sigma", "active")
    moved = {f: None if getattr(table, f) is None else getattr(table, f)[order] for f in fields}
    noisy = np.zeros(len(order), bool)
    if moved["C"] is not None:
        known = is_concrete(moved["C"])
        noisy = np.any(np.asarray(moved["C"]) != 0, axis=1) if known else np.ones(len(order), bool)
    moved["C"] = moved["C"] if np.any(noisy) else None
    first = int(table.start.C is not None)
    draw = np.maximum(np.cumsum(noisy) - 1 + first, 0).astype(np.int32)
    return dataclasses.replace(
        table, **moved, draw=draw, nodes=nodes.astype(np.int32), clock=None, brownian=None
    )
