"""Golden trajectories of the diffusers schedulers in float64, for the parity tests.

    pip install torch diffusers numpy scipy
    python tests/golden/make_diffusers.py            # writes tests/golden/diffusers_*.npz

Needed only to make the files again: the tests read the files and import neither package. The
versions used are written inside each file; README.md beside this script describes the contents.

The network is exact: x0, eps, v, flow or EDM's raw output of a Gaussian mixture, computed in
float64 at the (alpha, sigma) that the scheduler itself gives to the call, x = alpha x0 + sigma eps.

Float64. The schedulers build float32 tables and cast the state to float32 inside `step`. Every such
place names the type through the module globals `torch` or `np` (`torch.float32`, `np.float32`) or
takes torch's default, so each scheduler module gets stand-ins for the two whose `float32` is
float64, and the default is set to float64: tables, sigmas, timesteps and steps are then those of
the published code, only wider. A dispatch mode raises if any float32 tensor appears anyway.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import diffusers
import numpy as np
import scipy
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DIM, BATCH, TRAIN = 4, 3, 1000
_RNG = np.random.default_rng(20240229)
MIXTURE = {
    "weights": [0.3, 0.5, 0.2],
    "means": np.round(_RNG.uniform(-1.4, 1.4, (3, DIM)), 3).tolist(),
    "scales": np.round(_RNG.uniform(0.2, 0.5, (3, DIM)), 3).tolist(),
}
START = _RNG.standard_normal((BATCH, DIM))

PLAIN = {"clip_sample": False}
DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.3}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
FULL_ORDER = {"lower_order_final": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SPAN = {"sigma_min": 0.03, "sigma_max": 14.6}
CHURN = {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 50.0, "s_noise": 1.007}


def _spacings(**config):
    return [{"timestep_spacing": s, **config} for s in ("leading", "linspace", "trailing")]


def _predictions(kinds=("sample", "v_prediction"), **config):
    return [{"prediction_type": kind, **config} for kind in kinds]


def _betas(**config):
    return [{"beta_schedule": b, **config} for b in ("scaled_linear", "squaredcos_cap_v2")]


def _case(config=None, steps=10, step=None, setup=None):
    """One run: the constructor's options, number of steps, options of step and set_timesteps."""
    case = {"config": config or {}, "step": step or {}, "setup": setup or {}, "steps": steps}
    options = (f"{k}={v}" for part in ("config", "step", "setup") for k, v in case[part].items())
    return {"name": ",".join([f"n={steps}", *options]), **case}


def _ddim():
    cases = [_case({**c, **PLAIN}, step={"eta": e}) for e in (0.0, 0.5, 1.0) for c in _spacings()]
    clipped = {"use_clipped_model_output": True}
    for clip in ({}, {"clip_sample_range": 0.5}, DYNAMIC, {"thresholding": True}):
        cases += [_case(clip), _case(clip, step=clipped)]
    cases += [_case(step={"eta": 1.0}), _case(step={"eta": 1.0, **clipped})]
    cases.append(_case(PLAIN, step=clipped))
    for offset in (0, 1):
        last = {"set_alpha_to_one": False, "steps_offset": offset, **PLAIN}
        cases += [_case(last, step={"eta": eta}) for eta in (0.0, 1.0)]
    cases += [_case(c) for c in (*_predictions(**PLAIN), *_predictions(), *_betas(**PLAIN))]
    kinds = ("epsilon", "sample", "v_prediction")
    cases += [_case({**c, **ZERO_SNR, **PLAIN}) for c in _predictions(kinds)]
    v = {"prediction_type": "v_prediction", **ZERO_SNR, **PLAIN}
    cases += [_case(v, n, {"eta": e}) for e, n in ((0.5, 10), (1.0, 10), (1.0, 12))]
    cases.append(_case({"prediction_type": "v_prediction", **ZERO_SNR}))
    cases += [_case({**c, **PLAIN}, n) for c in _spacings() for n in (1, 2, 3)]
    return cases


