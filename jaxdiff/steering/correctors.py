"""Feynman-Kac correctors: annealed, guided and product densities sampled as they are, by weights.

Skreta, Akhound-Sadegh, Ohanesian, Bondesan, Aspuru-Guzik, Doucet, Brekelmans, Tong & Neklyudov,
"Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts" (2025). Sampling with
the score S = sum_i b_i s_i of p = prod_i q_i^b_i at every level does not give p at the end, as the
noised product is not the product of the noised. The density that the reverse process should have is
p_t = prod_i q_{i,t}^b_i at every t, and with s_i the scores at x_t particles reach it with weights

    d log w = g^2 / 2 (|S|^2 - sum_i b_i |s_i|^2) dtau + (sum_i b_i - 1) div f dtau,

tau the reverse time, and resampling. Special cases, the paper's: annealing q^b has
g^2 / 2 b (b - 1) |s|^2; guidance q_1^(1-b) q_2^b has g^2 / 2 b (b - 1) |s_1 - s_2|^2; the product q_1
q_2 has g^2 <s_1, s_2>. For f linear in x its divergence is the same for all particles: it belongs to
the normaliser alone.

The paper's drift is that of tau = 1 (noise g dW). From the Fokker-Planck equation of
dx = [f x - (1 + tau^2) / 2 g^2 S] dt + tau g dW the weights are the same for every tau: the divergences
of the scores cancel whenever the drift is the one that keeps p_t's marginals for its noise. So any
sampler of that family can be corrected: `euler_maruyama` with the paper's steps, `ddpm`, `sa_solver`,
SDE-DPM-Solver++ and Langevin correctors, whose noise moves nothing in t; tau = 1 / sqrt(b) is the
paper's tempered noise. Above 1 the noise mixes the particles at each level, and their weights stay
even. A sum over rows takes the weights as constant from one evaluation to the next, so they are of
first order in the step, whatever the sampler's order. Samplers that go back up in noise (restarts,
churn), that renew all of it (consistency), or that change level without moving (annealed Langevin) are
none of that family, and refused.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import as_arrays, is_concrete
from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid
from jaxdiff.guidance.composition import Experts
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.predictions import convert
from jaxdiff.processes import Process
from jaxdiff.rows import at
from jaxdiff.solvers.combine import with_outputs
from jaxdiff.solvers.tableau import Tableau
from jaxdiff.steering.resampling import Resampler, inverse, per_sample_of
from jaxdiff.steering.scheme import (
    allowed_rows,
    check_family,
    regrown,
    variances,
)

BIRTH_DEATH = "birth_death"


class CorrectorState(NamedTuple):
    """What the control carries; `sample(..., save="state").aux` is the last.

    `log_weights` [batch]: of the particles, since their group was last resampled, up to a constant of
    the group; the final ones belong to the samples. `log_normaliser` [groups]: of log Z_0 / Z_T, Z_t the
    integral of p_t over x (meaningless with `clip` or birth-death). `ancestor` [batch]: each particle's
    first state's index: few different ones, and the group descends from few. `resamplings` [groups].
    """

    log_weights: Float[Array, " batch"]
    log_normaliser: Float[Array, " groups"]
    ancestor: Int[Array, " batch"]
    resamplings: Int[Array, " groups"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Corrector(Control):
    """The control of `corrector`, which see.

    `share` [rows]: 1 - v' / v, v = (sigma / alpha)^2 from row to row; `expansion` [rows]: the change of
    log alpha in a row; `allowed` [rows]: where particles may be resampled; `noise`: the tableau's C.
    """

    share: Any
    expansion: Any
    allowed: Any
    noise: Any
    exponents: Any
    clip: Any
    resampler: Resampler = dataclasses.field(metadata={"static": True})
    birth_death: bool = dataclasses.field(metadata={"static": True})
    prediction: str = dataclasses.field(metadata={"static": True})

    def init(self, x: Any) -> CorrectorState:
        """Equal weights."""
        leaves = jax.tree.leaves(x)
        zeros = jnp.zeros(leaves[0].shape[0], jnp.result_type(*leaves))
        groups = self.resampler.grouped(zeros).shape[0]
        return CorrectorState(
            zeros, zeros[:groups], jnp.arange(len(zeros)), jnp.zeros(groups, jnp.int32)
        )

    def after(
        self, aux: CorrectorState, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, CorrectorState]:
        """Weigh the particles for the row's step, and resample them before its noise."""
        change, dim = self._change(row, x, out)
        mean = jnp.mean(self.resampler.grouped(change), 1)
        change = change - per_sample_of(mean, len(change))
        if self.clip is not None:
            change = jnp.clip(change, -self.clip, self.clip)
        powers = jnp.sum(jnp.asarray(self.exponents)).astype(mean.dtype) - 1.0
        stretch = row.active * dim * powers * jnp.asarray(self.expansion)[row.index]
        log_weights = aux.log_weights + change
        totals = [
            jax.nn.logsumexp(self.resampler.grouped(w), 1) for w in (log_weights, aux.log_weights)
        ]
        grown = (totals[0] - totals[1] + mean - stretch).astype(mean.dtype)
        aux = aux._replace(log_normaliser=aux.log_normaliser + grown)
        if self.birth_death:
            index, chosen = self._reborn(key, change)
            log_weights = jnp.zeros_like(log_weights)
        elif self.resampler.threshold == 0:
            return carry, aux._replace(log_weights=log_weights)
        else:
            allowed = jnp.asarray(self.allowed)[row.index] & (row.active != 0)
            index, chosen = self.resampler(key, log_weights, allowed)
            log_weights = jnp.where(per_sample_of(chosen, len(index)), 0.0, log_weights)
        noise = None if self.noise is None else at(self.noise, row.index)
        return regrown(carry, noise, z, index), CorrectorState(
            log_weights, aux.log_normaliser, aux.ancestor[index],
            aux.resamplings + chosen.astype(jnp.int32),
        )  # fmt: skip

    def _change(self, row: RowInfo, x: Any, out: Any) -> tuple[Array, int]:
        """(the row's d log w but for the divergence, [batch]; the numbers in a sample)."""
        leaves = jax.tree.leaves(x)
        if not isinstance(out, tuple) or len(out) != 1 + len(self.exponents):
            raise ValueError(
                "a corrector needs the denoiser it was made for, with its parts "
                "(composition with keep_parts=True)"
            )
        eps = [convert(o, x, self.prediction, "eps", row.alpha, row.sigma) for o in out[1:]]
        batch = leaves[0].shape[0]

        def squares(tree):
            return sum(jnp.sum(jnp.square(a).reshape(batch, -1), 1) for a in jax.tree.leaves(tree))

        # |S|^2 - sum b |s|^2 by differences: what parts have in common does not cancel in rounding.
        powers = [jnp.asarray(b).astype(leaves[0].dtype) for b in self.exponents]
        rate = (sum(powers) - 1.0) * sum(b * squares(e) for b, e in zip(powers, eps))
        for (i, one), (j, other) in itertools.combinations(enumerate(eps), 2):
            apart = squares(jax.tree.map(jnp.subtract, one, other))
            rate = rate - powers[i] * powers[j] * apart
        share = jnp.asarray(self.share)[row.index]
        return 0.5 * share * row.active * rate, sum(a.size for a in leaves) // batch

    def _reborn(self, key: Any, change: Array) -> tuple[Array, Array]:
        """Particles below the mean die at their rate, those above it have the places."""
        grouped = self.resampler.grouped(change)
        groups, k = grouped.shape
        keys = self.resampler.keys(key, groups, k)

        def one(key, change):
            deaths, births = jax.random.split(key)
            dies = jax.random.uniform(deaths, (k,)) < -jnp.expm1(jnp.minimum(change, 0.0))
            parent = inverse(jnp.maximum(change, 0.0), jax.random.uniform(births, (k,)))
            return jnp.where(dies, parent, jnp.arange(k)), jnp.any(dies)

        index, chosen = jax.vmap(one)(keys, grouped)
        return (index + k * jnp.arange(groups)[:, None]).reshape(-1), chosen


