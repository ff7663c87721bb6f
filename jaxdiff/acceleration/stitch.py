"""T-Stitch: a small denoiser at high noise, larger ones where the detail is made.

Pan, Zhuang, Huang, Nie, Yu, Xiao, Cai & Anandkumar, "T-Stitch: Accelerating Sampling in Pre-Trained
Diffusion Models with Trajectory Stitching" (2024): denoisers of all sizes agree on what is coarse, so
a small one may do the first part of any sampler, without training. Their code is NVlabs/T-Stitch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_known, check_single, level
from jaxdiff.predictions import convert
from jaxdiff.solvers.tableau import Tableau

CLOCKS = ("t", "half_log_snr")


def stitch(
    denoisers: Sequence[Denoiser], switches: ArrayLike, clock: str = "t", each_cond: bool = False
) -> Denoiser:
    """One denoiser of several, each on its own part of the noise levels.

        out(x, t) = out_0(x, t)    if t >= switches[0]
                    out_i(x, t)    if switches[i - 1] > t >= switches[i]
                    out_n(x, t)    if t < switches[n - 1]

    With T-Stitch's two networks, of which the small one does the fraction r of the time (its code's t
    / T >= 1 - r): `stitch([small, large], t_max * (1 - r))`; `row_switches` has the fraction of a
    sampler's evaluations instead, exactly. It is a denoiser like any other: every tableau takes it,
    also those with a history (integrands are of one kind, whoever predicted them), and guidance.

    Where t is one number, as in `jaxdiff.sample`, only the network of that level runs (a
    `lax.switch`). Under a `vmap` over switches or tableaux, or for t [batch], all of them run and one
    is chosen.

    Arguments:
      denoisers: from noise to data, at least one. The result predicts what the last one does; others
        are converted.
      switches: one fewer than denoisers, a number for two, falling (rising for "half_log_snr");
        infinite ones leave a denoiser out. A leaf: new switches compile nothing.
      clock: "t", or "half_log_snr", in which denoiser 0 has log(alpha / sigma) <= switches[0].
      each_cond: `cond` is a sequence, of one condition for each denoiser; else all get the same.

    Its `cost` is that of the most expensive part; `average_cost` has the mean over a sampler's
    evaluations. Raises TypeError or ValueError for anything but denoisers of one prediction each,
    another number of switches, switches out of order, an unknown clock; and, when sampling, for
    another number of conditions, or for a denoiser of eps or score that the grid evaluates at alpha =
    0, if the last predicts something else.
    """
    denoisers = tuple(denoisers)
    if not denoisers:
        raise ValueError("stitch needs at least one denoiser")
    for denoiser in denoisers:
        check_single(denoiser, "stitch")
    if clock not in CLOCKS:
        raise ValueError(f"clock must be one of {CLOCKS}, got {clock!r}")
    if is_concrete(switches):
        switches = np.asarray(switches, np.float64)
        rising = np.atleast_1d(switches if clock == "half_log_snr" else -switches)
        if np.any(np.isnan(rising)) or np.any(rising[1:] < rising[:-1]):
            order = "rise" if clock == "half_log_snr" else "fall"
            raise ValueError(f"switches must {order} from noise to data, got {switches}")
    switches = jnp.atleast_1d(jnp.asarray(switches, jnp.result_type(float)))
    if switches.shape != (len(denoisers) - 1,):
        raise ValueError(
            f"{len(denoisers)} denoisers need {len(denoisers) - 1} switches, got shape "
            f"{switches.shape}"
        )
    memories = tuple(denoiser.memory for denoiser in denoisers)
    return Denoiser(
        _Stitched(tuple(d.prediction for d in denoisers), clock, bool(each_cond)),
        denoisers[-1].prediction, (denoisers, switches), level,
        memory=None if all(m is None for m in memories) else memories,
        cost=max(d.cost for d in denoisers),
    )  # fmt: skip


def row_switches(tableau: Tableau, fractions: ArrayLike) -> np.ndarray:
    """`stitch`'s switches, in t, for which each denoiser but the last has its share of the rows.

    `fractions` [denoisers - 1], a number for two denoisers: of the active rows, rounded to whole
    ones. 0 leaves a denoiser out, and fractions whose sum is 1 leave out the last. Rows of one t (both
    evaluations of Heun's nodes) stay together, with the earlier denoiser. Raises ValueError for
    fractions that are negative or add up to more than 1, and for a tableau that is traced or whose t
    rises (restarts): there a switch in t does not separate first rows from last.
    """
    shares = np.atleast_1d(np.asarray(fractions, np.float64))
    if shares.ndim != 1 or not np.all(shares >= 0) or shares.sum() > 1 + 1e-9:
        raise ValueError(f"fractions must be at least 0 and add up to at most 1, got {fractions!r}")
    t = _times(tableau)
    if np.any(np.diff(t) > 0):
        raise ValueError("t rises in this tableau: give stitch the switches themselves")
    last = np.round(np.cumsum(shares) * len(t) - 1e-9).astype(int)

    def after(k: int) -> float:
        while 0 < k < len(t) and t[k - 1] == t[k]:
            k += 1
        if k in (0, len(t)):
            return -np.inf if k else np.inf
        # Between two times: one of them itself would depend on how float32 rounds it.
        return 0.5 * (t[k - 1] + t[k])

    return np.asarray([after(k) for k in last], np.float64)


def row_shares(denoiser: Denoiser, tableau: Tableau) -> np.ndarray:
    """The fraction of a tableau's active rows that each denoiser of a `stitch` evaluates."""
    if not isinstance(denoiser, Denoiser) or not isinstance(denoiser.fn, _Stitched):
        raise TypeError("row_shares takes a denoiser of jaxdiff.acceleration.stitch")
    denoisers, switches = denoiser.params
    active = np.asarray(tableau.active) != 0
    levels = (np.asarray(a)[active] for a in (tableau.t, tableau.alpha, tableau.sigma))
    with np.errstate(divide="ignore"):
        place = np.asarray(denoiser.fn.place(switches, *map(jnp.asarray, levels)))
    return np.bincount(place, minlength=len(denoisers)) / len(place)


def average_cost(
    denoiser: Denoiser, tableau: Tableau, costs: Sequence[float] | None = None
) -> float:
    """The mean cost of an evaluation of a `stitch` over a tableau's active rows.

    `costs` [denoisers], by default each one's `cost` (network evaluations); give each one's
    operations (`jaxdiff.training.flops`) or seconds for networks of several sizes.
    """
    shares = row_shares(denoiser, tableau)
    if costs is None:
        costs = [d.cost for d in denoiser.params[0]]
    if np.shape(costs) != shares.shape:
        raise ValueError(f"costs must be {len(shares)} numbers, got {costs!r}")
    return float(shares @ np.asarray(costs, np.float64))


def _times(tableau: Tableau) -> np.ndarray:
    if not is_concrete(tableau.t, tableau.active):
        raise ValueError("the rows of a traced tableau are not known: call this outside")
    return np.asarray(tableau.t, np.float64)[np.asarray(tableau.active) != 0]


@dataclasses.dataclass(frozen=True)
class _Stitched:
    predictions: tuple[str, ...]
    clock: str
    each_cond: bool

    def place(self, switches: Array, t: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        """The index of the denoiser at a level."""
        if self.clock == "t":
            after = jnp.asarray(t)[..., None] < switches
        else:
            now = (jnp.log(alpha) - jnp.log(sigma))[..., None]
            after = (now > switches) | (switches == -jnp.inf)  # left out at alpha = 0 too
        return jnp.sum(after, -1, dtype=jnp.int32)

    def __call__(self, params, x, levels, cond=None, memory=None):
        denoisers, switches = params
        t, alpha, sigma = levels
        place = self.place(switches, *levels)
        target = self.predictions[-1]

        def run(i):
            def branch(x, memory):
                own = None if memory is None else memory[i]
                given = cond[i] if self.each_cond else cond
                out, own = denoisers[i].evaluate(x, t, alpha, sigma, given, own)
                out = convert(out, x, self.predictions[i], target, alpha, sigma)
                # Branches must agree: in the state's precision, not the network's.
                wide = lambda a, y: a.astype(jnp.promote_types(a.dtype, y.dtype))  # noqa: E731
                out = jax.tree.map(wide, out, x)
                if memory is not None:
                    memory = (*memory[:i], own, *memory[i + 1 :])
                return out, memory

            return branch

        branches = [run(i) for i in range(len(denoisers))]
        if jnp.ndim(place) == 0:
            out, kept = jax.lax.switch(place, branches, x, memory)
        else:
            out, kept = _choose(branches, place, x, memory)
        return out if memory is None else (out, kept)

    def check_at(self, params, batch, cond, alpha, t):
        denoisers, switches = params
        if self.each_cond and (not isinstance(cond, (tuple, list)) or len(cond) != len(denoisers)):
            raise ValueError(
                f"each_cond=True: cond must be {len(denoisers)} conditions, got {cond!r}"
            )
        target, noisy = self.predictions[-1], self._noisiest(switches, alpha, t)
        for i, denoiser in enumerate(denoisers):
            own, at = alpha, t
            if i not in noisy and is_concrete(alpha):  # the rows from alpha = 0 are not this one's
                some = np.asarray(alpha) != 0
                own = np.asarray(alpha)[some]
                at = None if t is None else t[some]
            check_known(denoiser.prediction, target, own, f"stitch, denoiser {i}")
            denoiser.check(batch, cond[i] if self.each_cond else cond, own, at)

    def _noisiest(self, switches, alpha, t) -> set[int]:
        """The denoisers that the rows of alpha = 0 evaluate, as far as the host knows them."""
        if not is_concrete(switches, alpha, t) or not np.any(np.asarray(alpha) == 0):
            return set()
        switches = np.asarray(switches)
        if self.clock != "t":
            return {int(np.sum(switches == -np.inf))}
        if t is None:
            return {int(np.sum(switches == np.inf))}
        at = np.asarray(t, switches.dtype)[np.asarray(alpha) == 0]
        return set(np.sum(at[:, None] < switches, -1).tolist())


def _choose(branches: Sequence[Any], place: Array, x: Any, memory: Any) -> tuple[Any, Any]:
    """All branches at all samples; each sample's own kept."""
    outs = []
    for branch in branches:
        out, memory = branch(x, memory)
        outs.append(out)

    def leaf(*leaves: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        chosen = leaves[0]
        for i, other in enumerate(leaves[1:], 1):
            chosen = jnp.where(to_batch(place, other) == i, other, chosen)
        return chosen

    return jax.tree.map(leaf, *outs), memory
