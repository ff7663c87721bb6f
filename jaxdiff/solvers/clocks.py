"""Exact linear parts: the scale and the clock of each integrand, and integrals of polynomials.

With x = alpha x0 + sigma eps, for every process and each prediction m, y = x / scale obeys
dy = g m dclock along the probability flow:

    m        scale                     clock                    g
    x0       sigma                     kappa = alpha / sigma    1
    eps      alpha                     rho = sigma / alpha      1
    flow     alpha + sigma             tau = sigma / scale      1
    v        sqrt(alpha^2 + sigma^2)   angle = atan2(sigma, alpha)   1 / scale

with flow = eps - x0 and v = alpha eps - sigma x0. An exponential integrator replaces g m by a
polynomial, in the clock itself or in any other monotone variable z of the noise level, and
integrates that exactly.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.solvers.phi import interpolation_weights

Level = tuple[Any, Any, Any]

INTEGRANDS = ("x0", "eps", "flow", "v")
VARIABLES = ("lambda", "t", "rho", "kappa", "tau", "angle")
_OWN_CLOCK = {"x0": "kappa", "eps": "rho", "flow": "tau", "v": "angle"}
QUADRATURE = 24


def check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of `accepted`."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} must be one of {accepted}, got {value!r}")


def check_order(order: Any, highest: int | None, name: str = "order", lowest: int = 1) -> None:
    """Raise ValueError unless `order` is an integer from `lowest` to `highest`, if there is one."""
    whole = isinstance(order, (int, np.integer)) and not isinstance(order, bool)
    if not whole or order < lowest or (highest is not None and order > highest):
        accepted = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be an integer {accepted}, got {order!r}")


def check_number(name: str, value: Any, low: float = 0.0, high: float = np.inf) -> None:
    """Raise ValueError unless `value` is a scalar in [low, high], and finite; a traced one passes."""
    if isinstance(value, (bool, str)) or np.ndim(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if is_concrete(value) and not (low <= value <= high and np.isfinite(value)):
        accepted = f"in [{low}, {high}]" if np.isfinite(high) else f"at least {low}, and finite"
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def scale(xp: Any, integrand: str, level: Level) -> Any:
    """The factor between x and y at a level (t, alpha, sigma)."""
    _, alpha, sigma = level
    if integrand == "x0":
        return sigma
    if integrand == "eps":
        return alpha
    return alpha + sigma if integrand == "flow" else xp.hypot(alpha, sigma)


def by_age(ages: Sequence[int], found: Sequence[Any], zero: Any = 0.0) -> list[Any]:
    """Weights of evaluations of these ages as a list over all ages, `zero` for the others."""
    m = [zero] * (ages[-1] + 1)
    for age, weight in zip(ages, found):
        m[age] = weight
    return m


def coordinate(xp: Any, variable: str, level: Level, power: float = 1.0) -> Any:
    """The variable z of a level, to a power; infinite where the level is an end that it puts there."""
    t, alpha, sigma = level
    with np.errstate(divide="ignore"):
        if variable == "t":
            z = t
        elif variable == "lambda":
            z = xp.log(alpha) - xp.log(sigma)
        elif variable in ("rho", "kappa"):
            z = sigma / alpha if variable == "rho" else alpha / sigma
        else:
            z = sigma / (alpha + sigma) if variable == "tau" else xp.arctan2(sigma, alpha)
    return z if power == 1.0 else z**power


def own_clock(xp: Any, integrand: str, level: Level) -> tuple[str, Any]:
    """The name of an integrand's clock, and its value at a level."""
    name = _OWN_CLOCK[integrand]
    return name, coordinate(xp, name, level)


def half_log_snr_at(xp: Any, variable: str, z: Any) -> Any:
    """lambda where `variable` (not "t") has the value z."""
    if variable == "lambda":
        return z
    if variable in ("rho", "kappa"):
        return -xp.log(z) if variable == "rho" else xp.log(z)
    return xp.log1p(-z) - xp.log(z) if variable == "tau" else -xp.log(xp.tan(z))


def carry(xp: Any, integrand: str, level: Level, end: Level) -> Any:
    """The coefficient of x in the exact solution from `level` to `end`."""
    return scale(xp, integrand, end) / scale(xp, integrand, level)


