"""Inverse problems: every posterior sampler against the exact posterior of a mixture.

    python benchmarks/inverse.py        # minutes; writes results/inverse.json and .png
    python benchmarks/inverse.py DDRM   # only these methods anew, the others from the stored results

The prior is a mixture of five Gaussians in 12 dimensions, the denoiser exact. Two operators measure 6
numbers of it: half of the entries (inpainting), or a random matrix; noise of standard deviation 0.05
or 0.3 (the data's is about 1). The posterior is a mixture too, known exactly. Of 512 samples for each of
four measurements: the error of the mean (of its norm), of the covariance (of its Frobenius norm), and
the sliced Wasserstein distance to 4,096 exact samples. Methods with a strength have the one of five
that is best, by that distance, on four other measurements. All start from the same noise, on the same
kind of grid: half-log-SNR's on vp_linear, to sigma = 0.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import machine
import matplotlib.pyplot as plt
import numpy as np

import jaxdiff as jd
from jaxdiff import inverse, solvers

DIM, SEEN, SAMPLES, MEASUREMENTS = 12, 6, 512, 4
NFE = (20, 50, 200)
NOISES = (0.05, 0.3)
OPERATORS = ("inpainting", "matrix")
PROCESS = jd.processes.vp_linear()
RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
ZETAS = (0.03, 0.1, 0.3, 1.0, 3.0)


class Method(NamedTuple):
    """make(denoiser, grid, measurement, strength) -> (denoiser, tableau, control).

    `evaluations` and `pullbacks`: per step of the grid. `problems`: the operators it is for.
    """

    make: Callable[..., tuple[Any, Any, Any]]
    strengths: tuple[float, ...] = (1.0,)
    evaluations: int = 1
    pullbacks: int = 0
    operators: tuple[str, ...] = OPERATORS


def ancestral(guide: Callable, **fields: Any) -> Method:
    """A denoiser from a denoiser, in DDPM's steps."""
    return Method(lambda d, g, m, s: (guide(d, m, s), solvers.ddpm(g), None), **fields)


def stepped(make: Callable, tableau: Callable, moves: bool = False) -> Callable:
    """A denoiser that predicts a correction of the step."""
    return lambda d, g, m, s: (make(d, m, s), inverse.corrected(tableau(g), moves), None)


def controlled(make: Callable) -> Callable:
    """A tableau and a control for the prior's denoiser."""
    return lambda d, g, m, s: (d, *make(d, g, m))


def flowchef(d, g, m, s):
    return inverse.flowchef(d, m, s, hold="eps"), solvers.ddim(g, outputs=2), None


def diffpir(d, g, m, s):
    return inverse.diffpir(d, m, s), inverse.partial_renewal(g, 0.3), None


