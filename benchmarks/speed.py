"""`jd.sample` against the bare network, diffusers (torch, CPU) and the official JAX DPM-Solver.

    python benchmarks/speed.py --diffusers PYTHON --dpm-solver dpm_solver_jax.py    # 10 minutes

PYTHON is an interpreter with torch and diffusers, dpm_solver_jax.py the file of that name of
github.com/LuChengTHU/dpm-solver. Writes results/speed.json.

DPM-Solver++(2M), 20 steps, batch 64, residual networks of three sizes with the same weights
everywhere; every program's sample is checked against ours. Run times are ratios over interleaved
pairs in one run, first samples medians over fresh processes without a compilation cache.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import numpy as np
from pairs import paired, seconds

import jaxdiff as jd

STEPS, BATCH, DIM = 20, 64, 64
SIZES = {"3 x 128": (128, 3), "4 x 512": (512, 4), "6 x 1024": (1024, 6)}  # depth x width
COMPILE = "/jax/core/compile/backend_compile_duration"
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: compiled.append(duration) if event == COMPILE else None
)


def make_weights(width, depth):
    rng = np.random.default_rng(0)

    def dense(n, m):
        return (rng.normal(size=(n, m)) / n**0.5).astype(np.float32)

    weights = {"enter": dense(DIM, width), "leave": dense(width, DIM), "depth": np.int32(depth)}
    weights["frequencies"] = np.geomspace(1.0, 100.0, 16).astype(np.float32)
    for i in range(depth):
        weights[f"time_{i}"] = dense(32, 2 * width)
        weights[f"up_{i}"], weights[f"down_{i}"] = dense(width, 2 * width), dense(2 * width, width)
    return weights, rng.normal(size=(BATCH, DIM)).astype(np.float32)


def network(weights, x, t):
    """eps: residual blocks shifted by an embedding of the time; t a scalar."""
    angles = t * weights["frequencies"]
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])
    h = x @ weights["enter"]
    for i in range(sum(key.startswith("up_") for key in weights)):
        shift = embedding @ weights[f"time_{i}"]
        h = h + jax.nn.silu(h @ weights[f"up_{i}"] + shift) @ weights[f"down_{i}"]
    return h @ weights["leave"]


@functools.partial(jax.jit, static_argnums=2)
def bare(weights, x, rows):
    """The network `rows` times, each on what it made before: what no sampler can go below."""
    return jax.lax.scan(lambda x, t: (network(weights, x, t), None), x, jnp.linspace(1, 0, rows))[0]


def thousandth(t, alpha, sigma):
    return t / 1000.0


def on(device, weights):
    return {k: jax.device_put(v, device) for k, v in weights.items() if k != "depth"}


def as_diffusers(weights):
    """(denoiser, tableau) of the peer's scheduler: its betas, its timesteps, its last step."""
    process = jd.processes.ddpm()
    grid = jd.grids.linspace(process, STEPS, keep_zero=False)
    table = jd.solvers.dpm_solver_pp_multistep(grid, 2, lower_order_final=False)
    return jd.Denoiser(network, "eps", weights, thousandth), table


def as_official(weights, order=2):
    grid = jd.grids.uniform(jd.processes.vp_linear(), STEPS, t_max=1.0, t_min=1e-3)
    table = jd.solvers.dpm_solver_pp_multistep(
        grid, order, variant="published", lower_order_final=False
    )
    return jd.Denoiser(network, "eps", weights), table


def official_call(module, weights, x, order=2):
    """A call of the official JAX code as its README writes it."""
    schedule = module.NoiseScheduleVP("linear")
    model = module.model_wrapper(lambda x, t: network(weights, x, t[0]), schedule)
    solver = module.DPM_Solver(model, schedule, predict_x0=True)
    return solver.sample(
        x, steps=STEPS, t_start=1.0, t_end=1e-3, order=order, skip_type="time_uniform",
        method="multistep",
    )  # fmt: skip


