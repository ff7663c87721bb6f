import matplotlib.image
import numpy as np

from jaxdiff.files import replacing
from jaxdiff.pictures import sample_grid


def test_a_row_is_a_class(tmp_path):
    """White images of class 1 and black ones of class 0, shuffled: black above, white below."""
    labels = np.array([1, 0, 1, 0, 1, 0, 1, 0])
    samples = np.where(labels[:, None, None, None] == 1, 1.0, -1.0) * np.ones((8, 8, 8, 1))
    sample_grid(tmp_path / "s.png", samples, labels)
    picture = matplotlib.image.imread(tmp_path / "s.png")[..., 0]
    height, width = picture.shape
    # Most of the middle columns is image: the margins stay white.
    middle = picture[:, width // 4 : -width // 8]
    dark = (middle < 0.05).mean(axis=1)
    assert dark[: height // 2].max() > 0.7 and dark[height // 2 + 2 :].max() < 0.05
    assert width > 200  # enlarged from 8 pixels


def test_pixels_are_clipped_not_rescaled(tmp_path):
    """A grey image stays grey beside one that leaves [-1, 1]."""
    samples = np.stack([np.zeros((8, 8, 3)), np.full((8, 8, 3), 5.0)])
    sample_grid(tmp_path / "s.png", samples)
    picture = matplotlib.image.imread(tmp_path / "s.png")[..., 0]
    levels, counts = np.unique(np.round(picture, 2), return_counts=True)
    assert 0.49 <= levels[counts > 500].min() <= 0.51


def test_latents_show_their_first_channels(tmp_path):
    image = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 4))
    pictures = {}
    for name, samples in (("all", image), ("three", image[..., :3]), ("two", image[..., :2]),
                          ("one", image[..., :1])):  # fmt: skip
        sample_grid(tmp_path / f"{name}.png", samples)
        pictures[name] = matplotlib.image.imread(tmp_path / f"{name}.png")
    np.testing.assert_array_equal(pictures["all"], pictures["three"])
    np.testing.assert_array_equal(pictures["two"], pictures["one"])


def test_vectors_become_points(tmp_path):
    sample_grid(tmp_path / "few.png", np.zeros((1, 2)), [0])
    spread = np.random.default_rng(0).uniform(-1, 1, (400, 2))
    sample_grid(tmp_path / "many.png", spread, np.arange(400) % 3)
    few, many = (matplotlib.image.imread(tmp_path / f"{n}.png")[..., :3] for n in ("few", "many"))
    coloured = [np.mean(np.ptp(p, axis=-1) > 0.2) for p in (few, many)]
    assert coloured[1] > 20 * coloured[0] > 0


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    try:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"] and path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"] and path.read_text() == "new"
