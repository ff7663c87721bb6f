"""Error against evaluations: our best training-free choice beside the best of the peers' samplers.

    python benchmarks/quality.py             # an hour and a half; results/quality.{json,png}

The probability flow of Gaussian mixtures in 2, 16 and 64 dimensions, with VP's linear schedule from t =
1 to 1e-3 and with EDM's sigma from 80 to 0.002; exact end points by DOP853 to 1e-10. The error is the
median over samples of |x - x*| / sqrt(d). Every sampler runs on every grid, with and without an
analytic first step. Among so many the best flatters itself, so a choice is made on 64 starts and
scored on 64 fresh ones, ours and the peers' alike.

The peers' samplers run as our tables with the peers' own formulas, errors included: each is matched
with the original code to 1e-8 in tests/test_parity*.py (DEIS's coefficients in the limit of its
sums). They run on the grids that their codes offer (uniform in lambda, Karras's, powers of t) and, as
a choice of its own, on ours as well (`grids.logistic`). Ours are all of theirs and the rest.
"""

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import jaxdiff as jd

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

from oracles import Mixture  # noqa: E402

NFE = (4, 5, 6, 8, 10, 12, 15, 20, 30, 50)
DIMS = (2, 16, 64)
STARTS = 64
PLAIN = (None, "analytic")  # starts that ask nothing of the data
MANY = 12  # evaluations above which the sweep is thinned
CHUNK = 192
OURS, PEERS = "logistic", "peers"  # our grids' name; the peers' methods on their own grids
PROCESSES = {
    "VP linear, t = 1 to 1e-3": (jd.processes.vp_linear(), 1.0, 1e-3),
    "EDM, sigma = 80 to 0.002": (jd.processes.edm(), 80.0, 0.002),
}
# diff-sampler's rule for the first step, eps = x / sqrt(1 + rho^2), is a spread of about 1 / sqrt(2).
SPREAD = 0.5**0.5
# Where the Gaussian with the data's mean and covariance hands over to the network.
SKIPS = dict(zip(PROCESSES, ((0.7, 0.5), (8.0, 3.0))))


def mixture(dim):
    # Many components, or the median is decided by which of them most starts belong to.
    rng = np.random.default_rng(100 + dim)
    return Mixture(rng.normal(size=(16, dim)), rng.uniform(0.25, 0.6, 16), np.full(16, 1 / 16))


@functools.cache
def grids(kind, steps, skip, many):
    """{name: grid} of `steps` steps, from t_max or from the time `skip`; the logistic ones are ours."""
    process, t_max, t_min = PROCESSES[kind]
    span = {"t_max": skip or t_max, "t_min": t_min}
    found = {"half-log-SNR": jd.grids.half_log_snr(process, steps, **span)}
    for rho in (7.0,) if many else (5.0, 7.0, 9.0):
        found[f"karras {rho:g}"] = jd.grids.karras(process, steps, rho, **span)
    if skip:
        return {name: found[name] for name in ("half-log-SNR", "karras 7")}
    exponents = (1.0, 1.5, 1.75, 2.0, 2.5, 3.0) if t_max == 1.0 else (3.0,)
    for p in (2.0, 3.0) if many else exponents:
        found[f"t^(1/{p:g})"] = jd.grids.power(process, steps, p, **span)
    exponents, centers = ((0.5, 0.75), (1.0,)) if many else ((0.5, 0.75, 1.0), (1.0, 2.0))
    for k, center in itertools.product(exponents, centers):
        name = f"{OURS} {k:g}, {center:g}"
        found[name] = jd.grids.logistic(process, steps, k, center, **span)
    return found


# --- the samplers ---------------------------------------------------------------------------------


def of(name, **options):
    return functools.partial(jd.solvers.build, name, **options), name, options


def peers():
    """{label: (builder, name, options)}: the peers' samplers, formulas as they publish them."""
    found = {}
    for k in (1, 2, 3, 4):
        found[f"diff-sampler ipndm {k}"] = of("ipndm", order=k)
        found[f"DEIS tAB{k - 1}"] = of("deis", order=k, variable="t")
        found[f"DEIS rhoAB{k - 1}"] = of("deis", order=k, variable="rho")
    for k in (2, 3, 4):
        found[f"diff-sampler ipndm_v {k}"] = of("ipndm", order=k, coefficients="published")
    for k, low in itertools.product((1, 2, 3), (True, False)):
        late = " lower final" if low else ""
        options = {"order": k, "variant": "published", "lower_order_final": low}
        found[f"DPM-Solver++ {k}M{late}"] = of("dpm_solver_pp_multistep", **options)
        found[f"DPM-Solver {k}M{late}"] = of("dpm_solver_multistep", **options)
        for variant, integrand in itertools.product(
            ("bh1", "bh2", "vary_coeff_published"), ("x0", "eps")
        ):
            found[f"UniPC {k} {variant} {integrand}{late}"] = of(
                "unipc", order=k, variant=variant, integrand=integrand, lower_order_final=low
            )
    found["EDM Heun"], found["k-diffusion LMS"] = of("heun"), of("lms")
    found["k-diffusion DPM2"] = of("kdpm2")
    for k, integrand in itertools.product((2, 3), ("x0", "eps")):
        found[f"DPM-Solver singlestep {k} {integrand}"] = of(
            "dpm_solver_singlestep", order=k, integrand=integrand
        )
    found["PNDM"], found["S-PNDM"] = of("f_pndm"), of("s_pndm")
    for k, beta in itertools.product((2, 3, 4), (0.6, 0.7, 0.8, 0.9)):
        found[f"GHVB {k} {beta}"] = of("ghvb", order=k, beta=beta)
    for name in ("heavy_ball_multistep", "ipndm", "pndm"):
        found |= {setting: of(setting) for setting in jd.solvers.CATALOGUE[name].settings}
    return found


