"""A folder of images against pixels written here, and malformed folders and files."""

import numpy as np
import pytest
from PIL import Image

from jaxdiff import data


def _write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


def test_image_folder_crops_the_centre_and_resizes(tmp_path):
    wide = np.zeros((4, 12, 3))
    wide[:, 4:8] = [255, 51, 0]  # the central square; what surrounds it must not show
    _write(tmp_path / "a.png", wide)
    grey = np.kron(np.array([[0, 255], [255, 0]]), np.ones((4, 4)))
    _write(tmp_path / "deep" / "b.PNG", grey)
    source = data.image_folder(tmp_path, size=4)
    assert (len(source), source.shape, source.num_classes) == (2, (4, 4, 3), None)
    colour = np.broadcast_to([1, -0.6, -1], (4, 4, 3))
    np.testing.assert_allclose(source[0]["x"], colour, atol=1e-6)
    assert set(source[0]) == {"x"} and source[0]["x"].dtype == np.float32
    x = data.image_folder(tmp_path, size=8, channels=1)[1]["x"][..., 0]
    assert [x[0, 0], x[0, -1], x[-1, 0], x[-1, -1]] == [-1, 1, 1, -1]


def test_image_folder_turns_images_upright(tmp_path):
    pixels = np.zeros((8, 8))
    pixels[:, :4] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # stored so that it must be turned a quarter clockwise
    _write(tmp_path / "turned.png", pixels, exif=exif)
    x = data.image_folder(tmp_path, size=8, channels=1)[0]["x"][..., 0]
    np.testing.assert_array_equal(x[:4], 1.0)
    np.testing.assert_array_equal(x[4:], -1.0)


def test_image_folder_classes_are_sorted_sub_folders(tmp_path):
    _write(tmp_path / "dog" / "1.png", np.full((2, 2), 255))
    _write(tmp_path / "cat" / "kittens" / "2.png", np.zeros((2, 2)))
    _write(tmp_path / "cat" / "1.jpg", np.zeros((2, 2)))
    _write(tmp_path / ".cache" / "1.png", np.zeros((2, 2)))
    _write(tmp_path / "dog" / "._1.png", np.zeros((2, 2)))
    source = data.image_folder(tmp_path, size=2, classes=True, channels=1)
    assert len(source) == 3  # hidden files and folders do not count
    assert (source.class_names, source.num_classes) == (("cat", "dog"), 2)
    assert [int(source[i]["label"]) for i in range(3)] == [0, 0, 1]
    assert [float(source[i]["x"].mean()) for i in range(3)] == [-1, -1, 1]


def test_unreadable_images_are_named(tmp_path):
    _write(tmp_path / "fine.png", np.zeros((64, 64)))
    (tmp_path / "cut.png").write_bytes((tmp_path / "fine.png").read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("not an image")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    source = data.image_folder(tmp_path, size=4)
    names = {file.name: i for i, file in enumerate(source.files)}
    assert source[names["fine.png"]]["x"].shape == (4, 4, 3)
    for name, reason in (("cut.png", ""), ("text.jpg", "identify"), ("deep.png", "8 bits")):
        with pytest.raises(ValueError, match=rf"cannot read the image .*{name}.*{reason}"):
            source[names[name]]
    with pytest.raises(ValueError, match=r"cannot read the image .*cut\.png"):
        next(data.loader(source, batch_size=4, seed=0, threads=1))


def test_bad_image_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder: .*absent"):
        data.image_folder(tmp_path / "absent", size=8)
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(NotADirectoryError, match=r"note\.txt"):
        data.image_folder(tmp_path / "note.txt", size=8)
    with pytest.raises(ValueError, match=r"no images in .*accepted: \.bmp, \.jpeg"):
        data.image_folder(tmp_path, size=8)
    _write(tmp_path / "cat" / "1.png", np.zeros((2, 2)))
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="no images in the class folder .*dog"):
        data.image_folder(tmp_path, size=8, classes=True)
    _write(tmp_path / "dog" / "1.png", np.zeros((2, 2)))
    _write(tmp_path / "stray.png", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"sub-folder; .*stray\.png.* is not"):
        data.image_folder(tmp_path, size=8, classes=True)
    for options, message in (
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 8, "channels": 4}, r"1 \(grey\) or 3 \(RGB\), got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            data.image_folder(tmp_path, **options)


def test_adm_crop_halves_by_means_and_then_crops_the_middle(tmp_path):
    """40 x 24 at size 4: halved twice by means, the bicubic resize from 10 x 6, the middle."""

    def halved(pixels):  # along the rows, then the columns, each rounded to bytes, as in Pillow
        rows = np.floor((pixels[:, ::2] + 1.0 * pixels[:, 1::2]) / 2 + 0.5)
        return np.floor((rows[::2] + rows[1::2]) / 2 + 0.5).astype(np.uint8)

    pixels = np.random.default_rng(0).integers(0, 256, (24, 40), np.uint8)
    _write(tmp_path / "a.png", pixels)
    halves = halved(halved(pixels))
    assert halves.shape == (6, 10)
    small = np.asarray(Image.fromarray(halves).resize((7, 4), Image.Resampling.BICUBIC))
    x = data.image_folder(tmp_path, size=4, channels=1, crop="adm")[0]["x"]
    np.testing.assert_allclose((x[..., 0] + 1) * 127.5, small[:, 1:5], atol=1e-4)
    # No resize at all where the mean already fits: the field's own definition of the crop.
    exact = data.image_folder(tmp_path, size=12, channels=1, crop="adm")[0]["x"]
    np.testing.assert_allclose((exact[..., 0] + 1) * 127.5, halved(pixels)[:, 4:16], atol=1e-4)
    with pytest.raises(ValueError, match=r"crop must be one of \['square', 'adm'\], got 'left'"):
        data.image_folder(tmp_path, size=4, crop="left")


def test_imagenet_is_a_thousand_named_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no ImageNet in .*www\.image-net\.org/download"):
        data.imagenet(tmp_path / "train", 4)
    _write(tmp_path / "n00000000" / "1.JPEG", np.zeros((4, 4)))
    with pytest.raises(ValueError, match="1000 class folders n01440764, ..., got 1"):
        data.imagenet(tmp_path, 4)
    for i in range(1, 1000):
        folder = tmp_path / f"n{i:08d}"
        folder.mkdir()
        (folder / "1.JPEG").hardlink_to(tmp_path / "n00000000" / "1.JPEG")
    source = data.imagenet(tmp_path, 2)
    assert (len(source), source.num_classes, source.crop) == (1000, 1000, "adm")
    assert source[123]["label"] == 123 and source[123]["x"].shape == (2, 2, 3)
    (tmp_path / "n00000000").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="n01440764"):
        data.imagenet(tmp_path, 2)
