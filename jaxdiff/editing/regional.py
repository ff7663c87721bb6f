"""DiffEditor's sampler: noise in a region, guidance that leaves the direction alone, time travel.

Mou, Wang, Song, Shan & Zhang, "DiffEditor: Boosting Accuracy and Flexibility on Diffusion-based Image
Editing" (2024), after their DragonDiffusion (2024). From a DDIM inversion that kept its states, DDIM
runs back with two outputs of the denoiser: x_0 of the noise guided by energies, and the noise itself,
which alone makes the direction,

    x' = alpha' x_0(eps + g) + sqrt(sigma'^2 - s^2) eps + s z,    s = eta m sigma' sqrt(1 - exp(-2 h)),

eta m being eta inside a mask and 0 outside, over some middle steps. `regional_sde` is that sampler;
`energy_guided` makes the two outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays, is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.grids import Grid
from jaxdiff.predictions import convert
from jaxdiff.solvers.first_order import posterior_share
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def regional_sde(
    grid: Grid, mask: ArrayLike, eta: float = 0.4, steps: Sequence[int] | None = None,
    outside: float = 0.0, repeats: Sequence[int] | None = None,
) -> Tableau:  # fmt: skip
    """DDIM with noise in a region, and time travel; takes a denoiser of ("x0", "eps").

    Arguments:
      mask: of the region, in [0, 1], of a sample's shape or one that broadcasts against the state
        (DiffEditor's is 0 or 1; its eta enters the step linearly in between, here eta m does).
      eta: DDIM's eta inside, in [0, 1].
      steps: the steps of the grid that draw noise; None for the second fifth of them, the published
        11 to 19 of 50, or where that is empty (up to 9 steps, 11 and 12) for the one step at 3/10 of
        the grid. None is drawn in a step to sigma = 0.
      outside: eta outside the mask.
      repeats: how often each step is taken, 1 by default: after each but the last time one step of
        DDIM inversion goes back up (z_{t-1} -> z_t, by the second output alone), an evaluation more.

    Raises ValueError for numbers out of range, or a step to sigma = 0 or from alpha = 0 that repeats.
    """
    check_ends(grid, "regional_sde", noise=True, data=True)
    if grid.backward:
        raise ValueError("regional_sde runs from noise to data")
    for name, value in (("eta", eta), ("outside", outside)):
        if not (np.ndim(value) == 0 and 0 <= value <= 1):
            raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    mask = np.asarray(mask, np.float64) if is_concrete(mask) else mask
    if is_concrete(mask) and not np.all((mask >= 0) & (mask <= 1)):
        raise ValueError("the mask must lie in [0, 1]")
    n = grid.steps
    if steps is None:
        steps = range(-(-n // 5) + 1, 2 * n // 5) or [3 * n // 10]
    noisy = {int(i) for i in steps}
    repeats = [1] * n if repeats is None else [int(r) for r in repeats]
    if not noisy <= set(range(n)) or len(repeats) != n or min(repeats) < 1:
        raise ValueError(
            f"steps must be among 0..{n - 1} and repeats {n} numbers of at least 1, got "
            f"{sorted(noisy)} and {repeats}"
        )
    xp, rows, nodes = grid.xp, [], [(0, 0)]
    etas = outside + (eta - outside) * mask
    if eta == outside == 0:
        noisy = set()
    for i in range(n):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        last = grid.ends[1] and i == n - 1
        z, along = None, s1
        if i in noisy and not last:
            share = posterior_share(grid, i)
            z, along = etas * s1 * xp.sqrt(share), s1 * xp.sqrt(1.0 - etas**2 * share)
        down = Row(grid.node(i), [Update([0.0], [(a1, along)], z)])
        if repeats[i] > 1 and (last or (grid.ends[0] and i == 0)):
            raise ValueError(f"step {i} goes to sigma = 0 or from alpha = 0 and cannot repeat")
        for _ in range(repeats[i] - 1):
            up = Row(grid.node(i + 1), [Update([a / a1], [(0.0, s - a * s1 / a1)])])
            rows += [down, up]
        rows.append(down)
        nodes.append((len(rows), 0))
    return assemble(rows, ("x0", "eps"), xp, nodes=nodes)


def energy_guided(
    denoiser: Denoiser, energy: Callable[..., tuple[Array, Array]], params: Any, mask: ArrayLike,
    scale: ArrayLike, window: tuple[ArrayLike, ArrayLike] = (0.0, np.inf),
) -> Denoiser:  # fmt: skip
    """x_0 of a noise guided by two energies, and the noise without: predicts ("x0", "eps").

        g = k (m grad_x E_edit + (1 - m) grad_x E_content),    x_0 = (x - sigma (eps + g)) / alpha

    Arguments:
      denoiser: any single prediction, guided or not.
      energy: fn(params, x, (t, alpha, sigma), cond) -> (E_edit, E_content), [batch] each;
        `move_energy` makes one.
      params: its pytree.
      mask: m, where E_edit acts, of a shape that broadcasts against the state.
      scale: k, for energies of this size; the published code's is 0.08 or 0.04 times 500 to 4000.
      window: (low, high), the times t at which there is guidance. It must leave out alpha = 0.

    A call costs an evaluation of the denoiser, and of the energy with its gradient.
    """
    check_single(denoiser, "energy_guided")
    strengths = as_arrays((params, mask, scale, tuple(window)))
    return wrap(_Guided(energy, denoiser.prediction), denoiser, strengths, ("x0", "eps"))


@dataclasses.dataclass(frozen=True)
class _Guided:
    energy: Callable
    prediction: str

    def __call__(self, evaluate, strengths, x, levels, cond):
        params, mask, scale, (low, high) = strengths
        t, alpha, sigma = levels
        out = evaluate(x, t, alpha, sigma, cond).astype(x.dtype)

        energies, pull = jax.vjp(lambda y: self.energy(params, y, levels, cond), x)
        zero, one = (jax.tree.map(fill, energies) for fill in (jnp.zeros_like, jnp.ones_like))
        (edit,), (content,) = pull((one[0], zero[1])), pull((zero[0], one[1]))
        guidance = mask * edit + (1 - mask) * content
        active = to_batch((t >= low) & (t <= high), x)
        shift = to_batch(scale * sigma / alpha, x).astype(x.dtype) * guidance
        x0 = convert(out, x, self.prediction, "x0", alpha, sigma)
        eps = convert(out, x, self.prediction, "eps", alpha, sigma)
        return x0 - jnp.where(active, shift, 0.0), eps


@dataclasses.dataclass(frozen=True)
class MoveEnergy:
    """The energies that move a piece of an image; fn(params, x, levels, cond), see `move_energy`."""

    features: Callable
    shift: tuple[int, int]
    weights: tuple[float, float, float, float]

    def __call__(self, params, x, levels, cond):
        (params, times, states, mask) = params
        edit, content, contrast, inpaint = self.weights
        kept = states[jnp.argmin(jnp.abs(times - jnp.max(levels[0])))]
        now, then = (
            [_resized(f, x.shape) for f in self.features(params, y, levels, cond)]
            for y in (x, jax.lax.stop_gradient(kept))
        )
        here = jnp.roll(mask, self.shift, (0, 1))
        left, other = mask * (1 - here), (1 - mask) * (1 - here)
        e_edit = e_content = 0.0
        for f, g in zip(now, then):
            moved = _mean(_cosine(f, jnp.roll(g, self.shift, (1, 2))), here)
            same = _mean(_cosine(f, g), other)
            unlike = _mean((_cosine(f, g) + 1) / 2, left)
            filled = (_cosine(_average(f, left), _average(g, other)) + 1) / 2
            e_edit += edit / (1 + 4 * moved) / len(now)
            e_content += content / (1 + 4 * same) / len(now) + contrast * unlike / len(now)
            e_content += inpaint / (1 + 4 * filled)
        return e_edit, e_content


def move_energy(
    features: Callable[..., Sequence[Array]], shift: tuple[int, int], params: Any,
    times: Float[ArrayLike, " nodes"], states: Float[ArrayLike, "nodes batch h w c"],
    mask: Float[ArrayLike, "h w"], edit: float = 4.0, content: float = 6.0, contrast: float = 0.2,
    inpaint: float = 0.8,
) -> tuple[MoveEnergy, Any]:  # fmt: skip
    """(energy, params) for `energy_guided`: what is under the mask moves by `shift` pixels.

    With F the features of the state and of the inversion's at that level, all at image size, cosines
    over channels and means over pixels,

        E_edit    = edit / (1 + 4 mean_{moved mask} cos(F, moved F_ref))
        E_content = content / (1 + 4 mean_{elsewhere} cos(F, F_ref))
                    + contrast mean_{left behind} (cos(F, F_ref) + 1) / 2
                    + inpaint / (1 + 4 (cos(mean_{left behind} F, mean_{elsewhere} F_ref) + 1) / 2)

    summed over the layers of features with equal shares (the last term without). DragonDiffusion's
    energies and their defaults in its demo.

    Arguments:
      features: fn(params, x, (t, alpha, sigma), cond) -> list of [batch, h', w', channels], such as
        `block_outputs` of a UNet's decoder.
      shift: (down, right), in pixels; the mask must stay inside the image and move off itself.
      times, states: of the inversion, `sample(..., save="nodes")` and its grid's t; the state at the
        nearest time is compared.
    """
    mask, states = np.asarray(mask), jnp.asarray(states)
    if states.ndim != 5 or mask.shape != states.shape[2:4] or len(states) != len(times):
        raise ValueError(
            f"need states [nodes, batch, h, w, c], a mask [h, w] and as many times, got shapes "
            f"{states.shape}, {mask.shape} and {np.shape(times)}"
        )
    inside = np.argwhere(mask > 0)
    if not len(inside):
        raise ValueError("the mask is empty")
    ends = inside + np.asarray(shift)
    if ends.min() < 0 or np.any(ends >= mask.shape) or np.all(np.roll(mask, shift, (0, 1)) == mask):
        raise ValueError(f"shift {shift} takes the mask out of the image, or leaves it where it is")
    energy = MoveEnergy(features, tuple(map(int, shift)), (edit, content, contrast, inpaint))
    return energy, as_arrays((params, np.asarray(times), states, mask.astype(np.float64)))


def _resized(f: Array, shape: tuple[int, ...]) -> Array:
    return jax.image.resize(f, (f.shape[0], *shape[1:3], f.shape[3]), "nearest")


def _cosine(a: Array, b: Array) -> Array:
    """Cosine similarity over the last axis; finite gradients where a vector is 0."""
    size = lambda c: jnp.sqrt(jnp.sum(c * c, -1) + 1e-12)  # noqa: E731
    return jnp.sum(a * b, -1) / (size(a) * size(b))


def _mean(values: Float[Array, "batch h w"], mask: Float[Array, "h w"]) -> Float[Array, " batch"]:
    return jnp.sum(values * mask, (1, 2)) / jnp.maximum(jnp.sum(mask), 1.0)


def _average(f: Float[Array, "batch h w c"], mask: Array) -> Float[Array, "batch c"]:
    return jnp.sum(f * mask[..., None], (1, 2)) / jnp.maximum(jnp.sum(mask), 1.0)
