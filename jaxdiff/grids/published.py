"""Grids that were fitted to released networks; a grid's levels for another number of steps."""

import numpy as np
from jaxtyping import ArrayLike, Float

from jaxdiff.arrays import is_concrete
from jaxdiff.grids.grid import Grid, check, check_steps, from_times
from jaxdiff.names import unknown
from jaxdiff.processes import Process

# sigma / alpha of 11 nodes. Sabour et al. have all three to three decimals (appendix B.3, table 3);
# that of Stable Video Diffusion is the table's own. The other two are levels of the networks' own
# schedule, within 1.5% of the table: Stable Diffusion 1.5 at timesteps 999, 850, 736, 645, 545,
# 455, 343, 233, 124, 24, 0, which are on the authors' page, research.nvidia.com/labs/toronto-ai/
# AlignYourSteps/howto.html; SDXL at 999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0, which are in
# the copies in ComfyUI and diffusers.
PUBLISHED = {
    "stable_diffusion_1": (
        14.6146412, 6.4745761, 3.8636746, 2.6946152, 1.8841921, 1.3943805, 0.9642584, 0.6523686,
        0.3977456, 0.1515233, 0.0291672,
    ),
    "stable_diffusion_xl": (
        14.6146412, 6.3184485, 3.7681790, 2.1811481, 1.3405245, 0.8620721, 0.5550693, 0.3798541,
        0.2332364, 0.1114188, 0.0291672,
    ),
    "stable_video_diffusion": (
        700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002,
    ),
}  # fmt: skip


def published(process: Process, name: str, steps: int = 10, end: str = "t_min") -> Grid:
    """The grid that the authors fitted to a network, `resized` if not of 10 steps.

    Sabour, Fidler & Kreis, "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models"
    (2024), for `stable_diffusion_1`, `stable_diffusion_xl` or `stable_video_diffusion`;
    `jaxdiff.calibration.aligned_grid` fits one to a network of yours. `end="zero"` puts sigma = 0
    in the last node's place, as is usual with these networks. Raises ValueError for another name,
    or a process that does not reach these levels (to 1e-4 of them).
    """
    check(process, end)
    if name not in PUBLISHED:
        raise ValueError(unknown("unknown published grid", name, PUBLISHED))
    if not is_concrete(process):
        raise ValueError("a published grid needs a process whose values are known, not traced")
    nodes = resized(PUBLISHED[name], steps)
    reach = [float(process.half_log_snr(t)) for t in (process.t_max, process.t_min)]
    lam = -np.log(nodes)
    inside = np.clip(lam, *reach)
    if np.any(np.abs(inside - lam) > 1e-4):
        low, high = np.exp(-np.asarray(reach[::-1]))
        raise ValueError(
            f"{name} has sigma / alpha from {nodes[-1]:g} to {nodes[0]:g}, the process from "
            f"{low:g} to {high:g}"
        )
    return from_times(process, process.time(inside if end == "t_min" else inside[:-1]), end)


def resized(levels: Float[ArrayLike, " nodes"], steps: int) -> Float[np.ndarray, " n"]:
    """Levels sigma / alpha for another number of steps: log-linear between nodes, by their index.

    `from_times(process, process.time(-np.log(resized(grid.sigma / grid.alpha, steps))))`. The ends
    stay. Raises ValueError for steps below 1, or levels that do not fall, or are not positive and
    finite.
    """
    levels = np.asarray(levels, np.float64)
    fall = levels.ndim == 1 and len(levels) > 1 and np.all(np.diff(levels) < 0)
    if not (fall and levels[-1] > 0 and levels[0] < np.inf):
        raise ValueError(f"levels must be positive, finite and fall, got {levels}")
    check_steps(steps)
    places = np.linspace(0.0, len(levels) - 1.0, steps + 1)
    found = np.exp(np.interp(places, np.arange(len(levels)), np.log(levels)))
    found[[0, -1]] = levels[[0, -1]]
    return found
