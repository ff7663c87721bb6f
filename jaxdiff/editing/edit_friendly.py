"""Edit-friendly DDPM inversion: noise maps that lead a stochastic sampler along chosen states.

A row of a one-register tableau is s' = mu(s) + C z, with mu its registers' and integrands' part. Given
where every row should end, x_1, ..., x_r, the noise that takes it there is

    z_i = (x_{i+1} - mu(x_i)) / C_i,      and then x_{i+1} is set to mu(x_i) + C_i z_i,

so that rounding does not pile up. `extract` is this line, for any such tableau: DDIM with eta > 0,
DDPM, SDE-DPM-Solver++ of any order (mu then holds earlier evaluations, as in LEDITS++, Brack et al.
2024). A replay is `jaxdiff.sample(..., noise=z)`: under the same condition it returns to the data, under
another one, or with other maps, it edits them.

Where the states come from makes the method. Huberman-Spiegelglas, Kulikov & Michaeli, "An Edit Friendly
DDPM Noise Space: Inversion and Manipulations" (2024), noise the data independently at each level,
x_i = alpha_i x_0 + sigma_i e_i: `edit_friendly`. One Markov path makes the DPM-Encoder,
`jaxdiff.editing.dpm_encoder`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.noise import normal
from jaxdiff.sampling import sample
from jaxdiff.solvers.tableau import Start, Tableau


class NoiseCode(NamedTuple):
    """What a replay starts from; a pytree, so an edit of it is a `jax.tree.map`.

    `states`: the sampler's states, leaves [rows + 1, batch, ...], from noise to data; `noise`: the
    maps, leaves [tableau.draws, batch, ...], for `sample(noise=)`; `residual`, [batch, ...]: x_0 less
    the last state, what a last row that draws no noise misses, and else rounding.

    Whatever commutes with the denoiser moves the picture with its code: shifting all leaves by a
    pixel shifts it (section 4 of the paper).
    """

    states: Any
    noise: Any
    residual: Any


def check_one_register(tableau: Any, what: str) -> None:
    """Raise unless `tableau` is single, stochastic, of one register, and starts at its argument."""
    if not isinstance(tableau, Tableau):
        raise TypeError(f"{what} takes a Tableau of jaxdiff.solvers, got {type(tableau).__name__}")
    if np.ndim(tableau.active) != 1:
        raise ValueError(f"{what} takes a single tableau, got one that is stacked")
    if tableau.C is None or (is_concrete(tableau.C) and not len(_noisy_rows(tableau))):
        raise ValueError(
            f"{what} needs a stochastic tableau, such as ddim(grid, eta=1): one without noise has no "
            "noise maps; invert it by running its grid.reversed(), or exactly with jaxdiff.inversion"
        )
    start = tableau.start
    plain = start.C is None and start.d is None and isinstance(start.S, (np.ndarray, jax.Array))
    if tableau.registers != 1 or not plain or (is_concrete(start.S) and np.any(start.S != 1)):
        raise ValueError(
            f"{what} takes a tableau of one register without a start of its own (ddim, ddpm, "
            "dpm_solver_pp_sde_multistep ...), whose row's noise enters the next state alone; got "
            f"{tableau.registers} registers"
        )
    if not is_concrete(tableau.C, tableau.draw):
        raise ValueError(f"{what} takes a tableau whose coefficients are known on the host")


def _noisy_rows(tableau: Tableau) -> np.ndarray:
    """Indices of the rows that draw noise."""
    leaves = [np.asarray(c).reshape(tableau.rows, -1) for c in jax.tree.leaves(tableau.C)]
    return np.flatnonzero(np.any(np.concatenate(leaves, 1) != 0, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Extraction(Control):
    """Solves every row of a tableau without noise for the noise that leads to `targets`."""

    targets: Any  # leaves [rows, batch, ...]
    scale: Any  # C of register 0, leaves [rows, ...], a prefix of the state

    def init(self, x: Any) -> Any:
        """No noise and no state of any row yet."""
        zeros = jax.tree.map(jnp.zeros_like, self.targets)
        return zeros, zeros

    def after(
        self, aux: Any, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """The row's noise, and its state reset to where that leads."""
        mean, r = carry.registers[0], row.index

        def solve(c, means, targets):
            c = c[r]

            def leaf(mu, target):
                c_ = c.astype(mu.dtype)
                draws = c_ != 0
                return jnp.where(draws, (target[r] - mu) / jnp.where(draws, c_, 1.0), 0.0)

            return jax.tree.map(leaf, means, targets)

        noise = jax.tree.map(solve, self.scale, mean, self.targets)
        new = jax.tree.map(
            lambda c, means, zs: jax.tree.map(lambda m, n: m + c[r].astype(m.dtype) * n, means, zs),
            self.scale, mean, noise,
        )  # fmt: skip
        put = lambda kept, values: jax.tree.map(lambda a, v: a.at[r].set(v), kept, values)  # noqa: E731
        return carry._replace(registers=(new,)), (put(aux[0], noise), put(aux[1], new))


