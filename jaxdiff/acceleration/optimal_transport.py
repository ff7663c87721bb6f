"""DPM-OT: an optimal-transport map from noise to noised data, then the last few reverse steps.

Li, Li, Wang, Lei, Luo & Gu, "DPM-OT: A New Diffusion Probabilistic Model Based on Optimal Transport"
(2023), after "AE-OT" (An et al., 2020). The targets y_i are data noised to an intermediate level. Among
all maps that send the prior to them with given masses, the one of least squared distance is the
gradient of Brenier's potential

    u(z) = max_i <z, y_i> + h_i,    T(z) = y_i  where i attains the maximum,

and its heights h are those at which every cell has its target's mass. They minimise a convex function
whose gradient is w_i(h) - nu_i, the cells' masses less the targets'. The code is cognaclee/DPM-OT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Key

from jaxdiff.arrays import jit_trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SemidiscreteMap:
    """T(z) = y_i, i = argmax_i <z, y_i> + h_i. Made by `fit_map`.

    `targets` [n, ...], `heights` [n] with mean 0. z is [batch, ...], of the targets' shape.
    """

    targets: Float[Array, "n ..."]
    heights: Float[Array, " n"]

    def scores(self, z: Float[Array, "batch ..."]) -> Float[Array, "batch n"]:
        """<z, y_i> + h_i."""
        flat = self.targets.reshape(len(self.targets), -1)
        product = jnp.matmul(z.reshape(len(z), -1), flat.T, precision="highest")
        return product + self.heights

    def cells(self, z: Float[Array, "batch ..."]) -> Int[Array, " batch"]:
        """The cell that each z lies in."""
        return jnp.argmax(self.scores(z), -1)

    def __call__(self, z: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """T(z)."""
        return self.targets[self.cells(z)]

    def averaged(
        self, z: Float[Array, "batch ..."], neighbours: int, max_angle: float
    ) -> tuple[Float[Array, "batch ..."], Int[Array, " batch"]]:
        """T continued between cells, and how many targets each result is a mean of.

        The mean of T(z) and those of the next `neighbours` - 1 targets in the order of their scores
        whose plane of u meets T(z)'s at a dihedral angle of at most `max_angle` radians:

            cos(angle) = (<y_i, y_j> + 1) / sqrt((|y_i|^2 + 1) (|y_j|^2 + 1)).

        Above it lies the singular set, between modes: no mean is taken across, so no sample falls
        between. (The code divides the angles by the largest of the batch and drops those samples, so
        its samples depend on each other; here z is kept and T(z) with it.) Raises ValueError for
        `neighbours` that are not from 1 to n, or an angle that is negative.
        """
        count = len(self.targets)
        if not 1 <= neighbours <= count:
            raise ValueError(f"neighbours must be from 1 to {count}, got {neighbours}")
        if not max_angle >= 0:
            raise ValueError(f"max_angle must be at least 0, got {max_angle}")
        nearest = jax.lax.top_k(self.scores(z), neighbours)[1]
        flat = self.targets.reshape(count, -1)
        normals = jnp.concatenate([flat, -jnp.ones((count, 1), flat.dtype)], -1)
        normals = normals / jnp.linalg.norm(normals, axis=-1, keepdims=True)
        own = normals[nearest]
        angle = jnp.arccos(jnp.clip(jnp.sum(own[:, :1] * own, -1), -1.0, 1.0))
        kept = (angle <= max_angle).at[:, 0].set(True)
        number = jnp.sum(kept, -1)
        mean = jnp.sum(kept[..., None] * flat[nearest], 1) / number[:, None]
        return mean.reshape(len(z), *self.targets.shape[1:]), number


class Fit(NamedTuple):
    """What `fit_map` returns: the `map`; `masses` [n], those of its cells as last measured; the targets'
    own, `wanted` [n]; `steps` made; `converged`: whether the tolerance was reached."""

    map: SemidiscreteMap
    masses: Float[np.ndarray, " n"]
    wanted: Float[np.ndarray, " n"]
    steps: int
    converged: bool

    @property
    def error(self) -> float:
        """max_i |w_i - nu_i| n: the worst cell's mass, in units of an equal share."""
        return float(np.max(np.abs(self.masses - self.wanted)) * len(self.wanted))


