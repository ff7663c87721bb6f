"""Golden runs of the authors' codes of methods that adapt to the network or to the state, in float64.

    git clone https://github.com/wl-zhao/DC-Solver             # and so on
    pip install torch diffusers numpy scipy tqdm
    python tests/golden/make_calibrated.py dc_solver=DC-Solver evodiff=EVODiff time_shift=TS-DPM \\
        dpm_solver_v3=DPM-Solver-v3

Each argument is a name of `REFERENCES` and a checkout, and writes calibrated_<name>.npz: `info`, a
JSON text with the repository, its commit, the versions, the mixture of diffusers_*.npz (the network is
its E[eps | x] or E[x0 | x]) and `cases`; and for case i the arrays "i/<name>" that its reference yields.
Needed only to make the files again: the tests read them with NumPy.
"""

import contextlib
import importlib
import io
import json
import platform
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np
from make_official import HERE, MIXTURE, double_torch
from official_sigma import BATCH, DIM, load

SHAPE = (BATCH, 1, 2, 2)
START = np.random.default_rng(20240905).standard_normal((BATCH, DIM))


def network(prediction, levels, seen):
    """The mixture's denoiser; the inputs and times of its calls are appended to `seen`."""
    import torch

    def evaluate(x, t, *args, **kwargs):
        seen.append((x.detach().numpy().reshape(BATCH, DIM).copy(), t.detach().numpy().reshape(-1)))
        alpha, sigma = (a.detach().numpy().reshape(-1, 1) for a in levels(t))
        x0, eps = posterior_of(x.reshape(BATCH, DIM), torch.from_numpy(alpha + 0 * sigma),
                               torch.from_numpy(sigma + 0 * alpha))  # fmt: skip
        return {"x0": x0, "eps": eps}[prediction].reshape(x.shape)

    return evaluate


def posterior_of(x, alpha, sigma):
    """`make_official.posterior` in torch, for levels of every sample, with gradients."""
    import torch

    weights, means, scales = (torch.tensor(MIXTURE[k]) for k in ("weights", "means", "scales"))
    alpha, sigma = alpha[..., None], sigma[..., None]
    centred = x[:, None] - alpha * means
    var = (alpha * scales) ** 2 + sigma**2
    logits = torch.log(weights) - 0.5 * torch.sum(centred**2 / var + torch.log(var), -1)
    share = torch.softmax(logits, 1)[..., None]
    x0 = torch.sum(share * (means + alpha * scales**2 / var * centred), 1)
    return x0, torch.sum(share * sigma / var * centred, 1)


