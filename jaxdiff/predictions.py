"""What a network predicts, and how one prediction becomes another.

With x_t = alpha x_0 + sigma eps every usual target is linear in (x_0, eps):

    x0     x_0
    eps    eps
    v      alpha eps - sigma x_0             (Salimans & Ho 2022)
    flow   eps - x_0                         (rectified flow's velocity, for every process)
    score  -eps / sigma                      (gradient of the log-density)

so every prediction is  p = (a x_0 + b eps) / c  with one (a, b, c) a row of `_TARGETS`, and the map
from a source to a target at a known x_t is affine in the source: target = u source + w x_t.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import namespace, to_batch

# name -> (a, b, c) with prediction = (a x_0 + b eps) / c, as functions of (alpha, sigma); c keeps a
# score's conversions finite at sigma = 0
_TARGETS = {
    "x0": lambda alpha, sigma: (1.0, 0.0, 1.0),
    "eps": lambda alpha, sigma: (0.0, 1.0, 1.0),
    "v": lambda alpha, sigma: (-sigma, alpha, 1.0),
    "flow": lambda alpha, sigma: (-1.0, 1.0, 1.0),
    "score": lambda alpha, sigma: (0.0, -1.0, sigma),
}
PREDICTIONS = tuple(_TARGETS)


def check_prediction(name: Any) -> None:
    """Raise ValueError unless `name` is one of `PREDICTIONS`."""
    if name not in _TARGETS:
        raise ValueError(f"unknown prediction {name!r}; choose from {list(PREDICTIONS)}")


def affine(source: str, target: str, alpha: ArrayLike, sigma: ArrayLike) -> tuple[Any, Any]:
    """(u, w) with target = u source + w x_t, each of alpha's shape.

    With source = (a x_0 + b eps) / c, target = (a' x_0 + b' eps) / c', inverting (x_t, source) to
    (x_0, eps):

        D = a sigma - b alpha,   u = (a' sigma - b' alpha) c / (D c'),   w = (a b' - b a') / (D c').

    Not finite where the source says nothing about the target: an eps or score network at alpha = 0,
    an x0 network at sigma = 0. Raises ValueError for an unknown name.
    """
    check_prediction(source)
    check_prediction(target)
    xp = namespace(alpha, sigma)
    alpha, sigma = xp.asarray(alpha) * 1.0, xp.asarray(sigma) * 1.0
    one, zero = xp.ones_like(alpha), xp.zeros_like(alpha)
    if source == target:
        return one, zero
    with np.errstate(divide="ignore", invalid="ignore"):
        if {source, target} == {"eps", "score"}:  # known of each other even where D = 0
            return (-sigma if target == "eps" else -1.0 / sigma) + zero, zero
        a, b, c = _TARGETS[source](alpha, sigma)
        a1, b1, c1 = _TARGETS[target](alpha, sigma)
        determinant = (a * sigma - b * alpha) * c1
        u = (a1 * sigma - b1 * alpha) * c / determinant
        w = (a * b1 - b * a1) / determinant
    return u + zero, w + zero


def convert(
    value: Any, x: Any, source: str, target: str, alpha: ArrayLike, sigma: ArrayLike
) -> Any:
    """The prediction `target` given the prediction `source` = `value` at x_t = `x`.

    `value` and `x` are arrays or pytrees of one structure, leaves [batch, ...]; `alpha` and `sigma`
    scalars or [batch].
    """
    if source == target:
        check_prediction(source)
        return value
    u, w = affine(source, target, alpha, sigma)
    return jax.tree.map(
        lambda p, y: to_batch(u, y).astype(y.dtype) * p + to_batch(w, y).astype(y.dtype) * y,
        value,
        x,
    )


def target(name: str, x0: Any, eps: Any, alpha: ArrayLike, sigma: ArrayLike) -> Any:
    """The prediction `name` of a known pair: a training target. Shapes as in `convert`."""
    check_prediction(name)
    a, b, c = _TARGETS[name](alpha, sigma)
    return jax.tree.map(
        lambda x, e: (to_batch(a, x) * x + to_batch(b, x) * e) / to_batch(c, x), x0, eps
    )
