"""Searched, calibrated and learned solvers beside the best training-free one.

    python benchmarks/learned.py --run runs/digits    # an hour; results/learned.{json,png}

Probability flows of the mixtures of benchmarks/quality.py (2, 16 and 64 dimensions, VP's linear
schedule and EDM's), of a mixture under classifier-free guidance, and of the digits network (trained
by `jaxdiff train --config configs/digits.py --workdir runs/digits`). The error is the median over
fresh starts of |x - x*| / sqrt(size); guided problems are fitted at one scale and scored at others.

The held-out starts only choose, the fresh ones only score. Of those to fit to, GITS takes 128
(of their trajectories), DC-Solver 10 (and DDIM trajectories of 999 steps), DPM-Solver-v3 256 (its
own trajectories), AutoDiffusion and S^3 256 with their ends (these three 32 of the digits), the
learned ones all, 1,024 of a mixture and 64 of the digits, with their ends, and some ten times the
evaluations. AutoDiffusion's fitness is here
the distance to the ends, its paper's a distance of distributions. Of a method's variants the one
with the least median error on the held-out starts is taken.

The learned ones begin at `START`, which is scored too: an analytic first step for the mean and
spread of the ends, then the flow predictor-corrector of order 2. Their settings (rate, blend, number
of steps) were chosen on EDM in 16 dimensions with 5 evaluations and VP there with 6, on other
starts. The best training-free solver of a mixture was chosen on 64 starts among 13,000 to 19,000 for
results/quality.json; elsewhere the held-out starts choose it among those that won there, the best of
results/digits_nfe.json and seven others.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path

import jax
import machine
import matplotlib.pyplot as plt
import numpy as np
from problems import DIGITS, FITTED, GUIDED, problems
from quality import DIMS, PROCESSES, SPREAD, evaluations_of, grids, ours

import jaxdiff as jd

NFE = (4, 5, 6, 8, 10)
SCALES = (FITTED, 1.0, 1.5, 3.0, 5.0)
BEST, START = "best training-free", "learned, before learning"
LEARNED, SHAPED = "learned", "learned, every component its own"


# --- the methods: (problem, evaluations, scale) -> table ------------------------------------------

OTHERS = (
    "dpm_solver_pp_2m", "unipc_2", "unipc_3", "ipndm_3", "deis_tab3", "flow_pc_2", "flow_pc_3",
)  # fmt: skip


def moments(problem, scale):
    """The mean of the ends of the starts to fit to, and one standard deviation for all components."""
    ends = problem.data(problem.fit, scale)[1]
    return ends.mean(0), float(ends.std(0).mean())


@functools.cache
def chosen(cell):
    """The training-free choice of a cell of results/quality.json."""
    text = (machine.RESULTS / "quality.json").read_text()
    return json.loads(text)["cells"][cell]["ours"]["choice"].split("; ")


def training_free(kind, dim, nfe):
    label, grid, *analytic = chosen(f"{kind}; {dim}-D; {nfe} NFE")
    build, name, options = ours(nfe)[label]
    each, extra = evaluations_of(name, options)
    table = build(grids(kind, (nfe + len(analytic) - extra) // each, None, False)[grid])
    return jd.solvers.analytic_first_step(table, std=SPREAD) if analytic else table


def best_training_free(problem, nfe, scale, name):
    if name.count("; ") == 1:
        kind, dim = name.split("; ")
        return training_free(kind, int(dim.split("-")[0]), nfe)
    tables, spacings = [], ("logistic", "half-log-SNR", "quadratic")
    mean, std = moments(problem, scale)
    for kind, dim in itertools.product(PROCESSES, DIMS):
        label, _, *analytic = chosen(f"{kind}; {dim}-D; {nfe} NFE")
        build, method, options = ours(nfe)[label]
        each, extra = evaluations_of(method, options)
        for grid in spacings:
            table = build(problem.grid(grid, (nfe + len(analytic) - extra) // each))
            tables.append(jd.solvers.analytic_first_step(table, mean, std) if analytic else table)
    others = [functools.partial(jd.solvers.build, name) for name in OTHERS]
    others.append(functools.partial(
        jd.solvers.exponential_adams, integrand="flow", variable="t", order=2, corrector=4, blend=0.5
    ))  # fmt: skip
    tables += [build(problem.grid(g, nfe)) for build, g in itertools.product(others, spacings)]
    return problem.best_of([t for t in tables if t.nfe == nfe], scale)


STEPPED = "ddim", "ipndm_3", "unipc_2", "flow_pc_2"  # on grids that a method makes


def gits(problem, nfe, scale, name):
    x, _, cond = problem.data(problem.some(128), scale)
    fine = jd.grids.karras(problem.process, 60, t_max=problem.span[0], t_min=problem.span[1])
    grid = jd.calibration.trajectory_grid(problem.denoiser(scale), fine, x, nfe, cond=cond)
    return problem.best_of([jd.solvers.build(s, grid) for s in STEPPED], scale)


def auto_diffusion(problem, nfe, scale, name):
    x, ends, cond = problem.data(problem.some(), scale)
    fine = problem.grid("half-log-SNR", 60)

    def fitness(samples):
        gap = (samples - ends).reshape(len(ends), -1)
        return float(np.exp(np.mean(np.log(np.linalg.norm(gap, axis=1)))))

    tables = [
        jd.calibration.search_steps(
            problem.denoiser(scale), fine, x, nfe, functools.partial(jd.solvers.build, family),
            fitness, cond=cond,
        ).tableau
        for family in STEPPED
    ]  # fmt: skip
    return problem.best_of(tables, scale)


def s3(problem, nfe, scale, name):
    x, ends, cond = problem.data(problem.some(), scale)
    held_x, held_ends, held_cond = problem.data(problem.held, scale)
    return jd.calibration.search_solver(
        problem.denoiser(scale), problem.grid("logistic", nfe), x, ends,
        (held_x, held_ends), average="geometric", cond=cond,
        held_out_cond=held_cond,
    ).tableau  # fmt: skip


def dc_solver(problem, nfe, scale, _):
    x, _, cond = problem.data(problem.some(10), scale)
    tables = []
    for grid in (problem.grid(g, nfe) for g in ("logistic", "half-log-SNR")):
        for name in ("unipc_2", "unipc_3", "flow_pc_2"):
            base = jd.solvers.build(name, grid)
            fit = jd.calibration.fit_compensation(problem.denoiser(scale), base, grid, x, cond)
            tables.append(jd.solvers.dynamic_compensation(base, grid, fit.ratios))
    return problem.best_of(tables, scale)


_statistics = {}


def dpm_solver_v3(problem, nfe, scale, name):
    if name not in _statistics:
        x, _, cond = problem.data(problem.some(), scale)
        grid = problem.grid("half-log-SNR", 120)
        path = jd.sample(problem.denoiser(scale), jd.solvers.build("dpm_solver_pp_2m", grid), x,
                         cond=cond, save="nodes")  # fmt: skip
        batches = [path if cond is None else (path, cond)]
        _statistics[name] = jd.calibration.estimate_statistics(
            problem.denoiser(scale), grid, batches, "rademacher", 4, key=jax.random.key(0)
        )
    tables = [
        jd.solvers.dpm_solver_v3(
            problem.grid(grid, nfe), _statistics[name], order, pseudo, corrector
        )
        for grid, order, pseudo, corrector in itertools.product(
            ("logistic", "half-log-SNR"), (2, 3), (False, True), ("none", "same", "pseudo")
        )
    ]
    return problem.best_of(tables, scale)


def family(problem, scale):
    """Where learning begins."""
    mean, std = moments(problem, scale)

    def build(grid):
        table = jd.solvers.exponential_adams(
            grid, integrand="flow", order=2, corrector=4, blend=0.25
        )
        return jd.solvers.analytic_first_step(table, mean, std)

    return build


def start(problem, nfe, scale, name):
    return family(problem, scale)(problem.grid("logistic", nfe + 1))


def learned(problem, nfe, scale, name, shaped=False):
    x, ends, cond = problem.data(problem.fit, scale)
    held_x, held_ends, held_cond = problem.data(problem.held, scale)
    return jd.calibration.learn(
        problem.denoiser(scale), family(problem, scale), problem.grid("logistic", nfe + 1), x,
        ends.astype(np.float32), (held_x, held_ends.astype(np.float32)), history=nfe, shaped=shaped,
        average="geometric", cond=cond, held_out_cond=held_cond, steps=problem.steps,
        learning_rate=0.02,
    ).tableau  # fmt: skip


METHODS = {
    BEST: best_training_free, "GITS": gits, "AutoDiffusion": auto_diffusion, "S^3": s3,
    "DC-Solver": dc_solver, "DPM-Solver-v3": dpm_solver_v3, START: start, LEARNED: learned,
    SHAPED: functools.partial(learned, shaped=True),
}  # fmt: skip


# --- the runs -------------------------------------------------------------------------------------


def measure(run, names, numbers, path):
    """{problem: {nfe: {method: [error at each scale]}}}; finished methods are kept in `path`."""
    kept = {}
    for line in path.read_text().splitlines() if path and path.exists() else ():
        (name, nfe, errors) = json.loads(line)
        kept.setdefault((name, nfe), {}).update(errors)
    made = {name: functools.cache(make) for name, make in problems(run).items()}
    for nfe, (name, make) in itertools.product(numbers, made.items()):
        errors = kept.setdefault((name, nfe), {})
        if names and name not in names:
            continue
        scales = SCALES if name in (GUIDED, DIGITS) else (1.0,)
        for method in (method for method in METHODS if method not in errors):
            table = METHODS[method](make(), nfe, scales[0], name)
            assert table.nfe == nfe, (method, table.nfe)
            errors[method] = [make().error(table, make().fresh, s) for s in scales]
            print(name, nfe, method, float(f"{errors[method][0]:.2g}"), flush=True)
            if path:
                with path.open("a") as file:
                    file.write(json.dumps([name, nfe, {method: errors[method]}]) + "\n")
    done = {
        name: {
            nfe: {method: kept[name, nfe][method] for method in METHODS} for nfe in sorted(numbers)
        }
        for name in made if not names or name in names
    }  # fmt: skip
    return done


def over_best(found):
    """Errors over the best training-free one's, at the scale fitted to: {problem: {method: {nfe}}}."""
    return {
        name: {
            method: {nfe: round(e[method][0] / e[BEST][0], 3) for nfe, e in cells.items()}
            for method in list(METHODS)[1:]
        }
        for name, cells in found.items()
    }


