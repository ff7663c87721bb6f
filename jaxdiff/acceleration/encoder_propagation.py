"""Faster Diffusion: a UNet's encoder runs at a few key rows, its decoder at all of them.

Li, Hu, Khan, Li, Yang, Wang, Cheng & Yang, "Faster Diffusion: Rethinking the Role of UNet Encoder in
Diffusion Models" (2024): encoder features change little from one step to the next, the decoder's much.
At a key row r the network is decode(F_r, t_r), F_r = encode(x_r, t_r); at a row q after it, up to the
next key, decode(F_r, t_q), whatever the state is by then. So the decoders of such a group do not wait
for each other: they can run as one batch. Their code is hutaiHang/Faster-Diffusion.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser, check_single, level
from jaxdiff.integrator import Control, RowInfo
from jaxdiff.models.network import Features, TwoHalves
from jaxdiff.solvers.tableau import Tableau

# The code's keys for 50 steps ("50ls" is that of the paper's Stable Diffusion), as it names them.
_SETS: dict[str, tuple[int, ...]] = {
    "50ls": (0, 1, 2, 3, 5, 10, 15, 25, 35),
    "50ls2": (0, 10, 11, 12, 15, 20, 25, 30, 35, 45),
    "50ls3": (0, 20, 25, 30, 35, 45, 46, 47, 48, 49),
    "50ls4": (0, 9, 13, 14, 15, 28, 29, 32, 36, 45),
}
_RULES: dict[str, Callable[[int], bool]] = {
    "75ls": lambda i: i > 65 or i < 10 or i % 5 == 0,
    "100ls": lambda i: i > 85 or i < 10 or i % 5 == 0,
    "s2": lambda i: i < 20 or i > 40 or i % 2 == 0,
    "pro": lambda i: math.isqrt(9 + 8 * i) ** 2 == 9 + 8 * i,
}
KEY_SETS = (*_SETS, *_RULES)


class Propagated(NamedTuple):
    """The memory of `propagate_encoder`; `sample(..., save="state").memory` is the last.

    `row`: evaluations so far; `encoded`: those that ran the encoder; `kept`: `Features`, or in parallel
    the outputs of the group's rows [longest group, *x.shape].
    """

    row: Int[Array, ""]
    encoded: Int[Array, ""]
    kept: Any


def key_rows(keys: str | int, rows: int) -> tuple[int, ...]:
    """The rows at which the encoder runs, of a sampler of `rows` evaluations.

    `keys`: a name of the paper's code, or an integer n for every n-th row. Names: "50ls" (for 50
    steps; dense early), "50ls2" to "50ls4" (spread, late, middle), "75ls" and "100ls" (all of the
    first 10 and of those after 65 or 85, every fifth between), "s2" (every second from 20 to 40), "pro"
    (0, 2, 5, 9, 14, ...: gaps that grow by one). Raises ValueError for other names, or n below 1.
    """
    if isinstance(keys, str):
        if keys not in KEY_SETS:
            raise ValueError(f"keys must be one of {KEY_SETS}, or an integer, got {keys!r}")
        rule = _RULES[keys] if keys in _RULES else _SETS[keys].__contains__
    elif isinstance(keys, (int, np.integer)) and not isinstance(keys, bool) and keys >= 1:
        rule = lambda i: i % keys == 0  # noqa: E731
    else:
        raise ValueError(
            f"keys must be one of {KEY_SETS}, or an integer of at least 1, got {keys!r}"
        )
    return tuple(i for i in range(rows) if rule(i))


def propagate_encoder(
    denoiser: Denoiser, tableau: Tableau, keys: str | int | Iterable[int], like: Any,
    parallel: bool = False,
) -> Denoiser:  # fmt: skip
    """The denoiser of a `UNet` or `SongUNet` whose encoder runs at the key rows of a sampler only.

        fast = propagate_encoder(denoiser, tableau, "50ls", x_T)
        x0 = jd.sample(fast, tableau, x_T, cond=labels)

    Any tableau, with or without a history: outputs of other rows need no new state. The denoiser
    counts its own calls, one a row, so it is for that tableau, from its first row on. It has a memory
    (`Propagated`), with the number of encoder runs; where rows are not vmapped, what is not needed does
    not run (`lax.cond`).

    Arguments:
      denoiser: of `jaxdiff.models.from_linen` with one of these networks; guidance and thresholding
        come after it.
      keys: see `key_rows`, or the rows themselves, 0 among them.
      like: x_T, or a `jax.ShapeDtypeStruct` of it: the memory has its shape. Under classifier-free
        guidance the network sees both halves at once, so twice the batch.
      parallel: at a key row the decoder runs once, on a batch of all rows up to the next key; the other
        rows take their outputs. The same results to rounding, faster where one row leaves a device
        idle, with the memory of a larger batch.

    Raises TypeError for a denoiser of another kind, ValueError for one in training mode, for a stacked
    or traced tableau, and for rows that it does not have. In parallel `sample` raises ValueError for a
    tableau of other alphas; one of other times alone gives NaN.
    """
    check_single(denoiser, "propagate_encoder")
    fn = denoiser.fn
    if not isinstance(getattr(fn, "module", None), TwoHalves):
        raise TypeError(
            "propagate_encoder takes jaxdiff.models.from_linen of a UNet or SongUNet: the network's own "
            f"denoiser, whose way down and up are known, got {fn!r}"
        )
    if fn.train:
        raise ValueError("propagate_encoder takes a denoiser that is not in training mode")
    if np.ndim(tableau.active) != 1 or not is_concrete(tableau.t):
        raise ValueError("propagate_encoder takes one tableau, not stacked and not traced")
    if isinstance(keys, (str, int)):
        keys = key_rows(keys, tableau.rows)
    chosen = sorted(set(keys))
    if chosen[:1] != [0] or chosen[-1] >= tableau.rows:
        raise ValueError(
            f"keys must be rows from 0 to {tableau.rows - 1}, 0 among them, got {chosen}"
        )
    lengths = np.diff([*chosen, tableau.rows])
    group = np.repeat(np.arange(len(chosen)), lengths)
    # Row by row: the place in its group (0 at a key), and that group's length.
    place = np.arange(tableau.rows) - np.asarray(chosen)[group]
    levels = tuple(np.asarray(a, np.float32) for a in (tableau.t, tableau.alpha, tableau.sigma))
    times = levels[0] if denoiser.time is None else denoiser.time(*levels)
    shape = jax.ShapeDtypeStruct(like.shape, jnp.promote_types(like.dtype, jnp.float32))
    memory = _memory(fn.module, denoiser.params, shape, int(lengths.max()) if parallel else None)
    table = (jnp.asarray(place, jnp.int32), jnp.asarray(lengths[group], jnp.int32))
    ahead = jnp.asarray(times, jnp.float32), jnp.asarray(levels[1])
    params = (denoiser.params, table, ahead)
    lengths = tuple(np.unique(lengths).tolist()) if parallel else None
    found = _Propagating(fn, denoiser.time, lengths)
    return Denoiser(found, denoiser.prediction, params, level, memory, denoiser.cost)


def _memory(module: TwoHalves, variables: Any, like: Any, longest: int | None) -> Propagated:
    zero = jnp.zeros((), jnp.int32)
    if longest is not None:
        return Propagated(zero, zero, jnp.zeros((longest, *like.shape), like.dtype))
    cond = {}
    if channels := getattr(module, "image_channels", 0):
        cond["image"] = jnp.zeros((*like.shape[:3], channels), like.dtype)
    if module.num_classes is not None:
        cond["label"] = np.zeros(like.shape[0], np.int32)

    def encode(variables, x):
        return module.apply(variables, x, 0.0, cond or None, method="encode")

    found = jax.eval_shape(encode, variables, like)
    return Propagated(zero, zero, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), found))


@dataclasses.dataclass(frozen=True)
class _Propagating:
    network: Any
    time: Callable | None
    lengths: tuple[int, ...] | None  # of the groups, if their decoders run as one batch

    def __call__(self, params, x, levels, cond=None, memory=None):
        params, (places, lengths), (times, _) = params
        variables = params[0] if self.network.has_rngs else params
        t = levels[0] if self.time is None else self.time(*levels)
        kept = jax.tree.leaves(memory.kept)[0].shape[-4]
        if kept != x.shape[0]:
            raise ValueError(
                f"propagate_encoder was told of a batch of {kept}, the network sees {x.shape[0]}: "
                "pass like= of what it sees (twice the batch under classifier-free guidance)"
            )
        # Past the last row (another sampler's) the place is that of the last.
        row = jnp.minimum(memory.row, places.shape[0] - 1)
        key = places[row] == 0

        def run(method, *args):
            return self.network.module.apply(variables, *args, cond, method=method)

        if self.lengths is None:
            features = jax.lax.cond(key, lambda: run("encode", x, t), lambda: memory.kept)
            out, kept = run("decode", features, t), features
        else:

            def group(length):
                def branch():
                    ahead = jax.lax.dynamic_slice_in_dim(times, row, length)
                    features, module = run("encode", x, t), self.network.module
                    found = _decode_all(module, variables, features, ahead, cond)
                    return memory.kept.at[:length].set(found.astype(memory.kept.dtype))

                return branch

            which = jnp.searchsorted(jnp.asarray(self.lengths), lengths[row])
            branches = [lambda: memory.kept, *(group(n) for n in self.lengths)]
            kept = jax.lax.switch(jnp.where(key, which + 1, 0), branches)
            # What is kept was decoded at the stored times: of no use at others.
            same = jnp.all(jnp.isclose(t, times[row], rtol=1e-2, atol=1e-5))
            out = jnp.where(same, kept[places[row]], jnp.nan)
        return out, Propagated(memory.row + 1, memory.encoded + key, kept)

    def check(self, params, batch, cond, alpha):
        self.network.check(params[0], batch, cond, alpha)
        told = params[2][1]
        if self.lengths is None or not is_concrete(alpha, told):
            return
        alpha, told = np.asarray(alpha), np.asarray(told)
        # All rows, or some in a row: a part of the tableau, to be continued.
        parts = (told[i : i + len(alpha)] for i in range(len(told) - len(alpha) + 1))
        if not any(np.allclose(part, alpha, rtol=1e-5, atol=1e-6) for part in parts):
            raise ValueError(
                "parallel=True decodes at the times of the tableau that propagate_encoder was given; "
                "this one has other levels: make a denoiser for it"
            )


def _decode_all(
    module: TwoHalves, variables: Any, features: Features, times: Float[Array, " rows"], cond: Any
) -> Float[Array, "rows batch height width channels"]:
    """One decoder pass over rows x batch, of one encoder's features."""
    rows, batch = times.shape[0], features.middle.shape[0]

    def tiled(a: ArrayLike) -> Array:
        """A copy for every row; numbers, for all samples alike, as they are."""
        a = jnp.asarray(a)
        return a if a.ndim == 0 else jnp.broadcast_to(a, (rows, *a.shape)).reshape(-1, *a.shape[1:])

    wide = jax.tree.map(tiled, features)
    cond = jax.tree.map(tiled, cond)
    out = module.apply(variables, wide, jnp.repeat(times, batch), cond, method="decode")
    return out.reshape(rows, batch, *out.shape[1:])


@dataclasses.dataclass(frozen=True)
class PriorNoise(Control):
    """Some of x_T back into the state: the paper's prior noise injection.

        x <- x + scale x_T    before every row with t < below

    which restores the texture that reused features smooth away: `sample(..., control=PriorNoise())`.
    `scale` 0.003 and half of the time, `below` 0.5 for times in [0, 1], are the paper's. In the
    authors' sampler with parallel decoders a key row's network has not seen its own row's addition;
    here, as in their plain one, it has. Raises ValueError unless both are finite.
    """

    scale: float = 0.003
    below: float = 0.5

    def __post_init__(self):
        if not (np.isfinite(self.scale) and np.isfinite(self.below)):
            raise ValueError(f"scale and below must be finite, got {self.scale} and {self.below}")

    def init(self, x: Any) -> Any:
        """x_T, the first state."""
        return x

    def before(self, aux: Any, row: RowInfo, x: Any, key: Any) -> tuple[Any, Any]:
        """The state with its share of x_T; padding rows stay."""
        size = jnp.where((row.t < self.below) & (row.active != 0), self.scale, 0.0)
        return jax.tree.map(lambda a, first: a + size.astype(a.dtype) * first, x, aux), aux
