"""Error and Frechet distance against evaluations, on the trained digits network.

    jaxdiff train --config configs/digits.py --workdir runs/digits
    python benchmarks/digits_nfe.py runs/digits    # 15 minutes; results/digits_nfe.{json,png}

RMS: distance, per pixel, from where the network's own probability flow ends (1,000 steps of
DPM-Solver++(2M)), median over samples, guidance 1. Some peers' samplers of benchmarks/quality.py and
some of ours are chosen from on 32 starts and scored on 32 fresh ones. Frechet distance: digit-classifier
features of 2,000 samples to all 1,797 real digits.
"""

import argparse
import itertools

import machine
import matplotlib.pyplot as plt
import numpy as np
from quality import MANY, PEERS, evaluations_of, peers
from tqdm import tqdm

import jaxdiff as jd
from jaxdiff.experiment import make_tableau
from jaxdiff.generation import balanced_labels, generate
from jaxdiff.training.run import read_experiment, restore

NFE = (4, 5, 6, 8, 10, 12, 15, 20, 30, 50)
CHOOSE, SCORE, COUNT = 32, 32, 2000
FIXED = ("ddim", "dpm_solver_pp_2m", "unipc_2", "heun")
GRIDS = {
    "half-log-SNR": ("half_log_snr", {}), "quadratic": ("quadratic", {}),
    "karras 7": ("karras", {"rho": 7.0}), "logistic 0.75": ("logistic", {"exponent": 0.75}),
}  # fmt: skip
THEIRS = (
    *(f"diff-sampler ipndm {k}" for k in (3, 4)), *(f"diff-sampler ipndm_v {k}" for k in (2, 3, 4)),
    *(f"DEIS tAB{k}" for k in (1, 2, 3)), "DEIS rhoAB3", "DPM-Solver 2M", "DPM-Solver 3M",
    "DPM-Solver++ 2M", "DPM-Solver++ 3M", *(f"UniPC {k} {b} x0" for k in (2, 3) for b in ("bh1", "bh2")),
    "UniPC 3 vary_coeff_published x0", "EDM Heun", "k-diffusion DPM2", "DPM-Solver singlestep 2 x0",
    "DPM-Solver singlestep 3 x0", "PNDM", *(f"GHVB {k} {b}" for k in (3, 4) for b in (0.7, 0.8)),
)  # fmt: skip


def theirs():
    found = peers()
    return {label: found[label] for label in THEIRS}


def pool():
    """{label: (name, options)}: the peers' methods, ours of one builder, and the fixed ones."""
    found = {label: (name, options) for label, (_, name, options) in theirs().items()}
    found |= {name: (name, {}) for name in FIXED}
    for integrand, variable, order, corrector, blend in itertools.product(
        ("flow", "x0", "v"), ("lambda", "t"), (2, 3), (0, 4), (0.5, 1.0)
    ):
        label = f"adams {integrand} in {variable}, {order} x {blend:g} + {corrector}"
        found[label] = "exponential_adams", {
            "integrand": integrand, "variable": variable, "order": order, "corrector": corrector,
            "blend": blend,
        }  # fmt: skip
    return found


def choices(process, nfe):
    """{(label, grid): axes} of every choice with exactly `nfe` evaluations; fewer for many."""
    found = {}
    for (label, (name, options)), (grid, (spacing, grid_options)) in itertools.product(
        pool().items(), GRIDS.items()
    ):
        if nfe > MANY and ("karras" in grid or "logistic" in grid or options.get("blend") == 0.5):
            continue
        each, extra = evaluations_of(name, options)
        steps, rest = divmod(nfe - extra, each)
        if rest or steps < 1:
            continue
        axes = {
            "solver": name, "options": options, "steps": steps, "grid": spacing,
            "grid_options": grid_options,
        }  # fmt: skip
        if make_tableau(process, name, steps, spacing, options, grid_options).nfe == nfe:
            found[label, grid] = axes
    return found


def median_of(some):
    def metric(samples, facts):
        gap = np.asarray(samples[some], np.float64) - facts["reference"][some]
        return np.median(np.sqrt(np.mean(gap.reshape(len(gap), -1) ** 2, 1)))

    return metric


