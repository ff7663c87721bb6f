"""BoundaryDiffusion: semantic edits by one step across a hyperplane, with a frozen network.

Zhu, Wu, Deng, Russakovsky & Yan, "Boundary Guided Learning-Free Semantic Control with Diffusion Models"
(2023). Data are inverted by DDIM up to a mixing step t_m, not to the noise's end. There a linear support
vector machine separates the labelled latents z = x_{t_m}, and another the features h of the network's
bottleneck; with unit normal n and signed distance <n, v> + b to the plane, an edit moves

    v' = v + (d - <n, v> - b) n

to the distance d of one's choice, once, for z and for h, and the sampler goes on from t_m, in the paper
with eta = 1. (The published code leaves out b, so that its d is counted from the parallel plane
through 0.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float
from scipy import stats
from sklearn.svm import SVC

from jaxdiff.arrays import to_batch
from jaxdiff.denoisers import Denoiser
from jaxdiff.editing.features import block_outputs, replace_block
from jaxdiff.grids import Grid
from jaxdiff.sampling import sample
from jaxdiff.solvers.tableau import Tableau


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Boundary:
    """A hyperplane <n, v> + b = 0; the labelled side is where that is positive.

    Attributes:
      normal: n, of unit length, in one latent's shape.
      offset: b, a scalar.
    """

    normal: Array
    offset: Array

    def distance(self, v: Float[Array, "batch ..."]) -> Float[Array, " batch"]:
        """The signed distance of latents [batch, ...] to the plane."""
        flat = v.reshape(v.shape[0], -1)
        return flat @ self.normal.reshape(-1).astype(v.dtype) + self.offset.astype(v.dtype)

    def move(self, v: Float[Array, "batch ..."], distance: ArrayLike) -> Float[Array, "batch ..."]:
        """v along the normal to a signed distance, a scalar or [batch]; its own leaves v as it is."""
        by = jnp.asarray(distance, v.dtype) - self.distance(v)
        return v + to_batch(by, v) * self.normal.astype(v.dtype)


def fit_boundary(
    latents: Float[ArrayLike, "n ..."], positive: Bool[ArrayLike, " n"], penalty: float = 1.0
) -> Boundary:
    """The linear support vector machine that separates labelled latents.

    Arguments:
      latents: [n, ...], at least one of each kind.
      positive: whether each has the attribute.
      penalty: scikit-learn's C.

    Raises ValueError for other shapes, labels of one kind, or a penalty that is not positive.
    """
    latents, positive = np.asarray(latents), np.asarray(positive)
    if latents.ndim < 2 or positive.shape != latents.shape[:1]:
        raise ValueError(
            f"need latents [n, ...] and n labels, got shapes {latents.shape} and {positive.shape}"
        )
    if set(np.unique(positive).tolist()) != {False, True}:
        raise ValueError("labels must be booleans (or 0 and 1) of both kinds")
    if not penalty > 0:
        raise ValueError(f"penalty must be positive, got {penalty!r}")
    machine = SVC(kernel="linear", C=penalty).fit(latents.reshape(len(latents), -1), positive)
    normal = machine.coef_[0]
    length = np.linalg.norm(normal)
    dtype = jnp.result_type(float)
    return Boundary(
        jnp.asarray((normal / length).reshape(latents.shape[1:]), dtype),
        jnp.asarray(machine.intercept_[0] / length, dtype),
    )


def cross_boundary(
    denoiser: Denoiser, tableau: Tableau, x: Float[Array, "batch ..."], boundary: Boundary,
    distance: ArrayLike, h_boundary: Boundary | None = None, h_distance: ArrayLike = 0.0,
    block: str = "middle_block_1", cond: Any = None, key: Array | None = None,
) -> Float[Array, "batch ..."]:  # fmt: skip
    """Move latents at t_m across a boundary, once, and sample on.

    Arguments:
      tableau: from t_m on: `ddim(grid, eta=1)` in the paper, eta = 0 to reconstruct.
      x: latents at the tableau's first node, e.g. by DDIM on the grid reversed.
      boundary, distance: of z, and where to; `boundary.distance(x)` moves nothing.
      h_boundary, h_distance: of the output of `block` at (x, t_m), before z moves; in the first row
        alone the network then uses the moved h in place of its own. (The published code goes on with
        each row's h in the row after it.)
      cond: of the denoiser, which must not be guided if h moves.
      key: for a stochastic tableau.
    """
    if h_boundary is not None:
        level = tuple(jnp.asarray(c)[0] for c in (tableau.t, tableau.alpha, tableau.sigma))
        h = block_outputs(denoiser, (block,), x, *level, cond)[block]
        denoiser = replace_block(denoiser, block, h_boundary.move(h, h_distance), level[0])
    return sample(denoiser, tableau, boundary.move(x, distance), key=key, cond=cond)


def mixing_step(states: Float[ArrayLike, "nodes n ..."], grid: Grid, tolerance: float = 0.1) -> int:
    """The node at which inverted data have mixed: their radii are those of the noise end.

    By analogy with the mixing time of a Markov chain, min {k: distance(k, K) <= tolerance from k on},
    with the Kolmogorov-Smirnov distance between the samples' radii |x_k| / sqrt(alpha_k^2 +
    sigma_k^2) at node k and at the last, noisiest one. The paper searches for t_m by the radii of
    latents, too, but publishes code for the radii only: the distance and its tolerance are this
    library's.

    Arguments:
      states: of the inversion, `sample(..., save="nodes")` on a reversed grid.
      grid: that grid, from data to noise.
      tolerance: in (0, 1).

    Returns k; t_m is grid.t[k]. Raises ValueError for another grid, number of nodes, or tolerance, and
    for states that are not finite.
    """
    states = np.asarray(states, np.float64)
    if not grid.backward or len(states) != len(grid):
        raise ValueError(
            f"need the states at every node of a reversed grid, got {len(states)} states and "
            f"{len(grid)} nodes{'' if grid.backward else ' of a grid from noise to data'}"
        )
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1), got {tolerance!r}")
    if not np.all(np.isfinite(states)):
        raise ValueError("the states must be finite")
    size = np.hypot(np.asarray(grid.alpha), np.asarray(grid.sigma))
    radii = np.linalg.norm(states.reshape(*states.shape[:2], -1), axis=2) / size[:, None]
    apart = [stats.ks_2samp(r, radii[-1]).statistic > tolerance for r in radii]
    return int(np.max(np.flatnonzero(apart), initial=-1)) + 1
