"""CIFAR-10 as in EDM: class-conditional DDPM++ of 55.7M parameters, augmentation with conditioning.

    jaxdiff train --config configs/cifar10_edm.py --workdir runs/cifar10_edm

Data: cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked in data/.
The paper's figure (not measured here): FID 1.79 with 35 evaluations, the sampler below; about two
days on eight V100 (its repository's table).

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), config F
of table 2 and appendix F, and the defaults of its repository's train.py (--cond=1 --arch=ddpmpp):
200M images in batches of 512, Adam at 1e-3 with eps 1e-8, warmed up over 10M images and then constant,
dropout 13%, augmentation 12%, EMA with a half-life of 0.5M images, at most 5% of those seen,
log(sigma) ~ N(-1.2, 1.2^2), sigma_data 0.5. For NCSN++ (1.79 too): --config.model.embedding=fourier
--config.model.noise_multiplier=2 --config.model.encoder=residual
"--config.model.resample_filter=(1,3,3,1)".

On a laptop: --config configs/cifar10_edm.py:laptop trains a small network of the same kind on
patches of scikit-learn's photographs; it shows that everything works, and has no expected figure.
"""

from ml_collections import ConfigDict

IMAGES = 200_000_000


def get_config(size: str = "full") -> ConfigDict:
    if size not in ("full", "laptop"):
        raise ValueError(f"size must be 'full' or 'laptop', got {size!r}")
    batch = 512
    config = ConfigDict()
    config.data = {"name": "cifar10", "path": "data"}
    config.augment = {"probability": 0.12}
    config.process = {"name": "edm"}
    config.model = {
        "name": "song_unet", "dropout": 0.13, "label_dropout": 0.0, "time_scale": 1.0,
    }  # fmt: skip
    config.denoiser = {"prediction": "x0", "precondition": True, "dtype": "bfloat16"}
    config.loss = {"weighting": "edm", "time_law": "log_normal_sigma"}
    config.optimizer = {
        "name": "adam", "learning_rate": 1e-3, "warmup_steps": 10_000_000 // batch,
        "schedule": "constant", "clip_norm": 0.0,
    }  # fmt: skip
    config.train = {
        "steps": IMAGES // batch, "batch_size": batch, "ema_decay": 0.5 ** (batch / 500_000),
        "ema_warmup": "half_life", "checkpoint_every": 5000, "sample_every": 10_000, "prefetch": 2,
    }  # fmt: skip
    config.sample = {
        "solver": "heun", "steps": 18, "grid": "karras", "grid_options": {"end": "zero"},
    }  # fmt: skip
    config.evaluate = {"count": 5000}
    if size == "laptop":
        config.data = {"name": "photo_patches", "size": 16, "stride": 4}
        config.model.update(width=32, multipliers=(1, 2), num_blocks=1, attention_resolutions=(8,))
        config.denoiser.dtype = "float32"
        config.optimizer.warmup_steps = 50
        config.train.update(steps=300, batch_size=32, ema_decay=0.99, checkpoint_every=100,
                            sample_every=100, log_every=10, prefetch=0)  # fmt: skip
        config.evaluate.count = 64
    return config
