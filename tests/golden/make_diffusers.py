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

Two schedulers draw from torchsde's Brownian tree. `BrownianPath`, as exact, takes its place, so
that the draws are recorded; torchsde is not needed.
"""

import argparse
import importlib
import json
import platform
import sys
import types
from pathlib import Path

import diffusers
import diffusers_cases
import diffusers_more
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
SCHEDULERS = diffusers_cases.SCHEDULERS | diffusers_more.SCHEDULERS

# Classes that the package does not offer at the top, or not without torchsde.
PLACES = {
    "CosineDPMSolverMultistepScheduler": "scheduling_cosine_dpmsolver_multistep",
    "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
    "FlowMatchLCMScheduler": "scheduling_flow_match_lcm",
    "LTXEulerAncestralRFScheduler": "scheduling_ltx_euler_ancestral_rf",
    "ScoreSdeVpScheduler": "deprecated.scheduling_sde_vp",
}
# What the network predicts where that is no option.
PREDICTIONS = {
    "CMStochasticIterativeScheduler": "consistency",
    "IPNDMScheduler": "v_prediction",
    "ScoreSdeVeScheduler": "score",
    "ScoreSdeVpScheduler": "epsilon",
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


class BrownianPath:
    """Increments of a Brownian path in sigma, divided by the root of their length.

    Two intervals that begin at one sigma share the first, as in torchsde's tree.
    """

    def __init__(self, draw):
        self.draw, self.begin = draw, None

    def __call__(self, begin, end):
        length, draw = abs(end - begin), self.draw()
        if self.begin is None or begin != self.begin:
            self.begin, self.length, self.increment = begin, length, length**0.5 * draw
        else:
            whole = self.increment + (length - self.length) ** 0.5 * draw
            self.length, self.increment = length, whole
        return self.increment / length**0.5


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


def network(x, alpha, sigma, family, config, kind):
    """What a perfect network of the case's prediction type returns at (x, alpha, sigma)."""
    x0, eps = mixture_posterior(x, alpha, sigma)
    if family == "consistency":
        data = config["sigma_data"]
        skip = data**2 / ((sigma - config["sigma_min"]) ** 2 + data**2)
        return (x0 - skip * x) * np.hypot(sigma, data) / ((sigma - config["sigma_min"]) * data)
    if family == "edm":
        data, total = config["sigma_data"], np.sqrt(sigma**2 + config["sigma_data"] ** 2)
        sign = -1.0 if kind == "v_prediction" else 1.0
        return sign * (x0 - (data / total) ** 2 * x) * total / (sigma * data)
    # v belongs to the variance-preserving state x / sqrt(alpha^2 + sigma^2).
    scale = np.hypot(alpha, sigma)
    outputs = {"epsilon": eps, "sample": x0, "flow_prediction": eps - x0, "score": -eps / sigma,
               "v_prediction": (alpha * eps - sigma * x0) / scale}  # fmt: skip
    return outputs[kind]


def discrete(scheduler, t, final=None):
    """(alpha, sigma) of a timestep, or of the level `final` where it is negative."""
    abar = scheduler.alphas_cumprod[t] if t >= 0 else final
    return float(abar.sqrt()), float((1 - abar).sqrt())


def to_next(scheduler, i, t):
    """LCM, TCD, UnCLIP: from one timestep of the list to the next."""
    last = i + 1 == len(scheduler.timesteps)
    to = -1 if last else int(scheduler.timesteps[i + 1])
    if last and hasattr(scheduler, "final_alpha_cumprod") and "TCD" in type(scheduler).__name__:
        to = 0
    return discrete(scheduler, int(t)), discrete(scheduler, to, torch.tensor(1.0)), to


