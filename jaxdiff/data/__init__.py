"""Data: sources (what an example is), one loader (which examples make batch number n), and what is
done to images in training."""

from jaxdiff.data.augment import Augmentation
from jaxdiff.data.cifar import CIFAR10, cifar10
from jaxdiff.data.folder import ImageFolder, image_folder, imagenet
from jaxdiff.data.loader import loader
from jaxdiff.data.parquet import ParquetSource, parquet
from jaxdiff.data.records import RecordSource, array_record, write_array_record
from jaxdiff.data.sources import ArraySource, PatchSource, arrays, digits, photo_patches

__all__ = [
    "Augmentation",
    "ArraySource",
    "CIFAR10",
    "ImageFolder",
    "ParquetSource",
    "PatchSource",
    "RecordSource",
    "array_record",
    "arrays",
    "cifar10",
    "digits",
    "image_folder",
    "imagenet",
    "loader",
    "parquet",
    "photo_patches",
    "write_array_record",
]