def extract(denoiser: Denoiser, tableau: Tableau, states: Any, cond: Any = None) -> NoiseCode:
    """The noise maps with which `tableau` passes through `states`.

    Arguments:
      tableau: stochastic, of one register; see the module.
      states: x_0, ..., x_rows from noise to data, leaves [rows + 1, batch, ...]: the first, where the
        sampler starts, and where each row should end. A row without noise ends where it does, and the
        next goes on from there.
      cond: of the denoiser, under which `replay` reproduces the states.

    Of a run of the sampler itself, `sample(..., save="trajectory")`, it returns that run's noise.
    Raises TypeError or ValueError for another tableau, or another number of states.
    """
    check_one_register(tableau, "extract")
    states = jax.tree.map(as_data, states)
    for leaf in jax.tree.leaves(states):
        if leaf.ndim < 2 or leaf.shape[0] != tableau.rows + 1:
            raise ValueError(
                f"states must be [rows + 1, batch, ...] with {tableau.rows} rows, got {leaf.shape}"
            )
    scale = jax.tree.map(lambda c: jnp.asarray(c[:, 0]), tableau.C)
    control = _Extraction(jax.tree.map(lambda a: a[1:], states), scale)
    means = dataclasses.replace(tableau, C=None, brownian=None, clock=None)
    first = jax.tree.map(lambda a: a[0], states)
    end = sample(denoiser, means, first, cond=cond, save="state", control=control)
    rows, (noise, visited) = _noisy_rows(tableau), end.aux
    if len(set(np.asarray(tableau.draw)[rows].tolist())) != len(rows):
        raise ValueError("extract: rows of this tableau share draws of noise")
    order = rows[np.argsort(np.asarray(tableau.draw)[rows])]
    return NoiseCode(
        jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, visited),
        jax.tree.map(lambda a: a[order], noise),
        jax.tree.map(lambda a, b: a[-1] - b[-1], states, visited),
    )


def edit_friendly(
    denoiser: Denoiser, tableau: Tableau, x0: Any, key: Array, cond: Any = None
) -> NoiseCode:
    """Edit-friendly noise maps of data (Huberman-Spiegelglas et al. 2024).

    x_i = alpha_i x_0 + sigma_i e_i with independent e_i at every row's level, and x_0 itself at the
    end; then `extract`. Neighbouring states share no noise, so each map makes up for the last: the
    maps have a standard deviation above 1, are negatively correlated from one row to the next, and
    hold the picture itself.

    Arguments:
      tableau: a stochastic sampler of one register, such as `ddim(grid, eta=1)`. On a grid that ends
        at sigma > 0 (the paper's: its scheduler's last level is that of timestep 0) the last row's
        noise reaches x_0 exactly; in a step to sigma = 0 there is none, and `NoiseCode.residual`
        is what it misses. (The published code sets the last map to 0.)
      x0: the data, leaves [batch, ...].
      key: one key, or one per sample.
      cond: of the denoiser, describing x0 (with guidance, of the wrapped denoiser).

    The direction's coefficient is DDIM's, sqrt(sigma'^2 - eta^2 s^2); the published code has eta s^2
    under the root, which differs where eta is neither 0 nor 1.
    """
    check_one_register(tableau, "edit_friendly")
    x0 = jax.tree.map(as_data, x0)
    rows = np.arange(tableau.rows)
    noise = jax.vmap(lambda r: normal(key, x0, r))(rows)

    def leaf(x, e):
        alpha, sigma = (
            jnp.asarray(c, x.dtype).reshape(-1, *(1,) * x.ndim)
            for c in (tableau.alpha, tableau.sigma)
        )
        return jnp.concatenate([alpha * x + sigma * e, x[None]])

    return extract(denoiser, tableau, jax.tree.map(leaf, x0, noise), cond)


