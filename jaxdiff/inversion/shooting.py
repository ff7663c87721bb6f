"""Inversion of any deterministic sampler: Newton's method on the whole run."""

from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.arrays import as_arrays, is_concrete, jit_trees, structure_hash
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.inversion.roots import NotConvergedError, solve, tolerance
from jaxdiff.sampling import check_call, sample
from jaxdiff.solvers.clocks import check_order
from jaxdiff.solvers.tableau import Tableau


class Shot(NamedTuple):
    """`x_T`; `residual` [batch], rms(sample(x_T) - x); `iterations`; `converged` [batch]."""

    x_T: Any
    residual: Any
    iterations: Any
    converged: Any


def shoot(
    denoiser: Denoiser, tableau: Tableau, x: Any, cond: Any = None, guess: Any = None,
    tol: float | None = None, max_iterations: int = 20, throw: bool = True,
) -> Shot:  # fmt: skip
    """The x_T that a deterministic sampler turns into x: sample(x_T) = x by Newton's method.

    An iteration solves  (d sample / d x_T) d = sample(x_T) - x  with GMRES, whose products are
    derivatives along the whole run (jvp, constant memory), then moves by d, or by less where the
    residual did not fall. It needs nothing of the sampler but that it is deterministic: multistep,
    Runge-Kutta, predictor-corrector. Where the run contracts differences by a factor c, x_T is found
    to the residual divided by c.

    Arguments:
      x: the sample, at the tableau's last node. guess: the x_T to start from; None: naive DDIM
        inversion on the tableau's levels.
      tol: for the rms residual of a sample; None: 1e-12 in float64, 1e-6 in float32.
      throw: raise where a sample did not converge; else, and under a trace, see `converged`.

    Raises ValueError for a stochastic tableau, NotConvergedError with the largest residual.
    """
    check_order(max_iterations, None, "max_iterations")
    check_single(denoiser, "shoot")
    x, cond, denoiser, guess = (as_arrays(tree) for tree in (x, cond, denoiser, guess))
    if isinstance(tableau, Tableau) and tableau.stochastic:
        raise ValueError("shoot inverts deterministic samplers, got one that draws noise")
    check_call(denoiser, tableau, x, None, None, cond, "final", None, None)
    tol = tolerance(x, tol)
    structure = structure_hash(denoiser, tableau, x, cond, guess)
    limits = (np.float64(tol), np.int32(max_iterations))
    found = _run(denoiser, tableau, x, cond, guess, limits, structure)
    if throw and is_concrete(found):
        bad = np.flatnonzero(~np.asarray(found.converged))
        if bad.size:
            worst = np.nan_to_num(np.asarray(found.residual), nan=np.inf)
            raise NotConvergedError(
                f"{bad.size} of {len(worst)} samples did not reach tol = {tol:g} in "
                f"{int(found.iterations)} iterations: the largest residual is {worst.max():.2g}, of "
                f"sample {worst.argmax()} (throw=False returns what was found)"
            )
    return found


@jit_trees
def _run(denoiser, tableau, x, cond, guess, limits, structure):
    def run(x_T):
        return sample(denoiser, tableau, x_T, cond=cond, adjoint=diffrax.ForwardMode())

    x_T = _naive(denoiser, tableau, x, cond) if guess is None else guess
    root = solve("newton", run, x, x_T, 1.0, *limits)
    return Shot(root.s, root.residual, root.iterations, root.residual <= limits[0])


def _naive(denoiser: Denoiser, tableau: Tableau, x: Any, cond: Any) -> Any:
    """DDIM from the level of the last row to that of the first, x taken to lie at the former."""
    wide = jnp.result_type(*jax.tree.leaves(x))
    levels = tuple(jnp.asarray(a, wide) for a in (tableau.t, tableau.alpha, tableau.sigma))

    def step(s, pair):
        (t, alpha, sigma), (_, alpha_1, sigma_1) = pair
        eps = denoiser.predict("eps", s, t, alpha, sigma, cond)
        move = lambda a, e: alpha_1 * (a - sigma * e) / alpha + sigma_1 * e  # noqa: E731
        return jax.tree.map(lambda a, e: move(a, e.astype(a.dtype)), s, eps), None

    ahead, behind = (tuple(a[part] for a in levels) for part in (slice(1, None), slice(-1)))
    return jax.lax.scan(step, x, (ahead, behind), reverse=True)[0]
