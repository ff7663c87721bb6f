"""Denoising MCMC: a chain in data and noise level finds the modes, any integrator takes the noise off.

Kim & Ye, "Denoising MCMC for Accelerating Diffusion-Based Generative Models" (2023). For data with
noise of standard deviation s added, x ~ p_s, and a distribution pi(s) of levels, the chain runs in
p(x, s) = p_s(x) pi(s): Langevin steps on x, and exact draws of s from p(s | x), which a classifier of
noise levels learns (Denoising Langevin Gibbs). Every few moves the state of least noise is taken and
denoised from its own level on, a far shorter way than from pure noise. Their code is 1202kbs/DMCMC.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Int, Key

from jaxdiff.arrays import is_concrete, jit_trees, to_batch
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.mixtures import GaussianMixture
from jaxdiff.noise import normal, per_sample
from jaxdiff.processes import Process
from jaxdiff.sampling import sample

_WIDTH, _DEPTH = 128, 2  # of the classifier's hidden layers


class Chain(NamedTuple):
    """States of the chains: `x` [chains, ...] and the index of each one's level, `place` [chains]."""

    x: Float[Array, "chains ..."]
    place: Int[Array, " chains"]


class Denoised(NamedTuple):
    """What `denoising_langevin_gibbs` returns.

    `x` [rounds, chains, ...]: samples; `sigma` [rounds, chains]: the level each was denoised from;
    `chain`: where the chains stand, to go on from.
    """

    x: Float[Array, "rounds chains ..."]
    sigma: Float[Array, "rounds chains"]
    chain: Chain


# --- the distribution of the level given the state ------------------------------------------------


def exact_levels(
    mixture: GaussianMixture, sigmas: Float[ArrayLike, " levels"],
    log_prior: Float[ArrayLike, " levels"] | None = None,
) -> Partial:  # fmt: skip
    """x [batch, dim] -> log p(s | x) [batch, levels], up to a constant, of a Gaussian mixture.

    log p_s(x) + log pi(s), in closed form; `log_prior` is log pi, uniform by default. Raises ValueError
    for levels that do not rise or are not positive.
    """
    sigmas = _check_sigmas(sigmas)
    prior = jnp.zeros(len(sigmas)) if log_prior is None else jnp.asarray(log_prior)
    return Partial(_exact, mixture, jnp.asarray(sigmas, mixture.means.dtype), prior)


def _exact(mixture, sigmas, log_prior, x):
    one = lambda s: mixture.log_density(x, 1.0, s)  # noqa: E731
    return jax.vmap(one, out_axes=-1)(sigmas) + log_prior


def train_levels(
    x0: Float[ArrayLike, "n ..."], sigmas: Float[ArrayLike, " levels"], key: Key[Array, ""],
    steps: int = 2000, batch: int = 256, learning_rate: float = 3e-3, module: nn.Module | None = None,
) -> Partial:  # fmt: skip
    """x [batch, ...] -> log p(s | x) [batch, levels]: a classifier of noise levels.

    Cross-entropy on x = x0 + s eps with s uniform among the levels (the code's 1,000 in geometric
    progression), by Adam with a cosine schedule. A network of one output a level, which is what Gibbs
    needs, and all that a chain pays for a draw of s.

    Arguments:
      x0: data.
      module: `apply(variables, x)` to logits [batch, levels]; by default a multilayer perceptron on
        the flattened x, brought to unit size, and the logarithm of that size.

    Raises ValueError for levels that do not rise or are not positive, and for numbers below 1.
    """
    sigmas = _check_sigmas(sigmas)
    if min(steps, batch) < 1 or not learning_rate > 0:
        raise ValueError(
            f"steps and batch must be at least 1 and learning_rate positive, got {steps}, {batch}, "
            f"{learning_rate}"
        )
    module = _Levels(len(sigmas)) if module is None else module
    x0 = jnp.asarray(x0, jnp.float32)
    variables = _train(
        module, x0, jnp.asarray(sigmas, jnp.float32), key, steps, batch, float(learning_rate)
    )
    return Partial(_Classifier(module), variables)


class _Levels(nn.Module):
    levels: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        size = jnp.sqrt(1e-12 + jnp.mean(jnp.square(x), -1, keepdims=True))
        h = jnp.concatenate([x / jnp.sqrt(1.0 + size**2), jnp.log(size)], -1)
        for _ in range(_DEPTH):
            h = nn.silu(nn.Dense(_WIDTH)(h))
        return nn.Dense(self.levels)(h)


@dataclasses.dataclass(frozen=True)
class _Classifier:
    module: nn.Module

    def __call__(self, variables, x):
        return self.module.apply(variables, x)


