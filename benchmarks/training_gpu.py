"""DiT on a GPU: utilisation and memory of a training step, and sampling beside diffusers' DiT.

    python benchmarks/training_gpu.py [--batch N] [--diffusers PYTHON]
    python benchmarks/training_gpu.py --tiny          # any device, a tiny network, writes nothing

Puts its cells into results/training.json, with the device and the versions; benchmarks/training.py does
so too where it finds a GPU. PYTHON is an interpreter with torch (with CUDA) and diffusers, this one by
default; where it has them not, the cell says why. Training: bfloat16 with float32 masters, cuDNN's flash
attention, random latents of 32 x 32 x 4, AdamW, EMA; N examples a step, or of the powers of two up to
512 the largest that fits. Sampling: 50 steps of DDIM, 64 images at a time, both networks in bfloat16
with random weights.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import numpy as np
from training_step import STEPS, Run, compiled

from jaxdiff import config as configuration
from jaxdiff.experiment import make_tableau, sampler
from jaxdiff.models.dit import SIZES
from jaxdiff.settings import SECTIONS
from jaxdiff.training import flops
from jaxdiff.training.meter import peak_memory
from jaxdiff.training.run import batches, prepare

CONFIG = Path(__file__).parents[1] / "configs" / "imagenet256_dit_xl2.py"
LATER = "not measured yet"
NETWORKS = {name: SIZES[name] for name in ("DiT-S/2", "DiT-B/2", "DiT-XL/2")}
TINY = {"tiny": {"patch_size": 2, "width": 32, "depth": 2, "num_heads": 2}}
TRAINING = "MFU in bfloat16, one H200"
SAMPLING = "images per second, sampling, over diffusers' DiT in torch"
CLASSES, LATENT = 1000, (32, 32, 4)
LARGEST = 512  # images a step
ROUNDS = 7


def configured(folder, network, batch, latent=LATENT, remat=False):
    """The paper's configuration with this network, on `batch` random latents."""
    rng = np.random.default_rng(0)
    file = Path(folder) / f"latents_{batch}.npz"
    x = np.clip(rng.standard_normal((batch, *latent), np.float32), -4, 4)
    np.savez(file, x=x, label=rng.integers(0, CLASSES, batch))
    config = configuration.load(CONFIG, SECTIONS).unlock()
    config.data = {"name": "arrays", "data": str(file), "bounds": (-4.0, 4.0),
                   "num_classes": CLASSES}  # fmt: skip
    config.model.update(network)
    config.model.remat = remat
    config.denoiser.attention = "cudnn"
    config.train.update(batch_size=batch, prefetch=0)
    config.sample.update(solver="ddim", steps=50, grid="leading", guidance=1.0)
    config.evaluate.guidance = (1.0,)
    return config


def largest_batch(folder, network, latent, remat, memory):
    """The largest power of two whose activations and state should fit `memory` bytes."""
    experiment = prepare(configured(folder, network, 1, latent, remat), jax.devices()[:1]).experiment
    params = jax.eval_shape(experiment.init, jax.random.key(0))

    def size(tree):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))

    def kept(count):
        """Bytes between the forward pass and the backward pass of so many images."""

        def backward(params, x, t, label):
            return jax.vjp(lambda p: experiment.module.apply(p, x, t, label), params)[1]

        x, t = jnp.zeros((count, *experiment.shape)), jnp.zeros(count)
        return size(jax.eval_shape(backward, params, x, t, jnp.zeros(count, jnp.int32)))

    # With the average, two moments and the gradient; weights that are kept are in both counts.
    state, image = 5 * size(params), kept(2) - kept(1)
    batch = LARGEST
    while batch > 1 and state + batch * image > 0.9 * memory:
        batch //= 2
    return batch


def seconds(call, rounds=ROUNDS):
    """The median over some rounds, after one that compiles."""
    call()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def train_once(folder, network, batch, latent, remat):
    """A compiled step's figures."""
    plan = prepare(configured(folder, network, batch, latent, remat), jax.devices()[:1])
    program = compiled(plan)
    rows = next(batches(plan.experiment.config, plan.source, plan.placement))
    state = jax.jit(plan.init, out_shardings=plan.placement.state)()
    run = Run(program, state, plan.placement.put(rows, batch))
    step = seconds(run) / STEPS
    rate = flops.TRAINING_PASSES * flops.forward(plan.experiment) * batch / step
    peak = flops.peak(jax.devices()[0])
    return {
        "batch": batch, "step_seconds": round(step, 6), "images_per_second": round(batch / step, 1),
        "model_tflops": round(rate / 1e12, 3), "mfu": None if peak is None else round(rate / peak, 4),
        "memory_gib": round(peak_memory(program) / 2**30, 2),
    }  # fmt: skip


