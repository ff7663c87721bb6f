"""The training step against a hand-written optax loop and FlaxDiff's; waiting for input; memory with
and without rematerialisation.

    python benchmarks/training.py [--flaxdiff DIR]    # 6 minutes

DIR is a checkout of github.com/AshishKumar4/FlaxDiff, which needs clu, termcolor, einops and requests.
Writes results/training.json. The hand-written loop trains the same network on the same batch with the
same optimiser, clipping, warm-up, average and metrics; it draws its noise from one key and knows
nothing of configurations. FlaxDiff's step donates its batch, which is put on the device anew in each
of its steps. Run times are ratios over interleaved pairs in one run. What needs a GPU is measured by
training_gpu.py, alone or from here; without one its cells stay as they are, "not measured yet".
"""

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import optax
from ml_collections import ConfigDict
from pairs import paired
from training_gpu import LATER, cells
from training_peer import flaxdiff_step
from training_step import Run, compiled

from jaxdiff import config as configuration
from jaxdiff.models import DiT, UNet
from jaxdiff.settings import SECTIONS
from jaxdiff.training import flops
from jaxdiff.training.loop import train
from jaxdiff.training.meter import peak_memory
from jaxdiff.training.run import batches, prepare

ROOT = Path(__file__).parents[1]


def digits(**train_settings) -> ConfigDict:
    """configs/digits.py: a DiT of 0.7M parameters."""
    config = configuration.load(ROOT / "configs" / "digits.py", SECTIONS).unlock()
    config.train.update(train_settings)
    return config


def patches() -> ConfigDict:
    """An ADM UNet of 1.2M parameters on 16 x 16 colour patches."""
    config = digits()
    config.data = {"name": "photo_patches", "size": 16, "stride": 16}
    config.model = {
        "name": "unet", "width": 32, "multipliers": (1, 2), "num_blocks": 2,
        "attention_resolutions": (8,),
    }  # fmt: skip
    config.train.batch_size = 16
    config.evaluate = {}
    return config


def hand_optimizer(config):
    chosen, steps = config.optimizer, config.train.steps
    rate = optax.warmup_cosine_decay_schedule(
        0.0, chosen.learning_rate, chosen.warmup_steps, steps, 0.0
    )
    return optax.chain(
        optax.clip_by_global_norm(chosen.clip_norm),
        optax.adamw(rate, chosen.b1, chosen.b2, chosen.eps, weight_decay=chosen.weight_decay),
    )


def hand_written(plan):
    """What one would write for this network with flax and optax alone."""
    config, module = plan.experiment.config, plan.experiment.module
    optimizer = hand_optimizer(config)

    def loss_fn(params, x, label, key):
        noise_key, time_key, drop_key = jax.random.split(key, 3)
        batch = x.shape[0]
        t = (jnp.arange(batch) + jax.random.uniform(time_key, (batch,))) / batch
        alpha, sigma = (f(0.5 * jnp.pi * t)[:, None, None, None] for f in (jnp.cos, jnp.sin))
        eps = jax.random.normal(noise_key, x.shape)
        out = module.apply(
            params, alpha * x + sigma * eps, t, label, train=True,
            rngs={"label": drop_key, "dropout": drop_key},
        )  # fmt: skip
        return jnp.mean((out - (alpha * eps - sigma * x)) ** 2)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, opt_state, ema, count, key = state
        loss, grads = jax.value_and_grad(loss_fn)(
            params, batch["x"], batch["label"], jax.random.fold_in(key, count)
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(config.train.ema_decay, (1.0 + count) / (10.0 + count))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(params),
        }
        return (params, opt_state, ema, count + 1, key), metrics

    key = jax.random.key(0)
    x = jnp.zeros((1, *plan.experiment.shape))
    params = module.init(key, x, jnp.zeros(1), jnp.zeros(1, jnp.int32))
    state = params, optimizer.init(params), jax.tree.map(jnp.copy, params), jnp.int32(0), key
    return step, state


def both(config, peer):
    """(our run, the peer's) of the same network on the same batch."""
    plan = prepare(config)
    placement = plan.placement
    rows = next(batches(plan.experiment.config, plan.source, placement))
    batch = placement.put(rows, config.train.batch_size)
    state = jax.jit(plan.init, out_shardings=placement.state)()
    return Run(compiled(plan), state, batch), Run(*peer(plan), jax.device_put(rows))


def against_flaxdiff(config, path, rounds):
    config.denoiser.conditional = False
    config.sample.guidance, config.evaluate.guidance = 1.0, (1.0,)
    config.evaluate.features = "pixels"
    ours, theirs = both(
        config, lambda plan: flaxdiff_step(path, plan, hand_optimizer(plan.experiment.config))
    )
    ours(), theirs()
    return paired(ours, theirs, rounds)


