"""PSNR and SSIM against their definitions, written out pixel by pixel."""

import numpy as np
import pytest

from jaxdiff.metrics import psnr, ssim


def by_definition(x, y, data_range):
    """SSIM of two single-channel images by loops over windows (Wang et al. 2004, section III.C)."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    grid = np.arange(11) - 5
    w = np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mx, my = np.sum(w * a), np.sum(w * b)
            sx, sy = np.sum(w * (a - mx) ** 2), np.sum(w * (b - my) ** 2)
            sxy = np.sum(w * (a - mx) * (b - my))
            top = (2 * mx * my + c1) * (2 * sxy + c2)
            values.append(top / ((mx**2 + my**2 + c1) * (sx + sy + c2)))
    return np.mean(values)


def test_they_are_as_defined():
    rng = np.random.default_rng(0)
    y = rng.uniform(-1, 1, size=(2, 14, 13, 3))
    x = y + 0.3 * rng.normal(size=y.shape)
    want = [np.mean([by_definition(a[..., c], b[..., c], 2.0) for c in range(3)])
            for a, b in zip(x, y)]  # fmt: skip
    np.testing.assert_allclose(ssim(x, y), want, rtol=1e-10)
    np.testing.assert_allclose(ssim(x / 2, y / 2, data_range=1.0), want, rtol=1e-10)
    error = [np.mean((a - b) ** 2) for a, b in zip(x, y)]
    np.testing.assert_allclose(psnr(x, y), 10 * np.log10(4 / np.array(error)), rtol=1e-12)


def test_known_values():
    """Equal images; a constant shift; one image and its negative; one reference for all."""
    image = np.random.default_rng(1).uniform(-1, 1, size=(1, 12, 12))
    both = np.concatenate([image, image + 0.02])
    np.testing.assert_allclose(ssim(both, image)[0], 1.0)
    assert psnr(both, image)[0] == np.inf
    np.testing.assert_allclose(psnr(both, image)[1], 40.0, rtol=1e-12)
    # Flat images differ in the first factor alone, with C1 = 4e-4.
    flat = np.full((1, 11, 11), 0.5)
    np.testing.assert_allclose(ssim(-flat, flat), (-0.5 + 4e-4) / (0.5 + 4e-4), rtol=1e-10)


def test_bad_images_are_named():
    image = np.zeros((2, 12, 12))
    for other in (np.zeros((2, 12, 13)), np.zeros((3, 12, 12)), np.zeros(())):
        with pytest.raises(ValueError, match="as many references"):
            psnr(image, other)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(image[:, :10], image[:, :10])
    with pytest.raises(ValueError, match="must be finite"):
        psnr(image + np.nan, image)
    with pytest.raises(ValueError, match="data_range must be positive, got 0"):
        ssim(image, image, data_range=0)