def training(networks, latent, batch=None):
    """{network: {remat: figures}}; without a batch the largest that fits, halved until it does."""
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2**33)
    found = {}
    for name, network in networks.items():
        for remat in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                tried = batch or largest_batch(folder, network, latent, remat, memory)
                while True:
                    try:
                        figures = train_once(folder, network, tried, latent, remat)
                        break
                    except jax.errors.JaxRuntimeError as error:
                        if "RESOURCE_EXHAUSTED" not in str(error) or batch or tried == 1:
                            raise
                        tried //= 2
            found.setdefault(name, {})[f"remat {remat}"] = figures
            print(name, f"remat {remat}", figures, file=sys.stderr, flush=True)
    return found


def ours(network, latent, batch):
    """Images per second of `Experiment.sample`, its weights in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        config = configured(folder, network, 1, latent)
        experiment = prepare(config, jax.devices()[:1]).experiment
    variables = jax.jit(
        lambda key: jax.tree.map(lambda a: a.astype(jnp.bfloat16), experiment.init(key))
    )(jax.random.key(0))
    tableau = make_tableau(experiment.process, **sampler(experiment.config))
    ids = np.arange(batch)

    def call():
        drawn = experiment.sample(variables, tableau, ids % CLASSES, ids, 0, 1.0)
        return jax.block_until_ready(drawn)

    return batch / seconds(call), int(tableau.nfe)


def theirs(python, network, latent, batch, steps):
    """What training_gpu_peer.py found in a process of its own, or why it found nothing."""
    settings = dict(network, size=latent[0], channels=latent[2], classes=CLASSES, batch=batch,
                    steps=steps, rounds=ROUNDS, device="cuda" if on_gpu() else "cpu")  # fmt: skip
    script = Path(__file__).with_name("training_gpu_peer.py")
    done = subprocess.run(
        [python, str(script), json.dumps(settings)], capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        return f"{LATER}: {last[-1]}"
    return json.loads(done.stdout.splitlines()[-1])


def sampling(networks, latent, batch, python):
    """{network: ours, theirs, and the ratio to the faster of theirs}."""
    found = {}
    for name, network in networks.items():
        rate, steps = ours(network, latent, batch)
        peer = theirs(python, network, latent, batch, steps)
        found[name] = {"ours": round(rate, 2), "diffusers": peer, "batch": batch, "steps": steps}
        if isinstance(peer, dict):
            found[name]["ours / theirs"] = round(rate / max(peer["images_per_second"].values()), 3)
        print(name, found[name], file=sys.stderr, flush=True)
    return found


def on_gpu():
    return jax.default_backend() == "gpu"


def cells(batch=None, python=sys.executable):
    """The two cells of results/training.json; without a GPU as they are there."""
    if not on_gpu():
        file = machine.RESULTS / "training.json"
        there = json.loads(file.read_text()) if file.exists() else {}
        empty = {TRAINING: dict.fromkeys(NETWORKS, LATER), SAMPLING: LATER}
        kept = {name: there.get(name, value) for name, value in empty.items()}
        print(f"no GPU here ({jax.default_backend()}); kept: {json.dumps(kept)}", file=sys.stderr)
        return kept
    about = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }
    # Sampling first: training leaves less memory to the other process.
    compared = sampling({"DiT-XL/2": NETWORKS["DiT-XL/2"]}, LATENT, 64, python)
    return {TRAINING: about | training(NETWORKS, LATENT, batch), SAMPLING: about | compared}


def main(batch, python, tiny):
    if tiny:
        latent = (8, 8, 4)
        found = training(TINY, latent, batch), sampling(TINY, latent, batch or 4, python)
        print(json.dumps(found, indent=1))
        return
    found = cells(batch, python)
    file = machine.RESULTS / "training.json"
    figures = json.loads(file.read_text()) | found
    file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, help="examples a step (default: the largest that fits)")
    parser.add_argument("--diffusers", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    main(given.batch, given.diffusers, given.tiny)