def corrector(
    denoiser: Denoiser, grid: Grid, tableau: Tableau, particles: int | None = None,
    scheme: str = "systematic", threshold: float = 0.5, clip: ArrayLike | None = None,
    rows: Sequence[int] | None = None,
) -> tuple[Tableau, Corrector]:  # fmt: skip
    """(tableau, control) that sample the product of powers which a composition stands for:

        annealed = jd.guidance.product([model], [2.0], keep_parts=True)
        tableau, control = corrector(annealed, grid, jd.solvers.euler_maruyama(grid), particles=64)
        x_T = start(annealed, process, key, shape)
        state = jd.sample(annealed, tableau, x_T, key, control=control, save="state")
        x, log_weights = state.registers[0], state.aux.log_weights

    No evaluation is added to the composition's own. Weights are of first order: take many steps.

    Arguments:
      denoiser: of `jaxdiff.guidance.product` or `compose` with keep_parts=True and weights that do not
        change with the level: the exponents b_i. `compose([s], null_cond=...)` is guidance at s.
      grid, tableau: a sampler of the family in this module, with alpha > 0 at the noise end. One
        without noise takes threshold=0: its copies would stay together.
      particles: k, the size of the groups; None: the batch is one. Samples of a group must have one
        condition.
      scheme: of `jaxdiff.steering.SCHEMES`, or "birth_death", the paper's jump process: in every row a
        particle whose d log w is below its group's mean dies with probability
        1 - exp(d log w - mean), and one above it takes the place; the weights stay equal.
      threshold: resample a group where its effective sample size falls below threshold k; 1: in every
        row; 0: never, for importance weights.
      clip: bound on |d log w - its mean| of a row, the published code's 1 or 2: less variance, some
        bias. None: no bound.
      rows: where resampling is allowed; all by default.

    Raises TypeError or ValueError for another kind of denoiser, weights in time, a tableau that is not
    of the grid or not of the family, rows that it lacks, or as `Resampler`.
    """
    experts = denoiser.params if isinstance(denoiser, Denoiser) else None
    if not isinstance(experts, Experts) or isinstance(denoiser.prediction, str):
        raise TypeError(
            "corrector takes a denoiser of jaxdiff.guidance.compose or product with keep_parts=True"
        )
    if not experts.constant:
        raise ValueError("corrector takes weights that are numbers, not functions of the level")
    exponents = experts.exponents(None, None, None)
    if any(np.ndim(b) for b in exponents):
        raise ValueError(f"corrector takes one exponent a density, got {exponents}")
    if any(np.ndim(leaf) for leaf in jax.tree.leaves(denoiser.memory)):
        raise ValueError("corrector takes a denoiser whose memory holds no array: none is resampled")
    here, after = variances(grid, tableau, "corrector")
    check_family(grid, tableau, "corrector")
    birth_death = scheme == BIRTH_DEATH
    resampler = Resampler(particles, "systematic" if birth_death else scheme, threshold)
    if not tableau.stochastic and (birth_death or threshold > 0):
        raise ValueError(
            "a sampler without noise never parts the copies of a particle: take a stochastic tableau, "
            "or threshold=0 for importance weights"
        )
    if clip is not None and is_concrete(clip) and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip!r}")
    log_alpha = np.log(np.append(tableau.alpha, grid.alpha[-1]))
    control = Corrector(
        *as_arrays((
            1.0 - after / here, np.diff(log_alpha), allowed_rows(tableau, rows),
            tableau.C if tableau.stochastic else None, tuple(exponents), clip,
        )),
        resampler, birth_death, denoiser.predictions[0],
    )  # fmt: skip
    return with_outputs(tableau, len(denoiser.predictions)), control


def start(denoiser: Denoiser, process: Process, key: Array, shape: tuple[int, ...]) -> Array:
    """x_T of a corrected composition: the prior with its variance over the sum of the exponents.

    `prior^b` of a normal is a normal of its variance over b. Raises ValueError if the exponents do not
    sum to a positive number, TypeError for a denoiser that is no composition.
    """
    if not isinstance(denoiser, Denoiser) or not isinstance(denoiser.params, Experts):
        raise TypeError("start takes a denoiser of jaxdiff.guidance.compose or product")
    if not denoiser.params.constant:
        raise ValueError("start takes weights that are numbers, not functions of the level")
    total = sum(denoiser.params.exponents(None, None, None))
    if is_concrete(total) and not np.all(np.asarray(total) > 0):
        raise ValueError(f"the exponents must sum to a positive number, got {total}")
    return process.prior(key, shape) / jnp.sqrt(jnp.asarray(total, jnp.float32))