def weights(
    grid: Grid, level: Level, end: Level, places: list[Level], integrand: str,
    variable: str = "lambda", power: float = 1.0, ends: tuple[bool, bool] | None = None,
) -> list[Any]:  # fmt: skip
    """Weights w_k with  x(end) = carry x(level) + sum_k w_k m_k,  exact for polynomial integrands.

    m_k are the predictions at `places`; g m is replaced by the polynomial of degree len(places) - 1
    in z = `variable`^power through them. In closed form where z is lambda (for x0 and eps) or the
    integrand's own clock, else by Gauss quadrature with 24 nodes. At alpha = 0 or sigma = 0 lambda
    is infinite: there `places` must hold one level if z is infinite too (the first-order limit), and
    where only the clock is infinite the limit is scale(end) times the polynomial's value there.
    `ends` says whether `level` has alpha = 0 and whether `end` has sigma = 0: needed for traced nodes.
    """
    xp = grid.xp
    concrete = is_concrete(level[1:], end[1:])
    if ends is None:
        ends = (bool(level[1] == 0), bool(end[2] == 0)) if concrete else (False, False)
    outer = scale(xp, integrand, end)
    (own, start), (_, stop) = (own_clock(xp, integrand, place) for place in (level, end))
    # An infinite clock: kappa at sigma = 0, where y / clock -> x0 at the end itself.
    runaway = ends[1] and own == "kappa"
    first, last = (coordinate(xp, "lambda", place) for place in (level, end))
    inner = [1.0 if integrand != "v" else 1.0 / scale(xp, "v", place) for place in places]
    if len(places) == 1:
        # outer * (stop - start), where lambda is finite and known so written that nothing cancels.
        plain = any(ends) or not concrete
        if integrand == "x0":
            whole = end[1] - end[2] * level[1] / level[2] if plain else (
                -end[1] * xp.expm1(first - last)
            )
        elif integrand == "eps":
            whole = end[2] - end[1] * level[2] / level[1] if plain else (
                -end[2] * xp.expm1(last - first)
            )
        else:
            whole = outer * (stop - start)
        return [whole * inner[0]]
    if not any(ends) and variable == "lambda" and power == 1.0 and integrand in ("x0", "eps"):
        offsets = [coordinate(xp, "lambda", place) - first for place in places]
        factor, sign = (end[1], -1.0) if integrand == "x0" else (-end[2], 1.0)
        return [factor * w for w in interpolation_weights(offsets, last - first, sign)]
    z = [coordinate(xp, variable, place, power) for place in places]
    if runaway:
        values = _basis(xp, z, coordinate(xp, variable, end, power)[None])[:, 0]
        return [end[1] * value for value in values]
    if variable == own and power == 1.0:
        # Polynomials of degree len(z) - 1 in the clock: Gauss quadrature in it is exact.
        points, measure = gauss(xp, start, stop, (len(z) + 1) // 2)
        basis = _basis(xp, z, points)
    else:
        levels, measure = _levels_between(grid, level, end, own, variable == "t", not any(ends))
        basis = _basis(xp, z, coordinate(xp, variable, levels, power))
    return [outer * g * w for g, w in zip(inner, basis @ measure)]


_legendre = functools.cache(np.polynomial.legendre.leggauss)


def gauss(xp: Any, start: Any, stop: Any, count: int) -> tuple[Any, Any]:
    """Nodes and weights of Gauss-Legendre quadrature from `start` to `stop`."""
    points, measure = _legendre(count)
    half = 0.5 * (stop - start)
    return start + half * (1.0 + points), half * measure


def _basis(xp: Any, z: list[Any], points: Any) -> Any:
    """The Lagrange polynomials of the nodes z at `points`: [len(z), len(points)]."""
    # A few operations on arrays: one by one they took XLA minutes to compile for a gradient.
    z, own = xp.stack(z), np.eye(len(z), dtype=bool)
    above = xp.where(own[:, :, None], 1.0, points - z[:, None])
    below = xp.where(own, 1.0, z[:, None] - z)
    return xp.prod(above, 1) / xp.prod(below, 1)[:, None]


def _levels_between(
    grid: Grid, level: Level, end: Level, own: str, times: bool, finite: bool
) -> tuple[Level, Any]:
    """Levels of a quadrature from `level` to `end`, and its weights in the clock `own`."""
    xp = grid.xp
    if finite:
        first, last = (coordinate(xp, "lambda", place) for place in (level, end))
        lam, measure = gauss(xp, first, last, QUADRATURE)
        rate = {"kappa": xp.exp(lam), "rho": -xp.exp(-lam)}
        tau = 1.0 / (1.0 + xp.exp(lam))
        rate |= {"tau": -tau * (1.0 - tau), "angle": -0.5 / xp.cosh(lam)}
    else:
        # In the angle both ends are finite; the clock's rate is finite too, or `weights` is done.
        first, last = (coordinate(xp, "angle", place) for place in (level, end))
        angle, measure = gauss(xp, first, last, QUADRATURE)
        sine, cosine = xp.sin(angle), xp.cos(angle)
        rate = {"kappa": -1.0 / sine**2, "rho": 1.0 / cosine**2}
        rate |= {"tau": 1.0 / (sine + cosine) ** 2, "angle": xp.ones_like(angle)}
        lam = xp.log(cosine) - xp.log(sine)
        if times:
            # No grid knows the times between its last finite node and an end: evenly in the angle.
            share = (angle - first) / (last - first)
            return (level[0] + share * (end[0] - level[0]), None, None), measure * rate[own]
    if times:
        return grid.at(lam), measure * rate[own]
    # Any level of this lambda has the other variables' values.
    sigma = 1.0 / xp.sqrt(1.0 + xp.exp(2.0 * lam))
    return (None, xp.exp(lam) * sigma, sigma), measure * rate[own]
