"""Golden runs of USF's code in float64: random tables of decisions, and where they end.

    git clone https://github.com/thu-nics/USF
    pip install torch numpy
    python tests/golden/make_usf.py USF

Writes usf.json: the repository and its commit, the starts `x` [4, 2], the bins of the statistics,
and cases with the decisions as that code takes them and the samples `end` [4, 2]. The network is
the exact noise prediction of three Gaussians, the process VP with beta from 0.1 to 20 on [1e-3, 1].
Of the code's text two things are changed: statistics stay on the CPU and in float64. Needed only to
make the file again.
"""

import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
MEANS = [[1.0, 0.2], [-0.9, 0.6], [0.1, -1.1]]
WEIGHTS, STD, DATA_MEAN = [0.3, 0.45, 0.25], 0.6, [0.3, -0.2]
ENDS, BINS, STEPS, CASES = (1.0, 1e-3), 40, 5, 12
RELAXATIONS = [None, "dpmsolver-2", "unipc-bh1", "0.5exp", "-0.5exp", "linear"]
NO_CORRECTOR = {"type": "no_corrector", "start_point": None, "taylor_order": None,
                "derivative_type": None}  # fmt: skip


def derivatives(order, rng):
    """Of one predictor: the first sometimes from fewer evaluations, and scaled."""
    found = []
    for k in range(order - 1):
        fewest = rng.randint(1, order - 2) if k == 0 and order > 2 else order - 1
        points = list(range(-(fewest if rng.random() < 0.5 else order - 1) - 1, -1))
        entry = {"estimate": f"Difference_{len(points)}", "active_points": points,
                 "relaxation": rng.choice(RELAXATIONS) if k == 0 else None}  # fmt: skip
        if entry["relaxation"] == "linear":
            entry["relaxation_coefficient"] = round(rng.gauss(0.0, 0.2), 3)
        found.append(entry)
    return found


def corrector(order, predictor, rng):
    """UniPC's: one term more, the new evaluation in every system."""
    found = []
    for entry in predictor:
        points = [age - 1 for age in entry["active_points"]] + [-1]
        found.append({"estimate": f"Difference_{len(points)}", "active_points": points,
                      "relaxation": None})  # fmt: skip
    found.append(copy.deepcopy(found[-1]) if found else {
        "estimate": "Difference_1", "active_points": [-1], "relaxation": rng.choice(RELAXATIONS[:5])
    })  # fmt: skip
    return {"type": "pseudo", "start_point": -2, "taylor_order": order + 1,
            "derivative_type": found}  # fmt: skip


def decisions(case, half_log_snr, inverse, rng):
    first, last = (half_log_snr(t) for t in ENDS)
    bins = sorted(rng.sample(range(1, BINS), STEPS - 1))
    inner = [inverse(first + (last - first) * b / BINS) for b in bins]
    orders = [min(rng.choice([1, 2, 3, 4]), i + 1) for i in range(STEPS)]
    kinds = ["noise_prediction", "data_prediction", "dpmsolver_v3_prediction"]
    found = [derivatives(order, rng) for order in orders]
    fixes = [
        corrector(order, entry, rng) if rng.random() < 0.5 and i < STEPS - 1 else NO_CORRECTOR
        for i, (order, entry) in enumerate(zip(orders, found))
    ]
    return {
        "timesteps": [ENDS[0], *inner, ENDS[1]], "orders": orders,
        "prediction_types": [rng.choice(kinds[: 3 if case % 2 else 2]) for _ in orders],
        "start_points": [-1] * STEPS, "derivative_types": found, "corrector_types": fixes,
        "afs": rng.choice(["no_afs", "average_x0"]),
    }  # fmt: skip


def main(checkout):
    import torch

    torch.set_default_dtype(torch.float64)
    text = (Path(checkout) / "codebases/edm/uni_sampler/uni_sampler.py").read_text()
    code = types.ModuleType("uni_sampler")
    text = text.replace(".cuda()", "").replace("np.float32", "np.float64")
    exec(compile(text, "uni_sampler.py", "exec"), code.__dict__)
    schedule = code.NoiseScheduleVP("linear", continuous_beta_0=0.1, continuous_beta_1=20.0)
    means, weights = torch.tensor(MEANS), torch.tensor(WEIGHTS)

    def noise(x, t):
        alpha, sigma = schedule.marginal_alpha(t[:1]), schedule.marginal_std(t[:1])
        variance = (alpha * STD) ** 2 + sigma**2
        gap = x.reshape(len(x), 1, -1) - alpha * means
        share = torch.softmax(torch.log(weights) - 0.5 * (gap**2).sum(-1) / variance, 1)
        return (sigma * (share[..., None] * gap).sum(1) / variance).reshape(x.shape)

    half_log_snr = lambda t: float(schedule.marginal_lambda(torch.tensor([t])))  # noqa: E731
    inverse = lambda lam: float(schedule.inverse_lambda(torch.tensor([lam])))  # noqa: E731
    rng, cases = random.Random(0), []
    x = np.random.default_rng(0).normal(size=(4, 2))
    wave = np.linspace(0.0, 5.0, BINS + 1)[:, None] + np.arange(2)
    with tempfile.TemporaryDirectory() as folder:
        wave = wave[..., None, None]
        np.savez(os.path.join(folder, "l.npz"), l=0.5 + 0.4 * np.sin(wave))
        np.savez(os.path.join(folder, "sb.npz"), s=0.5 * np.cos(wave), b=np.sin(2.0 * wave))
        average = os.path.join(folder, "average_x0.pth")
        torch.save(torch.tensor(DATA_MEAN).reshape(1, 2, 1, 1).repeat(4, 1, 1, 1), average)
        sampler = code.uni_sampler(
            noise, schedule, statistics_dir=folder, dpmsolver_v3_t_start=ENDS[0],
            dpmsolver_v3_t_end=ENDS[1], average_x0_dir=average,
        )  # fmt: skip
        for case in range(CASES):
            table = decisions(case, half_log_snr, inverse, rng)
            given = {**copy.deepcopy(table), "timesteps": torch.tensor(table["timesteps"])}
            end = sampler.sample(torch.tensor(x).reshape(4, 2, 1, 1), given, steps=STEPS)
            cases.append({"decisions": table, "end": end.reshape(4, 2).tolist()})
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True)
    info = {"repository": "https://github.com/thu-nics/USF", "commit": commit.strip(),
            "bins": BINS, "x": x.tolist(), "cases": cases}  # fmt: skip
    (HERE / "usf.json").write_text(json.dumps(info) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
