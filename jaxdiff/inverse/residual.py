"""Restoration by RDDM: from a degraded image to the clean one, through its residual and its noise.

Liu, Wang, Fan, Wang, Tang & Qu, "Residual Denoising Diffusion Models" (2024). The process is
`jaxdiff.processes.residual` (or any other: alpha = 1 - A, sigma = B), the step
`jaxdiff.solvers.residual` (or any other). Networks see I_t and I_in; the state is x = I - I_in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays
from jaxdiff.denoisers import Denoiser, level
from jaxdiff.processes import Process
from jaxdiff.sampling import sample
from jaxdiff.solvers.tableau import Tableau

_PREDICTS = {"both": ("x0", "eps"), "residual": "x0", "noise": "eps"}


def residual_denoiser(fn: Callable, params: Any = None, predicts: str = "both") -> Denoiser:
    """The denoiser of x = I - I_in from a network of RDDM; cond is I_in.

    Arguments:
      fn: fn([params,] I_t, (A, B), I_in) -> (I_res, eps), or one of them.
      predicts: "both"; "residual" or "noise", and then the other follows from x_t = -(1 - A) I_res +
        B eps. (Which is best depends on the task; the paper learns it.)

    With "both" it takes `jaxdiff.solvers.residual` (or `ddim(grid, outputs=2)`). Raises ValueError
    for another `predicts`.
    """
    if predicts not in _PREDICTS:
        raise ValueError(f"predicts must be one of {list(_PREDICTS)}, got {predicts!r}")
    return Denoiser(
        _Centred(fn, predicts, params is not None), _PREDICTS[predicts], (params,), level
    )


@dataclasses.dataclass(frozen=True)
class _Centred:
    fn: Callable
    predicts: str
    has_params: bool

    def __call__(self, params, x, levels, cond=None):
        _, alpha, sigma = levels
        image = jax.tree.map(jnp.add, x, cond)
        out = self.fn(*params[: self.has_params], image, (1.0 - alpha, sigma), cond)
        negated = lambda tree: jax.tree.map(jnp.negative, tree)  # noqa: E731
        if self.predicts == "both":
            return negated(out[0]), out[1]
        return out if self.predicts == "noise" else negated(out)

    def check(self, params, batch, cond, alpha):
        if cond is None:
            raise ValueError("a residual denoiser needs cond: the inputs I_in, [batch, ...]")


def restore(
    denoiser: Denoiser, tableau: Tableau, inputs: Any, noise: Any, key: Array | None = None,
    save: str = "final",
) -> Any:  # fmt: skip
    """Restore `inputs`: start from I_in + noise, sample the residual, return images.

    Arguments:
      denoiser: of x = I - I_in under cond = I_in, such as `residual_denoiser` makes.
      tableau: any sampler on a grid from the noise end, where alpha = 1 - A is 0 (or near it).
      inputs: I_in, leaves [batch, ...].
      noise: B(T) eps, of their shapes: `process.prior(key, inputs.shape)`.
      key: for stochastic tableaux: one key, or one per sample.
      save: as in `jaxdiff.sample`, of "final", "trajectory", "nodes" and "x0"; all are images.

    Raises ValueError for another save, and what `jaxdiff.sample` raises.
    """
    if save not in ("final", "trajectory", "nodes", "x0"):
        raise ValueError(f"save must be 'final', 'trajectory', 'nodes' or 'x0', got {save!r}")
    inputs = jax.tree.map(jnp.asarray, as_arrays(inputs))
    out = sample(denoiser, tableau, noise, key, cond=inputs, save=save)
    return jax.tree.map(jnp.add, out, inputs)


def residual_loss(
    denoiser: Denoiser, process: Process, x0: Any, inputs: Any, t: Float[ArrayLike, " batch"],
    eps: Any, norm: str = "l1", weights: tuple[ArrayLike, ArrayLike] = (1.0, 1.0),
) -> Float[Array, " batch"]:  # fmt: skip
    """RDDM's loss, one per sample: w_res |I_res_hat - I_res| + w_eps |eps_hat - eps|.

    Means over a sample's entries.

    Arguments:
      denoiser: of `residual_denoiser`; of "residual" or "noise" alone the other term is left out.
      process: gives alpha = 1 - A and sigma = B at t.
      x0, inputs, eps: I_0, I_in and standard normals, of one structure, leaves [batch, ...].
      t: times of `process`, [batch] or a scalar.
      norm: "l1", the paper's, or "l2" (squares), whose minimiser is the conditional mean.

    Raises ValueError for another norm, a denoiser of anything else, or structures that differ.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm must be 'l1' or 'l2', got {norm!r}")
    if denoiser.prediction not in _PREDICTS.values():
        raise ValueError(
            f"residual_loss takes a denoiser of {list(_PREDICTS.values())}, it predicts "
            f"{denoiser.prediction!r}"
        )
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (x0, inputs, eps)]
    if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        raise ValueError(f"x0, inputs and eps must have one structure and shape, got {shapes}")
    alpha, sigma = process.alpha(t), process.sigma(t)
    target = jax.tree.map(jnp.subtract, x0, inputs)
    x = process.perturb(target, eps, t)
    out = denoiser(x, t, alpha, sigma, inputs)
    outs = (out,) if isinstance(denoiser.prediction, str) else out
    known = {"x0": (target, weights[0]), "eps": (eps, weights[1])}
    loss = 0.0
    for name, got in zip(denoiser.predictions, outs):
        want, weight = known[name]
        loss += weight * _distance(got, want, norm)
    return loss


def _distance(got: Any, want: Any, norm: str) -> Float[Array, " batch"]:
    leaves = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    power = jnp.abs if norm == "l1" else jnp.square
    total = sum(jnp.sum(power(a - b), axis=tuple(range(1, jnp.ndim(b)))) for a, b in leaves)
    return total / sum(b[0].size for _, b in leaves)
