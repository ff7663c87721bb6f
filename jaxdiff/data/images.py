"""Encoded images to pixels: turned upright, cropped to a square and resized."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MODES = {1: "L", 3: "RGB"}  # Pillow's name for 8-bit images of that many channels


def check_image_options(size: int, channels: int, crop: str) -> None:
    """Raise ValueError for what `read_image` does not take."""
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if channels not in MODES:
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    if crop not in CROPS:
        raise ValueError(f"crop must be one of {list(CROPS)}, got {crop!r}")


def read_image(
    file: Path | BinaryIO, name: str, size: int, channels: int, crop: str
) -> UInt8[np.ndarray, "size size channels"]:
    """The pixels of an image file. Raises ValueError, with its `name`, if it is no 8-bit image."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # Pillow clips these instead of scaling them
                raise ValueError(f"it has mode {image.mode!r}; accepted: 8 bits a channel")
            upright = ImageOps.exif_transpose(image).convert(MODES[channels])
            fitted = CROPS[crop](upright, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {name!r}: {error}") from error
    return np.asarray(fitted).reshape(size, size, channels)


def _square(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def _adm(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        halves = (image.width // 2, image.height // 2)
        image = image.resize(halves, Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


CROPS = {"square": _square, "adm": _adm}