def _ddpm():
    variances = ("fixed_small", "fixed_small_log", "fixed_large")
    cases = [_case({"variance_type": v, **PLAIN, **c}) for v in variances for c in _spacings()]
    cases.append(_case({"variance_type": "fixed_large_log", **PLAIN}))
    cases += [_case(c) for c in ({}, {"variance_type": "fixed_large"}, DYNAMIC)]
    cases += [_case(c) for c in (*_predictions(**PLAIN), *_betas(**PLAIN))]
    cases += [_case({**c, **ZERO_SNR, **PLAIN}) for c in _predictions()]
    cases += [_case({"beta_schedule": "sigmoid", **PLAIN})]
    return cases + [_case(PLAIN, n) for n in (1, 2, 3)]


def _sigma_spacings(*extra):
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", *extra)
    return [{name: True} for name in names]


def _euler():
    cases = [_case(c) for c in (*_spacings(), *_sigma_spacings(), *_predictions(), *_betas())]
    cases.append(_case({"timestep_spacing": "leading", "steps_offset": 1}))
    cases.append(_case({"timestep_spacing": "leading", "use_karras_sigmas": True}))
    cases.append(_case({"use_karras_sigmas": True, **SPAN}))
    cases += [_case(c) for c in (SIGMA_MIN, {**SIGMA_MIN, "use_karras_sigmas": True})]
    cases.append(_case({"interpolation_type": "log_linear"}))
    v = {"prediction_type": "v_prediction"}
    cases += [_case({**v, **ZERO_SNR}), _case({**v, "timestep_type": "continuous"})]
    cases += [_case(c, step=CHURN) for c in ({}, *_predictions())]
    cases.append(_case({}, step={"s_churn": 20.0}))
    cases += [_case({}, n) for n in (1, 2, 3)]
    return cases + [_case({"timestep_spacing": "trailing"}, 1)]


def _flow_euler():
    cases = [_case(c) for c in ({}, {"shift": 3.0}, *_sigma_spacings())]
    dynamic = {"use_dynamic_shifting": True}
    cases.append(_case(dynamic, setup={"mu": 1.15}))
    cases.append(_case({**dynamic, "time_shift_type": "linear"}, setup={"mu": 2.0}))
    cases.append(_case({"shift": 3.0, "shift_terminal": 0.1}))
    cases.append(_case({"stochastic_sampling": True, "shift": 3.0}))
    cases.append(_case({}, step=CHURN))
    return cases + [_case({"shift": 3.0}, n) for n in (1, 2, 3)]


def _edm_euler():
    options = ({}, {"sigma_schedule": "exponential"}, {"rho": 5.0, "sigma_max": 20.0}, SIGMA_MIN)
    cases = [_case(c) for c in (*options, {"sigma_data": 1.0}, *_predictions(("v_prediction",)))]
    cases += [_case(c, step=CHURN) for c in ({}, *_predictions(("v_prediction",)))]
    return cases + [_case({}, n) for n in (1, 2, 3)]


def _heun():
    cases = [_case(c) for c in (*_spacings(), *_sigma_spacings(), *_predictions())]
    cases += [_case(c) for c in ({"clip_sample": True}, {"beta_schedule": "squaredcos_cap_v2"})]
    return cases + [_case({}, n) for n in (1, 2, 3)] + [_case({"timestep_spacing": "trailing"}, 1)]


def _flow_heun():
    return [_case(), _case({"shift": 3.0}), *(_case({"shift": 3.0}, n) for n in (1, 2, 3)),
            _case(step={"s_churn": 3.0})]  # fmt: skip


def _dpm_common():
    """Cases that DPMSolverMultistepScheduler and its EDM version share."""
    solvers = [{"solver_order": k} for k in (1, 2, 3)] + [{"solver_type": "heun"}]
    cases = [_case({**s, **e}) for s in solvers for e in ({}, SIGMA_MIN)]
    cases += [_case({**s, **e, **FULL_ORDER}) for s in solvers[1:] for e in ({}, SIGMA_MIN)]
    cases.append(_case({**SIGMA_MIN, **FULL_ORDER, "euler_at_final": True}))
    cases += [_case({"solver_order": 3, **e}, 16) for e in ({}, SIGMA_MIN)]
    return cases + [_case({"solver_order": 3}, n) for n in (1, 2, 3)] + [_case(DYNAMIC)]


