"""FlaxDiff's train step on one of our networks, for benchmarks/training.py.

Its trainer's constructor wants a data set, a text encoder and a tracking service; its step needs
none of them, and is taken alone.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax


def flaxdiff_step(path, plan, optimizer):
    """(step, state): `step(state, batch) -> (state, metrics)` of the code in `path`, a checkout of
    github.com/AshishKumar4/FlaxDiff.

    The same network without labels, the cosine process, v-prediction, its own average and loss
    weights; it returns no norms.
    """
    sys.path.insert(0, path)
    from flaxdiff.inputs import DiffusionInputConfig
    from flaxdiff.predictors import VPredictionTransform
    from flaxdiff.schedulers import CosineContinuousNoiseScheduler
    from flaxdiff.trainer import GeneralDiffusionTrainer, Metrics, TrainState
    from flaxdiff.utils import RandomMarkovState

    config, module = plan.experiment.config, plan.experiment.module
    trainer = object.__new__(GeneralDiffusionTrainer)
    trainer.model = module
    trainer.noise_schedule = CosineContinuousNoiseScheduler()
    trainer.model_output_transform = VPredictionTransform()
    trainer.loss_fn = optax.l2_loss
    trainer.distributed_training, trainer.autoencoder = False, None
    trainer.unconditional_prob, trainer.ema_decay = 0.0, config.train.ema_decay
    trainer.input_config = DiffusionInputConfig("image", plan.experiment.shape, [])
    train_step = trainer._define_train_step(config.train.batch_size)

    key = jax.random.key(0)
    params = module.init(key, jnp.zeros((1, *plan.experiment.shape)), jnp.zeros(1))
    state = TrainState.create(
        apply_fn=module.apply, params=params, ema_params=jax.tree.map(jnp.copy, params),
        tx=optimizer, rngs=key, metrics=Metrics.empty(), dynamic_scale=None,
    )  # fmt: skip

    def step(state, batch):
        state, keys = state
        # From the host each time: the step donates its batch.
        images = 127.5 * np.asarray(batch["x"]) + 127.5
        state, loss, keys = train_step(state, keys, {"image": images}, jnp.zeros(1, jnp.int32))
        return (state, keys), {"loss": loss}

    return step, (state, RandomMarkovState(key))
