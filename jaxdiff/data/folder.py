"""A folder of image files as a source; ImageNet's."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from jaxdiff.data.images import SUFFIXES, check_image_options, read_image
from jaxdiff.data.sources import from_bytes

_IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Image files, read when they are asked for; build one with `image_folder`.

    Attributes:
      files: the files, sorted by path.
      size: height and width after the resize.
      channels: 1 (grey) or 3 (RGB).
      crop: "square" or "adm".
      labels: a label for each file, or None.
      class_names: the sub-folder of each label; empty without labels.
    """

    files: tuple[Path, ...]
    size: int
    channels: int = 3
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    crop: str = "square"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size, self.channels)

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Raises ValueError, naming the file, if it cannot be read as an 8-bit image."""
        file = self.files[index]
        pixels = read_image(file, str(file), self.size, self.channels, self.crop)
        example = {"x": from_bytes(pixels)}
        return example if self.labels is None else example | {"label": np.int32(self.labels[index])}


def image_folder(
    path: str | Path, size: int, classes: bool = False, channels: int = 3, crop: str = "square"
) -> ImageFolder:
    """Images of a folder and its sub-folders: x [size, size, channels] in [-1, 1].

    Files are sorted by path, hidden ones left out, and read lazily. Each image is turned upright
    (EXIF), cropped to its central square, resized (bicubic, antialiased) and mapped by
    value / 127.5 - 1; transparency is dropped. `crop="adm"` resizes as ADM and DiT do: halved by
    means of 2 x 2 pixels while both sides stay at least `size`, the shorter side made `size`
    (bicubic), and then cropped (Dhariwal & Nichol 2021).

    Args:
      path: the folder; files ending in .bmp, .jpeg, .jpg, .png or .webp count.
      size: height and width wanted, at least 1.
      classes: label each image by the sub-folder of `path` it is in, numbered in sorted order.
      channels: 3 (RGB) or 1 (grey).
      crop: "square" or "adm".

    Raises:
      FileNotFoundError, NotADirectoryError: `path` is missing, or not a folder.
      ValueError: a bad argument, no images (in the folder or, with `classes`, in one of its
        sub-folders), or, with `classes`, an image outside every sub-folder. An unreadable file
        raises ValueError when it is read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {str(root)!r}")
    if not root.is_dir():
        raise NotADirectoryError(f"not a folder: {str(root)!r}")
    check_image_options(size, channels, crop)
    files = tuple(
        sorted(
            file
            for file in root.rglob("*")
            if file.suffix.lower() in SUFFIXES and not _hidden(file.relative_to(root))
        )
    )
    if not files:
        raise ValueError(f"no images in {str(root)!r}; accepted: {', '.join(SUFFIXES)}")
    if not classes:
        return ImageFolder(files, size, channels, crop=crop)
    folders = (entry for entry in root.iterdir() if entry.is_dir())
    names = tuple(sorted(entry.name for entry in folders if not _hidden(Path(entry.name))))
    owners = [file.relative_to(root).parts[0] for file in files]
    if stray := [file for file, owner in zip(files, owners, strict=True) if owner not in names]:
        raise ValueError(
            f"with classes=True each image is in a sub-folder; {str(stray[0])!r} is not"
        )
    if empty := sorted(set(names) - set(owners)):
        raise ValueError(f"no images in the class folder {str(root / empty[0])!r}")
    number = {name: i for i, name in enumerate(names)}
    labels = tuple(number[owner] for owner in owners)
    return ImageFolder(files, size, channels, labels, names, crop)


def imagenet(path: str | Path, size: int, crop: str = "adm") -> ImageFolder:
    """ImageNet (ILSVRC 2012): x [size, size, 3] in [-1, 1], labels 0 to 999.

    `path` is the folder of the training (or validation) images, in a sub-folder for each class,
    "n01440764" to "n15075141"; labels number them in this order, the field's. Decoding the
    photographs costs about 10 ms an example: for training, store the result once with
    `write_array_record`. Other arguments and errors as in `image_folder`; ValueError, too, for
    other sub-folders than those of 1,000 classes.
    """
    if not Path(path).expanduser().is_dir():
        raise FileNotFoundError(
            f"no ImageNet in {str(path)!r}: download ILSVRC2012_img_train.tar from "
            "https://www.image-net.org/download.php (free registration) and unpack it, and then "
            "each class's archive into a folder of its name (n01440764, ...)"
        )
    source = image_folder(path, size, classes=True, crop=crop)
    named = all(re.fullmatch(r"n\d{8}", name) for name in source.class_names)
    if not named or source.num_classes != _IMAGENET_CLASSES:
        raise ValueError(
            f"{str(path)!r} must hold the {_IMAGENET_CLASSES} class folders n01440764, ..., got "
            f"{source.num_classes}, the first {source.class_names[0]!r}"
        )
    return source


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
