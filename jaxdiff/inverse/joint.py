"""Two priors, one measurement: source separation and removal of structured noise.

Stevens, van Gorp, Meral, Shin, Yu, Robert & van Sloun, "Removing Structured Noise with Diffusion Models"
(2023); Stevens, Meral, Yu, Apostolakis, Robert & van Sloun, "Dehazing Ultrasound using Diffusion Models"
(2024). What is measured is a sum of sources, each with its own operator and its own trained prior,

    y = A_x x + A_h h + noise_std n,

and (x, h) is sampled from p(x, h | y): the state is a dictionary {"x": ..., "h": ...}, of any number of
sources, that one tableau takes through all their reverse processes at one noise level, and each denoiser
sees its own. The likelihood couples them, through the residual y - sum_k A_k x_0hat,k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays, is_concrete
from jaxdiff.denoisers import Denoiser, check_single, level
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.inverse.operators import LinearOperator, as_leaf, check_operator
from jaxdiff.inverse.tweedie import Linearised, check_guidable, linearise, norms
from jaxdiff.noise import normal
from jaxdiff.predictions import convert
from jaxdiff.solvers.clocks import check_number
from jaxdiff.solvers.first_order import ddpm
from jaxdiff.solvers.tableau import Tableau
from jaxdiff.solvers.travel import Ends, ends, visits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MixedMeasurement:
    """y = sum_k A_k x_k + noise_std n; made by `mixed_measurement`."""

    operators: dict[str, LinearOperator | None]
    y: Array
    noise_std: Array

    def apply(self, name: str, x: Array) -> Array:
        """A_k x."""
        operator = self.operators[name]
        return x if operator is None else operator(x)

    def adjoint(self, name: str, y: Array) -> Array:
        """A_k^T y."""
        operator = self.operators[name]
        return y if operator is None else operator.adjoint(y)

    def residual(self, sources: Mapping[str, Array]) -> Float[Array, "batch ..."]:
        """y - sum_k A_k x_k."""
        return self.y - sum(self.apply(name, x) for name, x in sources.items())

    def check_state(self, sources: Mapping[str, Array]) -> None:
        """Raise ValueError unless every source is a batch of y's size, of what is measured of it."""
        _check_sources(sources, self.operators)
        for name, operator in self.operators.items():
            one = self.y.shape[1:] if operator is None else operator.shape
            want, got = (self.y.shape[0], *one), jnp.shape(sources[name])
            if got != want:
                raise ValueError(f"source {name!r} has shape {got}, its measurement is of {want}")

    def solve(self, v: Array, variances: Mapping[str, Array]) -> Array:
        """(sum_k variances_k A_k A_k^T + noise_std^2 I)^{-1} v, by conjugate gradients."""

        def covariance(v):
            parts = (
                c * self.apply(name, self.adjoint(name, v)) for name, c in variances.items()
            )  # fmt: skip
            return sum(parts) + self.noise_std.astype(v.dtype) ** 2 * v

        return cg(covariance, v, tol=1e-5, maxiter=50)[0]


def mixed_measurement(
    y: Float[ArrayLike, "batch ..."], noise_std: ArrayLike, *names: str, **operators: LinearOperator
) -> MixedMeasurement:
    """y = sum of sources + noise: `mixed_measurement(y, 0.1, "x", "h")`, or `(y, 0.1, x=A, h=B)`.

    Arguments:
      y: [batch, *measured].
      noise_std: standard deviation of the white noise beside the sources, at least 0.
      names: sources that are measured as they are; `operators`: those that an operator measures.

    Raises ValueError for fewer than two sources, or operators that do not measure what y is.
    """
    check_number("noise_std", noise_std)
    found = {**dict.fromkeys(names), **operators}
    if len(found) < 2 or len(found) != len(names) + len(operators):
        raise ValueError(f"a mixed_measurement takes at least two sources by name, got {list(found)}")
    for name, operator in operators.items():
        check_operator(operator, f"mixed_measurement: source {name!r}")
        if operator.measured != np.shape(y)[1:]:
            raise ValueError(
                f"source {name!r} measures {operator.measured}, y is of {np.shape(y)[1:]} a sample"
            )
    return MixedMeasurement(found, as_leaf(y, "y"), as_leaf(noise_std, "noise_std"))