def load(path):
    spec = importlib.util.spec_from_file_location("dpm_solver_jax", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Peer:
    """speed_peer.py in the other interpreter."""

    def __init__(self, python, path):
        script = Path(__file__).with_name("speed_peer.py")
        self.process = subprocess.Popen(
            [python, script, path, str(STEPS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        _, torch, diffusers = self._line().split()
        self.versions = {"torch": torch, "diffusers": diffusers}

    def _line(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the interpreter with torch and diffusers stopped; see its message")
        return line

    def ask(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._line()


def close(ours, theirs, tolerance=2e-3):
    gap = float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
    assert gap < tolerance, f"not the same sampler: samples differ by {gap} of their size"
    return gap


def one_size(width, depth, python, module, rounds):
    weights, x_T = make_weights(width, depth)
    device = jax.devices()[0]
    placed, x = on(device, weights), jax.device_put(x_T, device)
    denoiser, table = as_diffusers(placed)
    ours = functools.partial(jd.sample, denoiser, table, x)
    official = functools.partial(jd.sample, *as_official(placed), x)
    jitted = jax.jit(functools.partial(official_call, module))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.npz"
        np.savez(path, x_T=x_T, **weights)
        peer = Peer(python, path)
        peer.ask(f"save {folder}/x.npy")
        gaps = [close(ours(), np.load(f"{folder}/x.npy"))]

        def timer(call):
            return float(peer.ask(call)) if isinstance(call, str) else seconds(call)

        gaps.append(close(official(), np.asarray(jitted(placed, x))))
        bare(placed, x, STEPS)
        whole, its_whole = (
            functools.partial(jax.jit(jd.sample), d, jax.device_put(t), x)
            for d, t in ((denoiser, table), as_official(placed))
        )
        whole(), its_whole()
        found = {
            "ours / bare network": paired(ours, lambda: bare(placed, x, STEPS), rounds),
            "ours, jitted whole / bare network": paired(
                whole, lambda: bare(placed, x, STEPS), rounds
            ),
            "official JAX, jitted whole / ours, jitted whole": paired(
                lambda: jitted(placed, x), its_whole, rounds
            ),
            "official JAX, jitted whole / ours": paired(lambda: jitted(placed, x), official, rounds),
            "official JAX, jitted whole / bare network": paired(
                lambda: jitted(placed, x), lambda: bare(placed, x, STEPS), rounds
            ),
            "diffusers / ours": paired("sample", ours, rounds, timer),
            "diffusers / its bare network": paired("sample", "bare", rounds, timer),
            "torch's bare network / ours": paired(
                "bare", lambda: bare(placed, x, STEPS), rounds, timer
            ),
            "largest difference of the samples": gaps,
        }
        peer.process.stdin.close()
        peer.process.wait()
    return found, peer.versions


def other_solvers(module):
    """What a second solver of the same shape costs, and every call as the README writes it."""
    weights, x_T = make_weights(*SIZES["4 x 512"])
    placed, x = on(jax.devices()[0], weights), jnp.asarray(x_T)
    denoiser, table = as_official(placed)
    second = jd.solvers.deis(jd.grids.quadratic(jd.processes.vp_linear(), STEPS, t_min=1e-3), 2)
    counts, times = [], []
    for chosen in (table, second, second):
        before = len(compiled)
        times.append(seconds(lambda chosen=chosen: jd.sample(denoiser, chosen, x)))
        counts.append(len(compiled) - before)
    jitted = jax.jit(functools.partial(official_call, module))
    jax.block_until_ready(jitted(placed, x))
    official_call(module, placed, x)
    return {
        "ours, programs compiled by the first, a second and the second again": counts,
        "ours, first call of a second solver / its second call": round(times[1] / times[2], 2),
        "official JAX as its README calls it / jitted whole": paired(
            lambda: official_call(module, placed, x), lambda: jitted(placed, x), 5
        ),
    }


FIRST = {
    "jaxdiff": "import speed, jax; w, x = speed.make_weights(512, 4); "
    "d, t = speed.as_diffusers(speed.on(jax.devices()[0], w)); "
    "speed.jd.sample(d, t, x).block_until_ready()",
    "official JAX": "import sys, speed, jax; w, x = speed.make_weights(512, 4); "
    "w = speed.on(jax.devices()[0], w); "
    "speed.official_call(speed.load(sys.argv[1]), w, x).block_until_ready()",
}


def first_samples(python, dpm_solver, rounds=3):
    """Seconds from the start of a process to its first sample, imports and compilation included."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    weights, x_T = make_weights(512, 4)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/weights.npz", x_T=x_T, **weights)
        peer = [python, "speed_peer.py", f"{folder}/weights.npz", str(STEPS)]
        commands = {name: [sys.executable, "-c", code, dpm_solver] for name, code in FIRST.items()}
        times = {name: [] for name in (*commands, "diffusers")}
        for _ in range(rounds):
            for name in times:
                begin = time.perf_counter()
                subprocess.run(
                    commands.get(name, peer), check=True, env=environment, cwd=Path(__file__).parent,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                )  # fmt: skip
                times[name].append(time.perf_counter() - begin)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def main(python, dpm_solver, rounds):
    module = load(dpm_solver)
    sizes = {}
    for name, (width, depth) in SIZES.items():
        sizes[name], versions = one_size(width, depth, python, module, rounds)
    return {
        "peers": versions,
        "run time [quartiles]": sizes,
        "another solver": other_solvers(module),
        "seconds to the first sample, fresh process": first_samples(python, dpm_solver),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--diffusers", required=True, help="a Python with torch and diffusers")
    parser.add_argument("--dpm-solver", required=True, help="the official dpm_solver_jax.py")
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    dpm_solver = str(Path(given.dpm_solver).resolve())
    machine.write("speed", main(given.diffusers, dpm_solver, given.rounds))
