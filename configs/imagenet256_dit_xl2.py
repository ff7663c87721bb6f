"""ImageNet at 256 x 256 in latent space: DiT-XL/2 of 675M parameters.

    jaxdiff train --config configs/imagenet256_dit_xl2.py --workdir runs/imagenet256_dit_xl2

Data: latents [32, 32, 4] of ImageNet (ILSVRC2012_img_train.tar, https://www.image-net.org/download.php;
resized to 256 x 256 as `jaxdiff.data.imagenet(path, 256)` does) by Stable Diffusion's autoencoder
(stabilityai/sd-vae-ft-ema, at Hugging Face), samples of its posterior times 0.18215, of each image and
of its mirror image, because a mirrored latent is not the latent of the mirrored image. With them in an
object `latents` that has len, shape = (32, 32, 4), num_classes = 1000 and latents[i] = {"x": ..,
"label": ..} (21 GB; such an .npz, if it fits in memory: data.arrays(file, bounds=None)):

    data.write_array_record("data/imagenet256_latents", latents, dtype="float16", shards=128)

Samples are latents: divide by 0.18215 and decode. The paper's figures (not measured here), with 250
evaluations of DDPM: FID 9.62 without guidance and 2.27 with guidance 1.5, after 7M steps; 19.47
without guidance after 400,000.

Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 4 and table 4, and its
repository's train.py: batches of 256, AdamW at 1e-4, constant, no weight decay, label dropout 10%, EMA
0.9999, betas 1e-4 to 0.02, 1000 steps, the mean error of the noise and, for the variance that the
network also predicts, the variational bound. What differs: the sampler has the fixed smaller variance
(with the learned one, without guidance: `jaxdiff.learned_variance`).

On a laptop: --config configs/imagenet256_dit_xl2.py:laptop trains a small network of the same kind on
scikit-learn's digits; it shows that everything works, and has no expected figure.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    if size not in ("full", "laptop"):
        raise ValueError(f"size must be 'full' or 'laptop', got {size!r}")
    config = ConfigDict()
    config.data = {"name": "array_record", "path": "data/imagenet256_latents"}
    config.process = {"name": "ddpm"}
    config.model = {
        "name": "dit", "patch_size": 2, "width": 1152, "depth": 28, "num_heads": 16,
        "time_scale": 1.0,
    }  # fmt: skip
    config.denoiser = {"prediction": "eps", "learn_sigma": True, "dtype": "bfloat16"}
    config.loss = {"weighting": "simple", "time_law": "integers"}
    config.optimizer = {
        "name": "adamw", "learning_rate": 1e-4, "schedule": "constant", "clip_norm": 0.0,
    }  # fmt: skip
    config.train = {
        "steps": 7_000_000, "batch_size": 256, "ema_decay": 0.9999, "ema_warmup": "none",
        "checkpoint_every": 10_000, "sample_every": 50_000, "prefetch": 4,
    }  # fmt: skip
    config.sample = {
        "solver": "ddpm", "steps": 250, "grid": "linspace", "guidance": 1.5,
    }  # fmt: skip
    config.evaluate = {"count": 5000, "guidance": (1.0, 1.5)}
    if size == "laptop":
        config.data = {"name": "digits"}
        config.model.update(width=64, depth=2, num_heads=4)
        config.denoiser.dtype = "float32"
        config.train.update(steps=300, batch_size=32, ema_decay=0.99, checkpoint_every=100,
                            sample_every=100, log_every=10, prefetch=0)  # fmt: skip
        config.sample.update(steps=50)
        config.evaluate.update(count=100, guidance=(1.0,))
    return config
