"""A measurement: y = A x_0 + noise_std n, n standard normal."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import is_concrete
from jaxdiff.inverse.operators import Composed, LinearOperator, as_leaf, check_operator
from jaxdiff.inverse.spectra import reached, size
from jaxdiff.noise import normal


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """What is known of x_0: y = operator(x_0) + noise_std n. A pytree; all its arrays are leaves.

    Attributes:
      operator: a `LinearOperator`.
      y: [*operator.measured], one measurement for all samples of a batch, or [batch,
        *operator.measured], one each.
      noise_std: standard deviation of the noise, a scalar, at least 0.

    Raises TypeError for anything but an operator, ValueError for a y of another shape, numbers that
    are not finite, or a noise_std that is negative or no scalar.
    """

    operator: LinearOperator
    y: ArrayLike
    noise_std: ArrayLike

    def __post_init__(self):
        check_operator(self.operator, "Measurement")
        want = self.operator.measured
        if np.shape(self.y) != want and np.shape(self.y)[1:] != want:
            raise ValueError(
                f"y must have the shape {want} that the operator measures, or (batch, "
                f"{', '.join(map(str, want))}); got {np.shape(self.y)}"
            )
        if np.ndim(self.noise_std):
            raise ValueError(f"noise_std must be a scalar, got shape {np.shape(self.noise_std)}")
        if is_concrete(self.noise_std) and not self.noise_std >= 0:
            raise ValueError(f"noise_std must not be negative, got {self.noise_std!r}")
        for name in ("y", "noise_std"):
            object.__setattr__(self, name, as_leaf(getattr(self, name), name))

    def tree_flatten_with_keys(self):
        names = ("operator", "y", "noise_std")
        return [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in names], None

    @classmethod
    def tree_unflatten(cls, _, children):
        # Past the checks: transformations rebuild trees of anything, with more axes or none.
        self = object.__new__(cls)
        for name, child in zip(("operator", "y", "noise_std"), children):
            object.__setattr__(self, name, child)
        return self

    def batched(self, batch: int) -> Float[Array, "batch ..."]:
        """y for a batch, [batch, *measured]; ValueError if there are measurements of another one."""
        want = (batch, *self.operator.measured)
        if self.y.ndim == len(want) and self.y.shape != want:
            raise ValueError(f"there are {self.y.shape[0]} measurements for {batch} samples")
        return jnp.broadcast_to(self.y, want)

    def residual(self, x0: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """y - A x0, in x0's dtype; x0 of [batch, *operator.shape]."""
        return self.batched(jnp.shape(x0)[0]).astype(x0.dtype) - self.operator(x0)


def check_measurement(measurement: Any, what: str) -> None:
    """Raise TypeError unless `measurement` is a Measurement."""
    if not isinstance(measurement, Measurement):
        raise TypeError(f"{what} takes a Measurement, got {type(measurement).__name__}")


def measure(
    operator: LinearOperator, x0: Float[ArrayLike, "batch ..."], noise_std: ArrayLike,
    key: Array | None = None,
) -> Measurement:  # fmt: skip
    """Simulate: y = A x0 + noise_std n for data x0 [batch, *operator.shape], one y each.

    Noise falls on what is measured: directions that A does not reach (singular values of 0: `pinv`),
    such as the entries a mask leaves out, get none. Of a composition without a closed form those that
    its outer operator does not reach; other operators that iterate get noise everywhere. `key` is one
    key, or one per sample; not needed where noise_std is 0. Raises ValueError if it is missing.
    """
    check_operator(operator, "measure")
    x0 = as_leaf(x0, "x0")
    y = operator(x0)
    if is_concrete(noise_std) and noise_std == 0:
        return Measurement(operator, y, noise_std)
    if key is None:
        raise ValueError(f"noise of standard deviation {noise_std} needs a key")
    noise = _onto_range(operator, normal(key, y))
    return Measurement(operator, y + noise_std * noise, noise_std)


def _onto_range(operator: LinearOperator, y: Array) -> Array:
    """y without the directions that `operator` is known not to reach."""
    left = operator._left()
    if left is None:
        return _onto_range(operator.outer, y) if isinstance(operator, Composed) else y
    values, basis = left
    return basis.back(reached(values, y.dtype) * basis.coordinates(y))


def same_shape(measurement: Measurement, x: Array, what: str) -> None:
    """Raise ValueError unless the state x is [batch, *operator.shape]."""
    if jnp.shape(x)[1:] != measurement.operator.shape:
        raise ValueError(
            f"{what}: the state has shape {jnp.shape(x)}, the operator takes [batch, "
            f"{', '.join(map(str, measurement.operator.shape))}], "
            f"{size(measurement.operator.shape)} entries a sample"
        )
