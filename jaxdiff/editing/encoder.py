"""DPM-Encoder and CycleDiffusion: the Gaussian latent code of a stochastic sampler.

Wu & De la Torre, "Unifying Diffusion Models' Latent Space, with Applications to CycleDiffusion and
Guidance" (2023). All the noise that a stochastic sampler draws, z = (x_T, eps_T, ..., eps_1), is a
Gaussian code of what it returns, x_0 = G(z). To encode x_0, sample x_T ~ q(x_T | x_0) and every other
state from the sampler's own kernel given x_0, q(x_{t-1} | x_t, x_0), and solve each row for its noise
under the model (`jaxdiff.editing.extract`); decoding is exact. The chain given x_0 is the sampler itself
on a denoiser that knows x_0: so any stochastic tableau of one register has an encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxdiff.arrays import as_arrays
from jaxdiff.denoisers import Denoiser
from jaxdiff.editing.edit_friendly import (
    NoiseCode,
    as_data,
    check_one_register,
    extract,
    replay,
    tail,
)
from jaxdiff.noise import normal
from jaxdiff.sampling import sample
from jaxdiff.solvers.clocks import check_order
from jaxdiff.solvers.tableau import Tableau

# The draw of the first state; those of the rows count from 0.
FIRST_DRAW = np.uint32(2**32 - 2)


def _known(x0: Any, x: Any, t: Any) -> Any:
    return x0


def posterior_chain(tableau: Tableau, x0: Any, key: Array) -> Any:
    """States x_T, ..., x_0 of the sampler given its result, leaves [rows + 1, batch, ...].

    x_T = alpha x_0 + sigma e at the first row's level; then the tableau's rows with the known x_0 in
    place of the network's, and fresh noise. For DDPM's and DDIM's rows these are the exact posteriors
    q(x_{t-1} | x_t, x_0) of Ho et al. (2020) and Song et al. (2021). The last state is x_0 itself.
    """
    check_one_register(tableau, "posterior_chain")
    x0 = jax.tree.map(as_data, x0)
    e = normal(key, x0, FIRST_DRAW)

    def leaf(x, n):
        alpha, sigma = (jnp.asarray(c[0], x.dtype) for c in (tableau.alpha, tableau.sigma))
        return alpha * x + sigma * n

    x = jax.tree.map(leaf, x0, e)
    chain = sample(Denoiser(_known, "x0", x0), tableau, x, key=key, save="trajectory")
    return jax.tree.map(lambda a, b: a.at[-1].set(b), chain, x0)


def dpm_encoder(
    denoiser: Denoiser, tableau: Tableau, x0: Any, key: Array, cond: Any = None
) -> NoiseCode:
    """The code of data under a model: `posterior_chain`, then `extract`.

    `replay(denoiser, tableau, code, cond)` decodes it, exactly. To encode only up to T_es < T (the
    paper's early stop) pass `tail(tableau, skip)`, here and to `replay`, or a tableau on the rest of the
    grid. Arguments as in `jaxdiff.editing.edit_friendly`, which differs in the states alone.
    """
    return extract(denoiser, tableau, posterior_chain(tableau, x0, key), cond)


def cycle(
    source: Denoiser, target: Denoiser, tableau: Tableau, x0: Any, key: Array,
    source_cond: Any = None, target_cond: Any = None, skip: int = 0,
) -> Any:  # fmt: skip
    """CycleDiffusion: encode with the source model, decode with the target's.

    Arguments:
      source, target: two models, trained apart or the same one under two conditions.
      tableau: a stochastic sampler of one register: `ddim(grid, eta)` with eta 0.1 to 1 in the paper.
      x0: data of the source, leaves [batch, ...].
      skip: rows left out at the noise end; more keep more of x0.

    Returns x0's translation, with its structure. Raises what `extract` and `replay` do.
    """
    check_one_register(tableau, "cycle")
    rest = tail(tableau, skip)
    code = dpm_encoder(source, rest, x0, key, source_cond)
    return replay(target, rest, code, target_cond)


def langevin_codes(
    denoiser: Denoiser, tableau: Tableau, energy: Callable[[Any], Array], x_T: Any, key: Array,
    steps: int = 200, step_size: ArrayLike = 0.05, prior_std: ArrayLike = 1.0, cond: Any = None,
) -> tuple[Any, Array]:  # fmt: skip
    """Plug-and-play guidance: samples whose codes are distributed as N(z; 0, I) exp(-E(G(z))).

    Unadjusted Langevin dynamics over all the noise of the sampler (section 3.3 of the paper),

        z <- z - (h / 2) grad (|z|^2 / 2 + E(G(z))) + sqrt(h) w,    w ~ N(0, I),

    through the sampler's gradient; the model is not trained, nor told of E. A step costs a run of the
    sampler and its gradient. The step size's bias is first order in h.

    Arguments:
      tableau: any; of a deterministic one x_T is the whole code.
      energy: x_0 -> [batch], in nats; a function of the module, as a fresh one compiles again.
      x_T: the first states of the chains, leaves [batch, ...], e.g. `process.prior(key, shape)`.
      key: one key, or one per sample: of the rows' first noise and of the dynamics.
      steps: of the dynamics, at least 1.
      step_size: h, positive.
      prior_std: standard deviation of x_T, `process.prior_std`: its code is x_T / prior_std.

    Returns (x_0 of the last codes, energies [steps, batch] before each step).
    """
    check_order(steps, 10**9, "steps", 1)
    if not (jnp.ndim(step_size) == 0 and 0 < step_size < math.inf):
        raise ValueError(f"step_size must be a positive number, got {step_size!r}")
    x_T = as_arrays(x_T)
    draws = tableau.draws
    first = lambda r: normal(key, x_T, r)  # noqa: E731
    noise = jax.vmap(first)(np.arange(draws)) if draws else None
    codes = jax.tree.map(lambda a: a / prior_std, x_T), noise
    return _langevin(denoiser, tableau, energy, codes, key, steps, step_size, prior_std, cond)


def _langevin(denoiser, tableau, energy, codes, key, steps, step_size, prior_std, cond):
    draws = tableau.draws

    def decode(codes):
        x = jax.tree.map(lambda a: a * prior_std, codes[0])
        return sample(denoiser, tableau, x, noise=codes[1], cond=cond)

    def total(codes):
        energies = energy(decode(codes))
        return jnp.sum(energies), energies

    def step(codes, i):
        slope, energies = jax.grad(total, has_aux=True)(codes)
        # Draws of the rows come first; leaf by leaf, each row of the noise has its own.
        own = [normal(key, codes[0], draws + i * (draws + 1))]
        if draws:
            own.append(
                jax.vmap(lambda r: normal(key, codes[0], draws + i * (draws + 1) + 1 + r))(
                    jnp.arange(draws)
                )
            )
        fresh = (own[0], own[1] if draws else None)
        new = jax.tree.map(
            lambda z, g, w: z - 0.5 * step_size * (z + g) + jnp.sqrt(step_size).astype(z.dtype) * w,
            codes, slope, fresh,
        )  # fmt: skip
        return new, energies

    codes, energies = jax.lax.scan(step, codes, jnp.arange(steps))
    return decode(codes), energies
