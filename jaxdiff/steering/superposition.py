"""SuperDiff: sampling from several models at once, by their densities along the path: OR and AND.

Skreta, Atanackovic, Bose, Tong & Neklyudov, "The Superposition of Diffusion Models Using the Ito Density
Estimator" (2025). Steps of the reverse SDE with the score sum_i k_i s_i, sum_i k_i = 1, along which
log q_i of every model is known without a divergence (`jaxdiff.controls.ito_increment`). With dy the
step of y = x / alpha, and v = sigma^2 / alpha^2,

    OR     k = softmax(T log q_i + l_i):  the mixture of the q_i in proportion to exp(l_i), if T = 1
    AND    k such that the step changes all log q_i by the same:
           <s_i, dy> - (v - v') / 2 |s_i|^2 equal for all i,  dy = dy_0 + c sum_j k_j s_j

AND is a linear system in k of each sample: it needs the noise of the step, so k is chosen after it is
drawn. For two models in continuous time k_1 = [g^2 dtau (|s_1|^2 - |s_2|^2) / 2 - <g^2 s_2 dtau + g dW,
s_1 - s_2>] / (g^2 dtau |s_1 - s_2|^2), the paper's. Where the models agree, at much noise, the system
is singular and k far from [0, 1]: `bounds` clips it. AND samples where the densities are equal along the
whole path, which is not the product of the densities: for that see `jaxdiff.steering.corrector`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays, is_concrete, to_batch
from jaxdiff.controls.density import ito_increment
from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid
from jaxdiff.guidance.composition import Experts
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.predictions import PREDICTIONS, convert
from jaxdiff.solvers.clocks import check_choice
from jaxdiff.solvers.combine import with_outputs
from jaxdiff.solvers.tableau import Tableau
from jaxdiff.steering.scheme import check_family, steps, variances


class SuperpositionState(NamedTuple):
    """What the control carries; `sample(..., save="state").aux` is the last.

    log_density: log q_i of the state, in nats; shares: k_i of the last step; both [models, batch].
    """

    log_density: Float[Array, "models batch"]
    shares: Float[Array, "models batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Superposition(Control):
    """The control of `superposition`, which see.

    `gain` [rows]: what the new state has of the predicted noise; `ends` [rows, 2]: (alpha, sigma) at the
    end of each row's step.
    """

    gain: Any
    ends: Any
    temperature: Any
    bias: Any
    bounds: Any
    initial: Any
    reference: Any
    rule: str = dataclasses.field(metadata={"static": True})
    models: int = dataclasses.field(metadata={"static": True})
    prediction: str = dataclasses.field(metadata={"static": True})

    def init(self, x: Any) -> SuperpositionState:
        """The densities of the first state, and equal shares."""
        leaves = jax.tree.leaves(x)
        dtype = jnp.result_type(*leaves)
        shape = (self.models, leaves[0].shape[0])
        first = jnp.broadcast_to(jnp.asarray(self.initial, dtype), shape)
        return SuperpositionState(first, jnp.full(shape, 1.0 / self.models, dtype))

    def after(
        self, aux: SuperpositionState, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry,
        key: Any,
    ) -> tuple[Carry, SuperpositionState]:  # fmt: skip
        """Mix the parts anew, and follow the densities to where that leads."""
        if not isinstance(out, tuple) or len(out) != 1 + self.models:
            raise ValueError("a superposition needs the denoiser it was made for, with its parts")
        level = row.alpha, row.sigma
        used, *eps = (convert(o, x, self.prediction, "eps", *level) for o in out)
        end = tuple(jnp.asarray(self.ends)[row.index].astype(row.alpha.dtype))
        gain = jnp.asarray(self.gain)[row.index] * row.active
        (state,) = carry.registers
        bare = jax.tree.map(lambda a, e: a - gain.astype(a.dtype) * e, state, used)
        if self.rule == "or":
            shares = jax.nn.softmax(self.temperature * aux.log_density + self._bias(), 0)
        else:
            shares = self._equal(x, bare, eps, gain, level, end)
        shares = shares.astype(aux.shares.dtype)

        def mixed(a, *parts):
            total = sum(to_batch(k, a).astype(a.dtype) * p for k, p in zip(shares, parts))
            return a + gain.astype(a.dtype) * total

        new = jax.tree.map(mixed, bare, *eps)
        change = jnp.stack([ito_increment(x, e, new, level, end, self.reference) for e in eps])
        change = jnp.where(row.active != 0, change, 0.0).astype(aux.log_density.dtype)
        aux = SuperpositionState(
            aux.log_density + change, jnp.where(row.active != 0, shares, aux.shares)
        )
        return carry._replace(registers=(new,)), aux

    def _bias(self) -> Any:
        return 0.0 if self.bias is None else jnp.asarray(self.bias)[:, None]

    def _equal(self, x: Any, bare: Any, eps: Any, gain: Any, level: Any, end: Any) -> Array:
        """The shares of AND, [models, batch]: differences from the last model's, solved for."""
        (alpha, sigma), alpha1 = level, end[0]
        drop = (sigma / alpha) ** 2 - (end[1] / alpha1) ** 2

        def flat(tree):
            leaves = jax.tree.leaves(tree)
            return jnp.concatenate([a.reshape(a.shape[0], -1) for a in leaves], 1)

        s = jnp.stack([-(alpha / sigma) * flat(e) for e in eps])
        step = flat(jax.tree.map(lambda b, a: b / alpha1 - a / alpha, bare, x))
        pull = -gain / alpha1 * (sigma / alpha)  # y' moves by pull times the score
        apart = s[:-1] - s[-1]
        matrix = pull * jnp.einsum("ind,jnd->nij", apart, apart)
        known = jnp.einsum("ind,nd->ni", apart, step + pull * s[-1])
        squares = jnp.sum(s * s, -1)
        wanted = 0.5 * drop * (squares[:-1] - squares[-1]).T - known
        # Models that agree leave the matrix 0: then no share is better than another.
        size = jnp.einsum("nii->n", matrix) * jnp.finfo(matrix.dtype).eps
        ridge = jnp.maximum(size, jnp.finfo(matrix.dtype).tiny)[:, None, None]
        eye = jnp.eye(len(apart), dtype=matrix.dtype)
        first = jnp.linalg.solve(matrix + ridge * eye, wanted[..., None])[..., 0].T
        shares = jnp.concatenate([first, 1.0 - jnp.sum(first, 0, keepdims=True)])
        if self.bounds is None:
            return shares
        # Shrunk towards equal shares, as far as it takes: they go on summing to 1.
        low, high = self.bounds
        off = shares - 1.0 / self.models
        room = jnp.where(off > 0, high, low) - 1.0 / self.models
        least = jnp.min(jnp.where(off == 0, 1.0, room / jnp.where(off == 0, 1.0, off)), 0)
        return 1.0 / self.models + jnp.clip(least, 0.0, 1.0) * off


