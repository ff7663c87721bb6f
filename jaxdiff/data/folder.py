"""A folder of image files as a source."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from jaxdiff.data.sources import from_bytes

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_MODES = {1: "L", 3: "RGB"}  # Pillow's name for 8-bit images of that many channels


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Image files, read when they are asked for; build one with `image_folder`.

    Attributes:
      files: the files, sorted by path.
      size: height and width after the resize.
      channels: 1 (grey) or 3 (RGB).
      labels: a label for each file, or None.
      class_names: the sub-folder of each label; empty without labels.
    """

    files: tuple[Path, ...]
    size: int
    channels: int = 3
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()

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
        example = {"x": from_bytes(self._read(self.files[index]))}
        return example if self.labels is None else example | {"label": np.int32(self.labels[index])}

    def _read(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):  # Pillow clips these instead of scaling them
                    raise ValueError(f"it has mode {image.mode!r}; accepted: 8 bits a channel")
                upright = ImageOps.exif_transpose(image).convert(_MODES[self.channels])
                fitted = ImageOps.fit(
                    upright, (self.size, self.size), method=Image.Resampling.BICUBIC
                )
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read the image {str(file)!r}: {error}") from error
        return np.asarray(fitted).reshape(self.shape)


def image_folder(
    path: str | Path, size: int, classes: bool = False, channels: int = 3
) -> ImageFolder:
    """Images of a folder and its sub-folders: x [size, size, channels] in [-1, 1].

    Files are sorted by path, hidden ones left out, and read lazily. Each image is turned upright
    (EXIF), cropped to its central square, resized (bicubic, antialiased) and mapped by
    value / 127.5 - 1; transparency is dropped.

    Args:
      path: the folder; files ending in .bmp, .jpeg, .jpg, .png or .webp count.
      size: height and width wanted, at least 1.
      classes: label each image by the sub-folder of `path` it is in, numbered in sorted order.
      channels: 3 (RGB) or 1 (grey).

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
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if channels not in _MODES:
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    files = tuple(
        sorted(
            file
            for file in root.rglob("*")
            if file.suffix.lower() in _SUFFIXES and not _hidden(file.relative_to(root))
        )
    )
    if not files:
        raise ValueError(f"no images in {str(root)!r}; accepted: {', '.join(_SUFFIXES)}")
    if not classes:
        return ImageFolder(files, size, channels)
    folders = (entry for entry in root.iterdir() if entry.is_dir())
    names = tuple(sorted(entry.name for entry in folders if not _hidden(Path(entry.name))))
    owners = [file.relative_to(root).parts[0] for file in files]
    if stray := [file for file, owner in zip(files, owners, strict=True) if owner not in names]:
        raise ValueError(
            f"with classes=True each image is in a sub-folder; {str(stray[0])!r} is not"
        )
    if empty := sorted(set(names) - set(owners)):
        raise ValueError(f"no images in the class folder {str(root / empty[0])!r}")
    return ImageFolder(files, size, channels, tuple(map(names.index, owners)), names)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