def dc_solver(root):
    """Ratios given, ratios searched, and the released cascade polynomial."""
    import torch

    folder = root / "stable-diffusion/ldm/models/diffusion/dc_solver"
    code = load(folder / "dc_solver.py", "official_dc_solver")
    with mock.patch.object(torch, "float32", torch.float64):
        schedule = code.NoiseScheduleVP("linear", continuous_beta_0=0.1, continuous_beta_1=20.0)

    def levels(t):
        return schedule.marginal_alpha(t), schedule.marginal_std(t)

    def solver(variant, dc_order, predict_x0, seen):
        return code.DCSolver(network("eps", levels, seen), schedule, predict_x0=predict_x0,
                             variant=variant, dc_order=dc_order)  # fmt: skip

    rng = np.random.default_rng(3)
    start = torch.from_numpy(START.reshape(SHAPE))
    for variant, order, dc_order, predict_x0, skip, steps in (
        ("bh1", 3, 2, True, "time_uniform", 6),
        ("bh2", 3, 2, True, "logSNR", 5),
        ("bh2", 3, 1, True, "time_uniform", 7),
        ("bh1", 2, 1, True, "time_uniform", 5),
        ("bh2", 3, 2, False, "logSNR", 6),
    ):
        options = {"variant": variant, "order": order, "predict_x0": predict_x0,
                   "skip_type": skip, "steps": steps}  # fmt: skip
        common = dict(steps=steps, t_end=1e-3, order=order, skip_type=skip, method="multistep")
        seen = []
        made = solver(variant, dc_order, predict_x0, seen)
        times = made.get_time_steps(skip, 1.0, 1e-3, steps, "cpu")
        nodes = np.stack([times.numpy(), *(a.numpy() for a in levels(times))], -1)
        ratios = np.append(np.ones(dc_order), 1.0 + 0.4 * rng.standard_normal(steps - dc_order))
        result = made.sample(start, dc_ratios=ratios.tolist(), **common)
        inputs = np.stack([x for x, _ in seen])
        yield {"kind": "ratios", **options, "dc_order": dc_order}, {
            "start": START, "nodes": nodes, "ratios": ratios, "inputs": inputs,
            "result": result.numpy().reshape(BATCH, DIM),
        }  # fmt: skip
        # The search, towards the trajectory of DPM-Solver-1 with 40 steps an interval.
        made = solver(variant, dc_order, predict_x0, [])
        exact, x = [start], start
        for a, b in zip(times[:-1], times[1:]):
            fine = torch.linspace(float(a), float(b), 41)
            for s, t in zip(fine[:-1], fine[1:]):
                vectors = s.expand(BATCH), t.expand(BATCH)
                eps = made.model(x, vectors[0])
                (a0, s0), (a1, s1) = levels(vectors[0]), levels(vectors[1])
                wide = lambda v: v.reshape(-1, 1, 1, 1)  # noqa: E731
                x = wide(a1 / a0) * x + wide(s1 - a1 / a0 * s0) * eps
            exact.append(x)
        made.ref_ts = times.numpy() + 1e-9
        made.ref_xs = exact
        found = made.search_dc(start, **common)
        yield {"kind": "search", **options, "dc_order": dc_order}, {
            "start": START, "nodes": nodes, "ratios": np.array(found),
            "reference": torch.stack(exact).numpy().reshape(-1, BATCH, DIM),
        }  # fmt: skip
    path = root / "diffusers/src/diffusers/schedulers/scheduling_dcsolver_multistep.py"
    diffusers = load(path, "diffusers.schedulers.scheduling_dcsolver_multistep")
    scheduler = diffusers.DCSolverMultistepScheduler
    coefficients = root / "diffusers/dc_solver/cpr_coeffs_path/sd2.1.npy"
    for scale, steps in ((7.5, 5), (6.0, 6), (3.5, 10), (9.0, 20)):
        found = scheduler.cascade_polynomial_regression(None, scale, steps, coefficients)
        yield {"kind": "cascade", "scale": scale, "steps": steps}, {
            "ratios": np.array(found), "coefficients": np.load(coefficients)
        }  # fmt: skip


def evodiff(root):
    """The sampler on EDM's levels; with one channel of 4 pixels, and with 4 channels of one."""
    import torch

    folder = root / "code_demo/edm_cifar10"
    sys.path.insert(0, str(folder))
    sys.modules["samplers"] = types.ModuleType("samplers")
    sys.modules["samplers"].__path__ = [str(folder / "samplers")]
    code = importlib.import_module("samplers.evodiff")
    schedule = importlib.import_module("samplers.utils").NoiseScheduleEDM()

    def levels(t):
        return schedule.marginal_alpha(t), schedule.marginal_std(t)

    for steps, skip, first, last, shape in (
        (6, "edm", 80.0, 0.002, (BATCH, 1, 2, 2)),
        (10, "edm", 80.0, 0.002, (BATCH, DIM, 1, 1)),
        (10, "logSNR", 14.6, 0.03, (BATCH, 1, 2, 2)),
        (24, "logSNR", 14.6, 0.03, (BATCH, 1, 2, 2)),
        (3, "time_uniform", 3.0, 0.5, (BATCH, 1, 2, 2)),
        (5, "time_quadratic", 10.0, 0.02, (BATCH, DIM, 1, 1)),
    ):
        seen = []
        start = torch.from_numpy(first * START.reshape(shape))
        solver = code.EVODiff_edm(schedule)
        common = dict(steps=steps, t_start=first, t_end=last, order=2, skip_type=skip)
        with mock.patch.object(torch, "Tensor", DoubleTensor(torch.Tensor)):
            result = solver.sample(network("eps", levels, seen), start, **common)
            times = solver.get_time_steps(skip, first, last, steps, "cpu").numpy()
        yield {"steps": steps, "skip_type": skip, "channels": shape[1]}, {
            "start": first * START, "nodes": np.stack([times, np.ones(steps + 1), times], -1),
            "inputs": np.stack([x for x, _ in seen]), "result": result.numpy().reshape(BATCH, DIM),
        }  # fmt: skip


