"""The phi functions of exponential integrators, and the weights they give.

    phi_0(h) = exp(h),   phi_k(h) = (phi_{k-1}(h) - 1 / (k-1)!) / h,   phi_k(0) = 1 / k!

(Hochbruck & Ostermann, "Exponential Integrators", Acta Numerica 2010.)
"""

from math import factorial
from typing import Any

from jaxtyping import ArrayLike

from jaxdiff.arrays import namespace

_SERIES_TERMS = 24
_SERIES_RADIUS = 2.0
_INVERSE_FACTORIALS = [1.0 / factorial(j) for j in range(64)]


def phi(k: int, h: ArrayLike) -> Any:
    """phi_k(h), elementwise, accurate to a few units in the last place from |h| = 1e-8 to 50.

    The recurrence cancels catastrophically near 0, so there the Taylor series
    sum_j h^j / (j + k)! is summed instead. Differentiable in h. Raises ValueError for k < 0.
    """
    if k < 0:
        raise ValueError(f"phi_k needs k >= 0, got {k}")
    if k == 0:
        xp = namespace(h)
        return xp.exp(xp.asarray(h) * 1.0)
    return phis(k, h)[-1]


def phis(k: int, h: ArrayLike) -> list[Any]:
    """[phi_1(h), ..., phi_k(h)], as accurate as `phi`."""
    xp = namespace(h)
    h = xp.asarray(h) * 1.0
    small = xp.abs(h) < _SERIES_RADIUS
    # Each branch sees an argument that is safe for it, so that neither can poison a gradient.
    series_h, far_h = xp.where(small, h, 0.0), xp.where(small, 1.0, h)
    highest = xp.zeros_like(h)
    for j in reversed(range(_SERIES_TERMS)):
        highest = highest * series_h + _INVERSE_FACTORIALS[j + k]
    # Near 0 the recurrence is stable downward from the highest, far from it upward.
    near, far = [highest], [xp.expm1(far_h) / far_h]
    for j in range(1, k):
        near.insert(0, series_h * near[0] + _INVERSE_FACTORIALS[k - j])
        far.append((far[-1] - _INVERSE_FACTORIALS[j]) / far_h)
    return [xp.where(small, a, b) for a, b in zip(near, far)]


def interpolation_weights(offsets: Any, h: ArrayLike, sign: float = -1.0) -> Any:
    """Weights b_k with  int_0^h exp(sign (h - s)) P(s) ds = sum_k b_k P(offsets_k).

    P is the polynomial of degree len(offsets) - 1 through the nodes `offsets` (relative to the
    step's start, in units of s). From the moments int_0^h exp(sign (h - s)) s^j ds =
    j! h^(j+1) phi_{j+1}(sign h), by a Vandermonde solve in s / h. `sign` is -1 where the data
    prediction is integrated, +1 for the noise prediction (in reversed half-log-SNR).
    """
    xp = namespace(h, offsets)
    count = len(offsets)
    scaled = [offset / h for offset in offsets]
    moments = xp.asarray([factorial(j) * p for j, p in enumerate(phis(count, sign * h))])
    if count == 1:
        return moments * h
    matrix = xp.asarray([[r**j for r in scaled] for j in range(count)])
    return xp.linalg.solve(matrix, moments[:, None])[:, 0] * h