def ours(nfe):
    """{label: (builder, name, options)}: the catalogue, the peers', and one builder's options swept."""
    found = {
        name: of(name)
        for entry in jd.solvers.CATALOGUE.values()
        for name, setting in entry.settings.items()
        if setting.deterministic and "published" not in str(setting.options)
    }
    found |= peers()
    variables = [("lambda", 1.0), ("angle", 1.0), ("tau", 1.0), ("t", 0.5), ("t", 1.0)]
    # With many evaluations the pure orders win.
    blends = (0.25, 0.5, 0.75, 1.0) if nfe <= MANY else (1.0,)
    for integrand, (variable, power), order, corrector, blend in itertools.product(
        ("x0", "eps", "flow"), [*variables, ("rho", 1.0)], (1, 2, 3, 4), (0, 3, 4), blends
    ):
        if integrand == "flow" and (variable == "rho" or order == 4):
            continue
        if (corrector == 3 and nfe <= MANY and integrand != "flow") or (
            order == 1 and (blend != 1.0 or not corrector)
        ):
            continue
        z = variable if power == 1.0 else f"{variable}^{power:g}"
        label = f"adams {integrand} in {z}, {order}"
        label += f" x {blend:g}" if blend != 1.0 else ""
        label += f" + {corrector}" if corrector else ""
        found[label] = of(
            "exponential_adams", integrand=integrand, variable=variable, power=power, order=order,
            corrector=corrector, blend=blend,
        )
    return found


def evaluations_of(name, options):
    """(evaluations a step, evaluations more of the start)."""
    entry, _ = jd.solvers.find(name)
    setting = entry.settings.get(name, next(iter(entry.settings.values())))
    if name == "dpm_solver_singlestep":
        return options["order"], 0
    return entry.nfe_per_step_of(setting), setting.extra


def tables(kind, nfe, pool, starts):
    """[(label, grid, start), table] of every choice with exactly `nfe` evaluations.

    A start is None, "analytic" (the first step), or the time to teleport to.
    """
    found = []
    for (label, (build, name, options)), start in itertools.product(pool.items(), starts):
        each, extra = evaluations_of(name, options)
        steps, rest = divmod(nfe + (start == "analytic") - extra, each)
        if rest or steps < 1:
            continue
        skip = None if start in (None, "analytic") else start
        for grid_name, grid in grids(kind, steps, skip, nfe > MANY).items():
            table = build(grid)
            if start == "analytic" and table.rows < 2:
                continue
            if start == "analytic":
                table = jd.solvers.analytic_first_step(table, std=SPREAD)
            if table.nfe == nfe:
                found.append(((label, grid_name, start), table))
    return found


# --- the runs -------------------------------------------------------------------------------------


@functools.cache
def exact(kind, dim):
    """(starts, end points), [2 * STARTS, dim]: the first half to choose on, the second to score."""
    process, t_max, t_min = PROCESSES[kind]
    levels = [(float(process.alpha(t)), float(process.sigma(t))) for t in (t_max, t_min)]
    x = mixture(dim).sample(np.random.default_rng(dim), 2 * STARTS, *levels[0])
    return x, mixture(dim).flow(x, *levels)


@functools.cache
def moments(dim):
    """The mean and covariance of 10,000 samples of the data."""
    data = mixture(dim).sample(np.random.default_rng(1), 10_000)
    return data.mean(0), np.cov(data.T)


def entered(kind, dim, start, x):
    """x_T, or where the closed form for the data's mean and covariance takes it."""
    if start in (None, "analytic"):
        return x
    process, t_max, _ = PROCESSES[kind]
    after = jd.grids.from_times(process, np.array([start, 0.5 * start]))
    level = float(process.alpha(t_max)), float(process.sigma(t_max))
    table = jd.solvers.teleport(jd.solvers.ddim(after), *level, *moments(dim))
    return np.asarray(jd.sample(jd.Denoiser(_unused), table, x, save="nodes")[0])


def _unused(x, t):
    return x