def joint_dps(
    denoisers: Mapping[str, Denoiser], measurement: MixedMeasurement,
    strengths: Mapping[str, ArrayLike],
) -> Denoiser:  # fmt: skip
    """The published "dps" step: x_k' = step(x_k) - strength_k grad_{x_k} |y - sum_j A_j x_0hat,j|.

    Predicts (x_0hat, the corrections), each a dictionary, for `corrected(tableau)`. The norm is not
    squared and is each sample's own (the published code's is that of its whole batch), so a strength is
    a length a step. (The published code takes the sums of J's columns, entry by entry, for the
    pullback: here it is J^T.) One evaluation and one pullback of every denoiser a call.

    Arguments:
      denoisers: by name, of single predictions. cond, if any, is a dictionary of theirs.
      strengths: lambda and kappa, by name, at least 0; in the paper 12.7 and 16.7, of 600 steps with
        batches of 10.

    Raises ValueError where names differ, or a strength is negative.
    """
    _check(denoisers, measurement, "joint_dps", strengths)
    for name, strength in strengths.items():
        check_number(f"strengths[{name!r}]", strength)
    return _joint(_norm_step, linearise, denoisers, measurement, dict(strengths), ("x0", "x0"))


def joint_pigdm(
    denoisers: Mapping[str, Denoiser], measurement: MixedMeasurement,
    data_std: Mapping[str, ArrayLike],
) -> Denoiser:  # fmt: skip
    """The joint posterior's denoiser with Gaussians for p(x_k | state). Predicts x0, for any tableau.

        x_0,k = x_0hat,k + (sigma^2 / alpha) J_k^T A_k^T S^{-1} (y - sum_j A_j x_0hat,j)
        S = sum_k r_k^2 A_k A_k^T + noise_std^2 I,   r_k^2 = sigma^2 s_k^2 / (alpha^2 s_k^2 + sigma^2)

    The score of p(y | x_t, h_t), exact for x_k ~ N(m_k, s_k^2 I). (The published "pigdm" step weights it
    by strength_k r_k^2, has s_k = 1, and no noise_std in S.)

    Arguments:
      data_std: s_k by name, positive: each source's standard deviation.

    One evaluation and one pullback of every denoiser, and one solve by conjugate gradients, a call.
    """
    _check(denoisers, measurement, "joint_pigdm", data_std)
    for name, value in data_std.items():
        check_number(f"data_std[{name!r}]", value)
        if is_concrete(value) and value == 0:
            raise ValueError(f"data_std[{name!r}] must be positive, got {value!r}")
    return _joint(_score, linearise, denoisers, measurement, dict(data_std), "x0")


def _check_sources(state: Any, names: Mapping[str, Any]) -> None:
    if not isinstance(state, dict) or set(state) != set(names):
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"the state must be a dictionary of {sorted(names)}, got {found}")


def _check_names(measurement: Any, what: str, **named: Mapping[str, Any]) -> None:
    if not isinstance(measurement, MixedMeasurement):
        raise TypeError(f"{what} takes a mixed_measurement, got {type(measurement).__name__}")
    names = sorted(measurement.operators)
    for title, found in named.items():
        if sorted(found) != names:
            raise ValueError(f"{what}: the sources are {names}, the {title} {sorted(found)}")


def _check(denoisers: Any, measurement: Any, what: str, strengths: Any) -> None:
    _check_names(measurement, what, denoisers=denoisers, strengths=strengths)
    for denoiser in denoisers.values():
        check_single(denoiser, what)