def _dpm():
    cases = _dpm_common() + [_case(c) for c in (*_spacings(), *_predictions(), *_betas())]
    sigmas = _sigma_spacings("use_lu_lambdas")
    cases += [_case(c) for c in (*sigmas, {**sigmas[0], **SIGMA_MIN}, {**sigmas[3], **SIGMA_MIN})]
    cases.append(_case({**sigmas[0], **SIGMA_MIN, **FULL_ORDER, "solver_order": 3}))
    cases.append(_case({"prediction_type": "v_prediction", **ZERO_SNR}))
    cases += [_case({**FLOW, "flow_shift": s}) for s in (1.0, 3.0)]
    cases.append(_case({**FLOW, "flow_shift": 3.0, **SIGMA_MIN}))
    cosine = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    cases += [_case({**cosine, "timestep_spacing": s}) for s in ("linspace", "trailing")]
    cases.append(_case({"timestep_spacing": "leading", "steps_offset": 1}))
    return cases + [_case({"timestep_spacing": "trailing"}, n) for n in (1, 3)]


def _edm_dpm():
    options = ({"sigma_schedule": "exponential"}, {"rho": 5.0, "sigma_max": 20.0})
    return _dpm_common() + [_case(c) for c in (*options, *_predictions(("v_prediction",)))]


def _unipc():
    orders = [{"solver_order": k} for k in (1, 2, 3)]
    cases = []
    for kind in ("bh1", "bh2"):
        for data in (True, False):
            solver = {"solver_type": kind, "predict_x0": data}
            cases += [_case({**o, **solver, **SIGMA_MIN}) for o in orders]
            cases += [_case({**o, **solver}) for o in orders[1:2]]
    cases += [_case(o) for o in orders]
    # Order 3 to sigma = 0 without lower_order_final is missing: diffusers raises (singular system).
    cases += [_case({**o, **FULL_ORDER, **SIGMA_MIN}) for o in orders[1:]]
    cases.append(_case({"solver_order": 2, **FULL_ORDER}))
    disabled = ([0], [0, 1, 2], [*range(10)])
    cases += [_case({"solver_order": 3, "disable_corrector": d}) for d in disabled]
    cases += [_case(c) for c in (*_spacings(), *_predictions(), *_betas(), DYNAMIC)]
    cases += [_case({**c, "predict_x0": False, **SIGMA_MIN}) for c in (*_predictions(), DYNAMIC)]
    sigmas = _sigma_spacings()
    cases += [_case(c) for c in (*sigmas, {**sigmas[0], **SIGMA_MIN}, {**sigmas[0], **SPAN})]
    cases.append(_case({**sigmas[0], **SIGMA_MIN, **FULL_ORDER, "solver_order": 3}))
    cases.append(_case({"prediction_type": "v_prediction", **ZERO_SNR}))
    cases += [_case({**FLOW, "flow_shift": s}) for s in (1.0, 3.0)]
    cases += [_case({**FLOW, **c}) for c in (SIGMA_MIN, {"use_karras_sigmas": True})]
    cases.append(_case({**FLOW, "use_dynamic_shifting": True}, setup={"mu": 1.15}))
    cases.append(_case({**FLOW, "shift_terminal": 0.1}))
    cases += [_case({**FLOW, "flow_shift": 3.0}, n) for n in (1, 2)]
    return cases + [_case({"solver_order": 3}, n) for n in (1, 2, 3, 16)]