def superposition(
    denoiser: Denoiser, grid: Grid, tableau: Tableau, rule: str = "or",
    temperature: ArrayLike = 1.0, bias: ArrayLike | None = None,
    bounds: tuple[ArrayLike, ArrayLike] | None = (-5.0, 6.0), initial: ArrayLike = 0.0,
    reference: ArrayLike | None = 1.0,
) -> tuple[Tableau, Superposition]:  # fmt: skip
    """(tableau, control) that sample one model or another (OR), or what all find likely (AND):

        both = jd.guidance.product([one, other], keep_parts=True)
        tableau, control = superposition(both, grid, jd.solvers.ddpm(grid), "and")
        state = jd.sample(both, tableau, x_T, key, control=control, save="state")
        x, log_q = state.registers[0], state.aux.log_density

    No evaluation is added to the composition's own; its weights are replaced. Many steps are needed: the
    densities are followed to the order 1/2 of the step (see `jaxdiff.controls.density`).

    Arguments:
      denoiser: of `jaxdiff.guidance.product`, or `compose` without null_cond (one network under several
        conditions), with keep_parts=True; two models or more.
      grid, tableau: a sampler of one evaluation and one register a step without history, with the noise
        of the reverse SDE (tau = 1) in every step: `euler_maruyama`, `reverse_diffusion`, `ddpm`,
        `ddim(eta=1)`, `euler_ancestral`; lambda finite at both ends.
      rule: "or" or "and".
      temperature, bias: T, and l_i [models], of "or".
      bounds: of k_i in "and", (low, high) around 1 / models, or None; (-5, 6) for two models keeps
        what matters and is no part of the paper.
      initial: log q_i(x_T), a number, [batch] or [models, batch]; of "or" its differences count.
      reference: c of `jaxdiff.controls.ito_increment`; None for the published estimator. It adds the
        same to the density of every model.

    Raises TypeError or ValueError for another kind of denoiser, fewer than two models, a tableau that is
    not of that kind, an unknown rule, or bounds that leave out 1 / models.
    """
    if (
        not isinstance(denoiser, Denoiser)
        or not isinstance(denoiser.params, Experts)
        or isinstance(denoiser.prediction, str)
    ):
        raise TypeError(
            "superposition takes a denoiser of jaxdiff.guidance.compose or product with "
            "keep_parts=True"
        )
    models = len(denoiser.prediction) - 1
    if models < 2:
        raise ValueError(f"superposition takes two models or more, got {models}")
    check_choice("rule", rule, ("or", "and"))
    if bias is not None and np.shape(bias) != (models,):
        raise ValueError(f"bias must be [models] = ({models},), got shape {np.shape(bias)}")
    if bounds is not None and is_concrete(bounds) and not bounds[0] <= 1 / models <= bounds[1]:
        raise ValueError(f"bounds must hold 1 / {models}, got {bounds}")
    variances(grid, tableau, "superposition")
    if any(grid.ends):
        raise ValueError("superposition needs a grid to a t_min with sigma > 0")
    size = tableau.registers, tableau.history, tableau.outputs, tableau.rows
    if size != (1, 1, 1, grid.steps):
        raise ValueError(
            "superposition takes a tableau of one register, one integrand, one output and one row a "
            f"step, got {size[:3]} and {size[3]} rows for {grid.steps} steps"
        )
    check_family(grid, tableau, "superposition")
    v = (np.asarray(grid.sigma) / np.asarray(grid.alpha)) ** 2
    noise = np.log(np.maximum(steps(grid, tableau)[1], 1e-300) / (v[:-1] - v[1:]))
    h = 0.5 * np.log(v[:-1] / v[1:])
    if np.any((noise < -2.0 * h - 1e-3) | (noise > 0.6 * h + 1e-3)):
        i = int(np.argmax(np.abs(noise)))
        raise ValueError(
            f"step {i} has {np.exp(noise[i]):.3g} of the reverse SDE's noise: the Ito estimator needs "
            "all of it in every step (eta = 1, tau = 1)"
        )
    gain = tableau.B[:, 0, 0, 0] * tableau.u[:, 0, PREDICTIONS.index("eps")]
    ends = np.stack([grid.alpha[1:], grid.sigma[1:]], 1)
    data = gain, ends, temperature, bias, bounds, initial, reference
    control = Superposition(*as_arrays(data), rule, models, denoiser.predictions[0])
    return with_outputs(tableau, 1 + models), control
