"""CIFAR-10 as in DDPM: the unconditional UNet of 35.7M parameters, 1000 steps.

    jaxdiff train --config configs/cifar10_ddpm.py --workdir runs/cifar10_ddpm

Data: cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked in data/.
The paper's figure (not measured here): FID 3.17 with 1000 evaluations, after 800,000 steps; 10.6
hours on a TPU v3-8 (its appendix B).

Ho et al., "Denoising Diffusion Probabilistic Models" (2020), section 4 and appendix B, and its
repository's scripts/run_cifar.py: betas 1e-4 to 0.02, the mean error of the noise, batches of 128,
Adam at 2e-4 after 5,000 steps of warm-up, gradients clipped to norm 1, dropout 10%, random flips,
EMA 0.9999, ancestral sampling with the larger variance. What differs: the EMA is warmed up.

On a laptop: --config configs/cifar10_ddpm.py:laptop trains a small network of the same kind on
patches of scikit-learn's photographs; it shows that everything works, and has no expected figure.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    if size not in ("full", "laptop"):
        raise ValueError(f"size must be 'full' or 'laptop', got {size!r}")
    config = ConfigDict()
    config.data = {"name": "cifar10", "path": "data"}
    config.process = {"name": "ddpm"}
    config.model = {
        "name": "unet", "width": 128, "multipliers": (1, 2, 2, 2), "num_blocks": 2,
        "attention_resolutions": (16,), "head_channels": 256, "resample": "conv",
        "adaptive_scale": False, "dropout": 0.1, "time_scale": 1.0,
    }  # fmt: skip
    config.denoiser = {"prediction": "eps", "conditional": False, "dtype": "bfloat16"}
    config.loss = {"weighting": "simple", "time_law": "integers"}
    config.optimizer = {
        "name": "adam", "learning_rate": 2e-4, "warmup_steps": 5000, "schedule": "constant",
        "clip_norm": 1.0,
    }  # fmt: skip
    config.train = {
        "steps": 800_000, "batch_size": 128, "flip": True, "ema_decay": 0.9999,
        "checkpoint_every": 10_000, "sample_every": 50_000, "prefetch": 2,
    }  # fmt: skip
    config.sample = {
        "solver": "ddpm", "options": {"variance": "fixed_large"}, "steps": 1000, "grid": "leading",
    }  # fmt: skip
    config.evaluate = {"count": 5000}
    if size == "laptop":
        config.data = {"name": "photo_patches", "size": 16, "stride": 4}
        config.model.update(width=32, multipliers=(1, 2), num_blocks=1, attention_resolutions=(8,))
        config.denoiser.dtype = "float32"
        config.optimizer.warmup_steps = 50
        config.train.update(steps=300, batch_size=32, ema_decay=0.99, checkpoint_every=100,
                            sample_every=100, log_every=10, prefetch=0)  # fmt: skip
        config.sample.update(steps=100, count=4)
        config.evaluate.count = 64
    return config