# File name -> (scheduler class, family of its levels, its cases).
SCHEDULERS = {
    "ddim": ("DDIMScheduler", "alphas_cumprod", _ddim),
    "ddpm": ("DDPMScheduler", "alphas_cumprod", _ddpm),
    "euler": ("EulerDiscreteScheduler", "unit_alpha", _euler),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", "flow", _flow_euler),
    "edm_euler": ("EDMEulerScheduler", "edm", _edm_euler),
    "heun": ("HeunDiscreteScheduler", "unit_alpha", _heun),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", "flow", _flow_heun),
    "dpm_solver_pp": ("DPMSolverMultistepScheduler", "own", _dpm),
    "edm_dpm_solver_pp": ("EDMDPMSolverMultistepScheduler", "edm", _edm_dpm),
    "unipc": ("UniPCMultistepScheduler", "own", _unipc),
}


class Wide:
    """A module seen with float64 under the name float32."""

    def __init__(self, module):
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name):
        return getattr(self._module, name)


class NoFloat32(TorchDispatchMode):
    """Raises where an operation takes or returns a float32 tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                raise TypeError(f"float32 in {func}")
        return out


def mixture_posterior(x, alpha, sigma):
    """E[x0 | x] and E[eps | x] of the mixture at x = alpha x0 + sigma eps; x [batch, dim]."""
    weights, means, scales = (np.asarray(MIXTURE[k]) for k in ("weights", "means", "scales"))
    centred = x[:, None] - alpha * means
    var = (alpha * scales) ** 2 + sigma**2
    logits = np.log(weights) - 0.5 * np.sum(centred**2 / var + np.log(var), axis=-1)
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share = (share / share.sum(axis=1, keepdims=True))[..., None]
    x0 = np.sum(share * (means + alpha * scales**2 / var * centred), axis=1)
    return x0, np.sum(share * sigma / var * centred, axis=1)


def network(x, alpha, sigma, family, config):
    """What a perfect network of the case's prediction type returns at (x, alpha, sigma)."""
    x0, eps = mixture_posterior(x, alpha, sigma)
    kind = config.get("prediction_type", "flow_prediction")
    if family == "edm":
        data, total = config["sigma_data"], np.sqrt(sigma**2 + config["sigma_data"] ** 2)
        sign = -1.0 if kind == "v_prediction" else 1.0
        return sign * (x0 - (data / total) ** 2 * x) * total / (sigma * data)
    # v belongs to the variance-preserving state x / sqrt(alpha^2 + sigma^2).
    scale = np.hypot(alpha, sigma)
    outputs = {"epsilon": eps, "sample": x0, "flow_prediction": eps - x0,
               "v_prediction": (alpha * eps - sigma * x0) / scale}  # fmt: skip
    return outputs[kind]


def levels(scheduler, family, i, t):
    """((alpha, sigma) of call i, (alpha, sigma) that its step goes to, the latter's t or None)."""
    if family == "alphas_cumprod":
        table = scheduler.alphas_cumprod
        if hasattr(scheduler, "previous_timestep"):
            to, final = int(scheduler.previous_timestep(t)), scheduler.one
        else:  # DDIM computes it inside step()
            to = t - TRAIN // scheduler.num_inference_steps
            final = scheduler.final_alpha_cumprod
        pair = table[t], table[to] if to >= 0 else final
        (a, s), (a1, s1) = ((float(p.sqrt()), float((1 - p).sqrt())) for p in pair)
        return (a, s), (a1, s1), to if to >= 0 else (-1 if s1 == 0 else 0)
    sigmas = scheduler.sigmas[i], scheduler.sigmas[i + 1]
    if family == "own":
        pair = [scheduler._sigma_to_alpha_sigma_t(s) for s in sigmas]
    else:
        pair = [(1 - s if family == "flow" else 1.0, s) for s in sigmas]
    return *(tuple(map(float, p)) for p in pair), None


def last_clock(family, scheduler, to, previous, repeated):
    """t of the last node, where no call is made, so that the scheduler seldom names one."""
    if to[0] is not None:
        return to[0]
    if repeated or family == "edm":  # EDM's clock, log(sigma) / 4, has no value at sigma = 0
        return previous
    if family == "flow" or scheduler.config.get("use_flow_sigmas"):
        return 0.0
    return -1.0 if to[2] == 0 else 0.0


