"""A sweep in one program against a program for each sampler.

    python benchmarks/ablation.py [--workdir runs/digits]    # 15 minutes; writes results/ablation.json

512 samplers of ten evaluations on 64 samples of a mixture in 64 dimensions; 64 samplers on the
digits network (with --workdir, the folder of a run). Three ways, compilation included, without a
compilation cache, the end points compared cell by cell:

- `jd.ablation.run`: stacked tables under vmap;
- a program each: what a library must do whose samplers are code. It is our own loop over rows with
  the table's numbers in the program, so that nothing but the compilation differs;
- one program, in a loop: `jd.sample` with each table in turn, padded to one shape.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import machine
import numpy as np

import jaxdiff as jd
from jaxdiff.generation import balanced_labels
from jaxdiff.training.run import read_experiment, restore

NFE, COUNT = 10, 64
WAYS = ("together", "a program each", "one program, a loop")
COMPILE = "/jax/core/compile/backend_compile_duration"
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: compiled.append(duration) if event == COMPILE else None
)
SOLVERS = (
    "ddim", "dpm_solver_pp_2m", "dpm_solver_pp_2m_heun", "dpm_solver_pp_3m", "dpm_solver_2m",
    "dpm_solver_3m", "deis_tab1", "deis_tab2", "deis_tab3", "deis_rhoab2", "deis_rhoab3", "ipndm_2",
    "ipndm_3", "ipndm_4", "ipndm_v", "ghvb_1", "ghvb_2", "ghvb_3", "ghvb_4", "unipc_1", "unipc_2",
    "unipc_3", "unipc_2_bh1", "unipc_3_bh1", "unipc_2_eps", "adams_x0_2", "adams_flow_3",
    "adams_pc_2_4", "adams_v_lambda_2", "bdia_ddim", "heavy_ball_plms", "nesterov_plms",
)  # fmt: skip
GRIDS = (
    *({"grid": "karras", "rho": rho} for rho in (3.0, 5.0, 7.0, 9.0)),
    *({"grid": "power", "exponent": p} for p in (1.0, 1.5, 2.0, 3.0)),
    *({"grid": "logistic", "exponent": k, "center": c}
      for k, c in itertools.product((0.5, 0.75, 1.0), (0.5, 1.0))),
    {"grid": "half_log_snr"}, {"grid": "quadratic", "shift": 1.5},
)  # fmt: skip


def sweep_of(solvers, grids):
    sweep = jd.ablation.Sweep(())
    for grid in grids:
        sweep += jd.ablation.product(solver=list(solvers), nfe=NFE, **grid)
    return sweep


def timed(call):
    """(result, seconds, programs compiled)."""
    jax.clear_caches()
    before, begin = len(compiled), time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin, len(compiled) - before


def compare(sweep, denoiser, process, shape, cond=None, ways=WAYS):
    ends = {}

    def keep(samples, facts):
        ends[facts["axes"]["solver"], str(facts["axes"])] = samples
        return 0.0

    cells = jd.ablation.sweep.make_cells(sweep, {"process": process}, ["network"])
    tables = [cell.tableau for cell in cells]
    start = jax.random.split(jax.random.key(0))[0]
    keys = jd.sample_keys(start, np.arange(COUNT))
    x = process.prior(keys, (COUNT, *shape), jnp.result_type(float))

    def together():
        return jd.ablation.run(
            sweep, denoiser, process, shape, count=COUNT, cond=cond, metrics={"kept": keep},
            progress=False,
        )  # fmt: skip

    def a_program_each():
        def one(table):
            return jax.jit(lambda x: jd.sample(denoiser, table, x, cond=cond))(x)

        return [np.asarray(one(table)) for table in tables]

    def one_program():
        stacked = jd.solvers.stack(tables)
        run = jax.jit(lambda d, t, x: jd.sample(d, t, x, cond=cond))
        single = (jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), stacked) for i in range(len(tables)))
        return [np.asarray(run(denoiser, table, x)) for table in single]

    found, seconds = {}, {}
    calls = dict(zip(WAYS, (together, a_program_each, one_program)))
    for name in ways:
        call = calls[name]
        result, seconds[name], programs = timed(call)
        found[name] = {"seconds": round(seconds[name], 2), "programs compiled": programs}
        if name != "together":
            whole = [ends[cell.axes["solver"], str(dict(cell.axes))] for cell in cells]
            scale = np.abs(whole).max()
            gaps = np.array([np.abs(a - b).max() / scale for a, b in zip(whole, result)])
            found[name]["difference, median and largest cell"] = [
                float(np.median(gaps)), float(gaps.max())
            ]
            found[name]["over together"] = round(seconds[name] / seconds["together"], 2)
    return {"samplers": len(cells), "samples each": COUNT, "evaluations": NFE, **found}


def mixture(ways=WAYS):
    process, rng = jd.processes.vp_linear(), np.random.default_rng(0)
    denoiser = jd.gaussian_mixture(
        rng.normal(size=(16, 64)), rng.uniform(0.25, 0.6, 16), np.ones(16), process
    )
    return compare(sweep_of(SOLVERS, GRIDS), denoiser, process, (64,), ways=ways)


def in_float64():
    """Rounding apart: the mixture's cells together and one by one, in double precision."""
    with jax.enable_x64(True):
        found = mixture(("together", "one program, a loop"))
    return found["one program, a loop"]["difference, median and largest cell"]


def digits(workdir):
    experiment = read_experiment(workdir)
    denoiser = experiment.denoiser(restore(experiment, workdir).ema)
    sweep = sweep_of(SOLVERS[:16], GRIDS[:16:4])
    labels = balanced_labels(experiment, COUNT)
    return compare(sweep, denoiser, experiment.process, experiment.shape, labels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", help="the folder of a digits run")
    workdir = parser.parse_args().workdir
    jax.config.update("jax_enable_compilation_cache", False)
    figures = {"mixture in 64 dimensions": mixture()}
    figures["mixture, together and in a loop, difference in float64"] = in_float64()
    if workdir:
        figures["digits network"] = digits(workdir)
    machine.write("ablation", figures)
