"""Floating-point operations of a network, counted from its traced program, and devices' peaks.

Only matrix products and convolutions count, two operations a multiply-add: the model FLOPs of the
PaLM report (Chowdhery et al., 2022, appendix B). XLA's own cost analysis adds the elementwise ones,
and counts the body of a scan once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxdiff.experiment import Experiment

# A backward pass makes two products for each one of the forward pass.
TRAINING_PASSES = 3

# Dense bfloat16 operations per second of what JAX calls a device, by its `device_kind`. A part of a
# card (MIG) has another kind, and is rightly not found. NVIDIA's sheets give H100 and H200 with
# sparsity, which is twice the dense number.
PEAK: Mapping[str, float] = {
    # Google Cloud's documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e": peak compute
    # per chip, bf16.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # "NVIDIA A100 Tensor Core GPU" data sheet: the same for all four.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    # "NVIDIA H100 Tensor Core GPU" data sheet: SXM 1,979e12 and NVL 1,671e12 with sparsity; its
    # first edition, for the PCIe card: 1,513e12.
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    # "NVIDIA H200 Tensor Core GPU" data sheet: SXM 1,979e12 and NVL 1,671e12 with sparsity.
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835e12,
}


def peak(device: jax.Device) -> float | None:
    """Peak bfloat16 operations per second of a device, or None if it is not in `PEAK`."""
    return PEAK.get(device.device_kind)


def forward(experiment: Experiment) -> int:
    """Operations of one evaluation of the network on one example."""
    module = experiment.module
    if hasattr(module, "attention"):  # a fused kernel hides its products
        plain = functools.partial(jax.nn.dot_product_attention, implementation="xla")
        module = module.clone(attention=plain)
    open_network = dataclasses.replace(experiment, module=module)

    def call(variables, x, level, label):
        cond = None if experiment.num_classes is None else label
        return open_network.denoiser(variables)(x, level, level, level, cond)

    x = jax.ShapeDtypeStruct((1, *experiment.shape), jnp.float32)
    level = jax.ShapeDtypeStruct((1,), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    return count(call, jax.eval_shape(open_network.init, jax.random.key(0)), x, level, label)


def tokens(experiment: Experiment) -> int | None:
    """Tokens that a transformer makes of one example; None for other networks."""
    patch = getattr(experiment.module, "patch_size", None)
    return None if patch is None else math.prod(n // patch for n in experiment.shape[:2])


def count(fn: Callable, *args: Any) -> int:
    """Operations of fn(*args), which is traced but not run; `jax.ShapeDtypeStruct`s will do.

    A scan counts as often as it runs, a branch as its most expensive case, a convolution without
    the products with its padding. Raises ValueError for a `while_loop`, whose length no trace
    knows, and for a Pallas kernel.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_one(equation) for equation in jaxpr.eqns)


def _count_one(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    inner = [_count(jaxpr) for jaxpr in _inner(params)]
    if not any(inner):
        return 0
    if name in ("while", "pallas_call"):
        raise ValueError(f"the operations of a {name} cannot be counted from its trace")
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _inner(params: Mapping[str, Any]) -> list[core.Jaxpr]:
    values = (v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,)))
    found = (v.jaxpr if isinstance(v, core.ClosedJaxpr) else v for v in values)
    return [v for v in found if isinstance(v, core.Jaxpr)]


def _product(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
    params = equation.params
    numbers = params["dimension_numbers"]
    image, kernel = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval.shape
    taps = 1
    for i, (low, _) in enumerate(params["padding"]):
        dilation = params["lhs_dilation"][i]
        size = (image[numbers.lhs_spec[2 + i]] - 1) * dilation + 1
        places = np.arange(out[numbers.out_spec[2 + i]])[:, None] * params["window_strides"][i]
        window = np.arange(kernel[numbers.rhs_spec[2 + i]]) * params["rhs_dilation"][i]
        at = places + window - low
        taps *= int(np.sum((at >= 0) & (at < size) & (at % dilation == 0)))
    features = math.prod(kernel[i] for i in numbers.rhs_spec[:2])
    return 2 * out[numbers.out_spec[0]] * features * taps
