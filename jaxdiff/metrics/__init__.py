"""Metrics: distances between two samples, and a digit classifier that measures digits.

Every distance takes the two samples first, [n, ...] and [m, ...], and returns a float computed in
float64 on the host. `psnr` and `ssim` compare images one by one.
"""

from jaxdiff.metrics.classifier import (
    DigitClassifier,
    conditional_accuracy,
    digit_classifier,
    real_floor,
)
from jaxdiff.metrics.frechet import frechet_distance, frechet_from_moments
from jaxdiff.metrics.images import psnr, ssim
from jaxdiff.metrics.kernels import energy_distance, median_bandwidth, mmd, polynomial, rbf
from jaxdiff.metrics.transport import sinkhorn_divergence, sliced_wasserstein

__all__ = [
    "DigitClassifier",
    "conditional_accuracy",
    "digit_classifier",
    "energy_distance",
    "frechet_distance",
    "frechet_from_moments",
    "median_bandwidth",
    "mmd",
    "polynomial",
    "psnr",
    "rbf",
    "real_floor",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "ssim",
]