def fit_map(
    targets: Float[ArrayLike, "n ..."], key: Key[Array, ""],
    masses: Float[ArrayLike, " n"] | None = None, prior: Callable | None = None,
    tolerance: float = 0.3, samples: int = 2048, learning_rate: float = 0.3, max_steps: int = 1000,
    block: int = 250, heights: Float[ArrayLike, " n"] | None = None,
) -> Fit:  # fmt: skip
    """Fit the heights by Adam on Monte-Carlo measures of the cells.

    A step draws samples of the prior, counts them in the cells, moves h against the difference to the
    masses, and puts its mean back to 0. The learning rate falls to a hundredth over `max_steps`, and
    the map has the running mean of h over about 100 steps: so the noise of a step averages out, for
    which the authors' code has 10 n samples a step, doubled where it stalls. Every `block` steps that
    map's cells are measured on fresh samples, enough that noise is half of the tolerance; it stops
    where none is empty and all are within `tolerance` (the code: where the norm of the difference is
    below 8e-4).

    Arguments:
      targets: noised data, y.
      masses: nu, positive, normalised to sum to 1; equal by default.
      prior: `prior(key, shape)` -> z, as `process.prior`; standard normal by default.
      tolerance: of |w_i - nu_i| n.
      samples: of a step.
      heights: to start from, 0 by default.

    Raises ValueError for targets of no use (fewer than two, not finite), masses or heights of another
    number, masses that are not positive, and numbers below their least values.
    """
    targets = np.asarray(targets, np.float32)
    count = len(targets) if targets.ndim > 1 else 0
    if count < 2 or not np.all(np.isfinite(targets)):
        raise ValueError(
            f"targets must be finite and [n, ...], n at least 2, got shape {targets.shape}"
        )
    wanted = np.full(count, 1.0) if masses is None else np.asarray(masses, np.float64)
    start = np.zeros(count) if heights is None else np.asarray(heights)
    if not wanted.shape == start.shape == (count,) or not np.all(wanted > 0):
        raise ValueError(f"masses must be {count} positive numbers and heights as many")
    least = min(samples, max_steps, block)
    if least < 1 or not tolerance > 0 or not learning_rate > 0:
        raise ValueError(
            "samples, max_steps and block must be at least 1, tolerance and learning_rate positive, got "
            f"{samples}, {max_steps}, {block}, {tolerance}, {learning_rate}"
        )
    wanted = wanted / wanted.sum()
    # The standard deviation of a measured w_i n is sqrt(n / samples), the worst of n some 3 of it.
    checks = math.ceil(count * (6 / tolerance) ** 2 / samples)
    prior = _standard if prior is None else prior
    found = SemidiscreteMap(jnp.asarray(targets), jnp.asarray(start, jnp.float32))
    optimizer = _optimizer(learning_rate, max_steps)
    carry = found.heights, optimizer.init(found.heights), found.heights
    steps, converged, measured = 0, False, wanted
    while steps < max_steps and not converged:
        here = min(block, max_steps - steps)  # a last, shorter block compiles again
        carry, measured = _fit_block(
            found, carry, jnp.asarray(wanted, jnp.float32), jax.random.fold_in(key, steps), prior,
            samples, here, checks, learning_rate, max_steps,
        )  # fmt: skip
        steps += here
        measured = np.asarray(measured, np.float64)
        worst = np.max(np.abs(measured - wanted)) * count
        converged = bool(worst < tolerance and np.all(measured > 0))
    found = dataclasses.replace(found, heights=carry[2] - jnp.mean(carry[2]))
    return Fit(found, measured, wanted, steps, converged)


def cell_masses(
    found: SemidiscreteMap,
    key: Key[Array, ""],
    samples: int = 100_000,
    prior: Callable | None = None,
) -> Float[np.ndarray, " n"]:
    """w [n]: the fractions of about `samples` draws of the prior (`fit_map`) in the cells."""
    batches = math.ceil(samples / 2048)
    return np.asarray(
        _measure_alone(found, key, _standard if prior is None else prior, 2048, batches)
    )


def transport_error(
    found: SemidiscreteMap, masses: Float[ArrayLike, " n"], wanted: Float[ArrayLike, " n"]
) -> tuple[float, float]:
    """Upper bounds of (W_1, W_2) from the distribution of T(z) to the targets with their masses.

    Both live on the targets: where w_i and nu_i differ, mass moves by at most the diameter D of the
    targets, and with V = sum_i |w_i - nu_i| / 2 of it,

        W_1 <= D V,    W_2 <= D sqrt(V).

    As T is optimal for the masses that it has, this is all that the fit's error adds; a flow from the
    intermediate level to the data with Lipschitz constant L multiplies it by L at most. (D is taken as
    twice the largest distance from the mean: at most 2 times too large.)
    """
    flat = np.asarray(found.targets, np.float64).reshape(len(found.targets), -1)
    diameter = 2.0 * np.max(np.linalg.norm(flat - flat.mean(0), axis=1))
    moved = 0.5 * np.sum(np.abs(np.asarray(masses, np.float64) - np.asarray(wanted, np.float64)))
    return float(diameter * moved), float(diameter * np.sqrt(moved))


def _standard(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape)


def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.exponential_decay(learning_rate, steps, 0.01))


@jit_trees
def _fit_block(
    found, carry, wanted, key, prior, samples, block, checks, learning_rate, max_steps
):  # fmt: skip
    optimizer = _optimizer(learning_rate, max_steps)
    key, check = jax.random.split(key)

    def step(carry, key):
        heights, state, mean = carry
        here = dataclasses.replace(found, heights=heights)
        gradient = _measure(here, key, prior, samples, 1) - wanted
        updates, state = optimizer.update(gradient, state)
        heights = heights + updates
        heights = heights - jnp.mean(heights)
        return (heights, state, 0.99 * mean + 0.01 * heights), None

    carry = jax.lax.scan(step, carry, jax.random.split(key, block))[0]
    found = dataclasses.replace(found, heights=carry[2])
    return carry, _measure(found, check, prior, samples, checks)


def _measure(found, key, prior, samples, batches):
    """The cells' masses, on samples x batches draws."""

    def count(total, key):
        cells = found.cells(prior(key, (samples, *found.targets.shape[1:])))
        return total.at[cells].add(1.0 / (samples * batches)), None

    zero = jnp.zeros(len(found.targets))
    return jax.lax.scan(count, zero, jax.random.split(key, batches))[0]


_measure_alone = jit_trees(_measure)
