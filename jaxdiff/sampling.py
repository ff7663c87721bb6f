"""sample(): run any sampler on any denoiser."""

from __future__ import annotations

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.arrays import as_arrays, is_concrete, structure_hash
from jaxdiff.denoisers import Denoiser
from jaxdiff.integrator import SAVES, State, integrate
from jaxdiff.noise import BrownianPath, is_key_batch
from jaxdiff.solvers.tableau import Tableau


def sample(
    denoiser: Denoiser, tableau: Tableau, x_T: Any, key: jax.Array | None = None,
    noise: Any = None, cond: Any = None, save: str = "final",
    adjoint: diffrax.AbstractAdjoint | None = None, control: Any = None,
    state: State | None = None, progress_meter: diffrax.AbstractProgressMeter | None = None,
) -> Any:  # fmt: skip
    """Run a sampler.

    Arguments:
      denoiser: what to evaluate; see `jaxdiff.Denoiser`.
      tableau: the sampler, from a builder of `jaxdiff.solvers`; under `jax.vmap`, a stacked one.
      x_T: the state at the grid's first node, already scaled (`process.prior(key, shape)`): an array
        or a pytree, leaves [batch, ...]. Half precision is promoted to float32.
      key: for stochastic tableaux: one key (sample i then uses fold_in(key, i)), or one per sample
        (`jaxdiff.sample_keys`), which makes a sample independent of the batch it is drawn in.
      noise: instead of a key: an array or pytree [tableau.draws, *x.shape], or a
        `jaxdiff.BrownianPath`.
      cond: passed to the denoiser as it is (the models of `jaxdiff.models` check it first).
      save: "final" (the last s_0); "trajectory" (the network's inputs and the result, [rows + 1,
        ...]); "nodes" (the solution at the grid's nodes, [n + 1, ...]); "x0" (the denoised x_0 of
        every row, [rows, ...]); "state" (a `State`, for `state=`).
      adjoint: `diffrax.RecursiveCheckpointAdjoint()` (the default; inside shard_map and pmap
        `DirectAdjoint`, the only one that can be differentiated there), `ForwardMode` (for jvp), or
        `jaxdiff.gradients.ReversibleAdjoint()` (invertible tableaux: memory constant in the rows).
      control: see `jaxdiff.Control`.
      state: continue from a `State`; x_T is then None and the tableau's start is skipped.
      progress_meter: for example `diffrax.TqdmProgressMeter()`.

    Returns x_0 with x_T's structure, or what `save` says. Raises, before tracing: TypeError or
    ValueError for wrong types, an unknown save, a missing key, noise of another shape, an adjoint
    that does not apply, a control built for another prediction, or a network whose prediction says
    nothing at the grid's noise end;
    ValueError, on the first trace, for an output whose shape is not the state's.
    """
    x_T, noise, cond, state, denoiser = (
        as_arrays(tree) for tree in (x_T, noise, cond, state, denoiser)
    )
    check_call(denoiser, tableau, x_T, key, noise, cond, save, adjoint, state)
    _check_control(control, denoiser)
    if state is None:
        x_T = jax.tree.map(_at_least_float32, x_T)
    if adjoint is None:
        # diffrax's default cannot be differentiated inside shard_map and pmap.
        manual = jax.sharding.get_abstract_mesh().manual_axes
        adjoint = _DIRECT if manual else _CHECKPOINTED
    if hasattr(adjoint, "prepare"):
        adjoint = adjoint.prepare(tableau, denoiser, control)
    meter = _SILENT if progress_meter is None else progress_meter
    structure = structure_hash(denoiser, tableau, x_T, noise, cond, control, state)
    return integrate(
        denoiser, tableau, x_T, key, noise, cond, save, adjoint, control, state, meter, structure
    )


_DIRECT = diffrax.DirectAdjoint()
_CHECKPOINTED = diffrax.RecursiveCheckpointAdjoint()
_SILENT = diffrax.NoProgressMeter()


def _at_least_float32(leaf):
    return leaf if leaf.dtype.itemsize >= 4 else leaf.astype(jnp.float32)


