"""Inversion: the round-trip error of every method against steps, in float32 and float64.

    python benchmarks/inversion.py          # minutes; writes results/inversion.json and .png

x_T is drawn from the marginal of a mixture of broad components (for the digits network of tests/trained,
from its prior), sampled to x_0 and found again; the error is max |x_T found - x_T| over samples. The
methods of editing start from data: theirs is max |x_0 decoded - x_0|. vp_linear with uniform times from
1 to 1e-3, or with half-log-SNR's nodes in rows called "half"; the digits' own process from end to end.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import matplotlib.pyplot as plt
import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from listed import run_all  # noqa: E402
from oracles import BROAD  # noqa: E402
from round_trips import largest_errors  # noqa: E402
from trained import digits  # noqa: E402

import jaxdiff as jd  # noqa: E402
from jaxdiff import editing, inversion, solvers  # noqa: E402

STEPS = (10, 20, 50, 100, 200)
PROCESS = jd.processes.vp_linear()
UNIFORM = functools.partial(jd.grids.uniform, PROCESS)
HALF = functools.partial(jd.grids.half_log_snr, PROCESS)
DTYPES = {"float32": np.float32, "float64": np.float64}
# With an exact inverse: (grid, builder).
EXACT = {
    "BDIA, gamma = 1": (UNIFORM, solvers.bdia),
    "BDIA, gamma = 0.5": (UNIFORM, functools.partial(solvers.bdia, gamma=0.5)),
    "BDIA over DPM-Solver++": (UNIFORM, functools.partial(solvers.bdia, base="dpm_solver_pp")),
    "EDICT, p = 0.93": (UNIFORM, solvers.edict),
    "EDICT, p = 0.98": (UNIFORM, functools.partial(solvers.edict, p=0.98)),
    "O-BELM": (UNIFORM, solvers.belm),
    "O-BELM, half": (HALF, solvers.belm),
    "O-BELM over v": (UNIFORM, functools.partial(solvers.belm, integrand="v")),
    "O-BELM over v, half": (HALF, functools.partial(solvers.belm, integrand="v")),
    "heavy ball, order 1": (UNIFORM, functools.partial(solvers.ghvb, order=1)),
}
NAIVE = {"DDIM, naive": solvers.ddim, "DPM++(2M), naive": solvers.dpm_solver_pp_multistep}
SOLVED = {
    "DDIM, fixed point": (UNIFORM, solvers.ddim, dict(method="fixed_point", max_iterations=200)),
    "DDIM, Newton": (UNIFORM, solvers.ddim, dict(method="newton")),
    "DPM++(2M), sweeps, half": (HALF, solvers.dpm_solver_pp_multistep, dict(method="forward_step")),
    "DPM++(2M), Newton on the run": (UNIFORM, solvers.dpm_solver_pp_multistep, None),
}  # fmt: skip
EDITING = ("edit-friendly", "DPM-Encoder", "DDCM")


def mixture():
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS, "x0")


def start(level=0, count=16):
    grid = UNIFORM(1)
    return BROAD.sample(np.random.default_rng(0), count, grid.alpha[level], grid.sigma[level])


def exact(dtype):
    keys = [(name, steps) for name in EXACT for steps in STEPS]
    tables = [EXACT[name][1](EXACT[name][0](steps)) for name, steps in keys]
    found = largest_errors(mixture, tables, start(), dtype)
    return dict(zip(EXACT, found.reshape(-1, len(STEPS)).tolist()))


def naive(dtype):
    with jax.enable_x64(dtype == np.float64):
        x, found = jnp.asarray(start().astype(dtype)), {}
        for name, build in NAIVE.items():
            there = run_all(mixture(), [build(UNIFORM(n)) for n in STEPS], x)
            back = [build(UNIFORM(n).reversed()) for n in STEPS]
            again = run_all(mixture(), back, jnp.stack([jnp.asarray(a) for a in there]))
            found[name] = [float(np.abs(a - np.asarray(x)).max()) for a in again]
        return found


def solved(dtype):
    found = {name: [] for name in SOLVED}
    with jax.enable_x64(dtype == np.float64):
        x = jnp.asarray(start().astype(dtype))
        for name, (spacing, build, options) in SOLVED.items():
            for steps in STEPS:
                table = build(spacing(steps))
                x_0 = jd.sample(mixture(), table, x)
                if options is None:
                    got = inversion.shoot(mixture(), table, x_0, throw=False)
                else:
                    got = inversion.solve_back(mixture(), table, x_0, throw=False, **options)
                error = float(np.abs(np.asarray(got.x_T - x)).max())
                if not np.all(got.converged):
                    print(f"{name}, {steps} steps, {dtype.__name__}: not converged")
                found[name].append(error)
    return found


def edited(dtype):
    """From data and back to it; the last step, to sigma = 0, draws no noise (its miss is kept)."""
    found, key = {name: [] for name in EDITING}, jax.random.key(0)
    with jax.enable_x64(dtype == np.float64):
        x_0 = jnp.asarray(BROAD.sample(np.random.default_rng(0), 16).astype(dtype))
        for steps in STEPS:
            table = solvers.ddim(HALF(steps), eta=1.0)
            for name, encode in (
                ("edit-friendly", editing.edit_friendly), ("DPM-Encoder", editing.dpm_encoder),
            ):  # fmt: skip
                code = encode(mixture(), table, x_0, key)
                again = editing.replay(mixture(), table, code)
                found[name].append(float(np.abs(np.asarray(again - x_0)).max()))
            again = editing.ddcm(mixture(), HALF(steps, end="zero"), x_0, key)
            found["DDCM"].append(float(np.abs(np.asarray(again - x_0)).max()))
    return found


def on_digits(steps=50, count=8):
    """float32, the class-conditional network with 467,000 weights: errors of x_T, and of x_0 again.

    DDIM draws states together, to rounding along directions that the data do not have: x_0 alone then
    tells x_T no longer, however exactly each step is solved; a pair still does.
    """
    denoiser, process = digits.denoiser("large"), digits.experiment("large").process
    grid = jd.grids.uniform(process, steps)
    x, cond = process.prior(jax.random.key(0), (count, 8, 8, 1)), jnp.arange(count) % 10
    largest = lambda a, b: float(np.abs(np.asarray(a - b)).max())  # noqa: E731
    found = {}
    for name in ("BDIA, gamma = 1", "O-BELM", "O-BELM over v", "EDICT, p = 0.93"):
        table = EXACT[name][1](grid)
        state = jd.sample(denoiser, table, x, cond=cond, save="state")
        before = inversion.invert(denoiser, table, state, cond=cond)
        again = jd.sample(denoiser, table, None, cond=cond, state=before)
        found[name] = {"x_T": largest(before.registers[0], x)}
        found[name]["x_0"] = largest(again, state.registers[0])
    table = solvers.ddim(grid)
    x_0 = jd.sample(denoiser, table, x, cond=cond)
    back = jd.sample(denoiser, solvers.ddim(grid.reversed()), x_0, cond=cond)
    decode = lambda x_T: largest(jd.sample(denoiser, table, x_T, cond=cond), x_0)  # noqa: E731
    found["DDIM, naive"] = {"x_T": largest(back, x), "x_0": decode(back)}
    for name in ("DDIM, fixed point", "DDIM, Newton"):
        options = SOLVED[name][2]
        got = inversion.solve_back(denoiser, table, x_0, cond=cond, throw=False, **options)
        found[name] = {
            "x_T": largest(got.x_T, x), "x_0": decode(got.x_T),
            "iterations a step": float(np.mean(got.iterations)),
            "largest residual": float(np.max(got.residuals)),
        }  # fmt: skip
    return found


def draw(table):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    for axis, name in zip(axes, DTYPES):
        drawn = {method: rows for method, rows in table.items() if np.any(rows[name])}
        for i, (method, rows) in enumerate(drawn.items()):
            values = np.clip(np.nan_to_num(np.asarray(rows[name], float), nan=1e3), 1e-17, 1e3)
            style = "-" if method in EXACT else ":" if method in NAIVE else "--"
            marker = "os^vDPX*"[i % 8]
            axis.loglog(STEPS, values, style, marker=marker, ms=4, color=plt.cm.tab20(i), label=method)
        axis.axhline(1e-5 if name == "float32" else 1e-10, color="0.7", lw=1, zorder=0)
        axis.set(title=name, xlabel="steps", ylim=(1e-16, 2e3), xticks=STEPS, xticklabels=STEPS)
        axis.minorticks_off()
    axes[0].set_ylabel("largest error of a round trip (cut at 1000)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(machine.RESULTS / "inversion.png", dpi=110)


def main():
    table = {}
    for name, dtype in DTYPES.items():
        for part in (naive, solved, exact, edited):
            for method, row in part(dtype).items():
                table.setdefault(method, {})[name] = [e if np.isfinite(e) else None for e in row]
                print(name, method, " ".join(f"{e:.1e}" for e in row), flush=True)
    draw(table)
    machine.write("inversion", {"steps": STEPS, "mixture": table, "digits, 50 steps": on_digits()})


if __name__ == "__main__":
    main()