def dpm_solver_v3(root):
    """On statistics of no network: curves of the bin's index, one a dimension."""
    import torch

    code = load(root / "dpm_solver_v3.py", "official_dpm_solver_v3")
    schedules = {"linear": code.NoiseScheduleVP("linear"), "edm": code.NoiseScheduleEDM()}
    spans = {"linear": (1.0, 1e-3), "edm": (80.0, 0.002)}
    at, phase = np.linspace(0.0, 1.0, 121)[:, None], np.arange(DIM)
    shared = {
        "l": 1.0 / (1.0 + np.exp(12.0 * (at - 0.4 - 0.05 * phase))),
        "s": -0.6 * at + 0.4 * np.sin(5.0 * at + phase),
        "b": 0.5 * np.cos(4.0 * at + 2.0 * phase),
    }
    lams = {}
    for name, schedule in schedules.items():
        first, last = (schedule.marginal_lambda(torch.tensor(t)).item() for t in spans[name])
        lams[name] = np.linspace(first, last, 121)
    yield {"kind": "statistics"}, {**shared, **lams}
    plain = {"p_pseudo": False, "use_corrector": False, "c_pseudo": False,
             "lower_order_final": True, "half": False, "degenerated": False}  # fmt: skip
    corrected, pseudo = {"use_corrector": True}, {"use_corrector": True, "c_pseudo": True}
    runs = [("linear", "logSNR", 7, order, {}) for order in (1, 2, 3)]
    runs += [("linear", "logSNR", 7, order, corrected) for order in (1, 2, 3)]
    runs += [("linear", "logSNR", 7, order, pseudo) for order in (1, 2, 3)]
    runs += [("linear", "time_uniform", 6, 3, {**corrected, "lower_order_final": False})]
    runs += [("linear", "time_uniform", 10, 2, {**pseudo, "half": True})]
    runs += [("linear", "time_quadratic", 5, 3, {**corrected, "p_pseudo": True})]
    runs += [("linear", "logSNR", 5, 3, {**pseudo, "p_pseudo": True, "lower_order_final": False})]
    runs += [("linear", "logSNR", 6, 3, {**corrected, "degenerated": True})]
    runs += [("edm", "logSNR", 8, 3, corrected), ("edm", "edm", 8, 3, {})]
    for name, skip, steps, order, extra in runs:
        schedule, options, seen = schedules[name], {**plain, **extra}, []

        def levels(t, schedule=schedule):
            return schedule.marginal_alpha(t), schedule.marginal_std(t)

        start = torch.from_numpy(spans[name][0] * START.reshape(BATCH, DIM, 1, 1))
        own = dict(options)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            wide = {k: v[..., None, None] for k, v in shared.items()}
            np.savez(Path(folder) / "l.npz", l=wide["l"])
            np.savez(Path(folder) / "sb.npz", s=wide["s"], b=wide["b"])
            stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda x: x))
            stack.enter_context(mock.patch.object(torch, "FloatTensor", torch.tensor))
            stack.enter_context(mock.patch.object(torch, "Tensor", DoubleTensor(torch.Tensor)))
            solver = code.DPM_Solver_v3(
                folder, schedule, steps, *spans[name], skip, own.pop("degenerated"), "cpu"
            )
            net = network("eps", levels, seen)
            result = solver.sample(start, net, order, **own)
        times = solver.timesteps
        nodes = np.stack([times.numpy(), *(a.numpy() for a in levels(times))], -1)
        facts = {"kind": "run", "schedule": name, "skip_type": skip, "steps": steps, "order": order}
        yield {**facts, **options}, {
            "start": start.numpy().reshape(BATCH, DIM), "nodes": nodes,
            "inputs": np.stack([x for x, _ in seen]), "result": result.numpy().reshape(BATCH, DIM),
        }  # fmt: skip