def check_call(denoiser, tableau, x, key, noise, cond, save, adjoint, state) -> None:
    """Raise what `sample` raises for these arguments, before anything is traced."""
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"expected a jaxdiff.Denoiser, got {type(denoiser).__name__}")
    if not isinstance(tableau, Tableau):
        raise TypeError(f"expected a Tableau of jaxdiff.solvers, got {type(tableau).__name__}")
    if np.ndim(tableau.active) != 1:
        raise ValueError("a stacked tableau runs under jax.vmap: vmap(lambda t: sample(d, t, x))")
    if save not in SAVES:
        raise ValueError(f"unknown save {save!r}; choose from {list(SAVES)}")
    if isinstance(adjoint, (diffrax.BacksolveAdjoint, diffrax.ImplicitAdjoint)):
        raise ValueError(
            f"{type(adjoint).__name__} does not apply to a tableau, which is discrete: use "
            "RecursiveCheckpointAdjoint, DirectAdjoint or ForwardMode, "
            "jaxdiff.gradients.ReversibleAdjoint for an invertible tableau, or jaxdiff.ode for the "
            "continuous adjoint of the flow without noise"
        )
    if (x is None) == (state is None):
        raise ValueError("give x_T, or state= to continue from (with x_T=None)")
    leaves = jax.tree.leaves(x if state is None else state.registers)
    for leaf in leaves:
        if not eqx.is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.ndim:
            got = f"{leaf.dtype} of shape {leaf.shape}" if eqx.is_array(leaf) else repr(leaf)
            raise ValueError(f"the state must be floating-point arrays [batch, ...], got {got}")
        if leaf.shape[0] != leaves[0].shape[0]:
            raise ValueError(f"leaves of the state differ in batch: {[a.shape for a in leaves]}")
    if state is not None:
        kept = [leaf.shape[0] for leaf in jax.tree.leaves(state.history)] or [1]
        have, want = (len(state.registers), kept[0]), (tableau.registers, tableau.history)
        if have != want:
            raise ValueError(
                f"the state has {have[0]} registers and {have[1]} integrands, the tableau {want}"
            )
    if len(denoiser.predictions) > tableau.outputs:
        raise ValueError(
            f"the denoiser predicts {denoiser.predictions}, the tableau takes {tableau.outputs} "
            "output: build it with outputs=2 (ddim), or drop keep_eps"
        )
    _check_noise(tableau, x if state is None else state.registers[0], key, noise)
    _check_reachable(denoiser, tableau)
    denoiser.check(leaves[0].shape[0], cond, tableau.alpha, tableau.t)


def _check_noise(tableau, x, key, noise) -> None:
    if key is not None:
        is_key_batch(key)
    if not tableau.stochastic:
        return
    if noise is None and key is None:
        raise ValueError("this tableau is stochastic: pass key= or noise=")
    if isinstance(noise, BrownianPath):
        noise.check(tableau)
    elif noise is not None and is_concrete(tableau.draw):
        draws = tableau.draws
        want = jax.tree.map(lambda a: (draws, *a.shape), x)
        if jax.tree.structure(noise) != jax.tree.structure(x):
            raise ValueError("noise must have the structure of the state")
        for n, a in zip(jax.tree.leaves(noise), jax.tree.leaves(x)):
            if n.shape != (draws, *a.shape):
                raise ValueError(f"noise must have shape {want}, got {n.shape}")


def _check_control(control: Any, denoiser: Denoiser) -> None:
    """A control reads the network's output as the prediction of the denoiser it was built for."""
    known = getattr(control, "denoiser", None)
    if isinstance(known, Denoiser):
        read, fits = known.prediction, known.predictions == denoiser.predictions
    else:
        read = getattr(control, "prediction", None)
        fits = read is None or read in denoiser.predictions
    if not fits:
        raise ValueError(
            f"{type(control).__name__} was built for a denoiser that predicts {read!r}, and the one to "
            f"sample predicts {denoiser.prediction!r}: build it with the denoiser that is sampled"
        )


def _check_reachable(denoiser: Denoiser, tableau: Tableau) -> None:
    for p, blind in enumerate(tableau.blind):
        name = denoiser.predictions[min(p, len(denoiser.predictions) - 1)]
        if name in blind:
            raise ValueError(
                f"the grid evaluates where alpha = 0 or sigma = 0, and there a {name!r} network does "
                "not determine what this solver integrates: use a network that predicts v, x0 or flow"
            )
