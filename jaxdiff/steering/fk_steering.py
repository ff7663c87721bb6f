"""Feynman-Kac steering: particles of any sampler with noise, to p(x_0) exp(lambda r(x_0)).

Singhal, Horvitz, Teehan, Ren, Yu, McKeown & Ranganath, "A General Framework for Inference-time Scaling
and Steering of Diffusion Models" (2025). k particles are sampled side by side; at chosen rows each is
scored by a reward r_t of the x_0 that the network predicts (or of samples of x_0), weighted by a
potential G_t, and particles are resampled in proportion to the weights. With r_0, r_1, ... the rewards
in the order in which they are made,

    difference    G = exp(lambda (r_i - r_{i-1})),  r_{-1} = 0
    max           G = exp(lambda max_{j <= i} r_j)
    sum           G = exp(lambda sum_{j <= i} r_j)

and the last, on the final state itself, is exp(lambda r(x_0)) over the product of those before: the
product of all is exp(lambda r(x_0)), whatever the rewards in between, so that the weighted particles
are p(x_0) exp(lambda r(x_0)) as k grows. Nothing is differentiated, and no evaluation is added.

Where this differs from the published code: weights of rows that do not resample are kept (there, with
adaptive resampling, they are lost), the last max potential too has exp(lambda r(x_0)) in it (there the
running maximum), particles are resampled before the row's noise is drawn, not after, and degenerate
weights are an error, not equal weights. Not resampling at all is importance sampling, and its
highest reward best-of-k (`best`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import as_arrays, is_concrete, to_batch
from jaxdiff.denoisers import Denoiser
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.noise import is_key_batch, normal
from jaxdiff.rows import at, denoised, like
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.tableau import Tableau
from jaxdiff.steering.resampling import Resampler, checked, per_sample_of
from jaxdiff.steering.scheme import allowed_rows, regrown

POTENTIALS = ("difference", "max", "sum")
Reward = Callable[..., Float[Array, " batch"]]
Proposal = Callable[[Any, Any, tuple[Any, Any, Any]], Any]


class SteeringState(NamedTuple):
    """What the control carries; `sample(..., save="state").aux` is the last. All but two are [batch].

    `log_weights`: of the particles since their group was last resampled; those of the result.
    `reward`: the last one made, in the end r(x_0) (lambda r for samples of x_0 is a log-mean). `best`,
    `total`: the highest and the sum of the rewards so far. `log_potentials`: the sum of log G along the
    particle's path. `ancestor`: its first state's index. `log_normaliser` [groups]: log of the estimate
    of E exp(lambda r(x_0)). `resamplings` [groups].
    """

    log_weights: Float[Array, " batch"]
    reward: Float[Array, " batch"]
    best: Float[Array, " batch"]
    total: Float[Array, " batch"]
    log_potentials: Float[Array, " batch"]
    ancestor: Int[Array, " batch"]
    log_normaliser: Float[Array, " groups"]
    resamplings: Int[Array, " groups"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FKSteering(Control):
    """The control of `fk_steering`, which see."""

    denoiser: Denoiser
    params: Any
    strength: Any
    scored: Any
    last: Any
    noise: Any
    proposal: Any
    reward: Reward = dataclasses.field(metadata={"static": True})
    potential: str = dataclasses.field(metadata={"static": True})
    finish: str = dataclasses.field(metadata={"static": True})
    samples: int = dataclasses.field(metadata={"static": True})
    resampler: Resampler = dataclasses.field(metadata={"static": True})

    def init(self, x: Any) -> SteeringState:
        """Equal weights, no reward."""
        leaves = jax.tree.leaves(x)
        zeros = jnp.zeros(leaves[0].shape[0], jnp.result_type(*leaves))
        groups = self.resampler.grouped(zeros).shape[0]
        return SteeringState(
            zeros, zeros, jnp.full_like(zeros, -jnp.inf), zeros, zeros, jnp.arange(len(zeros)),
            zeros[:groups], jnp.zeros(groups, jnp.int32),
        )  # fmt: skip

    def after(
        self, aux: SteeringState, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, SteeringState]:
        """Score, weigh and resample where it is time to."""
        last = row.index == self.last
        noise = None if self.noise is None else at(self.noise, row.index)

        def steer(given):
            carry, aux = given
            aux = self._weighed(aux, self._reward(row, x, out, key), False)
            return self._resampled(carry, aux, key, noise, z)

        def end(given):
            carry, aux = given
            aux = self._weighed(aux, self._scores(carry.registers[0]), True)
            if self.finish == "weights":
                kept = checked(self.resampler.grouped(aux.log_weights)).reshape(-1)
                return carry, aux._replace(log_weights=kept)
            return self._resampled(carry, aux, key, None, None, self.finish == "resample")

        time = (jnp.asarray(self.scored)[row.index] & (row.active != 0)).astype(jnp.int32)
        branch = jnp.where(last, 2, time)
        return jax.lax.switch(branch, [lambda given: given, steer, end], (carry, aux))

    def _scores(self, x0: Any) -> Array:
        batch = jax.tree.leaves(x0)[0].shape[0]
        args = () if self.params is None else (self.params,)
        found = self.reward(*args, x0)
        if jnp.shape(found) != (batch,):
            raise ValueError(f"the reward must return [batch] = ({batch},), got {jnp.shape(found)}")
        return found

    def _reward(self, row: RowInfo, x: Any, out: Any, key: Any) -> Array:
        """Of the predicted x_0, or the log-mean-exp over samples of it."""
        levels = row.t, row.alpha, row.sigma
        outs = (out,) if isinstance(self.denoiser.prediction, str) else tuple(out)
        x0 = denoised(self.denoiser, levels, tuple(like(x, o) for o in outs), x)
        if self.proposal is None:
            return self._scores(x0)
        draw = jax.vmap(lambda i: self._scores(self.proposal(_folded(key, i), x0, levels)))
        found = draw(jnp.arange(1, self.samples + 1))
        power = jnp.where(self.strength == 0, 1.0, self.strength)
        return (jax.nn.logsumexp(power * found, 0) - jnp.log(self.samples)) / power

    def _weighed(self, aux: SteeringState, reward: Array, last: bool) -> SteeringState:
        reward = reward.astype(aux.reward.dtype)
        best, total = jnp.maximum(aux.best, reward), aux.total + reward
        strength = jnp.asarray(self.strength).astype(reward.dtype)
        if last:
            log_g = strength * reward - aux.log_potentials
        elif self.potential == "difference":
            log_g = strength * (reward - aux.reward)
        else:
            log_g = strength * (best if self.potential == "max" else total)
        # What has no weight stays without: inf - inf must not become a weight or NaN.
        lowest = jnp.where(strength < 0, jnp.inf, -jnp.inf)
        dead = (aux.log_weights == -jnp.inf) | (reward == lowest)
        log_weights = jnp.where(dead, -jnp.inf, aux.log_weights + log_g)
        log_potentials = jnp.where(dead, -jnp.inf, aux.log_potentials + log_g)
        new, old = (self._log_mean(w) for w in (log_weights, aux.log_weights))
        return aux._replace(
            log_weights=log_weights, reward=reward, best=best, total=total,
            log_potentials=log_potentials, log_normaliser=aux.log_normaliser + new - old,
        )  # fmt: skip

    def _log_mean(self, log_weights: Array) -> Array:
        grouped = self.resampler.grouped(log_weights)
        return jax.nn.logsumexp(grouped, 1) - jnp.log(grouped.shape[1])

    def _resampled(
        self, carry: Carry, aux: SteeringState, key: Any, noise: Any, z: Any, always: bool = False
    ) -> tuple[Carry, SteeringState]:
        index, chosen = self.resampler(key, aux.log_weights, always=always)
        moved = per_sample_of(chosen, len(index))
        paths = (aux.reward, aux.best, aux.total, aux.log_potentials, aux.ancestor)
        gathered = (a[index] for a in paths)
        log_weights = jnp.where(moved, 0.0, aux.log_weights)
        return regrown(carry, noise, z, index), SteeringState(
            log_weights, *gathered, aux.log_normaliser, aux.resamplings + chosen
        )


def _folded(key: Any, i: Any) -> Any:
    if key is None:
        raise ValueError("samples of x_0 are random: pass key= to sample")
    fold = lambda k: jax.random.fold_in(k, i)  # noqa: E731
    return jax.vmap(fold)(key) if is_key_batch(key) else fold(key)


def fk_steering(
    denoiser: Denoiser, tableau: Tableau, reward: Reward, strength: ArrayLike, params: Any = None,
    rows: Sequence[int] | None = None, potential: str = "difference",
    particles: int | None = None, scheme: str = "systematic", threshold: float = 0.5,
    finish: str = "resample", proposal: Proposal | None = None, samples: int = 1,
) -> FKSteering:  # fmt: skip
    """The control that steers a sampler to exp(strength reward(x_0)); see this module.

        control = fk_steering(model, tableau, brightness, 10.0, particles=8, rows=range(10, 50, 10))
        state = jd.sample(model, tableau, x_T, key, control=control, save="state")
        x, reward = state.registers[0], state.aux.reward

    Arguments:
      denoiser: what is sampled, guided or not; its memory must hold no array (it is not resampled).
      tableau: with noise, unless `rows` is empty.
      reward: fn([params,] x_0) -> [batch], a module-level function. It is called where it is needed
        only, and not differentiated. -inf (inf for lambda < 0) ends a particle, in any row: its weight
        is 0 until another one takes its place.
      strength: lambda, of any sign; a leaf.
      params: its pytree; what belongs to samples, [batch], must be the same all over a group (and cond=
        of `sample` too).
      rows: after which rows to score the predicted x_0 and resample; None for all but the last, whose
        final state is scored in any case. Empty: importance sampling, and best-of-k.
      potential: one of `POTENTIALS`.
      particles: k, the size of the groups, each steered for itself; None: the batch is one.
      scheme, threshold: as `Resampler`; the paper's are "multinomial", and 1 (always) or 0.5.
      finish: at the end "resample" (equally weighted samples, even where their effective number is
        high), "threshold" (as in other rows), or "weights" (to be used by whoever takes the result,
        with less variance).
      proposal: fn(key, x_0, (t, alpha, sigma)) -> samples of x_0 at that prediction, such as
        `GaussianProposal`; then the reward is log mean exp(lambda r) / lambda of `samples` of them
        (the published code's log mean exp(r) has no lambda in it).

    Raises TypeError or ValueError for arguments out of range, rows that the tableau lacks, resampling
    without noise, a reward of another shape, or from `sample` for a denoiser of another prediction;
    ValueError or a run-time error for weights that are NaN, infinite or all zero in a group.
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"expected a jaxdiff.Denoiser, got {type(denoiser).__name__}")
    if not isinstance(tableau, Tableau) or np.ndim(tableau.active) != 1:
        raise TypeError(f"expected one Tableau, got {type(tableau).__name__}")
    if not is_concrete(tableau.active):
        raise ValueError("fk_steering reads the tableau on the host: build it outside jit and vmap")
    if any(np.ndim(leaf) for leaf in jax.tree.leaves(denoiser.memory)):
        raise ValueError("fk_steering takes a denoiser whose memory holds no array")
    if not callable(reward):
        raise TypeError(f"reward must be a function, got {reward!r}")
    check_choice("potential", potential, POTENTIALS)
    check_choice("finish", finish, ("resample", "threshold", "weights"))
    check_order(samples, 10**6, "samples")
    if np.ndim(strength) or (is_concrete(strength) and not np.isfinite(strength)):
        raise ValueError(f"strength must be a finite number, got {strength!r}")
    last = int(np.sum(np.asarray(tableau.active))) - 1
    scored = allowed_rows(tableau, range(last) if rows is None else rows)
    if scored.any() and tableau.C is None:
        raise ValueError(
            "a sampler without noise never parts the copies of a particle: take a stochastic tableau, "
            "or rows=() for importance sampling"
        )
    resampler = Resampler(particles, scheme, threshold)
    return FKSteering(
        *as_arrays((denoiser, params, strength, scored, last, tableau.C, proposal)),
        reward, potential, finish, int(samples), resampler,
    )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianProposal:
    """x_0 ~ N(prediction, s^2), s = c sigma / sqrt(alpha^2 c^2 + sigma^2): a `proposal`.

    The posterior's spread for normal data of standard deviation c, [] or broadcast against a sample.
    """

    std: Any = 1.0

    def __call__(self, key: Any, x0: Any, levels: tuple[Any, Any, Any]) -> Any:
        _, alpha, sigma = levels
        scale = self.std * sigma / jnp.sqrt((alpha * self.std) ** 2 + sigma**2)
        z = normal(key, x0)
        return jax.tree.map(lambda a, e: a + to_batch(scale, a).astype(a.dtype) * e, x0, z)


def best(x: Any, scores: Float[ArrayLike, " batch"], particles: int | None = None) -> Any:
    """The particle of the highest score in each group, leaves [groups, ...]: best-of-k.

    With `fk_steering(..., rows=(), finish="weights")` and `state.aux.reward` it is the published
    code's "bon". Raises ValueError if `particles` does not divide the batch.
    """
    grouped = Resampler(particles).grouped(jnp.asarray(scores))
    groups, k = grouped.shape
    index = jnp.argmax(grouped, 1) + k * jnp.arange(groups)
    return jax.tree.map(lambda a: a[index], x)
