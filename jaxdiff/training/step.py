"""One training step: pure, keyed by the step's number, the same on any number of devices."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff import losses
from jaxdiff.experiment import Experiment
from jaxdiff.noise import normal, sample_keys
from jaxdiff.training.state import State

Step = Callable[[State, Mapping[str, jax.Array]], tuple[State, dict[str, jax.Array]]]


def make_step(experiment: Experiment, optimizer: optax.GradientTransformation) -> Step:
    """`train_step(state, batch) -> (state, metrics)` of an experiment.

    batch is {"x": [batch, ...], "label": [batch]}. With k = fold_in(state.key, state.step), example
    i draws its noise from fold_in(k_noise, i), i its index in the global batch, so the result does
    not depend on how the batch is split over devices (to rounding). The average of the weights is

        ema <- d ema + (1 - d) params,    d = min(ema_decay, (1 + step) / (10 + step)).

    metrics: the mean "loss", "grad_norm" before clipping, and "param_norm" after the update; all
    finite, or the new state is not to be kept.
    """
    settings = experiment.config

    def loss(params, batch, key):
        x0 = batch["x"]
        noise_key, time_key, label_key, dropout_key = jax.random.split(key, 4)
        eps = normal(sample_keys(noise_key, jnp.arange(x0.shape[0])), x0)
        t = losses.sample_times(
            settings.loss.time_law, time_key, x0.shape[0], experiment.process,
            **settings.loss.time_options,
        )  # fmt: skip
        denoiser = experiment.denoiser(params, {"label": label_key, "dropout": dropout_key})
        cond = None if experiment.num_classes is None else batch["label"]
        return losses.score_matching(
            denoiser, experiment.process, x0, t, eps, cond, settings.loss.weighting,
            **settings.loss.weighting_options,
        ).mean()  # fmt: skip

    def train_step(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        value, grads = jax.value_and_grad(loss)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(settings.train.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
        }
        return State(params, opt_state, ema, state.step + 1, state.key), metrics

    return train_step


def shardings(mesh: jax.sharding.Mesh) -> tuple[NamedSharding, NamedSharding]:
    """(of a batch: split over its examples; of the state: on every device)."""
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