def rms(experiment, variables, workdir):
    """{nfe: {who: {"choice", "rms", "axes"}}}."""
    process, count = experiment.process, CHOOSE + SCORE
    published, cells = set(theirs()), {}
    kinds = {
        PEERS: lambda label, grid: label in published and "logistic" not in grid,
        "peers' methods, our grids": lambda label, grid: label in published,
        "ours": lambda label, grid: True,
        **{name: lambda label, grid, name=name: (label, grid) == (name, "half-log-SNR")
           for name in FIXED},
    }  # fmt: skip
    for nfe in NFE:
        found = choices(process, nfe)
        named = {}  # a method may have two labels
        for label, axes in found.items():
            named.setdefault(str(axes), (label, axes))
        table = jd.ablation.run(
            jd.ablation.Sweep(tuple(axes for _, axes in named.values())),
            experiment.denoiser(variables), process, experiment.shape, count=count,
            cond=balanced_labels(experiment, count), reference={"steps": 1000},
            metrics={"first": median_of(slice(CHOOSE)), "rest": median_of(slice(CHOOSE, None))},
            workdir=workdir,
        )  # fmt: skip
        rows = {str(axes): row for (_, axes), row in zip(named.values(), table.rows)}
        cells[nfe] = {}
        for who, keep in kinds.items():
            kept = {label: rows[str(axes)] for label, axes in found.items() if keep(*label)}
            if not kept:  # Heun and an odd number of evaluations
                continue
            label = min(kept, key=lambda k: np.nan_to_num(kept[k]["first"], nan=np.inf))
            cells[nfe][who] = {
                "choice": "; ".join(label), "rms": kept[label]["rest"], "axes": found[label]
            }
        print(nfe, {who: (c["choice"], round(c["rms"], 5)) for who, c in cells[nfe].items()})
    return cells


def main(workdir, folder):
    experiment = read_experiment(workdir)
    variables = restore(experiment, workdir).ema
    classifier = jd.metrics.digit_classifier()
    real = classifier.features(jd.data.digits("all").x)
    labels = balanced_labels(experiment, COUNT)

    def frechet(axes):
        table = make_tableau(experiment.process, **axes)
        x = np.clip(generate(experiment, variables, table, labels, COUNT, 0, 1.0, 500), -1, 1)
        return round(jd.metrics.frechet_distance(classifier.features(x), real), 4)

    cells = rms(experiment, variables, folder)
    for cell in tqdm(cells.values()):
        for entry in cell.values():
            entry["frechet distance"] = frechet(entry.pop("axes"))
    few = [np.log(c["ours"]["rms"] / c[PEERS]["rms"]) for n, c in cells.items() if 5 <= n <= 10]
    fine = {"solver": "dpm_solver_pp_2m", "steps": 1000, "grid": "half_log_snr"}
    return {
        "frechet distance of 2,000 fresh real digits": round(
            jd.metrics.real_floor(classifier, COUNT, len(real)), 4
        ),
        "frechet distance, 1,000 steps": frechet(fine),
        "rms of ours over peers', geometric mean over 5 to 10 evaluations": float(
            np.exp(np.mean(few))
        ),
        "evaluations": cells,
    }


def draw(figures, path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    cells = figures["evaluations"]
    for axis, what in zip(axes, ("rms", "frechet distance")):
        for who, style in zip(
            (PEERS, "peers' methods, our grids", "ours", *FIXED),
            ("s--", "x-.", "o-", ".:", ".:", ".:", ".:"),
        ):
            points = [(nfe, cell[who][what]) for nfe, cell in cells.items() if who in cell]
            axis.loglog(*zip(*points), style, ms=4, label=who)
        axis.set(xlabel="evaluations (NFE)", ylabel=what, xticks=NFE, xticklabels=NFE)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].axhline(figures["frechet distance, 1,000 steps"], color="k", lw=0.8, label="1,000 steps")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", help="the folder of a digits run")
    parser.add_argument("--sweep", help="a folder that keeps what is computed, to go on there")
    given = parser.parse_args()
    figures = main(given.workdir, given.sweep)
    draw(figures, machine.RESULTS / "digits_nfe.png")
    machine.write("digits_nfe", figures)