@jit_trees
def _train(module, x0, sigmas, key, steps, batch, learning_rate):
    start, key = jax.random.split(key)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(variables, key):
        which, level, noise = jax.random.split(key, 3)
        x = x0[jax.random.randint(which, (batch,), 0, x0.shape[0])]
        place = jax.random.randint(level, (batch,), 0, sigmas.shape[0])
        x = x + to_batch(sigmas[place], x) * jax.random.normal(noise, x.shape)
        logits = module.apply(variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, place).mean()

    def step(carry, key):
        variables, state = carry
        updates, state = optimizer.update(jax.grad(loss)(variables, key), state)
        return (optax.apply_updates(variables, updates), state), None

    variables = module.init(start, x0[:1])
    carry = variables, optimizer.init(variables)
    return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][0]


# --- the chain ------------------------------------------------------------------------------------


def start_chain(
    levels: Callable, x: Float[Array, "chains ..."], key: Key[Array, ""], draw: str = "sample"
) -> Chain:
    """Chains from states x, at levels drawn from p(s | x).

    The authors take one sample of an ordinary sampler, with a little noise (standard deviation 0.5 for
    images in [0, 1]), and let the chain run some moves before they use it.
    """
    _check_draw(draw)
    return Chain(x, _gibbs(levels, x, per_sample(key, x.shape[0]), draw))


def langevin_gibbs(
    denoiser: Denoiser, process: Process, levels: Callable, sigmas: Float[ArrayLike, " levels"],
    chain: Chain, key: Key[Array, ""], moves: int, step_size: ArrayLike, draw: str = "sample",
    relative: bool = False, cond: Any = None,
) -> tuple[Chain, Chain]:  # fmt: skip
    """(chain, least): where the chains stand after some moves, and their states of least noise.

    A move is one evaluation:

        x <- x + step_size / 2 score(x, s) + sqrt(step_size) xi,    then    s ~ p(s | x)

    Arguments:
      denoiser: of the process.
      process: with alpha = 1 (`ve`, `edm`), as x keeps its scale; only its times are used.
      levels: log p(s | x), of `exact_levels` or `train_levels`.
      sigmas: the levels, rising.
      chain: see `start_chain`.
      key: one key, or one a chain.
      step_size: the paper's eta, in the units of x squared.
      draw: "sample", or "argmax" as the authors' code has it.
      relative: the step is step_size s^2, so that a move is of one kind at every level; the authors'
        is constant, too long at small s (where the next draw of s then finds more noise).
      cond: for the denoiser, leaves [chains, ...].

    `least` starts from the chain as given: a state it has already counts. Raises ValueError for a
    process that scales the data, levels that do not rise or are not as many as `levels` gives, a step
    that is not positive, no moves, another `draw`.
    """
    _check_chain(denoiser, process, levels, sigmas, chain, moves, step_size, draw)
    keys = per_sample(key, chain.x.shape[0])
    return _moves_alone(
        denoiser, process, levels, jnp.asarray(sigmas, chain.x.dtype), chain, keys, moves,
        jnp.asarray(step_size, chain.x.dtype), draw, relative, cond,
    )  # fmt: skip


def denoising_langevin_gibbs(
    denoiser: Denoiser, process: Process, levels: Callable, sigmas: Float[ArrayLike, " levels"],
    chain: Chain, key: Key[Array, ""], build: Callable, rounds: int, moves: int,
    step_size: ArrayLike, draw: str = "sample", relative: bool = False, select: str = "least",
    cond: Any = None,
) -> Denoised:  # fmt: skip
    """Samples: every few moves of the chains, their states of least noise, denoised.

    Arguments as in `langevin_gibbs`, and:
      build: `build(t_max)` -> the tableau that denoises from time t_max, which is traced: each sample
        is denoised from its own level, in one vmapped call. The authors run Heun on Karras's nodes and
        close with Tweedie's formula x + s^2 score(x, s), which is `solvers.denoise_to_zero`:

            def build(t_max):
                grid = jd.grids.karras(process, 4, t_max=t_max)
                return jd.solvers.denoise_to_zero(jd.solvers.heun(grid), grid)

        A module-level function: a fresh one compiles again.
      rounds: samples of every chain.
      moves: between two samples (the code's n_skip).
      select: "least", the paper's, of the states since the last sample the one of least noise; it is
        nearest to the data, but no longer a draw of p_s: an x at the edge of a mode, which the chain
        leaves for more noise, is picked more often, so that samples of a narrow mode come out too wide.
        "last": the state at the end of the moves, which is one.

    A sample costs moves + nfe of the tableau. Samples of one chain depend on each other: take many
    chains, or many moves, for independent ones. Raises as `langevin_gibbs` does, and ValueError
    where `build` has no finite tableau from the lowest level, such as one not above its t_min.
    """
    _check_chain(denoiser, process, levels, sigmas, chain, moves, step_size, draw)
    if is_concrete(sigmas, process):
        _check_lowest(process, np.ravel(sigmas)[0], build)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if select not in ("least", "last"):
        raise ValueError(f"select must be 'least' or 'last', got {select!r}")
    keys = per_sample(key, chain.x.shape[0])
    return _rounds(
        denoiser, process, levels, jnp.asarray(sigmas, chain.x.dtype), chain, keys, build, rounds,
        moves, jnp.asarray(step_size, chain.x.dtype), draw, relative, select, cond,
    )  # fmt: skip