# The one list; strengths are those of the argument that a method has for it.
METHODS = {
    "prior, unguided": ancestral(lambda d, m, s: d),
    "DPS, score": ancestral(inverse.dps, pullbacks=1),
    "DPS": Method(stepped(inverse.dps_step, solvers.ddpm), ZETAS, pullbacks=1),
    "MCG": Method(inverse.mcg, ZETAS, pullbacks=1),
    "STSL, K = 2": Method(
        stepped(
            lambda d, m, s: inverse.stsl(d, m, KEY, s, 0.01, 2, weighting="covariance"),
            solvers.ddpm, True,
        ), ZETAS, evaluations=4, pullbacks=2,
    ),
    "PiGDM, score": ancestral(lambda d, m, s: inverse.pigdm(d, m), pullbacks=1),
    "PiGDM": Method(
        stepped(lambda d, m, s: inverse.pigdm_step(d, m), lambda g: solvers.ddim(g, 1.0)),
        pullbacks=1,
    ),
    "TMPD": ancestral(lambda d, m, s: inverse.tmpd(d, m), pullbacks=2),
    "MMPS, 1 iteration": ancestral(lambda d, m, s: inverse.mmps(d, m, 1), pullbacks=2),
    "MMPS, 3 iterations": ancestral(lambda d, m, s: inverse.mmps(d, m, 3), pullbacks=4),
    "MMPS, 6 iterations": ancestral(lambda d, m, s: inverse.mmps(d, m, 6), pullbacks=7),
    "FlowChef": Method(flowchef, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "DDNM+": Method(controlled(inverse.ddnm_plus)),
    "DDRM": Method(controlled(inverse.ddrm)),
    "DiffPIR": Method(diffpir, (0.03, 0.1, 0.3, 1.0, 3.0)),
    "DAPS, 5 inner": Method(controlled(lambda d, g, m: inverse.daps(d, g, m, 5, 0.0)), evaluations=5),
}  # fmt: skip
REPAINT = 5


def prior():
    means = RNG.normal(size=(5, DIM))
    factors = RNG.normal(size=(5, DIM, DIM)) / np.sqrt(DIM)
    covariances = 0.02 * np.eye(DIM) + 0.25 * factors @ np.swapaxes(factors, 1, 2)
    return jd.gaussian_mixture(means, covariances, np.ones(5), PROCESS)


@functools.cache
def matrices():
    chosen = np.sort(RNG.permutation(DIM)[:SEEN])
    return {"inpainting": np.eye(DIM)[chosen], "matrix": RNG.normal(size=(SEEN, DIM)) / np.sqrt(DIM)}


class Set(NamedTuple):
    """Problems, with 4,096 exact samples of the posterior of each."""

    problems: list[tuple[Any, ...]]
    truths: list[np.ndarray]


def problems(d, key):
    """[(operator's name, noise, measurement, exact posterior)]."""
    of_data, of_noise = jax.random.split(key)
    x0 = d.params.sample(of_data, (MEASUREMENTS,))[0]
    found = []
    for name, A in matrices().items():
        for noise in NOISES:
            y = inverse.measure(inverse.matrix(A), x0, noise, of_noise).y
            for row in y:
                m = inverse.Measurement(inverse.matrix(A), row, noise)
                exact = inverse.mixture_posterior(d, A, row, noise)
                found.append((name, noise, m, exact))
    return found


def figures(samples, exact, truth):
    x = np.asarray(samples, np.float64)
    if not np.all(np.isfinite(x)) or np.abs(x).max() > 1e4:
        return dict.fromkeys(("mean", "covariance", "wasserstein"), float("inf"))
    return {
        "mean": np.linalg.norm(x.mean(0) - exact.mean) / np.linalg.norm(exact.mean),
        "covariance": np.linalg.norm(np.cov(x.T) - exact.covariance) / np.linalg.norm(exact.covariance),
        "wasserstein": jd.metrics.sliced_wasserstein(x, truth, jax.random.key(3), 64),
    }  # fmt: skip


def averaged(rows):
    """Per operator and noise: means over the measurements."""
    keys = sorted({(name, noise) for name, noise, _ in rows})
    out = {}
    for name, noise in keys:
        same = [f for n, s, f in rows if (n, s) == (name, noise)]
        out[f"{name}, {noise}"] = {k: float(np.mean([f[k] for f in same])) for k in same[0]}
    return out


def samples_of(make, d, steps, measurements, strengths, x_T):
    """[problems, strengths, SAMPLES, DIM] in one program."""
    grid = jd.grids.half_log_snr(PROCESS, steps, end="zero")

    def one(m, s):
        denoiser, tableau, control = make(d, grid, m, s)
        return jd.sample(denoiser, tableau, x_T, key=KEY, control=control)

    stacked = jax.tree.map(lambda *a: jnp.stack(a), *measurements)
    run = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    return np.asarray(run(stacked, jnp.asarray(strengths)))


def rows_of(method, strengths, d, steps, found, x_T):
    """{strength: [(operator, noise, figures)]}."""
    chosen = [i for i, p in enumerate(found.problems) if p[0] in method.operators]
    samples = samples_of(
        method.make, d, steps, [found.problems[i][2] for i in chosen], strengths, x_T
    )
    return {
        s: [
            (*found.problems[i][:2], figures(samples[k, j], found.problems[i][3], found.truths[i]))
            for k, i in enumerate(chosen)
        ]
        for j, s in enumerate(strengths)
    }


def measured(name, method, d, nfe, scored, others, x_T):
    steps, several = nfe // method.evaluations, len(method.strengths) > 1
    tables = {
        s: averaged(rows)
        for s, rows in rows_of(method, method.strengths, d, steps, scored, x_T).items()
    }
    choices = tables
    if several:
        choices = {
            s: averaged(rows)
            for s, rows in rows_of(method, method.strengths, d, steps, others, x_T).items()
        }
    row = {}
    for problem in next(iter(tables.values())):
        s = min(choices, key=lambda s: choices[s][problem]["wasserstein"])
        found = tables[s][problem]
        finite = np.isfinite(found["wasserstein"])
        row[problem] = found | ({"strength": s} if several else {}) if finite else None
    print(name, nfe, {p: f and round(f["wasserstein"], 3) for p, f in row.items()}, flush=True)
    return {
        "evaluations": steps * method.evaluations,
        "pullbacks": steps * method.pullbacks, "problems": row,
    }  # fmt: skip


def exact_rows(d, nfe, scored, others, x_T):
    """The posterior's own denoiser in DDPM's steps: what is left is the sampler's error."""
    tableau = solvers.ddpm(jd.grids.half_log_snr(PROCESS, nfe, end="zero"))
    run = jax.jit(lambda den: jd.sample(den, tableau, x_T, key=KEY))
    rows = [
        (name, noise, figures(run(exact.denoiser(PROCESS)), exact, truth))
        for (name, noise, _, exact), truth in zip(*scored)
    ]
    return {"evaluations": nfe, "pullbacks": 0, "problems": averaged(rows)}


def repaint_rows(d, nfe, scored, others, x_T):
    """RePaint takes a mask: on the inpainting problems, each step taken five times."""
    chosen = np.argmax(matrices()["inpainting"], 1)
    grid = jd.grids.half_log_snr(PROCESS, nfe // REPAINT, end="zero")
    run = jax.jit(lambda t, c: jd.sample(d, t, x_T, key=KEY, control=c))
    rows, evaluations = [], 0
    for (name, noise, m, exact), truth in zip(*scored):
        if name != "inpainting":
            continue
        known = np.zeros(DIM)
        known[chosen] = np.asarray(m.y)
        mask = np.isin(np.arange(DIM), chosen).astype(float)
        tableau, control = inverse.repaint(grid, known, mask, 1, REPAINT)
        evaluations = tableau.nfe
        rows.append((name, noise, figures(run(tableau, control), exact, truth)))
    return {"evaluations": evaluations, "pullbacks": 0, "problems": averaged(rows)}


def picture(table):
    """The distance against evaluations, one panel a problem; dashed: without a Jacobian."""
    names = list(table["exact posterior"][str(NFE[0])]["problems"])
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True)
    colours = plt.get_cmap("tab10").colors
    for axis, problem in zip(axes.flat, names):
        for k, (method, by_nfe) in enumerate(table.items()):
            points = [
                (row["evaluations"], row["problems"][problem]["wasserstein"])
                for row in by_nfe.values() if row["problems"].get(problem)
            ]  # fmt: skip
            free = not any(row["pullbacks"] for row in by_nfe.values())
            style = dict(
                color=colours[k % 10], marker="osv^D"[k % 5], ms=4, lw=1, ls="--" if free else "-"
            )
            if method in ("exact posterior", "prior, unguided"):
                style |= dict(color="black" if "exact" in method else "grey", marker="", lw=2)
            if points:
                axis.plot(*zip(*points), label=method, **style)
        axis.set(title=problem, xscale="log", yscale="log", ylim=(0.02, 1.6))
        axis.set_xticks(NFE, map(str, NFE))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("evaluations of the denoiser")
    for axis in axes[:, 0]:
        axis.set_ylabel("sliced Wasserstein to the posterior")
    entries = {}
    for axis in axes.flat:
        entries |= dict(zip(*axis.get_legend_handles_labels()[::-1]))
    figure.legend(entries.values(), entries.keys(), loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.84, 1))
    figure.savefig(machine.RESULTS / "inverse.png", dpi=110)


def main(chosen):
    d = prior()
    rng = np.random.default_rng(4)
    found = [problems(d, jax.random.key(seed)) for seed in (1, 2)]
    scored, others = (Set(ps, [p[3].sample(rng, 4096) for p in ps]) for ps in found)
    x_T = PROCESS.prior(jax.random.key(5), (SAMPLES, DIM))
    floor = averaged([
        (*p[:2], figures(p[3].sample(rng, SAMPLES), p[3], t)) for p, t in zip(*scored)
    ])  # fmt: skip
    lists = {"exact posterior": exact_rows, "RePaint, 5 times": repaint_rows}
    lists |= {name: functools.partial(measured, name, method) for name, method in METHODS.items()}
    table = {}
    if chosen:
        stored = json.loads((machine.RESULTS / "inverse.json").read_text())
        table = stored["methods"]
    for name in chosen or lists:
        table[name] = {
            str(nfe): lists[name](d, nfe, scored, others, x_T) for nfe in NFE
        }  # fmt: skip
    machine.write("inverse", {"512 exact samples": floor, "methods": table})
    picture(table)


if __name__ == "__main__":
    main(sys.argv[1:])
