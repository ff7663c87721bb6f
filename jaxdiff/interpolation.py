"""Monotone interpolation, over NumPy or JAX arrays."""

from typing import Any


def pchip(xp: Any, nodes: Any, values: Any, x: Any) -> Any:
    """Monotone piecewise-cubic interpolation of `values` at increasing `nodes`, in namespace `xp`.

    Inner slopes are the weighted harmonic means of Fritsch & Butland, "A Method for Constructing
    Local Monotone Piecewise Cubic Interpolants" (1984); both ends have limited three-point slopes,
    as scipy's PchipInterpolator. Two nodes give the straight line.
    """
    h = nodes[1:] - nodes[:-1]
    slope = (values[1:] - values[:-1]) / h
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    same = slope[1:] * slope[:-1] > 0
    left, right = xp.where(same, slope[:-1], 1.0), xp.where(same, slope[1:], 1.0)
    inner = xp.where(same, (w1 + w2) / (w1 / left + w2 / right), 0.0)
    first, last = _end_slope(xp, h, slope), _end_slope(xp, h[::-1], slope[::-1])
    d = xp.concatenate([first[None], inner, last[None]])
    i = xp.clip(xp.searchsorted(nodes, x, side="right") - 1, 0, nodes.shape[0] - 2)
    u = (x - nodes[i]) / h[i]
    return (
        values[i] * (1 + 2 * u) * (1 - u) ** 2 + values[i + 1] * u**2 * (3 - 2 * u)
        + h[i] * u * (1 - u) * (d[i] * (1 - u) - d[i + 1] * u)
    )  # fmt: skip


def _end_slope(xp: Any, h: Any, slope: Any) -> Any:
    """Three-point derivative at the first node, limited so that the interpolant stays monotone."""
    if h.shape[0] < 2:
        return slope[0]
    d = ((2 * h[0] + h[1]) * slope[0] - h[0] * slope[1]) / (h[0] + h[1])
    overshoot = (slope[0] * slope[1] < 0) & (xp.abs(d) > 3 * xp.abs(slope[0]))
    return xp.where(d * slope[0] > 0, xp.where(overshoot, 3 * slope[0], d), 0.0)
