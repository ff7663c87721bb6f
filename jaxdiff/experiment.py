"""An experiment: the one place where a configuration's sections become objects.

`train`, `sample` and `evaluate` all start from an `Experiment`, so that a checkpoint is used with
exactly the process, network and shape of data it was trained with.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import grids, solvers
from jaxdiff.arrays import is_concrete
from jaxdiff.data import Augmentation
from jaxdiff.data.loader import Source
from jaxdiff.denoisers import Denoiser, precondition
from jaxdiff.guidance import classifier_free
from jaxdiff.learned_variance import with_variance
from jaxdiff.models import from_linen
from jaxdiff.names import check_options, unknown
from jaxdiff.noise import sample_keys
from jaxdiff.parallel import split_batch
from jaxdiff.predictions import check_prediction
from jaxdiff.processes import Process
from jaxdiff.processes.discrete import is_discrete
from jaxdiff.sampling import sample
from jaxdiff.settings import GRIDS, SECTIONS
from jaxdiff.solvers.tableau import Tableau


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a configuration describes, apart from the data themselves.

    Attributes:
      config: completed and locked (`jaxdiff.config.complete`).
      process: the forward process.
      module: the Linen network.
      shape: of one example, without the batch.
      num_classes: labels the network is conditioned on, or None.
    """

    config: ConfigDict
    process: Process
    module: nn.Module
    shape: tuple[int, ...]
    num_classes: int | None

    def init(self, key: jax.Array) -> Any:
        """The network's initial variables, {"params": ...}."""
        x = jnp.zeros((1, *self.shape))
        return self.module.init(key, x, jnp.zeros(1), self._cond(np.zeros(1, np.int32)))

    def denoiser(self, variables: Any, rngs: Mapping[str, jax.Array] | None = None) -> Denoiser:
        """The denoiser with these variables; `rngs` ("label", "dropout") make it a training one.

        That of a network with a learned variance has two outputs: see `jaxdiff.learned_variance`.
        """
        settings = self.config.denoiser
        if settings.learn_sigma and rngs is not None:
            return with_variance(self.module, variables, settings.prediction, train=True, rngs=rngs)
        found = from_linen(
            self.module, variables, settings.prediction, train=rngs is not None, rngs=rngs
        )
        if settings.precondition:
            return precondition(found.fn, settings.sigma_data, found.params)
        return found

    def sample(
        self, variables: Any, tableau: Tableau, labels: Any, ids: Any, seed: int, guidance: float,
        mesh: jax.sharding.Mesh | None = None,
    ) -> jax.Array:  # fmt: skip
        """Samples [batch, *shape]; sample i is decided by (seed, ids[i]) and its label alone.

        `labels` are integers [batch], or None for a network without classes; `guidance` is s of
        uncond + s (cond - uncond). With a mesh, the one that the variables lie on, the batch is split
        by `jaxdiff.parallel.batch_sharding`. Raises ValueError for labels, a seed or guidance that do
        not apply.
        """
        check_seed("seed", seed)
        self.check_guidance(guidance)
        labels = None if labels is None else self.check_labels(labels)
        denoiser = self.denoiser(variables)
        if guidance != 1.0:
            denoiser = classifier_free(denoiser, guidance, np.int32(self.num_classes))
        start, steps = jax.random.split(jax.random.key(seed))
        ids = np.asarray(ids)
        x_T = self.process.prior(sample_keys(start, ids), (len(ids), *self.shape))
        keys, cond = sample_keys(steps, ids), self._cond(labels)
        if mesh is not None:
            x_T, keys, cond = split_batch(mesh, (x_T, keys, cond))
        return sample(denoiser, tableau, x_T, keys, cond=cond)

    def check_sampler(self, tableau: Tableau, guidance: float) -> None:
        """Raise ValueError if this network cannot be sampled so; traces, but computes nothing."""
        labels = None if self.num_classes is None else np.zeros(1, np.int32)

        def call(variables):
            return self.sample(variables, tableau, labels, np.arange(1), 0, guidance)

        jax.eval_shape(call, jax.eval_shape(self.init, jax.random.key(0)))

    def check_guidance(self, guidance: float) -> None:
        """Raise ValueError unless this network can be guided at that scale."""
        if not np.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance!r}")
        if guidance != 1.0 and (self.num_classes is None or not self._has_null):
            raise ValueError(
                f"guidance {guidance:g} needs a network trained with classes and label_dropout > 0;"
                " without them only guidance 1 applies"
            )

    def check_labels(self, labels: Any) -> np.ndarray:
        """The labels as int32; ValueError unless each is a class of this network, an integer."""
        labels = np.asarray(labels)
        if self.num_classes is None:
            raise ValueError("labels were given to a network trained without classes")
        # Integers beyond 64 bits come as Python's own.
        if not all(isinstance(k, int) and not isinstance(k, bool) for k in labels.ravel().tolist()):
            raise ValueError(f"labels must be integers, got {labels.dtype}: {labels.flat[0]!r}")
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if wrong.size:
            raise ValueError(
                f"label {wrong.flat[0]} is out of range: labels are 0 to {self.num_classes - 1}"
            )
        return labels.astype(np.int32)  # after the check: a cast wraps around

    @property
    def augmentation(self) -> Augmentation:
        """What training does to the images; the network is told of it."""
        return Augmentation(**self.config.augment)

    @property
    def _has_null(self) -> bool:
        return getattr(self.module, "label_dropout", 0) > 0

    def _cond(self, labels: Any) -> Any:
        return None if self.num_classes is None else jnp.asarray(labels)