def medians(kind, dim, found, templates):
    """[choices, 2]: median errors on the starts to choose on and on the fresh ones."""
    process = PROCESSES[kind][0]
    mix = mixture(dim)
    denoiser = jd.gaussian_mixture(mix.means, mix.std, mix.weights, process)
    x, ends = exact(kind, dim)
    starts = {start: jnp.asarray(entered(kind, dim, start, x)) for start in {s for (*_, s), _ in found}}
    out = []
    run = jax.vmap(lambda table, x: jd.sample(denoiser, table, x))
    for first in range(0, len(found), CHUNK):
        chunk = found[first : first + CHUNK]
        # Filled up to one shape, so that each number of evaluations is compiled once.
        chunk = [*chunk, *[chunk[0]] * (CHUNK - len(chunk))]
        stacked = jd.solvers.stack([*(table for _, table in chunk), *templates])
        begin = jnp.stack([starts[start] for (*_, start), _ in chunk] + [starts[chunk[0][0][2]]] * 2)
        error = np.linalg.norm(np.asarray(run(stacked, begin))[:CHUNK] - ends, axis=-1) / dim**0.5
        out.append(np.stack([np.median(error[:, :STARTS], 1), np.median(error[:, STARTS:], 1)], 1))
    return np.concatenate(out)[: len(found)]


def best(found, errors, keep):
    """The choice with the least error on the first starts, among those that `keep` accepts."""
    kept = np.array([keep(*choice) for choice, _ in found])
    errors = np.where(np.isfinite(errors) & kept[:, None], errors, np.inf)
    i = int(np.argmin(errors[:, 0]))
    label, grid, start = found[i][0]
    entry = {None: "", "analytic": "; analytic first step"}.get(start, f"; teleport to {start}")
    choice = f"{label}; {grid}{entry}"
    return {"choice": choice, "error": float(errors[i, 1]), "choices": int(kept.sum())}


def measure(path=None):
    """{cell: {who: ...}}; finished cells are kept in the file `path`, if there is one."""
    cells, kept = {}, {}
    for line in path.read_text().splitlines() if path and path.exists() else ():
        kept |= json.loads(line)
    theirs = set(peers())
    kinds = {
        PEERS: lambda label, grid, start: label in theirs and start in PLAIN and OURS not in grid,
        "peers' methods, our grids": lambda label, grid, start: label in theirs and start in PLAIN,
        "ours": lambda label, grid, start: start in PLAIN,
        "ours, data's mean and covariance known": lambda label, grid, start: True,
    }
    for kind, nfe in tqdm(list(itertools.product(PROCESSES, NFE))):
        names = [f"{kind}; {dim}-D; {nfe} NFE" for dim in DIMS]
        cells |= {name: kept[name] for name in names if name in kept}
        if all(name in kept for name in names):
            continue
        found = tables(kind, nfe, ours(nfe), PLAIN + SKIPS[kind] if nfe <= MANY else (None,))
        every = [table for _, table in found]
        templates = [max(every, key=lambda t: t.registers), max(every, key=lambda t: t.history)]
        for dim, name in zip(DIMS, names):
            if name in kept:
                continue
            errors = medians(kind, dim, found, templates)
            cell = {who: best(found, errors, keep) for who, keep in kinds.items()}
            for who in list(cell)[1:]:
                cell[who]["over peers"] = cell[who]["error"] / cell[PEERS]["error"]
            cell["ours"]["a peer's method"] = cell["ours"]["choice"].split(";")[0] in theirs
            cells[name] = cell
            if path:
                with path.open("a") as file:
                    file.write(json.dumps({name: cell}) + "\n")
    return cells


def draw(cells, path):
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), sharex=True)
    for (i, kind), (j, dim) in itertools.product(enumerate(PROCESSES), enumerate(DIMS)):
        axis = axes[i, j]
        for who, style in zip(next(iter(cells.values())), ("s--", "x-.", "o-", "^:")):
            y = [cells[f"{kind}; {dim}-D; {nfe} NFE"][who]["error"] for nfe in NFE]
            axis.loglog(NFE, y, style, ms=4, label=who)
        axis.set(title=f"{kind}; {dim}-D", xticks=NFE, xticklabels=NFE)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("evaluations (NFE)")
    for axis in axes[:, 0]:
        axis.set_ylabel("median error / sqrt(d)")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=4)
    figure.savefig(path, dpi=110)


def summary(cells):
    """Ratios of errors to the peers': geometric means over 5 to 10 evaluations, and the largest."""
    found = {}
    for who in list(next(iter(cells.values())))[1:]:
        ratios = {name: cell[who]["over peers"] for name, cell in cells.items()}
        ends = ("; 5 NFE", " 6 NFE", " 8 NFE", " 10 NFE")
        few = [r for name, r in ratios.items() if name.endswith(ends)]
        worst = max(ratios, key=ratios.get)
        found[who] = {
            "geometric mean over 5 to 10 evaluations": float(np.exp(np.mean(np.log(few)))),
            "largest": {worst: ratios[worst]},
            "cells above 1": sum(r > 1 + 1e-9 for r in ratios.values()), "cells": len(ratios),
        }  # fmt: skip
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=Path, help="a file that keeps cells, to go on from there")
    cells = measure(parser.parse_args().cells)
    machine.RESULTS.mkdir(exist_ok=True)
    draw(cells, machine.RESULTS / "quality.png")
    machine.write("quality", {"over the best of the peers": summary(cells), "cells": cells})
