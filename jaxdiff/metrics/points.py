"""What every distance takes: two samples, as float64 rows on the host."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float


def points(sample: Float[ArrayLike, "n ..."], name: str) -> Float[np.ndarray, "n dim"]:
    """The sample as float64 [n, dim]: trailing axes flattened, [n] read as n numbers.

    Raises:
      TypeError: not real numbers.
      ValueError: no axis, no values, or a NaN or infinity (the message says how many and where).
    """
    rows = np.asarray(sample)
    if not (jnp.issubdtype(rows.dtype, jnp.floating) or jnp.issubdtype(rows.dtype, jnp.integer)):
        raise TypeError(f"{name} must hold real numbers, got dtype {rows.dtype}")
    if rows.ndim == 0 or rows.size == 0:
        raise ValueError(f"{name} must be [n, ...] with at least one value, got {rows.shape}")
    rows = rows.astype(np.float64).reshape(len(rows), -1)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} must be finite: {len(bad)} of {len(rows)} points are not, the first is "
            f"number {bad[0]}"
        )
    return rows


def pair(
    a: Float[ArrayLike, "n ..."], b: Float[ArrayLike, "m ..."]
) -> tuple[Float[np.ndarray, "n dim"], Float[np.ndarray, "m dim"]]:
    """`points` of two samples; ValueError if their points have different shapes."""
    if np.shape(a)[1:] != np.shape(b)[1:]:
        raise ValueError(
            f"both samples must hold points of one shape, got {np.shape(a)} and {np.shape(b)}"
        )
    return points(a, "the first sample"), points(b, "the second sample")