def check_seed(where: str, seed: int) -> None:
    """Raise ValueError unless 0 <= seed < 2^32: JAX would use another seed's numbers, or fail."""
    if is_concrete(seed) and not 0 <= seed < 2**32:
        raise ValueError(f"{where} must be from 0 to {2**32 - 1}, got {seed}")


def make_source(config: ConfigDict) -> Source:
    """The examples of the data section."""
    return _call(SECTIONS["data"].choices, config.data)


def make_experiment(
    config: ConfigDict, shape: tuple[int, ...], num_classes: int | None
) -> Experiment:
    """Build every object of a completed configuration, for examples of that shape and classes.

    Raises ValueError or TypeError for settings that do not fit together: before anything is
    written, and before the first step.
    """
    settings = config.denoiser
    check_prediction(settings.prediction)
    if settings.precondition and settings.prediction != "x0":
        raise ValueError(
            "config.denoiser.precondition makes an x0 denoiser: set config.denoiser.prediction to "
            f"'x0', got {settings.prediction!r}"
        )
    if settings.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            "config.denoiser.dtype must be 'float32', 'bfloat16' or 'float16', got "
            f"{settings.dtype!r}"
        )
    if settings.conditional and num_classes is None:
        raise ValueError("the data have no labels: set config.denoiser.conditional to False")
    check_seed("config.seed", config.seed)
    check_seed("config.sample.seed", config.sample.seed)
    classes = num_classes if settings.conditional else None
    process = _call(SECTIONS["process"].choices, config.process)
    if settings.precondition and np.any(np.asarray(process.alpha(process.t_max)) == 0):
        raise ValueError(
            "config.denoiser.precondition: its c_noise = log(sigma / alpha) / 4 is infinite at "
            f"alpha = 0, where this process is at t_max = {process.t_max:g}. Set "
            f"config.process.t_max below {process.t_max:g}, or use no preconditioning with the "
            "prediction 'v' or 'flow'"
        )
    extra = {"num_classes": classes, "dtype": jnp.dtype(settings.dtype)}
    extra |= _learn_sigma(config, process) | _augment_dim(config, shape)
    module = _with_attention(_call(SECTIONS["model"].choices, config.model, **extra), settings)
    experiment = Experiment(config, process, module, tuple(shape), classes)
    _check_output(experiment)
    experiment.check_guidance(config.sample.guidance)
    experiment.check_sampler(make_tableau(process, **sampler(config)), config.sample.guidance)
    return experiment


def _with_attention(module: nn.Module, settings: ConfigDict) -> nn.Module:
    """The network with the attention that the denoiser section names."""
    if settings.attention not in ("xla", "cudnn"):
        raise ValueError(
            f"config.denoiser.attention must be 'xla' or 'cudnn', got {settings.attention!r}"
        )
    if settings.attention == "xla":
        return module
    if not hasattr(module, "attention") or settings.dtype == "float32":
        raise ValueError(
            "config.denoiser.attention 'cudnn' needs a network with attention and "
            "config.denoiser.dtype 'bfloat16' or 'float16', got a "
            f"{type(module).__name__} in {settings.dtype}"
        )
    if jax.default_backend() != "gpu":
        warnings.warn(
            "config.denoiser.attention 'cudnn' is for GPUs: XLA's attention is used on "
            f"{jax.default_backend()!r}", stacklevel=3,
        )  # fmt: skip
        return module
    flash = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return module.clone(attention=flash)


