"""The sections of a configuration: their keys, defaults and choices."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdiff import data, grids, models, processes
from jaxdiff.config import Range, Section


@dataclasses.dataclass(frozen=True)
class DenoiserSettings:
    """What the network predicts, and how it is called.

    `conditional` uses the data's labels; `precondition` wraps the network in EDM's preconditioning
    with `sigma_data`, and then the prediction is "x0"; `learn_sigma`: the network also predicts the
    variance of a ddpm process's steps, and is trained by `jaxdiff.learned_variance.hybrid_loss`
    (the sample section's solver does not use it). `dtype` is the network's. `attention` is
    "xla", or "cudnn": flash attention of cuDNN for bfloat16 and float16 networks on GPUs, whose
    memory does not grow with the square of the tokens (on other devices XLA's is used).
    """

    prediction: str = "v"
    conditional: bool = True
    precondition: bool = False
    sigma_data: float = 0.5
    learn_sigma: bool = False
    dtype: str = "float32"
    attention: str = "xla"


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Weighting and time law by their names in `jaxdiff.losses`, each with its options."""

    weighting: str = "v"
    weighting_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    time_law: str = "uniform"
    time_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Linear warm-up to `learning_rate`, then "cosine" to end_fraction of it, or "constant".

    `name` is "adam" or "adamw" (which uses `weight_decay`); gradients are clipped to the global
    norm `clip_norm` (0 does not clip).
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "cosine"
    end_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The loop: `batch_size` counts examples a step over all devices.

    They are taken in `accumulate` parts one after another, for less memory and the same gradient.

    `flip` mirrors images at random; `ema_decay` is the weights' average, warmed up; `keep` is how
    many of the latest checkpoints stay, with all those of steps that `keep_every` divides (0: none);
    `sample_every` steps a grid of samples is drawn (0: only at the end);
    `tensorboard` also writes event files; `prefetch` threads read batches ahead (0: on demand).

    `ema_warmup` is "count", "half_life" (at most `ema_rampup_ratio` of the training so far) or
    "none", see `jaxdiff.training.ema.decay`. `ema_lengths` are EDM2's sigma_rel of further averages,
    stored every `ema_snapshots_every` steps (0: only in checkpoints) to make any other length of.
    Every `evaluate_every` steps (0: only at the end) the evaluate section's figures are made; the
    checkpoint with the best `best_metric` of them stays in the folder "best".
    """

    steps: int
    batch_size: int = 128
    accumulate: int = 1
    flip: bool = False
    ema_decay: float = 0.999
    log_every: int = 50
    checkpoint_every: int = 1000
    keep: int = 2
    keep_every: int = 0
    sample_every: int = 0
    tensorboard: bool = False
    prefetch: int = 0
    ema_warmup: str = "count"
    ema_rampup_ratio: float = 0.05
    ema_lengths: tuple[float, ...] = ()
    ema_snapshots_every: int = 0
    evaluate_every: int = 0
    best_metric: str = ""


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The devices as a grid; the sizes multiply to their number, and -1 is what is left.

    A batch is split over `data` x `fsdp`. Along `fsdp` the parameters, their averages and the
    optimiser's copies are split too, along `tensor` the products inside the blocks, of networks that
    have rules for it. `rules` ("regex=axis,axis") place parameters otherwise, see
    `jaxdiff.parallel.partition`. A run may go on with another mesh.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """The default sampler of a run: solver and grid by name, each with its options.

    Every grid has the option `shift` (1, none, by default) of `jaxdiff.grids.shifted`.
    `guidance` is the scale s of uncond + s (cond - uncond); 1 is conditional. `count` samples a
    class make the picture; at most `batch_size` are drawn at once.
    """

    solver: str = "dpm_solver_pp_multistep"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 10
    grid: str = "half_log_snr"
    grid_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance: float = 1.0
    count: int = 8
    batch_size: int = 256
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """`count` samples are compared with the real data, once for each guidance scale.

    `features` is "digits" (a digit classifier's, for Frechet distance and accuracy) or "pixels";
    `ema` is the average of the weights: 0 is train.ema_decay's, else one of train.ema_lengths.
    """

    count: int = 1000
    features: str = "pixels"
    guidance: tuple[float, ...] = (1.0,)
    ema: float = 0.0


_IMAGE_HIDDEN = (
    "parent", "name", "num_classes", "learn_sigma", "image_channels", "dtype", "augment_dim",
    "fourier_frequencies",
)  # fmt: skip
_PROCESSES = (
    processes.vp_linear, processes.vp_cosine, processes.shifted_cosine, processes.sub_vp,
    processes.ddpm, processes.ve, processes.edm, processes.flow,
)  # fmt: skip
_SOURCES = (
    data.digits, data.photo_patches, data.arrays, data.image_folder, data.imagenet, data.cifar10,
    data.array_record, data.parquet,
)  # fmt: skip
_MODELS = {"dit": models.DiT, "unet": models.UNet, "song_unet": models.SongUNet, "mlp": models.MLP}
GRIDS = {
    f.__name__: f
    for f in (
        grids.half_log_snr, grids.uniform, grids.karras, grids.quadratic, grids.power,
        grids.logistic, grids.arctan, grids.truncated_karras, grids.leading, grids.linspace,
        grids.trailing,
    )
}  # fmt: skip

_FROM_0 = Range("at least 0", lambda v: v >= 0)
_FROM_1 = Range("at least 1", lambda v: v >= 1)
_FROM_2 = Range("at least 2", lambda v: v >= 2)
_POSITIVE = Range("positive", lambda v: v > 0)
_BELOW_1 = Range("in [0, 1)", lambda v: 0 <= v < 1)
_FRACTION = Range("in [0, 1]", lambda v: 0 <= v <= 1)

_DATA_RANGES = dict.fromkeys(("size", "stride", "num_classes"), _FROM_1)
_MODEL_RANGES = {
    **dict.fromkeys(("width", "depth", "num_heads", "patch_size", "num_blocks"), _FROM_1),
    **dict.fromkeys(("head_channels", "attention_resolutions", "noise_multiplier"), _FROM_1),
    **dict.fromkeys(("mlp_ratio", "multipliers", "time_scale", "fourier_scale"), _POSITIVE),
    **dict.fromkeys(("dropout", "label_dropout"), _BELOW_1),
}
_OPTIMIZER_RANGES = {
    **dict.fromkeys(("learning_rate", "eps"), _POSITIVE),
    **dict.fromkeys(("warmup_steps", "weight_decay", "clip_norm"), _FROM_0),
    **dict.fromkeys(("b1", "b2"), _BELOW_1), "end_fraction": _FRACTION,
}  # fmt: skip
_TRAIN_RANGES = {
    **dict.fromkeys(("steps", "batch_size", "accumulate"), _FROM_1),
    **dict.fromkeys(("log_every", "checkpoint_every", "keep"), _FROM_1),
    **dict.fromkeys(("keep_every", "sample_every", "prefetch"), _FROM_0),
    **dict.fromkeys(("ema_snapshots_every", "evaluate_every"), _FROM_0),
    "ema_decay": _BELOW_1, "ema_rampup_ratio": _POSITIVE,
    "ema_lengths": Range("above 0 and at most 1 / sqrt(12)", lambda v: 0 < v <= 12**-0.5),
}  # fmt: skip
_SAMPLE_RANGES = dict.fromkeys(("steps", "count", "batch_size"), _FROM_1)

SECTIONS: dict[str, Any] = {
    "seed": 0,
    "data": Section({f.__name__: f for f in _SOURCES}, ranges=_DATA_RANGES),
    "augment": Section({None: data.Augmentation}),
    "process": Section({f.__name__: f for f in _PROCESSES}),
    "model": Section(_MODELS, hidden=_IMAGE_HIDDEN, ranges=_MODEL_RANGES),
    "denoiser": Section({None: DenoiserSettings}, ranges={"sigma_data": _POSITIVE}),
    "loss": Section({None: LossSettings}),
    "optimizer": Section({None: OptimizerSettings}, ranges=_OPTIMIZER_RANGES),
    "train": Section({None: TrainSettings}, ranges=_TRAIN_RANGES),
    "mesh": Section({None: MeshSettings}),
    "sample": Section({None: SampleSettings}, ranges=_SAMPLE_RANGES),
    "evaluate": Section({None: EvaluateSettings}, ranges={"count": _FROM_2}),
}
