"""ImageNet at 64 x 64 as in EDM: the class-conditional ADM network of 296M parameters.

    jaxdiff train --config configs/imagenet64_adm.py --workdir runs/imagenet64_adm

Data: ILSVRC2012_img_train.tar of https://www.image-net.org/download.php, each class's archive unpacked
into a folder of its name, and stored once at this size (15 GB, as ADM resizes):

    python -c "from jaxdiff import data
    data.write_array_record('data/imagenet64', data.imagenet('ILSVRC2012/train', 64), shards=128)"

The paper's figure (not measured here): FID 1.36 with 511 evaluations, the sampler below; about 13
days on 32 A100 (its repository's table).

Network: Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), table 11.
Training: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022),
appendix F, and its repository's README (--cond=1 --arch=adm --duration=2500 --batch=4096 --lr=1e-4
--ema=50 --dropout=0.10 --augment=0): 2,500M images in batches of 4096, Adam at 1e-4 warmed up over 10M
images, no flips, EMA with a half-life of 50M images. They compute in float16, this in bfloat16.

4096 images are 128 a device on 32 devices: "--config.train.accumulate=4", or
"--config.model.remat=true", if that does not fit.

On a laptop: --config configs/imagenet64_adm.py:laptop trains a small network of the same kind on
patches of scikit-learn's photographs; it shows that everything works, and has no expected figure.
"""

from ml_collections import ConfigDict

IMAGES = 2_500_000_000


def get_config(size: str = "full") -> ConfigDict:
    if size not in ("full", "laptop"):
        raise ValueError(f"size must be 'full' or 'laptop', got {size!r}")
    batch = 4096
    config = ConfigDict()
    config.data = {"name": "array_record", "path": "data/imagenet64"}
    config.process = {"name": "edm"}
    config.model = {
        "name": "unet", "width": 192, "multipliers": (1, 2, 3, 4), "num_blocks": 3,
        "attention_resolutions": (32, 16, 8), "dropout": 0.1, "label_dropout": 0.0,
        "time_scale": 1.0,
    }  # fmt: skip
    config.denoiser = {"prediction": "x0", "precondition": True, "dtype": "bfloat16"}
    config.loss = {"weighting": "edm", "time_law": "log_normal_sigma"}
    config.optimizer = {
        "name": "adam", "learning_rate": 1e-4, "warmup_steps": 10_000_000 // batch,
        "schedule": "constant", "clip_norm": 0.0,
    }  # fmt: skip
    config.train = {
        "steps": IMAGES // batch, "batch_size": batch, "ema_decay": 0.5 ** (batch / 50_000_000),
        "ema_warmup": "half_life", "checkpoint_every": 2500, "sample_every": 10_000, "prefetch": 8,
    }  # fmt: skip
    config.sample = {
        "solver": "heun", "steps": 256, "grid": "karras", "grid_options": {"end": "zero"},
        "options": {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003},
    }  # fmt: skip
    config.evaluate = {"count": 5000}
    if size == "laptop":
        config.data = {"name": "photo_patches", "size": 16, "stride": 4}
        config.model.update(width=32, multipliers=(1, 2), num_blocks=1, attention_resolutions=(8,),
                            head_channels=32)  # fmt: skip
        config.denoiser.dtype = "float32"
        config.optimizer.warmup_steps = 50
        config.train.update(steps=300, batch_size=32, ema_decay=0.99, checkpoint_every=100,
                            sample_every=100, log_every=10, prefetch=0)  # fmt: skip
        config.sample.update(steps=18, options={})
        config.evaluate.count = 64
    return config
