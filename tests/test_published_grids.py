"""The published grids against the paper's table and the timesteps it was rounded to."""

import numpy as np
import pytest

from jaxdiff import grids, processes

DDPM = processes.ddpm("scaled_linear")
PROCESSES = {
    "stable_diffusion_1": DDPM,
    "stable_diffusion_xl": DDPM,
    "stable_video_diffusion": processes.edm(sigma_max=700.0),
}
# Sabour et al. 2024, appendix B.3, table 3.
TABLE = {
    "stable_diffusion_1": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152,
                           0.029],
    "stable_diffusion_xl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113,
                            0.029],
    "stable_video_diffusion": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173,
                               0.034, 0.002],
}  # fmt: skip
# The authors' page has the first, ComfyUI and diffusers both.
TIMESTEPS = {
    "stable_diffusion_1": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0],
    "stable_diffusion_xl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0],
}


@pytest.mark.parametrize("name", TABLE)
def test_levels_are_those_of_the_papers_table(name):
    """To 1.5%: timesteps are whole, but for video, which has none."""
    grid = grids.published(PROCESSES[name], name)
    rtol = 1e-4 if name == "stable_video_diffusion" else 0.015
    np.testing.assert_allclose(grid.sigma / grid.alpha, TABLE[name], rtol=rtol)


@pytest.mark.parametrize("name", TIMESTEPS)
def test_levels_are_those_of_the_timesteps(name):
    grid = grids.published(DDPM, name)
    np.testing.assert_allclose(grid.t, TIMESTEPS[name], atol=2e-3)
    # The last node at sigma = 0 stands for the table's last.
    ended = grids.published(DDPM, name, end="zero")
    assert ended.ends == (False, True)
    np.testing.assert_allclose(ended.t, TIMESTEPS[name], atol=2e-3)
    assert grids.published(DDPM, name, 6, end="zero").steps == 6


def test_resized_levels():
    """Log-linear in the node's index: 20 steps keep the nodes of 10, the new lie midway."""
    levels = np.array(TABLE["stable_diffusion_1"])
    np.testing.assert_allclose(grids.resized(levels, 10), levels, rtol=1e-14)
    found = grids.resized(levels, 20)
    np.testing.assert_allclose(found[::2], levels)
    np.testing.assert_allclose(found[1::2], np.sqrt(levels[1:] * levels[:-1]))
    third, sixth = (levels[i] ** a * levels[i + 1] ** (1 - a) for i, a in ((3, 2 / 3), (6, 1 / 3)))
    np.testing.assert_allclose(grids.resized(levels, 3), [levels[0], third, sixth, levels[-1]])


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: grids.published(DDPM, "stable_diffusion_1", end="data"), ValueError, "got 'data'"),
    (lambda: grids.published("vp", "stable_diffusion_1"), TypeError, "expected a process"),
    (lambda: grids.published(processes.edm(sigma_max=10.0), "stable_diffusion_1"), ValueError,
     "from 0.0291672 to 14.6146, the process from 0.002 to 10"),
    (lambda: grids.published(DDPM, "stable_diffusion"), ValueError,
     "'stable_diffusion'; did you mean stable_diffusion_1"),
    (lambda: grids.published(DDPM, "stable_diffusion_1", 0), ValueError, "at least 1, got 0"),
    (lambda: grids.resized([2.0, 1.0], 1.5), ValueError, "at least 1, got 1.5"),
    (lambda: grids.resized([1.0, 2.0], 3), ValueError, "positive, finite and fall"),
    (lambda: grids.resized([np.inf, 2.0], 3), ValueError, "positive, finite and fall"),
    (lambda: grids.resized([2.0, 0.0], 3), ValueError, "positive, finite and fall"),
])  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
