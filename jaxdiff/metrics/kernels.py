"""Distances from averages over pairs of points: maximum mean discrepancy and energy distance.

Everything is float64 on the host, a block of rows at a time, so 5,000 points against 5,000 need
tens of megabytes.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import ArrayLike, Float

from jaxdiff.metrics.points import pair

Kernel = Callable[
    [Float[np.ndarray, "n dim"], Float[np.ndarray, "m dim"]], Float[np.ndarray, "n m"]
]

_BLOCK = 2**21  # pairs at a time: 16 MiB a temporary


def mmd(
    a: Float[ArrayLike, "n ..."],
    b: Float[ArrayLike, "m ..."],
    kernel: Kernel | None = None,
    unbiased: bool = True,
) -> float:
    """The squared maximum mean discrepancy of two samples.

    MMD^2 = E k(a, a') + E k(b, b') - 2 E k(a, b). Unbiased: the means over a, a' leave out pairs of
    a point with itself, so equal distributions give 0 on average, and the figure may be negative.
    Biased: they include them; the figure is the squared distance of the samples' mean embeddings,
    at least 0 for a positive definite kernel.

    Args:
      a, b: [n, ...] and [m, ...], points of one shape; at least two each if unbiased.
      kernel: `rbf(bandwidth)`, `polynomial()` (on network features and unbiased this is the Kernel
        Inception Distance, over all pairs and not over random subsets) or any function of [n, dim]
        and [m, dim] to [n, m]. Default: `rbf(median_bandwidth(a, b))`, which depends on both
        samples; fix the bandwidth to compare several samples with one.

    Raises:
      TypeError: not real numbers.
      ValueError: points of different shapes, too few points, NaN or infinity.

    Papers: Gretton et al., "A Kernel Two-Sample Test" (2012), Lemma 6; Binkowski et al.,
    "Demystifying MMD GANs" (2018) for the Kernel Inception Distance.
    """
    a, b = pair(a, b)
    if unbiased and min(len(a), len(b)) < 2:
        raise ValueError(f"unbiased needs at least 2 points each, got {len(a)} and {len(b)}")
    if kernel is None:
        kernel = rbf(median_bandwidth(a, b))
    within = mean_kernel(kernel, a, a, unbiased) + mean_kernel(kernel, b, b, unbiased)
    return within - 2 * mean_kernel(kernel, a, b)


def energy_distance(a: Float[ArrayLike, "n ..."], b: Float[ArrayLike, "m ..."]) -> float:
    """sqrt(2 E|a - b| - E|a - a'| - E|b - b'|), | | Euclidean, over all pairs of two samples.

    The biased MMD with kernel -|x - y|. In one dimension it is `scipy.stats.energy_distance`,
    sqrt(2 integral of (F_a - F_b)^2); its square is what others call the energy distance.

    Raises:
      TypeError: not real numbers.
      ValueError: points of different shapes, NaN or infinity.

    Paper: Szekely and Rizzo, "Energy Statistics: A Class of Statistics Based on Distances" (2013).
    """
    squared = mmd(a, b, lambda x, y: -np.sqrt(_squared_distances(x, y)), unbiased=False)
    return float(np.sqrt(max(squared, 0.0)))


def rbf(bandwidth: float) -> Kernel:
    """k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)); ValueError unless 0 < bandwidth < infinity."""
    if not 0 < bandwidth < np.inf:
        raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}")
    return lambda x, y: np.exp(_squared_distances(x, y) / (-2 * bandwidth**2))


def polynomial(degree: int = 3, gamma: float | None = None, offset: float = 1.0) -> Kernel:
    """k(x, y) = (gamma x . y + offset)^degree; gamma defaults to 1 / dim.

    The defaults are the Kernel Inception Distance's. ValueError if degree is below 1.
    """
    if degree < 1:
        raise ValueError(f"degree must be at least 1, got {degree}")

    def kernel(x, y):
        scale = 1 / x.shape[1] if gamma is None else gamma
        return (scale * (x @ y.T) + offset) ** degree

    return kernel


def median_bandwidth(
    a: Float[ArrayLike, "n ..."], b: Float[ArrayLike, "m ..."], max_points: int = 2000
) -> float:
    """The median distance between two points of the pooled samples, a usual bandwidth for `rbf`.

    Above `max_points` pooled points, that many are used, evenly spaced through a, then b.

    Paper: Gretton et al., "A Kernel Two-Sample Test" (2012), section 8.
    """
    pooled = np.concatenate(pair(a, b))
    if len(pooled) > max_points:
        pooled = pooled[np.linspace(0, len(pooled) - 1, max_points).round().astype(int)]
    above_diagonal = np.triu_indices(len(pooled), 1)
    return float(np.median(np.sqrt(_squared_distances(pooled, pooled)[above_diagonal])))


def _squared_distances(
    x: Float[np.ndarray, "n dim"], y: Float[np.ndarray, "m dim"]
) -> Float[np.ndarray, "n m"]:
    # |x|^2 + |y|^2 - 2 x . y is one matrix product; a common centre keeps what cancels small.
    centre = y.mean(axis=0)
    x, y = x - centre, y - centre
    squared = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1) - 2 * (x @ y.T)
    return np.maximum(squared, 0, out=squared)


def mean_kernel(
    kernel: Kernel,
    x: Float[np.ndarray, "n dim"],
    y: Float[np.ndarray, "m dim"],
    without_diagonal: bool = False,
) -> float:
    """The mean of k(x, y) over all pairs; for y = x, if asked, without a point and itself."""
    rows = max(1, _BLOCK // len(y))
    total = 0.0
    for start in range(0, len(x), rows):
        values = kernel(x[start : start + rows], y)
        total += values.sum()
        if without_diagonal:
            total -= np.trace(values, offset=start)
    return float(total / (len(x) * (len(y) - without_diagonal)))
