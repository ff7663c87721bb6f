"""Random numbers that belong to a sample, not to a batch.

Every draw is a function of the sample's own key and of the draw's number, so a sample does not
depend on the batch, the device or the mesh in which it is computed.
"""

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, namespace


def is_key_batch(key: jax.Array) -> bool:
    """Whether `key` holds one key per sample; raises TypeError if it is no PRNG key at all."""
    if jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        ndim = key.ndim
    elif getattr(key, "dtype", None) == jnp.uint32 and key.ndim >= 1:
        ndim = key.ndim - 1
    else:
        raise TypeError(f"expected a PRNG key such as jax.random.key(0), got {key!r}")
    if ndim > 1:
        raise ValueError(f"expected one key or one per sample, got keys of shape {key.shape}")
    return ndim == 1


def sample_keys(key: jax.Array, ids: ArrayLike) -> jax.Array:
    """One key per sample: `fold_in(key, ids[i])`, `ids` an integer vector.

    Give each sample its global index, and any split of the samples over calls, devices or hosts
    draws the same numbers.
    """
    ids = jnp.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be a vector of integers, got {ids.dtype} of shape {ids.shape}")
    if is_key_batch(key):
        raise ValueError("sample_keys takes a single key, got one per sample")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def per_sample(key: jax.Array, batch: int) -> jax.Array:
    """`key` itself if it is one key per sample, else `sample_keys(key, arange(batch))`.

    Raises ValueError for another number of keys, and for a single key inside shard_map or pmap:
    there every device counts its samples from 0 and would draw its neighbour's numbers.
    """
    if is_key_batch(key):
        if key.shape[0] != batch:
            raise ValueError(f"got {key.shape[0]} keys for {batch} samples")
        return key
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual:
        raise ValueError(
            f"a single key under the manual mesh axes {tuple(manual)} would give every device the "
            "same noise: pass one key per sample, jaxdiff.sample_keys(key, global_ids)"
        )
    return sample_keys(key, np.arange(batch))


def normal(key: jax.Array, like: Any, draw: ArrayLike | None = None) -> Any:
    """Standard normals shaped like the pytree `like` (leaves [batch, ...]), drawn per sample.

    Leaf j of sample i uses `fold_in(fold_in(key_i, draw), j)`; a tree that is one array skips the
    second fold, and `draw=None` the first.
    """
    leaves, treedef = jax.tree.flatten(like)
    keys = per_sample(key, leaves[0].shape[0])
    if draw is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, draw)

    def leaf(j, shape, dtype):
        def one(k):
            return jax.random.normal(k if treedef.num_leaves == 1 else jax.random.fold_in(k, j),
                                     shape, dtype)  # fmt: skip

        return jax.vmap(one)(keys)

    return treedef.unflatten([leaf(j, x.shape[1:], x.dtype) for j, x in enumerate(leaves)])


