"""The Frechet distance between the Gaussians fitted to two sets of features."""

import numpy as np
from jaxtyping import ArrayLike, Float

from jaxdiff.metrics.points import pair, points


def frechet_distance(
    features_a: Float[ArrayLike, "n dim"], features_b: Float[ArrayLike, "m dim"]
) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), from the moments of two samples.

    mu are means and S unbiased covariances (n - 1), in float64 on the host. On samples the figure
    exceeds that of the distributions by about c (1 / n + 1 / m): compare figures of the same n and
    m only, and print `real_floor` for that n and m beside them.

    Args:
      features_a, features_b: [n, dim] and [m, dim], at least two rows each.

    Raises:
      TypeError: not real numbers.
      ValueError: fewer than two rows, different dims, NaN or infinity.

    Papers: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium" (2017), where the features are Inception's and the figure is called FID; Chong and
    Forsyth, "Effectively Unbiased FID and Inception Score and where to find them" (2020).
    """
    a, b = pair(features_a, features_b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, got {len(a)} and {len(b)}")
    covariance_a, covariance_b = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (a, b))
    return frechet_from_moments(a.mean(axis=0), covariance_a, b.mean(axis=0), covariance_b)


def frechet_from_moments(
    mean_a: Float[ArrayLike, " dim"],
    covariance_a: Float[ArrayLike, "dim dim"],
    mean_b: Float[ArrayLike, " dim"],
    covariance_b: Float[ArrayLike, "dim dim"],
) -> float:
    """The squared 2-Wasserstein distance between N(mean_a, covariance_a) and N(mean_b, ...).

    |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 sum of the singular values of S_a^(1/2) S_b^(1/2). That
    sum is tr((S_a S_b)^(1/2)), found without the square root of a matrix that is not symmetric, and
    is accurate for singular covariances too. Rounding below zero is returned as 0.

    Raises:
      ValueError: shapes that disagree, NaN or infinity, or a covariance that is not symmetric or
        has an eigenvalue below 0 (to 1e-6 of the largest one).

    Paper: Dowson and Landau, "The Frechet Distance between Multivariate Normal Distributions"
    (1982).
    """
    mean_a, mean_b = points(mean_a, "the first mean"), points(mean_b, "the second mean")
    if mean_a.shape != mean_b.shape or mean_a.shape[1] != 1:
        raise ValueError(
            f"the means must have one shape [dim], got {mean_a.shape} and {mean_b.shape}"
        )
    root_a, trace_a = _square_root(covariance_a, len(mean_a), "the first covariance")
    root_b, trace_b = _square_root(covariance_b, len(mean_b), "the second covariance")
    overlap = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
    squared = np.sum((mean_a - mean_b) ** 2) + trace_a + trace_b - 2 * overlap
    return max(float(squared), 0.0)


def _square_root(
    covariance: Float[ArrayLike, "dim dim"], dim: int, name: str
) -> tuple[Float[np.ndarray, "dim dim"], float]:
    matrix = points(covariance, name)
    if matrix.shape != (dim, dim):
        raise ValueError(f"{name} must be [{dim}, {dim}] like its mean, got {list(matrix.shape)}")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    tolerance = 1e-6 * np.abs(values).max()
    asymmetry = np.abs(matrix - matrix.T).max()
    if asymmetry > tolerance:
        raise ValueError(f"{name} must be symmetric, it is off its transpose by {asymmetry:.3g}")
    if values[0] < -tolerance:
        raise ValueError(f"{name} must have no eigenvalue below 0, it has {values[0]:.3g}")
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T, float(np.trace(matrix))
