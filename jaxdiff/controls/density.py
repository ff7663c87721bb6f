"""log p(x) along a sampled path of the reverse SDE, without a divergence.

In y = x / alpha and v = sigma^2 / alpha^2 the density q_v of the noised data obeys the heat equation,
the score of y is s = -eps / sqrt(v), and along a path with noise of variance v - v' the Laplacian in
d log q / dv is the negative of Ito's correction. What is left needs no derivative of the network:

    log q_{v'}(y') - log q_v(y) = <s, y' - y> - (v - v') / 2 |s|^2              (the step's first order)

and log p_t(x) = log q_v(y) - d log(alpha), d numbers a sample. It is the Ito density estimator of
Skreta et al., "The Superposition of Diffusion Models Using the Ito Density Estimator" (SuperDiff,
2025), and the augmented SDE of Karczewski, Heinonen & Garg, "Diffusion Models as
Cartoonists" (2025), in the variables where the process's drift is gone. It holds for any path with
that noise, whoever's drift made it: so one path tells the densities of several models.

For data with a smooth density the error after n steps is a random sum of size about (span in lambda)
sqrt(d / n), mostly from high noise, where s is nearly -y / v. A reference removes that part: with
r(y, v) the density of N(0, (v + c^2) I), data that are one normal of standard deviation c, the
estimator is applied to q / r, whose score is nearly zero there, and r is added exactly. It helps down
to noise of the size of c.

For data near a manifold the error is mostly bias, downwards: along a direction thinner than the noise,
where s is -y / v to the end, a step of h in lambda has (1 - exp(-2 h)) / 2 - h, about -h^2, on average.
In benchmarks/results/likelihood.json (fourteen such directions of 16) the bias is -40.2, -12.8 and -2.9
nats of a root mean square of 40.6, 13.3 and 3.6 with 25, 100 and 400 steps as published, and -16.4, -5.4
and -1.1 of 16.9, 5.8 and 1.6 with the reference. Only more steps reduce it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays, is_concrete
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.predictions import convert
from jaxdiff.solvers.tableau import Tableau


class DensityState(NamedTuple):
    """What the control carries; `sample(..., control=, save="state").aux` is the last.

    log_density: of the state at the last node reached, in nats, [models, batch]: the sampled
    denoiser's first, then the others'. `x`, `eps`: state and predictions at the step's start.
    """

    log_density: Float[Array, "models batch"]
    x: Any
    eps: tuple[Any, ...]


def ito_increment(
    x: Any, eps: Any, x_next: Any, level: tuple[Any, Any], next_level: tuple[Any, Any],
    reference: Any = None,
) -> Float[Array, " batch"]:  # fmt: skip
    """log p(x_next) - log p(x) in nats, [batch], over one step of the reverse SDE.

    Arguments:
      x, x_next: states (pytrees, leaves [batch, ...]) at both ends; eps: the model's prediction at x.
      level, next_level: (alpha, sigma) of the ends, positive, from more to less noise.
      reference: c, or None for the estimator as published.
    """
    (alpha, sigma), (alpha1, sigma1) = level, next_level
    v, v1 = (sigma / alpha) ** 2, (sigma1 / alpha1) ** 2

    def leaf(a, e, b):
        y, y1 = a / alpha, b / alpha1
        s, dy = -e.astype(a.dtype) * (alpha / sigma), y1 - y
        change = s * dy - 0.5 * (v - v1) * s**2 - jnp.log(alpha1 / alpha)
        if reference is not None:
            total, total1 = v + reference**2, v1 + reference**2
            r = -y / total
            exact = 0.5 * (y**2 / total - y1**2 / total1 + jnp.log(total / total1))
            change = change + exact - (r * dy - 0.5 * (v - v1) * r**2)
        return jnp.sum(change.reshape(len(a), -1), 1)

    return sum(jax.tree.leaves(jax.tree.map(leaf, x, eps, x_next)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ItoDensity(Control):
    """The control of `ito_density`, which see.

    `starts`, `ends`: whether a step starts, or ends, with a row; `levels`: (alpha, sigma) of the
    row's step at its start and at its end.
    """

    starts: Any
    ends: Any
    levels: Any
    others: tuple[Denoiser, ...]
    cond: Any
    initial: Any
    reference: Any
    prediction: str = dataclasses.field(metadata={"static": True})

    def init(self, x: Any) -> DensityState:
        """log p of the first state."""
        models, batch = 1 + len(self.others), len(jax.tree.leaves(x)[0])
        dtype = jnp.result_type(*jax.tree.leaves(x))
        value = self.initial
        if value is None:
            alpha, sigma = (jnp.asarray(a[0, 0], dtype) for a in self.levels)
            variance = sigma**2 + alpha**2
            value = -0.5 * sum(
                jnp.sum((a**2 / variance + jnp.log(2.0 * jnp.pi * variance)).reshape(batch, -1), 1)
                for a in jax.tree.leaves(x)
            )
        value = jnp.broadcast_to(value, (models, batch)).astype(dtype)
        return DensityState(value, x, (jax.tree.map(jnp.zeros_like, x),) * models)

    def after(
        self, aux: DensityState, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, DensityState]:
        """Keep the predictions where a step starts; add what the step changed where it ends."""
        _, t, alpha, sigma, active = row
        found = convert(out, x, self.prediction, "eps", alpha, sigma)
        fresh = (found, *(d.predict("eps", x, t, alpha, sigma, self.cond) for d in self.others))
        x0, eps = jax.tree.map(
            lambda a, b: jnp.where(self.starts[row.index], a.astype(b.dtype), b),
            (x, fresh), (aux.x, aux.eps),
        )  # fmt: skip
        level, next_level = (
            tuple(jnp.asarray(a[row.index, end], alpha.dtype) for a in self.levels)
            for end in (0, 1)
        )
        change = jnp.stack([
            ito_increment(x0, e, carry.registers[0], level, next_level, self.reference) for e in eps
        ])  # fmt: skip
        done = self.ends[row.index] & (active != 0)
        log_density = aux.log_density + jnp.where(done, change, 0.0).astype(aux.log_density.dtype)
        return carry, DensityState(log_density, x0, eps)


def ito_density(
    grid: Grid, tableau: Tableau, denoiser: Denoiser, *, others: Sequence[Denoiser] = (),
    cond: Any = None, initial: ArrayLike | None = None, reference: ArrayLike | None = 1.0,
) -> ItoDensity:  # fmt: skip
    """The control that follows log p along a stochastic sampler's path:

        tableau = jd.solvers.ddpm(grid)
        control = jd.controls.ito_density(grid, tableau, denoiser)
        state = jd.sample(denoiser, tableau, x_T, key, control=control, save="state")
        x_0, log_p = state.registers[0], state.aux.log_density[0]

    Arguments:
      grid, tableau: the sampler and the grid it was built on, with lambda finite at both ends. Its
        noise must be that of the reverse SDE (eta = 1, tau = 1): `ddpm`, `euler_maruyama`,
        `sa_solver`, `seeds` and the like.
      denoiser: what is sampled. Its evaluations are used, none is added.
      others: models whose density along the same path is followed too, one evaluation a row each,
        with the condition `cond`; without memory.
      initial: log p_T(x_T), [batch] or [models, batch]; by default of N(0, (sigma^2 + alpha^2) I).
      reference: c, the standard deviation of the data, roughly: a number, or an array that broadcasts
        against a sample; see this module. None: the estimator as published.

    Raises ValueError or TypeError for a denoiser of several predictions; others with memory; a grid
    that reaches alpha = 0 or sigma = 0, or is not the tableau's; a step without noise, or whose noise
    cannot be the reverse SDE's (that density needs a divergence: `jaxdiff.ode.log_likelihood`). The
    noise is checked to the order of the step, as sound samplers differ by that much: on a coarse grid
    eta or tau other than 1 may pass (tau = 1.5 in 40 steps of `sa_solver`), and the result is wrong.
    """
    for model in (denoiser, *others):
        check_single(model, "ito_density")
    if any(model.memory is not None for model in others):
        raise ValueError("others must be without memory: it would start afresh at every row")
    if not isinstance(grid, Grid) or not isinstance(tableau, Tableau):
        raise TypeError(
            f"expected a grid and a tableau, got {type(grid).__name__} and {type(tableau).__name__}"
        )
    if any(grid.ends) or grid.backward:
        raise ValueError(
            "the path must go from finite to finite lambda: give the grid a t_max with alpha > 0 and "
            f"a t_min with sigma > 0, got ends={grid.ends}, backward={grid.backward}"
        )
    if not is_concrete(grid, tableau):
        raise ValueError("ito_density reads the tableau on the host: build it outside jit and vmap")
    nodes = np.asarray(tableau.nodes)
    if nodes.ndim != 2 or len(nodes) != len(grid):
        raise ValueError(f"the tableau has {len(nodes)} nodes, the grid {len(grid)}")
    # A node that stands in another register was corrected by the row that evaluated there.
    first = nodes[:-1, 0] - (nodes[:-1, 1] != 0)
    last = np.append(first[1:], int(np.sum(np.asarray(tableau.active))))
    starts, ends, step = (np.zeros(tableau.rows, kind) for kind in (bool, bool, int))
    starts[first], ends[last - 1] = True, True
    step[: last[-1]] = np.repeat(np.arange(grid.steps), last - first)
    alpha, sigma = np.asarray(grid.alpha), np.asarray(grid.sigma)
    lam, rows = np.log(alpha / sigma), np.log(tableau.alpha / tableau.sigma)
    if not np.allclose(rows[first], lam[:-1], rtol=0, atol=1e-6):
        raise ValueError("the tableau does not evaluate the denoiser at the nodes of this grid")
    _check_noise(tableau, first, last, alpha, sigma)
    levels = tuple(np.stack([a[step], a[step + 1]], 1) for a in (alpha, sigma))
    return ItoDensity(
        *as_arrays((starts, ends, levels, tuple(others), cond, initial, reference)),
        denoiser.prediction,
    )  # fmt: skip


def _check_noise(tableau: Tableau, starts: Any, ends: Any, alpha: Any, sigma: Any) -> None:
    """Raise ValueError unless every step's noise is the reverse SDE's, to the order of the step.

    The bounds widen with the step: other noise passes where it differs by less than the schemes do.
    """
    if tableau.C is None or tableau.start.C is not None:
        raise ValueError(
            "ito_density follows a stochastic sampler of the reverse SDE; for a deterministic one, or "
            "noise before the first call, take jaxdiff.ode.log_likelihood"
        )
    if np.ndim(tableau.A) != 3:
        raise ValueError("ito_density takes a tableau of scalar coefficients")
    v = (sigma / alpha) ** 2
    for i, (first, last) in enumerate(zip(starts, ends)):
        noise = np.zeros((tableau.registers, last - first))
        for r in range(first, last):
            noise = np.asarray(tableau.A[r]) @ noise
            noise[:, tableau.draw[r] - tableau.draw[first]] += tableau.C[r]
        variance = np.sum(noise[0] ** 2) / alpha[i + 1] ** 2
        h = 0.5 * np.log(v[i] / v[i + 1])
        ratio = max(variance / (v[i] - v[i + 1]), 1e-300)
        # More noise, drawn at the next node's level, is a corrector's: not of the path's SDE.
        noisy = np.any(np.asarray(tableau.C[first:last]) != 0, 1)
        rho = tableau.sigma[first:last] / tableau.alpha[first:last]
        late = np.isclose(rho, np.sqrt(v[i + 1]), rtol=1e-6, atol=0) & (np.cumsum(noisy) > 1)
        # Exact steps have exp(-2 h) ("x0") or 1 ("eps"), Euler's at most about exp(h / 2).
        right = -2.0 * h - 1e-3 <= np.log(ratio) <= 0.6 * h + 1e-3
        if np.any(late & noisy) or not right:
            raise ValueError(
                f"step {i} has {ratio:.3g} of the reverse SDE's noise (eta = 1 or tau = 1 has 1, to "
                "the order of the step): for other noise, or none, take jaxdiff.ode.log_likelihood"
            )
