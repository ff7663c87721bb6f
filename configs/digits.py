"""Handwritten digits: a class-conditional DiT on scikit-learn's 1,797 images of 8 x 8 pixels.

    jaxdiff train --config configs/digits.py --workdir runs/digits

0.7M parameters, 2,000 steps; 2 min 10 s on two cores in all (compilation, training, samples,
figures; 220 s of CPU time). Expected in runs/digits/metrics.json, from 2,000 samples of 10
steps of DPM-Solver++(2M); the Frechet distance of that many new real digits would be 0.51:

    guidance 1.0    frechet_distance 0.54    conditional_accuracy 0.957
    guidance 1.5    frechet_distance 1.82    conditional_accuracy 0.998

v-prediction on the cosine process, uniform stratified times, Adam at 2e-3 with a cosine decay. The
digits are all trained on: the distance says how well they are fitted, not how it generalises.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = {"name": "digits", "split": "all"}
    config.process = {"name": "vp_cosine"}
    config.model = {"name": "dit", "patch_size": 2, "width": 96, "depth": 4, "num_heads": 4}
    config.denoiser = {"prediction": "v"}
    config.loss = {"weighting": "v", "time_law": "uniform", "time_options": {"stratified": True}}
    config.optimizer = {"learning_rate": 2e-3, "warmup_steps": 100, "schedule": "cosine"}
    config.train = {
        "steps": 2000, "batch_size": 64, "ema_decay": 0.999, "log_every": 50,
        "checkpoint_every": 500,
    }  # fmt: skip
    config.sample = {
        "solver": "dpm_solver_pp_multistep", "options": {"order": 2}, "steps": 10,
        "grid": "half_log_snr", "guidance": 1.5, "count": 10,
    }  # fmt: skip
    config.evaluate = {"count": 2000, "features": "digits", "guidance": (1.0, 1.5)}
    return config
