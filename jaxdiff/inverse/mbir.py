"""DiffusionMBIR: volumes from a prior of their slices, coupled by total variation between them.

Chung, Ryu, McCann, Klasky & Ye, "Solving 3D Inverse Problems using Pre-trained 2D Diffusion Models"
(2023). A volume is a batch of slices, each with its measurement. Every row of the sampler denoises all
slices, and then one iteration of ADMM (Boyd et al. 2011) moves the volume towards

    min_x  1/2 |y - A x|^2 + lam |D x|_1,        D x = x[i + 1] - x[i] over slices,

with the split z = D x, whose z and scaled dual w are kept from row to row (a warm start):

    (A^T A + rho D^T D) x = A^T y + rho D^T (z - w)      by conjugate gradients from the last x
    z = soft(D x + w, lam / rho),        w = w + D x - z.

So the network decides what no measurement sees, and the model what lies between slices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.inverse.measurement import Measurement, check_measurement, same_shape
from jaxdiff.solvers.clocks import check_number, check_order
from jaxdiff.solvers.tableau import Tableau


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SliceTV:
    """1/2 |y - A x|^2 + lam |D x|_1 of volumes [slices, ...], and its ADMM iteration.

    Attributes:
      lam: weight of the total variation, at least 0. At 0 nothing couples the slices: rho D^T D is
        left out too.
      rho: ADMM's penalty, positive. The published lam and rho are 0.04 and 10.
      periodic: whether the last slice is also next to the first, as in the published code.
      iterations, tolerance: of the conjugate gradients: at most so many, until |M x - b| is below
        `tolerance` (|b| + |M x|), the latter at the start. The published code makes 1.
    """

    lam: ArrayLike = 0.04
    rho: ArrayLike = 10.0
    periodic: bool = _static(False)
    iterations: int = _static(5)
    tolerance: float = _static(1e-5)

    def check(self) -> None:
        """Raise ValueError for numbers out of range."""
        for name in ("lam", "rho", "tolerance"):
            check_number(name, getattr(self, name))
        check_order(self.iterations, None, "iterations")

    def differences(self, x: Array) -> Array:
        """D x, of x's shape; without `periodic` the last is 0."""
        d = jnp.roll(x, -1, 0) - x
        return d if self.periodic else d.at[-1].set(0.0)

    def back(self, d: Array) -> Array:
        """D^T d."""
        return jax.linear_transpose(self.differences, jax.ShapeDtypeStruct(d.shape, d.dtype))(d)[0]

    def penalty(self, dtype: Any) -> Array:
        """The rho that is used: 0 where lam is 0."""
        return jnp.where(jnp.asarray(self.lam) > 0, jnp.asarray(self.rho), 0.0).astype(dtype)

    def normal(self, measurement: Measurement, x: Array) -> Array:
        """(A^T A + rho D^T D) x."""
        operator = measurement.operator
        coupling = self.penalty(x.dtype) * self.back(self.differences(x))
        return operator.adjoint(operator(x)) + coupling

    def target(self, measurement: Measurement, z: Array, w: Array) -> Array:
        """A^T y + rho D^T (z - w)."""
        y = measurement.batched(z.shape[0]).astype(z.dtype)
        return measurement.operator.adjoint(y) + self.penalty(z.dtype) * self.back(z - w)

    def solve(self, measurement: Measurement, x: Array, b: Array) -> Array:
        """(A^T A + rho D^T D)^{-1} b from x: what the equations leave open stays as in x."""
        first = self.normal(measurement, x)
        # Relative to both sides, as b - M x is no better known: what rounding leaves there may lie
        # outside the range of a singular M, and iterations on it diverge (lineax's go on until their
        # steps are small too).
        size = jnp.linalg.norm(b) + jnp.linalg.norm(first)
        found, _ = cg(
            lambda v: self.normal(measurement, v), b - first, tol=0.0,
            atol=self.tolerance * size, maxiter=self.iterations,
        )  # fmt: skip
        return x + found

    def step(
        self, measurement: Measurement, x: Array, z: Array, w: Array
    ) -> tuple[Array, Array, Array]:
        """One iteration of ADMM, (x, z, w) to the next."""
        x = self.solve(measurement, x, self.target(measurement, z, w))
        d = self.differences(x) + w
        rho = self.penalty(x.dtype)
        threshold = jnp.asarray(self.lam, x.dtype) / jnp.where(rho > 0, rho, 1.0)
        z = jnp.sign(d) * jnp.maximum(jnp.abs(d) - threshold, 0.0)
        return x, z, d - z


