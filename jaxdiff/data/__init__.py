"""Data: sources (what an example is) and one loader (which examples make batch number n)."""

from jaxdiff.data.folder import ImageFolder, image_folder
from jaxdiff.data.loader import loader
from jaxdiff.data.sources import ArraySource, PatchSource, arrays, digits, photo_patches

__all__ = [
    "ArraySource",
    "ImageFolder",
    "PatchSource",
    "arrays",
    "digits",
    "image_folder",
    "loader",
    "photo_patches",
]
