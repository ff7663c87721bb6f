"""DAPS: decoupled annealing posterior sampling.

Zhang, Chu, Berner, Meng, Anandkumar & Song, "Improving Diffusion Inverse Problem Solving with
Decoupled Noise Annealing" (2024). Level by level, with r = sigma / alpha,

    1. a few steps of the probability flow take the state x to x_0hat,
    2. x_0 ~ p(x_0 | x, y), where p(x_0 | x) is taken for N(x_0hat, r^2 I),
    3. the next state is alpha' x_0 + sigma' z:

it does not follow from x but through x_0 alone, so it can be far from x, and errors of one level do
not stay. As a tableau the flow's steps are rows, and step 3 belongs to the last of them; the
control is step 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.inverse.measurement import Measurement, check_measurement, same_shape
from jaxdiff.noise import normal
from jaxdiff.solvers.clocks import check_number, check_order
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Langevin:
    """Step 2 by unadjusted Langevin dynamics on log p(y | x_0) N(x_0; x_0hat, r^2), from x_0hat.

        x <- x + h g + sqrt(2 h) z,    g = A^T (y - A x) / tau^2 + (x_0hat - x) / r^2

    or with a momentum b (the published code's damped "hmc", the velocity's start standard normal)

        v <- b v + sqrt(h) g + sqrt(2 (1 - b)) z,    x <- x + sqrt(h) v.

    Attributes:
      steps: 100 in the published settings.
      step_size: h at the first level, positive; it must stay below 2 / (s^2 / tau^2 + 1 / r^2), s
        the operator's largest singular value, at every level.
      last: h at the last level is `last` times that, linear in the level in between, in (0, 1].
      tau: None for the measurement's noise_std. The published settings take 0.01 where that is 0.05;
        their loss |y - A x|^2 / tau^2 is without the Gaussian's 1/2, so it is tau = 0.0071 here.
      momentum: None, or b in [0, 1).
    """

    steps: int = dataclasses.field(default=100, metadata={"static": True})
    step_size: ArrayLike = 1e-4
    last: ArrayLike = 0.01
    tau: ArrayLike | None = None
    momentum: ArrayLike | None = None

    def __call__(
        self, measurement: Measurement, x0: Array, radius: Array, share: Array, key: Array
    ) -> Array:
        """A sample near x0 [batch, ...]; `share` in [0, 1): how far along the levels are."""
        tau = measurement.noise_std if self.tau is None else self.tau
        h = jnp.asarray(self.step_size * (1.0 + share * (self.last - 1.0)), x0.dtype)
        tau = jnp.asarray(tau, x0.dtype)

        def gradient(x):
            data = measurement.operator.adjoint(measurement.residual(x)) / tau**2
            return data + (x0 - x) / radius**2

        def step(i, carry):
            x, v = carry
            z = normal(key, x, i + 1)
            if self.momentum is None:
                return x + h * gradient(x) + jnp.sqrt(2.0 * h) * z, v
            b = jnp.asarray(self.momentum, x.dtype)
            v = b * v + jnp.sqrt(h) * gradient(x) + jnp.sqrt(2.0 * (1.0 - b)) * z
            return x + jnp.sqrt(h) * v, v

        start = x0 if self.momentum is None else normal(key, x0, 0)
        return jax.lax.fori_loop(0, self.steps, step, (x0, start))[0]


def daps(
    denoiser: Denoiser, grid: Grid, measurement: Measurement, inner: int = 5, end: float = 0.01,
    langevin: Langevin | None = None,
) -> tuple[Tableau, Control]:  # fmt: skip
    """(tableau, control) of DAPS: `sample(denoiser, tableau, x_T, key, control=control)`.

    Arguments:
      grid: the annealing levels, from alpha > 0 to sigma = 0; the paper's: `karras` with 200 steps
        from sigma / alpha = 100 to 0.1 and then 0.
      measurement: its noise_std must be positive (or Langevin's tau).
      inner: steps of the flow (Euler in sigma / alpha, that is DDIM) a level, spaced as `karras`
        with rho = 7. inner = 1 with end = 0 takes the network's x_0.
      end: sigma / alpha at which the flow stops, below that of every level; 0 for x_0 itself.
      langevin: how step 2 is taken; None draws from the exact Gaussian, which linear operators
        have: with x~ ~ N(x_0hat, r^2) and e ~ N(0, noise_std^2), x_0 = x~ + A^T (A A^T +
        noise_std^2 / r^2)^{-1} (y + e - A x~), one `solve`.

    Evaluations: grid.steps inner, without a Jacobian. Raises TypeError or ValueError for arguments
    that are not these.
    """
    check_single(denoiser, "daps")
    check_measurement(measurement, "daps")
    check_ends(grid, "daps", noise=False, data=True)
    check_order(inner, None, "inner")
    check_number("end", end)
    if grid.backward or not grid.ends[1] or grid.xp is not np:
        raise ValueError('daps takes a grid of known levels to sigma = 0: build it with end="zero"')
    if langevin is not None:
        _check_langevin(langevin)
    needed = measurement.noise_std if langevin is None or langevin.tau is None else langevin.tau
    if is_concrete(needed) and not needed > 0:
        raise ValueError("daps needs a noise_std above 0 (or Langevin's tau)")
    radius = np.exp(-grid.lam)
    if not end < radius[-2]:
        raise ValueError(
            f"the flow must end below the last level's sigma / alpha = {radius[-2]:.4g}, got {end}"
        )
    rows = []
    for i in range(grid.steps):
        levels = [grid.node(i)] + [_level(grid, r) for r in _spaced(radius[i], end, inner)]
        for k, ((_, a, s), (_, a1, s1)) in enumerate(zip(levels, levels[1:])):
            flow = np.array([s1 / s, a1 - s1 * a / s])
            if k < inner - 1:
                rows.append(Row(levels[k], [Update([flow[0]], [flow[1]])]))
        to_x0, (_, a2, s2) = flow / a1, grid.node(i + 1)
        z = None if i == grid.steps - 1 else s2
        state = Update([a2 * to_x0[0]], [a2 * to_x0[1]], z)
        rows.append(Row(levels[inner - 1], [state, Update([to_x0[0]], [to_x0[1]])]))
    nodes = [(i * inner, 0) for i in range(grid.steps + 1)]
    control = DAPS(measurement, langevin, radius[:-1], np.asarray(grid.alpha)[1:], inner)
    return assemble(rows, "x0", np, nodes=nodes), control


def _spaced(radius: float, end: float, steps: int) -> np.ndarray:
    """sigma / alpha after each of `steps` steps from `radius` to `end`, even in its 7th root."""
    roots = np.linspace(radius ** (1 / 7), end ** (1 / 7), steps + 1)[1:]
    return np.append(roots[:-1] ** 7, end)


def _level(grid: Grid, radius: float) -> tuple[Any, Any, Any]:
    return grid.node(grid.steps) if radius == 0 else grid.at(-np.log(radius))


def _check_langevin(langevin: Any) -> None:
    if not isinstance(langevin, Langevin):
        raise TypeError(f"langevin must be a Langevin or None, got {type(langevin).__name__}")
    check_order(langevin.steps, None, "steps")
    check_number("step_size", langevin.step_size)
    check_number("last", langevin.last, 0.0, 1.0)
    for name in ("step_size", "last"):
        value = getattr(langevin, name)
        if is_concrete(value) and value == 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
    if langevin.momentum is not None:
        check_number("momentum", langevin.momentum, 0.0, 1.0)
        if is_concrete(langevin.momentum) and langevin.momentum == 1:
            raise ValueError(f"momentum must be below 1, got {langevin.momentum!r}")


def gaussian_posterior(measurement: Measurement, x0: Array, radius: ArrayLike, key: Array) -> Array:
    """A sample of p(x | y) under the prior N(x0, radius^2 I), one for each x0 [batch, ...]; exact.

    A prior sample corrected by its own simulated measurement (Matheron's rule).
    """
    std = measurement.noise_std.astype(x0.dtype)
    prior = x0 + radius * normal(key, x0, 0)
    residual = measurement.residual(prior)
    residual = residual + std * normal(key, residual, 1)
    operator = measurement.operator
    return prior + operator.adjoint(operator.solve(residual, (std / radius) ** 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DAPS(Control):
    """The control of `daps`; `radius`, `alpha` [levels]: sigma / alpha, and the next's alpha."""

    measurement: Measurement
    langevin: Langevin | None
    radius: Any
    alpha: Any
    inner: int = dataclasses.field(metadata={"static": True})

    def init(self, x: Array) -> None:
        """Raise ValueError for a state of another shape than the operator takes."""
        same_shape(self.measurement, x, "daps")

    def after(
        self, aux: Any, row: RowInfo, x: Array, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """After a level's last row: x_0 of the posterior in place of the flow's."""
        if key is None:
            raise ValueError("daps draws from a posterior: sample needs key=")
        level = row.index // self.inner
        radius, alpha = (jnp.asarray(c, x.dtype)[level] for c in (self.radius, self.alpha))
        state, x0 = carry.registers

        def drawn():
            if self.langevin is None:
                found = gaussian_posterior(self.measurement, x0, radius, key)
            else:
                share = level.astype(x.dtype) / self.radius.shape[0]
                found = self.langevin(self.measurement, x0, radius, share, key)
            return state + alpha * (found - x0)

        last = row.index % self.inner == self.inner - 1
        return carry._replace(registers=(jax.lax.cond(last, drawn, lambda: state), x0)), aux