def total_variation(
    measurement: Measurement, model: SliceTV, x: Float[Array, "slices ..."], iterations: int = 100
) -> Float[Array, "slices ..."]:
    """The volume without a network: `iterations` of ADMM on the model alone, from x."""
    check_measurement(measurement, "total_variation")
    model.check()
    check_order(iterations, None, "iterations")
    same_shape(measurement, x, "total_variation")
    zero = jnp.zeros_like(x)
    first = (x, zero, zero)
    return jax.lax.fori_loop(0, iterations, lambda i, c: model.step(measurement, *c), first)[0]


def mbir(
    tableau: Tableau, grid: Grid, measurement: Measurement, model: SliceTV | None = None,
    final: str = "projection",
) -> Control:  # fmt: skip
    """The control of DiffusionMBIR: `sample(denoiser, tableau, x_T, key, control=control)`.

    The state [slices, ...] is one volume. After a row it stands at (alpha, sigma), and ADMM moves
    x / alpha, as in the paper, whose process has alpha = 1 (`jaxdiff.processes.ve`). Vmap `sample` for
    several volumes.

    Arguments:
      tableau: any on `grid`; the published one is `predictor_corrector` with one Langevin step.
      grid: from noise to data, as the tableau was built; the published has 2000 steps.
      measurement: of the slices, y [slices, *measured]. Its noise_std is not looked at: lam is what
        balances data and model.
      model: `SliceTV()` by default.
      final: what follows the last row. "projection": the data's least squares, by conjugate gradients
        from the state; "sweep": the published A^T (y - A x) / (A^T A 1), one sweep entry by entry, for
        operators without negative numbers; "none".

    With lam = 0 every slice is sampled by itself (diffusion and data consistency). Raises TypeError or
    ValueError for arguments that are not these.
    """
    check_measurement(measurement, "mbir")
    if not isinstance(tableau, Tableau) or not isinstance(grid, Grid):
        raise TypeError(
            f"mbir takes a Tableau and its Grid, got {type(tableau).__name__} and "
            f"{type(grid).__name__}"
        )
    if grid.backward:
        raise ValueError("mbir takes a grid from noise to data")
    if final not in ("projection", "sweep", "none"):
        raise ValueError(f"final must be 'projection', 'sweep' or 'none', got {final!r}")
    model = SliceTV() if model is None else model
    model.check()
    ends = jnp.append(jnp.asarray(tableau.alpha)[1:], jnp.asarray(grid.alpha[-1]))
    return MBIR(measurement, model, ends, final)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MBIR(Control):
    """The control of `mbir`; `ends` [rows] is alpha where each row ends."""

    measurement: Measurement
    model: SliceTV
    ends: Array
    final: str = _static("projection")

    def init(self, x: Array) -> tuple[Array, Array]:
        """z and w, both 0."""
        same_shape(self.measurement, x, "mbir")
        return jnp.zeros_like(x), jnp.zeros_like(x)

    def after(
        self, aux: Any, row: RowInfo, x: Array, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """One iteration of ADMM on register 0; after the last row also `final`."""
        state, *others = carry.registers
        alpha = self.ends.astype(state.dtype)[row.index]
        volume, *aux = self.model.step(self.measurement, state / alpha, *aux)
        last = row.index == self.ends.shape[0] - 1
        volume = jax.lax.cond(last, self._finish, lambda v: v, volume)
        return carry._replace(registers=(alpha * volume, *others)), tuple(aux)

    def _finish(self, volume):
        if self.final == "none":
            return volume
        operator, measurement = self.measurement.operator, self.measurement
        if self.final == "sweep":
            total = operator.adjoint(operator(jnp.ones_like(volume)))
            return volume + operator.adjoint(measurement.residual(volume)) / total
        data = dataclasses.replace(self.model, lam=jnp.zeros_like(jnp.asarray(self.model.lam)))
        zero = jnp.zeros_like(volume)
        return data.solve(measurement, volume, data.target(measurement, zero, zero))