def _joint(rule, at, denoisers, measurement, strengths, prediction) -> Denoiser:
    memory = {name: d.memory for name, d in denoisers.items()}
    kept = any(m is not None for m in memory.values())
    return Denoiser(
        _Joint(rule, at, kept), prediction, (dict(denoisers), measurement, as_arrays(strengths)), level,
        memory if kept else None, sum(d.cost for d in denoisers.values()),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Joint:
    rule: Callable
    at: Callable
    kept: bool

    def __call__(self, params, x, levels, cond=None, memory=None):
        denoisers, measurement, strengths = params
        _check_sources(x, denoisers)
        if measurement is not None:
            measurement.check_state(x)
        at = {
            name: self.at(
                denoiser, x[name], levels, None if cond is None else cond[name],
                None if memory is None else memory[name],
            )
            for name, denoiser in denoisers.items()
        }  # fmt: skip
        out = self.rule(measurement, strengths, at)
        return (out, {name: a.memory for name, a in at.items()}) if self.kept else out

    def check(self, params, batch, cond, alpha):
        if self.rule is _score:
            check_guidable(alpha, "joint_pigdm")
        for name, denoiser in params[0].items():
            denoiser.check(batch, None if cond is None else cond[name], alpha)


def _own(at: Mapping[str, Any]) -> dict[str, Array]:
    return {name: a.x0 for name, a in at.items()}


def _norm_step(measurement, strengths, at: dict[str, Linearised]):
    residual = measurement.residual(_own(at))
    g = residual / norms(residual)
    correction = {
        name: strengths[name] * a.pull(measurement.adjoint(name, g)) for name, a in at.items()
    }
    return _own(at), correction


def _score(measurement, data_std, at: dict[str, Linearised]):
    variances = {
        name: (a.sigma * data_std[name]) ** 2
        / ((a.alpha * data_std[name]) ** 2 + a.sigma**2)
        for name, a in at.items()
    }  # fmt: skip
    g = measurement.solve(measurement.residual(_own(at)), variances)
    return {
        name: a.x0 + a.covariance(measurement.adjoint(name, g)) for name, a in at.items()
    }  # fmt: skip


def joint_prior(denoisers: Mapping[str, Denoiser]) -> Denoiser:
    """All sources by themselves: predicts the dictionary of their x_0, for `JointProjection`."""
    for denoiser in denoisers.values():
        check_single(denoiser, "joint_prior")
    return _joint(_apart, _denoised, denoisers, None, None, "x0")


class _Denoised(NamedTuple):
    x0: Array
    memory: Any


def _denoised(denoiser, x, levels, cond, memory) -> _Denoised:
    """As `linearise`, of networks that need no derivative."""
    out, new = denoiser.evaluate(x, *levels, cond, memory)
    return _Denoised(convert(out.astype(x.dtype), x, denoiser.prediction, "x0", *levels[1:]), new)


def _apart(measurement, strengths, at: dict[str, _Denoised]):
    return _own(at)


def joint_projection(
    grid: Grid, measurement: MixedMeasurement, strengths: Mapping[str, ArrayLike],
    base: Callable[[Grid], Tableau] = ddpm,
) -> tuple[Tableau, Control]:  # fmt: skip
    """(tableau, control) of the published "projection" step: no gradient of any network.

        x_k <- x_k - strength_k A_k^T (sum_j A_j x_j - (alpha' y + sigma' z))

    after every row, with alpha', sigma' of the node it leads to (the published code noises y to the
    row's own level, a step too much): `sample(joint_prior(denoisers), tableau, x_T, key,
    control=control)`.

    Arguments:
      grid: from noise to data.
      strengths: by name, at least 0.
      base: the step, of the grid: a solver of one row a step and one register, `ddpm` or `ddim`.

    Raises ValueError where names differ, for a negative strength, or a base of other rows.
    """
    _check_names(measurement, "joint_projection", strengths=strengths)
    if not isinstance(grid, Grid) or grid.backward:
        raise ValueError(f"joint_projection takes a grid from noise to data, got {grid!r}")
    for name, strength in strengths.items():
        check_number(f"strengths[{name!r}]", strength)
    tableau = base(grid)
    if tableau.rows != grid.steps or tableau.registers != 1:
        raise ValueError(
            f"joint_projection takes a base of one register and one row a step, {grid.steps} here; "
            f"got {tableau.registers} registers and {tableau.rows} rows"
        )
    way = ends(grid, visits(grid.steps, 1, 1))
    return tableau, JointProjection(measurement, as_arrays(dict(strengths)), way)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class JointProjection(Control):
    """The control of `joint_projection`."""

    measurement: MixedMeasurement
    strengths: dict[str, Any]
    ends: Ends

    def init(self, x: Any) -> None:
        """Raise ValueError for a state of other shapes than were measured."""
        self.measurement.check_state(x)

    def after(
        self, aux: Any, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """The state that a row leaves, moved towards the noised measurement."""
        if key is None:
            raise ValueError("joint_projection noises the measurement: sample needs key=")
        (state,) = carry.registers
        y = self.measurement.y
        alpha, sigma = (
            jnp.asarray(c, y.dtype)[row.index] for c in (self.ends.alpha, self.ends.sigma)
        )
        noised = alpha * y + sigma * normal(key, y)
        apart = noised - y + self.measurement.residual(state)
        moved = {
            name: s + jnp.asarray(self.strengths[name], s.dtype) * self.measurement.adjoint(name, apart)
            for name, s in state.items()
        }  # fmt: skip
        return carry._replace(registers=(moved,)), aux
