"""The training state: one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxdiff.experiment import Experiment
from jaxdiff.training import ema as averages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything a step reads and writes.

    Attributes:
      params: the network's variables.
      opt_state: the optimiser's.
      ema: the exponential moving average of params, for sampling.
      step: steps done, int32.
      key: never changes; step n draws from fold_in(key, n).
      ema_tracks: an average of params for each of config.train.ema_lengths.
    """

    params: Any
    opt_state: Any
    ema: Any
    step: jax.Array
    key: jax.Array
    ema_tracks: tuple[Any, ...] = ()


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer section; see `jaxdiff.settings.OptimizerSettings`.

    Raises ValueError for an unknown name or schedule.
    """
    chosen = config.optimizer
    rules = {
        "adam": lambda rate: optax.adam(rate, chosen.b1, chosen.b2, chosen.eps),
        "adamw": lambda rate: optax.adamw(
            rate, chosen.b1, chosen.b2, chosen.eps, weight_decay=chosen.weight_decay
        ),
    }
    if chosen.name not in rules:
        raise ValueError(f"config.optimizer.name must be one of {list(rules)}, got {chosen.name!r}")
    if chosen.name == "adam" and chosen.weight_decay:
        raise ValueError("config.optimizer.weight_decay needs the optimizer 'adamw', not 'adam'")
    rule = rules[chosen.name](make_schedule(config))
    if chosen.clip_norm == 0:
        return rule
    return optax.chain(optax.clip_by_global_norm(chosen.clip_norm), rule)


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """The learning rate as a function of the step."""
    chosen, steps = config.optimizer, config.train.steps
    rest = max(steps - chosen.warmup_steps, 1)  # a short trial may end within the warm-up
    after = {
        "constant": lambda: optax.constant_schedule(chosen.learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(
            chosen.learning_rate, rest, chosen.end_fraction
        ),
    }
    if chosen.schedule not in after:
        raise ValueError(
            f"config.optimizer.schedule must be one of {list(after)}, got {chosen.schedule!r}"
        )
    warmup = optax.linear_schedule(0.0, chosen.learning_rate, max(chosen.warmup_steps, 1))
    return optax.join_schedules([warmup, after[chosen.schedule]()], [chosen.warmup_steps])


def init_state(experiment: Experiment, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step, decided by config.seed alone; pure."""
    init_key, key = jax.random.split(jax.random.key(experiment.config.seed))
    params = experiment.init(init_key)
    # A copy: a donated state may not hold one buffer twice.
    ema = jax.tree.map(jnp.copy, params)
    tracks = averages.start(params, experiment.config.train.ema_lengths)
    return State(params, optimizer.init(params), ema, jnp.zeros((), jnp.int32), key, tracks)