def _learn_sigma(config: ConfigDict, process: Process) -> dict[str, bool]:
    """The network's second output, if it is wanted."""
    if not config.denoiser.learn_sigma:
        return {}
    if not is_discrete(process) or config.denoiser.precondition:
        raise ValueError(
            "config.denoiser.learn_sigma is for the process 'ddpm' without preconditioning, got "
            f"config.process.name {config.process.name!r}"
        )
    _check_network(config, "learn_sigma", "config.denoiser.learn_sigma needs a network for images")
    return {"learn_sigma": True}


def _augment_dim(config: ConfigDict, shape: tuple[int, ...]) -> dict[str, int]:
    """The network's number of augmentation labels, if images are augmented."""
    count = Augmentation(**config.augment).label_dim
    if not count:
        return {}
    if len(shape) != 3 or min(shape[:2]) < 2:
        raise ValueError(
            "config.augment needs examples of shape [height, width, channels] of at least 2 x 2 "
            f"pixels, got {list(shape)}"
        )
    _check_network(config, "augment_dim", "config.augment needs a network that is told of it")
    return {"augment_dim": count}


def _check_network(config: ConfigDict, field: str, need: str) -> None:
    """Raise ValueError, with what is needed, unless the chosen network has the field."""
    name = config.model.name
    if not hasattr(SECTIONS["model"].choices[name], field):
        raise ValueError(f"{need}, got config.model.name {name!r}")


def sampler(config: ConfigDict) -> dict[str, Any]:
    """The sample section's arguments of `make_tableau`."""
    chosen = config.sample
    return {
        "solver": chosen.solver, "steps": chosen.steps, "grid": chosen.grid,
        "options": chosen.options.to_dict(), "grid_options": chosen.grid_options.to_dict(),
    }  # fmt: skip


def make_tableau(
    process: Process, solver: str, steps: int, grid: str,
    options: Mapping[str, Any] | None = None, grid_options: Mapping[str, Any] | None = None,
) -> Tableau:  # fmt: skip
    """A tableau by names, on the grid shifted by the grid option `shift`; or a stored one.

    `solver` may be a file of `jaxdiff.solvers.save`, "name.json", which has steps, grid and options
    of its own: those given here are not used. Raises ValueError for unknown names, with the nearest,
    and for a file that was made for another process.
    """
    if is_stored(solver):
        tableau = solvers.load(solver)
        _check_process(process, tableau, solver)
        return tableau
    solvers.find(solver)
    if grid not in GRIDS:
        raise ValueError(unknown("unknown grid", grid, GRIDS))
    build, own = GRIDS[grid], dict(grid_options or {})
    check_options(f"grid {grid!r}", build, own, skip=2, more=("shift",))
    shift = own.pop("shift", 1.0)
    nodes = grids.shifted(build(process, steps, **own), shift)
    return solvers.build(solver, nodes, **(options or {}))


def is_stored(solver: str) -> bool:
    """Whether a solver's name is that of a file."""
    return solver.endswith(".json")


def _check_process(process: Process, tableau: Tableau, name: str) -> None:
    for level in ("alpha", "sigma"):
        there = np.asarray(getattr(tableau, level))
        here = np.asarray(getattr(process, level)(np.asarray(tableau.t)))
        if not np.allclose(there, here, rtol=1e-4, atol=1e-6):
            i = int(np.argmax(np.abs(there - here)))
            raise ValueError(
                f"{name!r} was made for another process: at t = {tableau.t[i]:.6g} it has {level} = "
                f"{there[i]:.6g}, this one {here[i]:.6g}"
            )


def _call(choices: Mapping[str, Any], section: ConfigDict, **extra: Any) -> Any:
    arguments = {key: value for key, value in section.items() if key != "name"}
    return choices[section.name](**arguments, **extra)


def _check_output(experiment: Experiment) -> None:
    """Trace the network once, without computing, so that a misfit is found before anything runs."""
    variables = jax.eval_shape(experiment.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, *experiment.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)

    def call(variables, x, labels):
        return experiment.module.apply(variables, x, jnp.zeros(2), experiment._cond(labels))

    out = jax.eval_shape(call, variables, x, labels)
    if out.shape != x.shape:
        raise ValueError(f"the network maps a state of shape {x.shape} to {out.shape}")