# The clock's span, from its end down to 0, in bands that each shrink by a factor.
_BANDS, _SHRINK = 5, 2.0**10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BrownianPath:
    """One Brownian path per sample, so that 5 and 500 steps see the same noise.

    The noise of a diffusion SDE's exact integral has an accumulated variance that is a function of
    lambda alone, and that is the clock the path W runs in: a row that covers the clock from a to b
    > a (or down from b to a) draws (W(b) - W(a)) / sqrt(b - a). The clock is measured from the end
    where increments are small:

        form "x0"    exp(2 lambda) = alpha^2 / sigma^2     (SDE-DPM-Solver++, DDPM, DDIM with eta)
        form "eps"   exp(-2 lambda) = sigma^2 / alpha^2    (SDE-DPM-Solver in noise prediction)

    The two forms are different stochastic integrals: one path serves one form. The clock spans many
    orders of magnitude, from 0 to its value at the process's end, and a bisection in float32 only
    six: so W is the sum of independent `diffrax.VirtualBrownianTree`s (Li et al. 2020; Jelincic et
    al. 2024) over bands of the clock, each 1024 times the next. Costs hundreds of plain normals, so
    it is for studies.

    Attributes:
      process: spans the clock; its t_min (x0) or t_max (eps) must have finite lambda.
      form: "x0" or "eps".
      key: one key, or one per sample.
      tolerance: the path is exact over intervals longer than this fraction of the clock at their
        end, about twice the step in lambda (checked by `sample`). In (0, 1); in float32 not below
        the default.
    """

    process: Any
    form: str = dataclasses.field(metadata={"static": True})
    key: jax.Array
    tolerance: float = dataclasses.field(default=2.0**-13, metadata={"static": True})

    def __post_init__(self):
        if self.form not in ("x0", "eps"):
            raise ValueError(f"form must be 'x0' or 'eps', got {self.form!r}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie in (0, 1), got {self.tolerance!r}")

    def _span(self) -> Any:
        t = self.process.t_min if self.form == "x0" else self.process.t_max
        lam = self.process.half_log_snr(t)
        return namespace(lam).exp(2.0 * lam if self.form == "x0" else -2.0 * lam)

    def check(self, tableau: Any) -> None:
        """Raise ValueError unless the tableau's noise lives on this path."""
        if tableau.brownian != self.form or tableau.clock is None:
            have = tableau.brownian or "no Brownian path (its noise has no SDE limit)"
            raise ValueError(f"the tableau's noise belongs to {have}, the path is {self.form!r}")
        if not is_concrete(tableau.clock, self.process):
            return
        span, clock = float(self._span()), np.asarray(tableau.clock, np.float64)
        if not np.isfinite(span):
            raise ValueError("the process's span has infinite lambda: give it a t_min and t_max")
        if clock.max() > span * (1 + 1e-6):
            raise ValueError(f"the tableau leaves the process's span: clock {clock.max()} > {span}")
        widths = np.abs(clock[:, 1] - clock[:, 0])
        shares = widths / np.maximum(clock.max(1), span * _SHRINK**-_BANDS)
        smallest = shares[widths > 0].min(initial=np.inf)
        if smallest <= self.tolerance:
            raise ValueError(
                f"the tableau's smallest increment is {smallest:.3g} of its clock, not above the "
                f"path's tolerance {self.tolerance:.3g}: pass a smaller tolerance"
            )

    def draw(self, clock: Any, like: Any) -> Any:
        """Standard normals shaped like `like` for the clock interval (a, b) of one row."""
        batch = jax.tree.leaves(like)[0].shape[0]
        shape = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), like)
        clock = jnp.asarray(clock)
        if self.tolerance / _SHRINK < jnp.finfo(clock.dtype).eps:
            raise ValueError(f"tolerance {self.tolerance} is too small for {clock.dtype}")
        span = jnp.asarray(self._span(), clock.dtype)
        low, high = jnp.minimum(*clock), jnp.maximum(*clock)
        # The tableau's last node and the span's end are one number, but rounded apart.
        high = eqx.error_if(
            high, high > span * (1 + 1e-4), "the tableau leaves the Brownian path's process"
        )
        keys = per_sample(self.key, batch)
        width = high - low
        safe = jnp.where(width > 0, width, 1.0)

        def band(number):
            top = span * _SHRINK**-number
            bottom = jnp.where(number < _BANDS - 1, top / _SHRINK, 0.0)
            place = [jnp.clip((c - bottom) / (top - bottom), 0.0, 1.0) for c in (low, high)]
            scale = jnp.sqrt((top - bottom) / safe)

            def one(key):
                key = jax.random.fold_in(key, number)
                tolerance = self.tolerance / _SHRINK
                tree = diffrax.VirtualBrownianTree(0.0, 1.0, tolerance, shape, key)
                return jax.tree.map(lambda w: scale.astype(w.dtype) * w, tree.evaluate(*place))

            # A row without noise has an empty interval, and meets no band.
            nothing = jax.tree.map(lambda a: jnp.zeros((batch, *a.shape), a.dtype), shape)
            meets = (width > 0) & (high > bottom) & (low < top)
            return jax.lax.cond(meets, jax.vmap(one), lambda _: nothing, keys)

        bands = jax.lax.map(band, jnp.arange(_BANDS))
        return jax.tree.map(lambda w: w.sum(0), bands)
