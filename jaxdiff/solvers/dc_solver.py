"""DC-Solver: the outputs a multistep method remembers, moved along the time axis."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import VARIABLES, check_choice, check_order, coordinate
from jaxdiff.solvers.tableau import Tableau

HIGHEST_ORDER = 8


def dynamic_compensation(
    tableau: Tableau, grid: Grid, ratios: ArrayLike, order: int = 2, variable: str = "t"
) -> Tableau:
    """`tableau` whose step from node i remembers, for the output m_i, one at another time.

    Zhao et al., "DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic
    Compensation" (2024): once m_i has corrected the step that led to node i, it is replaced by

        c_i = P(rho_i z_i + (1 - rho_i) z_{i-1}),

    P the polynomial of degree `order` through m_i at z_i and the compensated c_{i-1}, c_{i-2}, ...
    at the nodes before. The prediction from node i and everything later uses c_i: m_i is the output
    at the predicted state, not at the corrected one, and the stronger the guidance the more that
    matters. Linear in the outputs, so that the result is a tableau: `order` registers carry
    c_{i-1}, c_{i-2}, ..., and the coefficients can be differentiated with respect to rho. rho = 1 is
    `tableau` itself. No evaluation more. `jaxdiff.calibration.fit_compensation` finds a network's
    ratios, `CascadePolynomial` those of other numbers of steps and guidance scales.

    Arguments:
      tableau: a deterministic method of one evaluation a step on `grid`, corrected (`unipc`,
        `corrected`) or not (`exponential_adams` and its like).
      ratios: rho of every step, [steps], near 1. Those of the first `order` steps, which have too
        few outputs behind them, must be 1.
      order: 1 to 8; 2 in the paper.
      variable: z, a variable of `exponential_adams`: "t" in the authors' code.

    Raises ValueError for another kind of tableau, other ratios, or a z that is infinite at a node.
    """
    check_order(order, HIGHEST_ORDER)
    check_choice("variable", variable, VARIABLES)
    corrected = node_registers(tableau, grid)[1] if grid.steps > 1 else 0
    steps, registers = grid.steps, tableau.registers
    ratios = _checked(ratios, steps, order)
    xp = namespace(tableau, grid.t, grid.alpha, grid.sigma, ratios)
    z = coordinate(xp, variable, tuple(level[:-1] for level in grid.node(slice(None))))
    if is_concrete(z) and not np.all(np.isfinite(z)):
        raise ValueError(f"{variable!r} is infinite at a node: {np.asarray(z)}")
    count = max(order, tableau.history - 1)
    place = _places(xp, z, ratios, order, count)
    a, b = tableau.A, tableau.B[..., 0]
    # s_0' = share x_i + sum_k p_k m_{i-k}: only the second part uses what is compensated.
    p = b[:, 0, 0]
    if corrected:
        share = xp.sum(a[:, 0] * a[:, 1], 1) / xp.sum(a[:, 1] ** 2, 1)
        p = p - share * b[:, 1, 0]
    first = np.eye(registers)[0]
    older = xp.concatenate(
        [b[:, :, 1:], xp.zeros((steps, registers, count + 1 - tableau.history))], 2
    ) + first[:, None] * (p[:, None] * place[:, 1:])[:, None]  # fmt: skip
    # The registers of c_{i-1}, c_{i-2}, ...: the new one first, the others move on by one.
    compensated = xp.concatenate([xp.zeros((steps, registers)), place[:, 1:]], 1)
    moved = np.eye(count - 1, registers + count, registers)
    newest = xp.concatenate([
        b[:, :, 0] + first * (p * (place[:, 0] - 1.0))[:, None], place[:, :1],
        xp.zeros((steps, count - 1)),
    ], 1)  # fmt: skip
    return dataclasses.replace(
        tableau,
        A=xp.concatenate([
            xp.concatenate([a, older], 2), compensated[:, None],
            xp.broadcast_to(moved, (steps, *moved.shape)),
        ], 1),
        B=newest[..., None, None],
        start=dataclasses.replace(
            tableau.start, S=xp.concatenate([tableau.start.S, xp.zeros(count)])
        ),
        registers=registers + count, history=1,
    )  # fmt: skip


def _places(xp: Any, z: Any, ratios: Any, order: int, count: int) -> Any:
    """Coefficients of m_i, c_{i-1}, c_{i-2}, ... in c_i for every i, [steps, count + 1]."""
    steps = z.shape[0]
    one = np.eye(1, count + 1)
    if steps <= order:
        return xp.broadcast_to(one, (steps, count + 1)) * 1.0
    ages = np.arange(order + 1)
    nodes = z[np.arange(order, steps)[:, None] - ages]
    at = ratios[order:] * nodes[:, 0] + (1.0 - ratios[order:]) * nodes[:, 1]
    # Lagrange polynomials: a factor (at - z_j) / (z_k - z_j) for every j but k.
    same = np.eye(order + 1, dtype=bool)
    gaps = xp.where(same, 1.0, nodes[:, :, None] - nodes[:, None, :])
    factors = xp.where(same, 1.0, (at[:, None] - nodes)[:, None, :]) / gaps
    found = xp.concatenate([xp.prod(factors, -1), xp.zeros((steps - order, count - order))], 1)
    return xp.concatenate([np.repeat(one, order, 0), found])


def _checked(ratios: Any, steps: int, order: int) -> Any:
    ratios = namespace(ratios).asarray(ratios) * 1.0
    if ratios.shape != (steps,):
        raise ValueError(f"ratios must be one for each of {steps} steps, got {ratios.shape}")
    if is_concrete(ratios):
        if not np.all(np.isfinite(ratios)):
            raise ValueError(f"ratios must be finite, got {ratios}")
        if np.any(np.asarray(ratios)[:order] != 1.0):
            raise ValueError(
                f"the first {order} steps have fewer than {order + 1} outputs: their ratios must be "
                f"1, got {ratios}"
            )
    return ratios


def node_registers(tableau: Tableau, grid: Grid) -> list[int]:
    """The register of the solution at each node: all 0, or 1 between the ends (corrected).

    Raises ValueError unless the tableau is one that `dynamic_compensation` takes.
    """
    if not isinstance(tableau, Tableau) or np.ndim(tableau.A) != 3:
        raise ValueError("dynamic compensation takes one tableau whose coefficients are numbers")
    if tableau.stochastic or tableau.d is not None or tableau.outputs != 1:
        raise ValueError("dynamic compensation takes a deterministic tableau of one output")
    if tableau.rows != grid.steps or tableau.registers > 2:
        raise ValueError(
            "dynamic compensation takes a tableau of one evaluation a step and 1 or 2 registers, "
            f"got {tableau.rows} rows for {grid.steps} steps and {tableau.registers} registers"
        )
    plain = [(i, 0) for i in range(len(grid))]
    kept = [(0, 0), *((i + 1, 1) for i in range(1, grid.steps)), (grid.steps, 0)]
    if is_concrete(tableau.nodes):
        found = [tuple(node) for node in np.asarray(tableau.nodes).tolist()]
    elif tableau.registers == 1:
        found = plain
    else:
        raise ValueError("the nodes of a traced tableau of 2 registers are not known")
    if found == plain and tableau.registers == 1:
        return [0] * len(grid)
    if found != kept or tableau.registers != 2:
        raise ValueError(
            "dynamic compensation takes a predictor, or one corrected at every node, got nodes "
            f"{found}"
        )
    if is_concrete(tableau.A):
        a = np.asarray(tableau.A, np.float64)
        if not np.allclose(a[:, 0, 0] * a[:, 1, 1], a[:, 0, 1] * a[:, 1, 0]):
            raise ValueError("the tableau does not predict from the corrected state")
    return [0, *([1] * (grid.steps - 1)), 0]


@dataclasses.dataclass(frozen=True, eq=False)
class CascadePolynomial:
    """Ratios of `dynamic_compensation` for any number of steps and guidance scale.

        rho_i = sum_abc coefficients[a, b, c] (i / n)^a (s / 12)^b (n / 50)^c,    i = 1 ... n,

    n the steps, s the guidance scale; 1 for the first `order` steps. The cascade polynomial
    regression of Zhao et al. (2024): the coefficients of a polynomial in the step are polynomials in
    the scale, whose coefficients are polynomials in the number of steps, in the authors' units.
    """

    coefficients: Float[np.ndarray, "step scale steps"]
    order: int = 2

    def predict(self, steps: int, scale: float = 1.0) -> Float[np.ndarray, " steps"]:
        """The ratios for a grid of `steps` steps under the guidance scale `scale`."""
        check_order(steps, 10**6, "steps")
        degrees = [size - 1 for size in self.coefficients.shape]
        found = _features(steps, scale, degrees) @ np.ravel(self.coefficients)
        return np.where(np.arange(steps) < self.order, 1.0, found)


def cascade_regression(
    ratios: Sequence[ArrayLike], scales: ArrayLike | None = None,
    degrees: tuple[int, int, int] = (3, 2, 2), order: int = 2,
) -> CascadePolynomial:  # fmt: skip
    """The `CascadePolynomial` nearest to ratios found for several settings, by least squares.

    Arguments:
      ratios: those of each setting, [steps]; their length is the setting's number of steps.
      scales: the guidance scale of each, [settings]; all 1 by default.
      degrees: in the step, the scale and the number of steps. The authors' are (3, 2, 2), which
        takes three scales and three numbers of steps; 0 for one that does not vary. A degree
        that fewer settings than it has coefficients would leave open is an error.
      order: of `dynamic_compensation`; the first ratios of each setting are not fitted.

    Where the settings determine no polynomial uniquely, the one of least norm. On grids uniform in t
    ratios vary smoothly with the setting, and low degrees, such as (3, 1, 1), serve best between
    few settings; on grids uniform in half-log-SNR they scatter: check the result there. Raises
    ValueError for sizes that do not fit.
    """
    ratios = [np.asarray(r, np.float64) for r in ratios]
    scales = np.ones(len(ratios)) if scales is None else np.asarray(scales, np.float64)
    if scales.shape != (len(ratios),) or not ratios or any(r.ndim != 1 for r in ratios):
        raise ValueError(
            f"ratios must be vectors, one for each scale, got {len(ratios)} for scales {scales}"
        )
    for name, degree in zip(("step", "scale", "steps"), degrees, strict=True):
        check_order(degree, 20, f"the degree in the {name}", 0)
    for name, degree, values in (
        ("guidance scales", degrees[1], set(scales.tolist())),
        ("numbers of steps", degrees[2], {r.size for r in ratios}),
        ("ratios a setting", degrees[0], range(max(r.size for r in ratios) - order)),
    ):
        if len(values) <= degree:
            raise ValueError(f"degree {degree} needs {degree + 1} {name}, got {len(values)}")
    features = [_features(r.size, s, degrees)[order:] for r, s in zip(ratios, scales)]
    found = np.linalg.lstsq(
        np.concatenate(features), np.concatenate([r[order:] for r in ratios]), rcond=1e-12
    )[0]
    return CascadePolynomial(found.reshape([d + 1 for d in degrees]), order)


def _features(steps: int, scale: float, degrees: Sequence[int]) -> Float[np.ndarray, "steps terms"]:
    """The monomials of every step, in the order of raveled coefficients."""
    powers = [np.arange(d + 1) for d in degrees]
    place = (np.arange(1, steps + 1) / steps)[:, None] ** powers[0]
    rest = np.outer((scale / 12.0) ** powers[1], (steps / 50.0) ** powers[2]).ravel()
    return np.einsum("ia,j->iaj", place, rest).reshape(steps, -1)
