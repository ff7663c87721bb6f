"""How close restored images are to the true ones: PSNR and SSIM, image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float
from scipy.ndimage import correlate1d

# Of Wang et al. (2004): an 11 x 11 window, and the two constants.
_RADIUS, _SIGMA, _K1, _K2 = 5, 1.5, 0.01, 0.03


def psnr(
    x: Float[ArrayLike, "n h w *channels"], reference: Float[ArrayLike, "n h w *channels"],
    data_range: float = 2.0,
) -> Float[np.ndarray, " n"]:  # fmt: skip
    """Peak signal-to-noise ratio, 10 log10(data_range^2 / mean squared error), in dB, [n].

    Arguments:
      x, reference: [n, h, w] or [n, h, w, channels], of one shape; one reference [1, ...] serves
        all.
      data_range: largest difference that pixels can have: 2 for images in [-1, 1], 1 in [0, 1].

    Infinite for equal images. In float64 on the host; nothing is clipped or rounded. Raises
    ValueError for shapes that differ, values that are not finite, or a data_range that is not
    positive.
    """
    x, reference = _images(x, reference, data_range)
    error = np.mean((x - reference) ** 2, axis=tuple(range(1, x.ndim)))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(data_range**2 / error)


def ssim(
    x: Float[ArrayLike, "n h w *channels"], reference: Float[ArrayLike, "n h w *channels"],
    data_range: float = 2.0,
) -> Float[np.ndarray, " n"]:  # fmt: skip
    """Structural similarity, [n], 1 for equal images: the mean over pixels (and channels) of

        (2 mu_x mu_y + C1) (2 s_xy + C2) / ((mu_x^2 + mu_y^2 + C1) (s_x^2 + s_y^2 + C2)),

    C1 = (0.01 data_range)^2, C2 = (0.03 data_range)^2, with means, variances and covariance in an
    11 x 11 Gaussian window of standard deviation 1.5 whose weights sum to 1, at the pixels around
    which it fits. Wang, Bovik, Sheikh & Simoncelli, "Image Quality Assessment: From Error
    Visibility to Structural Similarity" (2004); scikit-image's with gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False.

    Arguments and errors as for `psnr`; images must be at least 11 x 11. No downsampling before.
    """
    x, reference = _images(x, reference, data_range)
    width = 2 * _RADIUS + 1
    if min(x.shape[1:3]) < width:
        raise ValueError(f"ssim needs images of at least {width} x {width}, got {x.shape[1:3]}")
    ramp = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-0.5 * (ramp / _SIGMA) ** 2)
    weights /= weights.sum()

    def window(a):
        a = correlate1d(correlate1d(a, weights, axis=1), weights, axis=2)
        return a[:, _RADIUS:-_RADIUS, _RADIUS:-_RADIUS]

    mu_x, mu_y = window(x), window(reference)
    var_x, var_y = window(x * x) - mu_x**2, window(reference**2) - mu_y**2
    cov = window(x * reference) - mu_x * mu_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    alike = (2 * mu_x * mu_y + c1) * (2 * cov + c2)
    alike /= (mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2)
    return alike.mean(axis=tuple(range(1, alike.ndim)))


def _images(x: Any, reference: Any, data_range: Any) -> tuple[np.ndarray, np.ndarray]:
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    fits = x.shape[1:] == reference.shape[1:] and len(reference) in (1, len(x)) if x.ndim else False
    if x.ndim not in (3, 4) or not fits or x.size == 0:
        raise ValueError(
            "need images [n, h, w] or [n, h, w, channels] and as many references, or one; got shapes "
            f"{x.shape} and {reference.shape}"
        )
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(reference))):
        raise ValueError("images must be finite")
    if not 0 < data_range < np.inf:
        raise ValueError(f"data_range must be positive, got {data_range!r}")
    return x, np.broadcast_to(reference, x.shape)
