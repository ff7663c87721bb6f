"""CIFAR-10 with rectified flow: unconditional DDPM++ of 61.8M parameters on straight paths.

    jaxdiff train --config configs/cifar10_rectified_flow.py --workdir runs/cifar10_rectified_flow

Data: cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked in data/.
The paper's figure (not measured here): FID 2.58 with RK45 (127 evaluations; relative and absolute
tolerance 1e-5). The sampler below is Euler's, 100 equal steps; `jaxdiff.ode` has adaptive ones.

Liu et al., "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow"
(2023), table 1, 1-rectified flow, and its repository's configs/rectified_flow/
cifar10_rf_gaussian_ddpmpp.py: batches of 128, 1.3M steps, Adam at 2e-4 after 5,000 steps of
warm-up, gradients clipped to norm 1, dropout 15%, random flips, EMA 0.999999 (warmed up), t uniform,
and 999 t for the network. Its time runs from noise to data, ours from data to noise.

On a laptop: --config configs/cifar10_rectified_flow.py:laptop trains a small network of the same kind
on patches of scikit-learn's photographs; it shows that everything works, and has no expected figure.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    if size not in ("full", "laptop"):
        raise ValueError(f"size must be 'full' or 'laptop', got {size!r}")
    config = ConfigDict()
    config.data = {"name": "cifar10", "path": "data"}
    config.process = {"name": "flow"}
    config.model = {
        "name": "song_unet", "multipliers": (1, 2, 2, 2), "dropout": 0.15, "time_scale": 999.0,
    }  # fmt: skip
    config.denoiser = {"prediction": "flow", "conditional": False, "dtype": "bfloat16"}
    config.loss = {"weighting": "flow"}
    config.optimizer = {
        "name": "adam", "learning_rate": 2e-4, "warmup_steps": 5000, "schedule": "constant",
        "clip_norm": 1.0,
    }  # fmt: skip
    config.train = {
        "steps": 1_300_000, "batch_size": 128, "flip": True, "ema_decay": 0.999999,
        "checkpoint_every": 10_000, "sample_every": 50_000, "prefetch": 2,
    }  # fmt: skip
    config.sample = {"solver": "ddim", "steps": 100, "grid": "uniform"}
    config.evaluate = {"count": 5000}
    if size == "laptop":
        config.data = {"name": "photo_patches", "size": 16, "stride": 4}
        config.model.update(width=32, multipliers=(1, 2), num_blocks=1, attention_resolutions=(8,))
        config.denoiser.dtype = "float32"
        config.optimizer.warmup_steps = 50
        config.train.update(steps=300, batch_size=32, ema_decay=0.99, checkpoint_every=100,
                            sample_every=100, log_every=10, prefetch=0)  # fmt: skip
        config.sample.update(steps=20, count=4)
        config.evaluate.count = 64
    return config