def _moves(
    denoiser, process, levels, sigmas, chain, keys, moves, step_size, draw, relative, cond
):  # fmt: skip
    def move(carry, index):
        chain, least = carry
        folded = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, index)))(keys)
        x, sigma = chain.x, sigmas[chain.place]
        score = denoiser.predict("score", x, *_level(process, sigma), cond)
        eta = to_batch(step_size * sigma**2 if relative else jnp.full_like(sigma, step_size), x)
        noise = normal(folded[:, 0], x)
        x = x + 0.5 * eta * score.astype(x.dtype) + jnp.sqrt(eta) * noise
        chain = Chain(x, _gibbs(levels, x, folded[:, 1], draw))
        lower = chain.place < least.place
        kept = jnp.where(to_batch(lower, x), x, least.x)
        return (chain, Chain(kept, jnp.where(lower, chain.place, least.place))), None

    return jax.lax.scan(move, (chain, chain), jnp.arange(moves))[0]


_moves_alone = jit_trees(_moves)


@jit_trees
def _rounds(
    denoiser, process, levels, sigmas, chain, keys, build, rounds, moves, step_size, draw, relative,
    select, cond,
):  # fmt: skip
    def one_round(chain, index):
        folded = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, index)))(keys)
        chain, least = _moves(
            denoiser, process, levels, sigmas, chain, folded[:, 0], moves, step_size, draw, relative,
            cond,
        )  # fmt: skip
        return chain, (chain if select == "last" else least, folded[:, 1])

    chain, (taken, later) = jax.lax.scan(one_round, chain, jnp.arange(rounds))
    sigma = sigmas[taken.place]

    def denoise(x, t, key, cond):
        given = None if cond is None else jax.tree.map(lambda c: c[None], cond)
        return sample(denoiser, build(t), x[None], key[None], cond=given)[0]

    over_chains = jax.vmap(denoise, in_axes=(0, 0, 0, None if cond is None else 0))
    over_rounds = jax.vmap(over_chains, in_axes=(0, 0, 0, None))
    return Denoised(over_rounds(taken.x, _level(process, sigma)[0], later, cond), sigma, chain)


def _gibbs(levels: Callable, x: Array, keys: Array, draw: str) -> Int[Array, " chains"]:
    logits = levels(x)
    if draw == "argmax":
        return jnp.argmax(logits, -1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _level(process: Process, sigma: Array) -> tuple[Array, Array, Array]:
    return process.time(-jnp.log(sigma)).astype(sigma.dtype), jnp.ones_like(sigma), sigma


def _check_sigmas(sigmas: ArrayLike) -> np.ndarray:
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[0] <= 0 or np.any(np.diff(sigmas) <= 0):
        raise ValueError(f"sigmas must be at least 2 positive levels that rise, got {sigmas}")
    return sigmas


def _check_draw(draw: str) -> None:
    if draw not in ("sample", "argmax"):
        raise ValueError(f"draw must be 'sample' or 'argmax', got {draw!r}")


def _check_lowest(process: Process, sigma: float, build: Callable) -> None:
    """Build at the lowest level, where traced grids cannot tell that nothing is left of them."""
    try:
        tableau = build(process.time(-np.log(sigma * (1 - 1e-5))))  # more than rounding above t_min
    except ValueError as error:
        raise ValueError(f"build raises at the lowest of sigmas, {sigma:.6g}: {error}") from error
    if is_concrete(tableau) and not all(np.all(np.isfinite(a)) for a in jax.tree.leaves(tableau)):
        raise ValueError(f"build's tableau is not finite at the lowest of sigmas, {sigma:.6g}")


def _check_chain(denoiser, process, levels, sigmas, chain, moves, step_size, draw) -> None:
    check_single(denoiser, "Denoising MCMC")
    if is_concrete(sigmas):
        _check_sigmas(sigmas)
    found = jax.eval_shape(levels, chain.x).shape
    if found != (chain.x.shape[0], np.size(sigmas)):
        raise ValueError(
            f"levels must return [{chain.x.shape[0]}, {np.size(sigmas)}], one number a level of "
            f"sigmas, got {found}"
        )
    if is_concrete(step_size) and not np.all((0 < np.asarray(step_size)) & np.isfinite(step_size)):
        raise ValueError(f"step_size must be positive and finite, got {step_size}")
    _check_draw(draw)
    if moves < 1:
        raise ValueError(f"moves must be at least 1, got {moves}")
    ends = [process.t_min, process.t_max]
    if not np.allclose(np.asarray(process.alpha(np.asarray(ends))), 1.0):
        raise ValueError(
            "Denoising MCMC takes a process with alpha = 1, as jaxdiff.processes.ve or edm, got "
            f"{type(process).__name__}"
        )