def pndm(scheduler, i, t):
    """Where PNDM's transfer ends, whichever of its two lists the call is of."""
    t, stride = int(t), TRAIN // scheduler.num_inference_steps
    if i < len(scheduler.prk_timesteps):
        to = t - (0 if i % 2 else stride // 2)
    else:
        to = t if i == 1 else t - stride
    there = discrete(scheduler, to, scheduler.final_alpha_cumprod)
    return discrete(scheduler, t), there, to if to >= 0 else (-1 if there[1] == 0 else 0)


def ddim_inverse(scheduler, i, t):
    """The network is asked at the level that the step goes to."""
    there = discrete(scheduler, int(t))
    return there, there, int(t)


def two_stages(scheduler, i, t):
    """KDPM2 and DPMSolverSDE: a call at the node, and one between it and the next."""

    def sigma(j):
        if j >= len(scheduler.timesteps):
            return float(scheduler.sigmas[-1])
        if j % 2 == 0:
            return float(scheduler.sigmas[j])
        if not hasattr(scheduler, "sigmas_interpol"):  # halfway in log sigma
            return float((scheduler.sigmas[j - 1] * scheduler.sigmas[j + 1]).sqrt())
        ancestral = hasattr(scheduler, "sigmas_down")
        return float(scheduler.sigmas_interpol[j - 1 if ancestral else j])

    return (1.0, sigma(i)), (1.0, sigma(i + 1)), None


def ipndm(scheduler, i, t):
    pair = [(float(scheduler.alphas[k]), float(scheduler.betas[k])) for k in (i, i + 1)]
    return *pair, None


def sde_ve(scheduler, i, t):
    """The levels of `step_pred`; the pipeline shows the network `sigmas[i]`, a rounded one."""
    k = int(t * (len(scheduler.timesteps) - 1))
    levels = [0.0, *scheduler.discrete_sigmas.tolist()]
    return (1.0, levels[k + 1]), (1.0, levels[k]), None


def sde_vp(scheduler, i, t):
    def level(t):
        c = scheduler.config
        log = -0.25 * t**2 * (c.beta_max - c.beta_min) - 0.5 * t * c.beta_min
        return float(np.exp(log)), float(np.sqrt(1.0 - np.exp(2.0 * log)))

    last = i + 1 == len(scheduler.timesteps)
    to = 0.0 if last else float(scheduler.timesteps[i + 1])
    return level(float(t)), level(to), to


LEVELS = {
    "LCMScheduler": to_next, "TCDScheduler": to_next, "UnCLIPScheduler": to_next,
    "PNDMScheduler": pndm, "IPNDMScheduler": ipndm, "DDIMInverseScheduler": ddim_inverse,
    "KDPM2DiscreteScheduler": two_stages, "KDPM2AncestralDiscreteScheduler": two_stages,
    "DPMSolverSDEScheduler": two_stages, "ScoreSdeVeScheduler": sde_ve,
    "ScoreSdeVpScheduler": sde_vp,
}  # fmt: skip


def levels(scheduler, family, i, t):
    """((alpha, sigma) of call i, (alpha, sigma) that its step goes to, the latter's t or None)."""
    special = LEVELS.get(type(scheduler).__name__)
    if special:
        return special(scheduler, i, t)
    t = int(t)
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
    if hasattr(scheduler, "noisiest_timestep"):  # the inverse of DPM-Solver
        return float(scheduler.noisiest_timestep)
    if repeated or family == "edm":  # EDM's clock, log(sigma) / 4, has no value at sigma = 0
        return previous
    if family == "flow" or scheduler.config.get("use_flow_sigmas"):
        return 0.0
    return -1.0 if to[2] == 0 else 0.0


def advance(scheduler, out, t, x, i, options):
    """The state after call i."""
    if hasattr(scheduler, "step_pred"):  # score_sde's: the corrector's step is not a table
        last = i + 1 == len(scheduler.timesteps)  # the pipelines return the last step's mean
        if "Vp" in type(scheduler).__name__:
            return scheduler.step_pred(out, x, t)[last]
        done = scheduler.step_pred(out, t, x)
        return done.prev_sample_mean if last else done.prev_sample
    if type(scheduler).__name__ == "UnCLIPScheduler" and i + 1 < len(scheduler.timesteps):
        options = {**options, "prev_timestep": scheduler.timesteps[i + 1]}
    return scheduler.step(out, t, x, **options).prev_sample


def walk(scheduler, family, case, calls, kind):
    """Run the scheduler, appending every call's (t, alpha, sigma) to `calls`.

    Returns (states, outputs, where each step goes: (t or None, alpha, sigma)).
    """
    # One more axis: thresholding wants [batch, channels, ...].
    x = torch.from_numpy(START)[..., None] * getattr(scheduler, "init_noise_sigma", 1.0)
    if "Inverse" in type(scheduler).__name__:  # from data
        start = np.array(MIXTURE["means"][0]) + np.array(MIXTURE["scales"][0]) * START
        x = torch.from_numpy(start)[..., None]
    states, outputs, targets = [x], [], []
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        here, there, next_t = levels(scheduler, family, i, t)
        calls.append((float(t), *here))
        targets.append((next_t, *there))
        outputs.append(network(x[..., 0].numpy(), *here, family, scheduler.config, kind))
        out = torch.from_numpy(outputs[-1])[..., None]
        x = advance(scheduler, out, t, x, i, case["step"])
        if getattr(scheduler, "step_index", None) not in (None, i + 1):
            raise RuntimeError(f"{case}: at step {scheduler.step_index}, expected {i + 1}")
        states.append(x)
    return torch.stack(states)[..., 0].numpy(), np.stack(outputs), targets


def find(name):
    """A scheduler's class, its module seen wide."""
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    if name in PLACES:
        cls = getattr(importlib.import_module(f"diffusers.schedulers.{PLACES[name]}"), name)
    else:
        cls = getattr(diffusers, name)
    # One scheduler takes its levels from flow Euler's.
    for wide in (cls, diffusers.FlowMatchEulerDiscreteScheduler):
        module = sys.modules[wide.__module__]
        module.torch, module.np = Wide(torch), Wide(np)
    return cls


def grid_nodes(scheduler, calls, targets):
    """Positions in `calls` of the nodes, without the last."""
    if LEVELS.get(type(scheduler).__name__) is two_stages:
        return list(range(0, len(calls), 2))
    if LEVELS.get(type(scheduler).__name__) is pndm:  # midpoints are nodes too
        return [i for i, call in enumerate(calls) if call not in calls[:i]]
    # Heun: every second step() goes to a new level.
    return [0, *range(1, len(calls), getattr(scheduler, "order", 1))]


def run(name, family, case):
    """The recorded run of one case: (facts for the JSON, arrays)."""
    cls = find(name)
    rng, draws, drawn_in, calls = np.random.default_rng(7), [], [], []

    def randn_tensor(*args, **kwargs):
        draws.append(rng.standard_normal((BATCH, DIM)))
        drawn_in.append(len(calls) - 1)
        return torch.from_numpy(draws[-1])[..., None]

    sys.modules[cls.__module__].randn_tensor = randn_tensor
    config = dict(case["config"])
    if "tau_func" in config:  # SA-Solver's noise, here a number
        config["tau_func"] = lambda t: case["config"]["tau_func"]
    scheduler = cls(**config)
    scheduler.set_timesteps(case["steps"], **case["setup"])
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(case["steps"], case["config"].get("sigma_min"))
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = BrownianPath(randn_tensor)
    kind = scheduler.config.get("prediction_type", PREDICTIONS.get(name, "flow_prediction"))
    states, outputs, targets = walk(scheduler, family, case, calls, kind)

    nodes = grid_nodes(scheduler, calls, targets)
    ends = np.array([*(calls[i][1:] for i in nodes), targets[-1][1:]])
    with np.errstate(divide="ignore"):
        lam = np.log(ends[:, 0]) - np.log(ends[:, 1])
    repeated = bool(abs(lam[-1] - lam[-2]) < 1e-9)
    clock = [calls[i][0] for i in nodes]
    clock.append(last_clock(family, scheduler, targets[-1], clock[-1], repeated))
    off_grid = any(to[1:] != call[1:] for to, call in zip(targets[:-1], calls[1:], strict=True))
    finite = np.isfinite(states).all(axis=(1, 2))
    facts = {
        **case,
        "prediction": kind,
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
    parser.add_argument("--only", nargs="*", default=list(SCHEDULERS), choices=list(SCHEDULERS))
    args = parser.parse_args()
    folder = args.out
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    versions = {m.__name__: m.__version__ for m in (diffusers, torch, np, scipy)}
    versions["python"] = platform.python_version()
    for short in args.only:
        name, family, cases = SCHEDULERS[short]
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