class DoubleTensor:
    """torch.Tensor whose call makes float64 of NumPy's, as tensors of levels must be here."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, values):
        import torch

        return torch.tensor(values)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Model:
    """A network with the method that PNMSolver calls."""

    def __init__(self, fn):
        self.fn = fn

    def to(self, device):
        return self

    def __call__(self, x, t):
        return self.fn(x, t)


def time_shift(root):
    """The released PNMSolver, which shifts the target of a transfer."""
    import torch

    code = load(root / "sampler/pnm_solver.py", "official_pnm_solver", empty=("tqdm",))
    code.tqdm = lambda values, **kwargs: values
    code.PNMSolver.inverse_img_transform = lambda self, x: x
    rng = np.random.default_rng(11)
    bars = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000), 0)

    def levels(t):
        return bars[t.long()].sqrt(), (1 - bars[t.long()]).sqrt()

    for method, steps, window, cutoff, eta in (
        ("euler", 10, 40, 100, 0), ("euler", 20, 60, 300, 0), ("s_pndm", 10, 40, 100, 0),
        ("ddpm", 10, 40, 100, 1.0), ("ddpm", 8, 100, 0, 0.5), ("euler", 10, 0, 100, 0),
    ):  # fmt: skip
        seen, noise = [], []
        solver = code.PNMSolver(
            Model(network("eps", levels, seen)), 1000, 1e-4, 0.02, "linear", "cpu",
            shift_time_step=True, window_size=window, cut_off_value=cutoff, eta=eta,
        )  # fmt: skip
        assert torch.allclose(solver.alphas_cump, bars, rtol=1e-12)
        # Data of unit variance have no level to find; these starts are of several variances.
        start = torch.from_numpy((START * np.array([[0.6], [0.9], [1.2]])).reshape(SHAPE))

        def normal(x):
            noise.append(rng.standard_normal((BATCH, DIM)))  # noqa: B023
            return torch.from_numpy(noise[-1].reshape(SHAPE))  # noqa: B023

        sequence = list(range(1, 1000, 1000 // steps))
        with mock.patch.object(torch, "randn_like", normal), torch.no_grad():
            result = solver.sample(x_T=start, batch_size=BATCH, method=method, time_seq=sequence)
        times = np.array([*reversed(sequence), 0])
        nodes = np.stack([times, *(a.numpy() for a in levels(torch.from_numpy(times)))], -1)
        yield {"method": method, "window": window, "cutoff": cutoff, "eta": eta}, {
            "start": start.numpy().reshape(BATCH, DIM), "nodes": nodes,
            "inputs": np.stack([x for x, _ in seen]), "noise": np.reshape(noise, (-1, BATCH, DIM)),
            "result": result.numpy().reshape(BATCH, DIM),
        }  # fmt: skip


REFERENCES = {
    "dc_solver": ("wl-zhao/DC-Solver", dc_solver),
    "evodiff": ("ShiguiLi/EVODiff", evodiff),
    "time_shift": ("Mingxiao-Li/TS-DPM", time_shift),
    "dpm_solver_v3": ("thu-ml/DPM-Solver-v3", dpm_solver_v3),
}


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        repository, cases = REFERENCES[name]
        git = ["git", "-C", path, "rev-parse", "HEAD"]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
        versions = {p: importlib.import_module(p).__version__ for p in ("numpy", "torch")}
        info = {"repository": repository, "commit": commit, "mixture": MIXTURE, "cases": [],
                "versions": {**versions, "python": platform.python_version()}}  # fmt: skip
        arrays = {}
        with double_torch(), contextlib.redirect_stdout(io.StringIO()):
            for i, (facts, found) in enumerate(cases(Path(path).resolve())):
                info["cases"].append(facts)
                for key, value in found.items():
                    if not np.isfinite(value).all():
                        raise RuntimeError(f"{facts}: {key} is not finite")
                    arrays[f"{i}/{key}"] = value
        file = HERE / f"calibrated_{name}.npz"
        text = np.frombuffer(json.dumps(info).encode(), dtype=np.uint8)
        np.savez_compressed(file, info=text, **arrays)
        print(f"{file.name}: {len(info['cases'])} cases, {file.stat().st_size / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