def over_scales(found):
    """Of the guided problems: the same at every scale, of the learned ones."""
    return {
        f"{name}; {nfe} NFE": {
            method: dict(zip(SCALES, np.round(np.divide(e[method], e[BEST]), 3).tolist()))
            for method in (LEARNED, SHAPED)
        }
        for name in (GUIDED, DIGITS) for nfe, e in found.get(name, {}).items()
    }  # fmt: skip


def draw(found, path):
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), sharey=True)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, (name, cells) in zip(axes.flat, found.items()):
        for method, style in zip(
            METHODS, ("ks--", "v:", "^:", "d:", "<:", ">:", "x--", "o-", "P-")
        ):
            points = [(nfe, e[method][0]) for nfe, e in cells.items()]
            axis.loglog(*zip(*points), style, ms=5, label=method)
        axis.set(title=name, xticks=list(cells), xticklabels=list(cells))
        axis.title.set_fontsize(9)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("evaluations (NFE)")
    for axis in axes[:, 0]:
        axis.set_ylabel("median error / sqrt(size)")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=9, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="a trained digits run; none skips the network")
    parser.add_argument("--cells", type=Path, help="a file that keeps cells, to go on from there")
    parser.add_argument("--only", nargs="*", help="fit these problems alone and write no results")
    parser.add_argument("--nfe", nargs="*", type=int, default=NFE, help="numbers of evaluations")
    given = parser.parse_args()
    found = measure(given.run, given.only, given.nfe, given.cells)
    if not given.only:
        machine.RESULTS.mkdir(exist_ok=True)
        draw(found, machine.RESULTS / "learned.png")
        machine.write("learned", {
            "over the best training-free": over_best(found),
            "guidance scales, fitted at the first": over_scales(found),
            "median errors": found,
        })  # fmt: skip