def walk(scheduler, family, case, calls):
    """Run the scheduler, appending every call's (t, alpha, sigma) to `calls`.

    Returns (states, outputs, where each step goes: (t or None, alpha, sigma)).
    """
    # One more axis: thresholding wants [batch, channels, ...].
    x = torch.from_numpy(START)[..., None] * getattr(scheduler, "init_noise_sigma", 1.0)
    states, outputs, targets = [x], [], []
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        here, there, next_t = levels(scheduler, family, i, int(t))
        calls.append((float(t), *here))
        targets.append((next_t, *there))
        outputs.append(network(x[..., 0].numpy(), *here, family, scheduler.config))
        out = torch.from_numpy(outputs[-1])[..., None]
        x = scheduler.step(out, t, x, **case["step"]).prev_sample
        if getattr(scheduler, "step_index", None) not in (None, i + 1):
            raise RuntimeError(f"{case}: at step {scheduler.step_index}, expected {i + 1}")
        states.append(x)
    return torch.stack(states)[..., 0].numpy(), np.stack(outputs), targets


def run(name, family, case):
    """The recorded run of one case: (facts for the JSON, arrays)."""
    cls = getattr(diffusers, name)
    module = sys.modules[cls.__module__]
    module.torch, module.np = Wide(torch), Wide(np)
    rng, draws, drawn_in, calls = np.random.default_rng(7), [], [], []

    def randn_tensor(shape, generator=None, device=None, dtype=None):
        draws.append(rng.standard_normal((BATCH, DIM)))
        drawn_in.append(len(calls) - 1)
        return torch.from_numpy(draws[-1])[..., None]

    module.randn_tensor = randn_tensor
    scheduler = cls(**case["config"])
    scheduler.set_timesteps(case["steps"], **case["setup"])
    states, outputs, targets = walk(scheduler, family, case, calls)

    stride = scheduler.order  # Heun: every second step() goes to a new level
    ends = np.array([calls[0][1:], *(to[1:] for to in targets[::stride])])
    with np.errstate(divide="ignore"):
        lam = np.log(ends[:, 0]) - np.log(ends[:, 1])
    repeated = bool(lam[-1] - lam[-2] < 1e-9)
    clock = [calls[0][0], *(call[0] for call in calls[1::stride])]
    clock.append(last_clock(family, scheduler, targets[-1], clock[-1], repeated))
    off_grid = any(to[1:] != call[1:] for to, call in zip(targets[:-1], calls[1:], strict=True))
    finite = np.isfinite(states).all(axis=(1, 2))
    facts = {
        **case,
        "prediction": scheduler.config.get("prediction_type", "flow_prediction"),
        "off_grid": off_grid,
        "repeated_node": repeated,
        "nan_from": None if finite.all() else int(np.argmin(finite)),
        "drawn_in_call": drawn_in,
    }
    return facts, {
        "states": states,
        "outputs": outputs,
        "noise": np.reshape(draws, (-1, BATCH, DIM)),
        "calls": np.array(calls),
        "targets": np.array(targets, dtype=float)[:, 1:],
        "nodes": np.column_stack([clock, ends])[: 0 if off_grid else None],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().out
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    versions = {m.__name__: m.__version__ for m in (diffusers, torch, np, scipy)}
    versions["python"] = platform.python_version()
    for short, (name, family, cases) in SCHEDULERS.items():
        with NoFloat32():
            runs = [run(name, family, case) for case in cases()]
        info = {"scheduler": name, "levels": family, "versions": versions, "mixture": MIXTURE}
        info["cases"], columns = [], {key: [] for key in runs[0][1]}
        for facts, arrays in runs:
            rows = {}
            for key, value in arrays.items():
                start = sum(map(len, columns[key]))
                rows[key] = [start, start + len(value)]
                columns[key].append(value)
            info["cases"].append({**facts, "rows": rows})
        path = folder / f"diffusers_{short}.npz"
        text = np.frombuffer(json.dumps(info).encode(), dtype=np.uint8)
        np.savez_compressed(path, info=text, **{k: np.concatenate(v) for k, v in columns.items()})
        print(f"{path.name}: {len(runs)} cases, {path.stat().st_size / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
