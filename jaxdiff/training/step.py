"""One training step: pure, keyed by the step's number, the same on any number of devices."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxdiff import losses
from jaxdiff.experiment import Experiment
from jaxdiff.learned_variance import hybrid_loss
from jaxdiff.models import Rows
from jaxdiff.noise import normal, sample_keys
from jaxdiff.training import ema as averages
from jaxdiff.training.state import State

Step = Callable[[State, Mapping[str, jax.Array]], tuple[State, dict[str, jax.Array]]]


def make_step(
    experiment: Experiment, optimizer: optax.GradientTransformation, axis_name: str | None = None
) -> Step:
    """`train_step(state, batch) -> (state, metrics)` of an experiment.

    batch is {"x": [batch, ...], "label": [batch]}. With k = fold_in(state.key, state.step), example
    i draws its augmentation, noise, time and label dropout by i, its index in the global batch, so
    the result does not depend on how the batch is split over devices or over
    config.train.accumulate micro-batches, to rounding (the networks' own dropout, where there is
    any, draws other masks in each micro-batch). The average of the weights is

        ema <- d ema + (1 - d) params,    d of `jaxdiff.training.ema.decay`,

    beside those of config.train.ema_lengths (`jaxdiff.training.ema.update`).
    metrics: the mean "loss", "grad_norm" before clipping, and "param_norm" after the update; all
    finite, or the new state is not to be kept. Parameters, gradients, optimiser and averages are
    float32 whatever the network computes in.

    Under `jax.jit` batch is the global batch, split or not. `axis_name` makes the step of one
    device under `jax.pmap`, which sees its own slice of the batch, in the order of the devices, and
    averages gradients over that axis:

        step = jax.pmap(make_step(experiment, optimizer, "devices"), "devices", in_axes=(None, 0),
                        out_axes=None)
    """
    settings = experiment.config
    train, augmentation = settings.train, experiment.augmentation
    objective = hybrid_loss if settings.denoiser.learn_sigma else losses.score_matching

    def loss(params, batch, key, rows, piece):
        noise_key, time_key, label_key, dropout_key = jax.random.split(key, 4)
        x0, cond = batch["x"], {}
        if augmentation.label_dim:
            keys = sample_keys(jax.random.fold_in(key, 4), rows.index)  # a fifth beside the four
            x0, cond["augment"] = augmentation(keys, x0)
        eps = normal(sample_keys(noise_key, rows.index), x0)
        t = losses.sample_times(
            settings.loss.time_law, time_key, x0.shape[0], experiment.process, ids=rows.index,
            total=rows.total, **settings.loss.time_options,
        )  # fmt: skip
        if piece is not None:
            dropout_key = jax.random.fold_in(dropout_key, piece)
        denoiser = experiment.denoiser(params, {"label": label_key, "dropout": dropout_key})
        if experiment.num_classes is not None:
            cond["label"] = batch["label"]
            if rows.total != x0.shape[0]:
                cond["rows"] = rows
        return objective(
            denoiser, experiment.process, x0, t, eps, cond or None, settings.loss.weighting,
            **settings.loss.weighting_options,
        ).mean()  # fmt: skip

    def train_step(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        value, grads = _mean(
            jax.value_and_grad(loss), state.params, batch, key, train.accumulate, axis_name
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = averages.decay(
            state.step, train.ema_decay, train.ema_warmup, train.ema_rampup_ratio
        )
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
        tracks = averages.update(state.ema_tracks, params, state.step + 1, train.ema_lengths)
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
        }
        return State(params, opt_state, ema, state.step + 1, state.key, tracks), metrics

    return train_step


def _mean(
    value_and_grad: Callable, params: Any, batch: Any, key: jax.Array, count: int,
    axis_name: str | None,
) -> tuple[Float[Array, ""], Any]:  # fmt: skip
    """(loss, gradients), the means over `count` micro-batches one after another, and over devices.

    Micro-batch m holds the examples m, m + count, m + 2 count, ... of the batch at hand: where it
    is split over devices in consecutive blocks, each device finds its share among its own.
    """
    local = batch["x"].shape[0]
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * local
    total = local * devices

    def one(piece, batch):
        index = first + piece + count * np.arange(local // count)
        number = None if total == local // count else first + piece
        return value_and_grad(params, batch, key, Rows(index, total), number)

    if count == 1:
        mean = one(0, batch)
    else:
        pieces = jax.tree.map(
            lambda a: a.reshape(local // count, count, *a.shape[1:]).swapaxes(0, 1), batch
        )
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)

        def add(sums, piece):
            return jax.tree.map(jnp.add, sums, one(*piece)), None

        sums, _ = jax.lax.scan(add, zeros, (jnp.arange(count), pieces))
        mean = jax.tree.map(lambda a: a / count, sums)
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)