def replay(
    denoiser: Denoiser, tableau: Tableau, code: NoiseCode, cond: Any = None, skip: int = 0,
    residual: bool = True,
) -> Any:  # fmt: skip
    """Run the sampler along a code: the data under the condition of `extract`, else an edit of it.

    Arguments:
      cond: the target's condition; a batch of it goes with the code's batch.
      skip: rows left out at the noise end (the paper's T_skip): the run starts at state `skip`. More
        keep more of the data.
      residual: add `code.residual` to the result.

    Raises ValueError for a skip that is not in 0..rows - 1, or above 0 with a tableau that keeps a
    history (see `tail`).
    """
    rest = tail(tableau, skip)
    x = jax.tree.map(lambda a: a[skip], code.states)
    noise = None
    if rest.C is not None:
        noise = jax.tree.map(lambda a: a[tableau.draws - rest.draws :], code.noise)
    out = sample(denoiser, rest, x, noise=noise, cond=cond)
    return jax.tree.map(jnp.add, out, code.residual) if residual else out


def tail(tableau: Tableau, skip: int) -> Tableau:
    """The sampler without its first `skip` rows: it starts at the state that row `skip` evaluates.

    For samplers whose rows look back at nothing. One that keeps a history is built anew on the rest of
    the grid, where its first rows are of lower order: `from_times(process, grid.t[skip:])`.
    """
    integer = isinstance(skip, (int, np.integer)) and not isinstance(skip, bool)
    if not integer or not 0 <= skip < tableau.rows:
        raise ValueError(f"skip must be an integer in 0..{tableau.rows - 1}, got {skip!r}")
    if skip == 0:
        return tableau
    if tableau.history != 1 or tableau.registers != 1:
        raise ValueError(
            "only a tableau of one register and no history can leave rows out: build this one on the "
            "rest of the grid, jaxdiff.grids.from_times(process, grid.t[skip:])"
        )
    cut = lambda tree: jax.tree.map(lambda a: a[skip:], tree)  # noqa: E731
    noisy = [] if tableau.C is None else _noisy_rows(tableau)
    noisy = np.asarray(noisy, int)
    before, after = noisy[noisy < skip], noisy[noisy >= skip]
    offset = int(np.asarray(tableau.draw)[before].max(initial=-1)) + 1
    nodes = np.asarray(tableau.nodes)
    fields = ("A", "B", "d", "u", "w", "t", "alpha", "sigma", "active")
    return dataclasses.replace(
        tableau, **{name: cut(getattr(tableau, name)) for name in fields},
        C=cut(tableau.C) if len(after) else None,
        draw=np.maximum(np.asarray(tableau.draw)[skip:] - offset, 0).astype(np.int32),
        clock=cut(tableau.clock) if len(after) else None,
        brownian=tableau.brownian if len(after) else None,
        nodes=nodes[nodes[:, 0] >= skip] - np.asarray([skip, 0], np.int32),
        start=Start(np.ones(1)), blind=((),) * tableau.outputs,
    )  # fmt: skip


def as_data(leaf: Any) -> Array:
    """A floating-point array of at least 32 bits; ValueError for other kinds."""
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"data must be floating-point, got {leaf.dtype}")
    return leaf if leaf.dtype.itemsize >= 4 else leaf.astype(jnp.float32)