def against_hand_written(config, rounds):
    ours, theirs = both(config, hand_written)
    first, second = float(ours()["loss"]), float(theirs()["loss"])
    assert abs(first - second) < 0.25 * second, f"not the same training: losses {first}, {second}"
    return paired(ours, theirs, rounds)


def waiting(steps, prefetch):
    """The loop's own figures of a run of some steps, without the first window."""
    config = digits(
        steps=steps, log_every=steps // 4, checkpoint_every=steps, prefetch=prefetch
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(prepare(config), Path(folder) / "run", progress=False)
        lines = (Path(folder) / "run" / "throughput.jsonl").read_text().splitlines()[1:]
    found = [json.loads(line) for line in lines]
    names = [name for name in found[0] if name != "step"]
    return {name: float(f"{sum(one[name] for one in found) / len(found):.4g}") for name in names}


NETWORKS = {
    "DiT-S/2, latents 32 x 32 x 4, batch 16": (DiT.from_size("DiT-S/2"), (16, 32, 32, 4)),
    "UNet 64, 32 x 32 x 3, batch 16": (UNet(width=64, multipliers=(1, 2, 2)), (16, 32, 32, 3)),
}


# XLA drops on the CPU, but on no accelerator, the barriers that keep the first computation and the
# second of a block apart, and then merges the two: without that pass.
OPTIONS = {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}}


def inputs(module, shape):
    """Shapes of (params, x, t)."""
    x, t = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), x, t), x, t


def kept_memory(module, shape, remat):
    """MiB of activations that the forward pass keeps for the backward pass."""
    module = module.clone(remat=remat)
    params, x, t = inputs(module, shape)

    def backward(params, x, t):
        return jax.vjp(lambda p: module.apply(p, x, t), params)[1]

    kept, weights = jax.tree.leaves(jax.eval_shape(backward, params, x, t)), jax.tree.leaves(params)
    return round(4 * (sum(a.size for a in kept) - sum(a.size for a in weights)) / 2**20, 1)


def step_memory(module, shape, remat):
    """MiB of a whole Adam step, in XLA's own account."""
    module = module.clone(remat=remat)
    params, x, t = inputs(module, shape)
    optimizer = optax.adam(1e-4)

    def step(state, x, t):
        params, opt_state = state
        grads = jax.grad(lambda p: jnp.mean(module.apply(p, x, t) ** 2))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = params, jax.eval_shape(optimizer.init, params)
    options = OPTIONS.get(jax.default_backend())
    program = jax.jit(step, donate_argnums=0).lower(state, x, t).compile(options)
    return round(peak_memory(program) / 2**20, 1)


def counted(module, shape):
    """Our operations over XLA's, which adds the elementwise ones."""
    arguments = inputs(module, shape)
    theirs = jax.jit(module.apply).lower(*arguments).cost_analysis()["flops"]
    return round(flops.count(module.apply, *arguments) / theirs, 4)


def main(rounds, steps, flaxdiff, batch, diffusers):
    device = jax.devices()[0]
    networks = {
        "DiT of configs/digits.py, batch 64": digits,
        "UNet, 16 x 16 x 3, batch 16": patches,
    }
    return {
        "device": device.device_kind,
        "our step / a hand-written optax loop's [quartiles]": {
            name: against_hand_written(config(), rounds) for name, config in networks.items()
        },
        "our step / FlaxDiff's, without labels [quartiles]": {
            name: against_flaxdiff(config(), flaxdiff, rounds) if flaxdiff else LATER
            for name, config in networks.items()
        },
        "the loop on configs/digits.py": {
            f"prefetch {threads}": waiting(steps, threads) for threads in (0, 2)
        },
        "MiB of activations kept for the backward pass, by remat": {
            name: {str(remat): kept_memory(*network, remat) for remat in (False, "dots", True)}
            for name, network in NETWORKS.items()
        },
        "MiB of a step (memory_analysis), by remat": {
            name: {str(remat): step_memory(*network, remat) for remat in (False, "dots", True)}
            for name, network in NETWORKS.items()
        },
        "our FLOPs / XLA's": {name: counted(*network) for name, network in NETWORKS.items()},
        **cells(batch, diffusers),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flaxdiff", help="a checkout of FlaxDiff")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, help="on a GPU (default: the largest that fits)")
    parser.add_argument("--diffusers", default=sys.executable, metavar="PYTHON", help="on a GPU")
    given = parser.parse_args()
    machine.write("training", main(**vars(given)))
