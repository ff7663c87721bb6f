"""Gradients through sampling: their error, the memory they take and their time, by adjoint.

    python benchmarks/gradients.py      # about 10 minutes; writes results/gradients.json and .png

A small network on 8 x 8 digits, trained here (vp_cosine, v prediction); a loss of 128 samples, with
respect to all parameters and x_T; uniform times from 0.98 to 0.02. Errors are relative, in float32,
against DirectAdjoint in float64 on the same steps, and against the gradient of the flow itself. Memory
is what XLA reserves besides arguments and results, in states (128 x 64 float32 numbers). Time is the
process's own on all cores, as a ratio over interleaved pairs.
"""

import sys
import time
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import machine
import matplotlib.pyplot as plt
import numpy as np
import optax
from optax.projections import projection_box
from pairs import paired

import jaxdiff as jd
from jaxdiff.gradients import ReversibleAdjoint, adjoint_dpm, optimize
from jaxdiff.metrics import digit_classifier

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from trained.digits import denoiser, experiment  # noqa: E402

PROCESS = jd.processes.vp_cosine()
ROWS, BATCH = (16, 64, 256), 128
LABELS = np.arange(BATCH) % 10
MODULE = jd.models.MLP(width=128, depth=2, num_classes=10)
SAMPLERS = {
    "bdia": jd.solvers.bdia,
    "edict": lambda grid: jd.solvers.edict(jd.grids.uniform(PROCESS, grid.steps // 2, **SPAN)),
    "belm": lambda grid: jd.solvers.belm(grid, "v"),
}
SPAN = {"t_max": 0.98, "t_min": 0.02}
ADJOINTS = {
    "direct": diffrax.DirectAdjoint(),
    "recursive checkpointing": diffrax.RecursiveCheckpointAdjoint(),
    "reversible": ReversibleAdjoint(),
}
METHODS = [
    ("direct", "bdia"), ("recursive checkpointing", "bdia"), ("reversible", "bdia"),
    ("reversible", "edict"), ("reversible", "belm"), ("backsolve", "flow"),
]  # fmt: skip


def error_of_v(variables, images, labels, key):
    """The mean squared error of v, of 128 digits at one level each."""
    keys = jax.random.split(key, 3)
    chosen = jax.random.choice(keys[0], len(images), (BATCH,))
    t = jax.random.uniform(keys[1], (BATCH,), minval=0.02, maxval=0.98)
    alpha, sigma = PROCESS.alpha(t)[:, None], PROCESS.sigma(t)[:, None]
    x_0, eps = images[chosen], jax.random.normal(keys[2], (BATCH, 64))
    v = MODULE.apply(variables, alpha * x_0 + sigma * eps, t, labels[chosen])
    return jnp.mean((v - (alpha * eps - sigma * x_0)) ** 2)


def trained():
    digits = jd.data.digits("train")
    images = digits.x.reshape(-1, 64)
    start = MODULE.init(jax.random.key(0), images[:1], jnp.zeros(1), digits.label[:1])
    return optimize(
        error_of_v,
        start,
        optax.adam(1e-3),
        2000,
        args=(images, digits.label),
        key=jax.random.key(1),
    ).value


def sampler(method, steps, rows):
    """x_0 = f(denoiser, x_T), and the times of a continuous one."""
    if steps == "flow":
        t = jd.grids.uniform(PROCESS, rows // 2, **SPAN).t  # Heun's method: two evaluations a step
        options = adjoint_dpm(PROCESS, t)
        if method != "backsolve":
            options["adjoint"] = ADJOINTS[method]
        return lambda learned, x: (
            jd.ode.solve(learned, PROCESS, x, t[0], t[-1], cond=LABELS, **options).x
        )
    tableau = SAMPLERS[steps](jd.grids.uniform(PROCESS, rows, **SPAN))
    return lambda learned, x: jd.sample(learned, tableau, x, cond=LABELS, adjoint=ADJOINTS[method])


def gradient(variables, x_T, run):
    """A compiled call for the gradient of a loss, and its temporary memory in bytes."""

    def loss(inputs):
        variables, x = inputs
        out = run(jd.models.from_linen(MODULE, variables, "v"), x)
        return jnp.mean((out - 0.3) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower((variables, x_T)).compile()
    return lambda: compiled((variables, x_T)), compiled.memory_analysis().temp_size_in_bytes


def relative(got, exact):
    """Relative errors of the gradients with respect to the parameters and to x_T."""
    vectors = [
        [np.concatenate([np.ravel(a) for a in jax.tree.leaves(part)]).astype(np.float64)
         for part in tree]
        for tree in (got, exact)
    ]  # fmt: skip
    return [float(np.linalg.norm(g - e) / np.linalg.norm(e)) for g, e in zip(*vectors)]


def in_float64(variables, x_T, run):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (variables, x_T))
        return jax.device_get(gradient(*wide, run())[0]())


def cpu_seconds(call):
    """Processor time of one call: the machine may be shared."""
    begin = time.process_time()
    jax.block_until_ready(call())
    return time.process_time() - begin


def table(variables, rounds=7):
    x_T = PROCESS.prior(jax.random.key(2), (BATCH, 64))

    def fine():
        grid = jd.grids.uniform(PROCESS, 2000, **SPAN)
        tableau = jd.solvers.dpm_solver_pp_multistep(grid, order=2)
        return lambda learned, x: jd.sample(learned, tableau, x, cond=LABELS)

    flow = in_float64(variables, x_T, fine)
    out = []
    for rows in ROWS:
        exact = {
            steps: in_float64(variables, x_T, lambda s=steps: sampler("direct", s, rows))  # noqa: B023
            for steps in {steps for _, steps in METHODS}
        }
        direct = None
        for method, steps in METHODS:
            call, memory = gradient(variables, x_T, sampler(method, steps, rows))
            got = call()
            direct = direct or call
            (theta, noise), (theta_flow, _) = relative(got, exact[steps]), relative(got, flow)
            out.append({
                "adjoint": method, "sampler": steps, "rows": rows,
                "error, parameters": theta, "error, x_T": noise, "error to the flow": theta_flow,
                "memory [states]": memory / (4 * BATCH * 64),
                "time / direct [quartiles]": paired(call, direct, rounds, cpu_seconds),
            })  # fmt: skip
            print(out[-1], flush=True)
    return out


def logits(params, x):
    """`metrics.digit_classifier` in JAX."""
    hidden = x.reshape(len(x), -1)
    for name in ("Dense_0", "Dense_1"):
        layer = params["params"][name]
        hidden = jax.nn.silu(hidden @ layer["kernel"] + layer["bias"])
    last = params["params"]["Dense_2"]
    return hidden @ last["kernel"] + last["bias"]


def surprise(x_T, network, classifier, cond, wanted):
    x_0 = jd.sample(network, TABLEAU, x_T, cond=cond, adjoint=ReversibleAdjoint())
    likely = jax.nn.log_softmax(logits(classifier, jnp.clip(x_0, -1, 1)))
    return -jnp.take_along_axis(likely, wanted[:, None], 1).sum()


TABLEAU = jd.solvers.bdia(jd.grids.half_log_snr(PROCESS, 16, t_max=0.98, t_min=0.02))


def noise_for_another_digit(bound=0.8, steps=80):
    """Samples of the digit UNet before and after their noise, moved by at most `bound` a number, is
    optimised for the classifier to see the digit after the one that was asked for."""
    network, classifier = denoiser("small"), digit_classifier()
    cond = np.arange(40) % 10
    wanted = (cond + 1) % 10
    x_T = experiment("small").process.prior(jax.random.key(3), (40, 8, 8, 1))
    low, high = x_T - bound, x_T + bound
    found = optimize(
        surprise, x_T, optax.adam(0.1), steps, args=(network, classifier.params, cond, wanted),
        project=lambda x: projection_box(x, low, high),
    )  # fmt: skip
    pictures = [
        np.clip(jd.sample(network, TABLEAU, x, cond=cond), -1, 1) for x in (x_T, found.value)
    ]
    seen = [classifier.predict(p) for p in pictures]
    return pictures, {
        "bound": bound, "steps": steps, "samples": len(cond),
        "classified as asked for, before": float(np.mean(seen[0] == cond)),
        "classified as wanted, before": float(np.mean(seen[0] == wanted)),
        "classified as wanted, after": float(np.mean(seen[1] == wanted)),
        "mean -log p(wanted), before and after": [
            float(found.losses[0] / 40), float(found.losses[-1] / 40)
        ],
    }  # fmt: skip


def draw(rows, pictures):
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), width_ratios=(1, 1, 1, 1.3))
    for method, steps in METHODS:
        own = [row for row in rows if (row["adjoint"], row["sampler"]) == (method, steps)]
        series = (
            [row["memory [states]"] for row in own], [row["error, parameters"] for row in own],
            [row["time / direct [quartiles]"][1] for row in own],
        )  # fmt: skip
        for axis, values in zip(axes, series):
            axis.plot(ROWS, values, "o-", label=f"{method}, {steps}")
    titles = ("temporary memory [states]", "relative error, parameters", "time / direct")
    for axis, title in zip(axes, titles):
        axis.set(xscale="log", title=title, xlabel="evaluations a sample")
        axis.set_xticks(ROWS, map(str, ROWS))
        axis.minorticks_off()
    axes[0].set_yscale("log"), axes[1].set_yscale("log"), axes[2].set_ylim(0, 1.1)
    axes[0].legend(fontsize=7)
    before, after = (np.pad(p[:10, :, :, 0], ((0, 0), (1, 1), (1, 1))) for p in pictures)
    lines = [np.concatenate(list(p[half]), 1) for half in (slice(0, 5), slice(5, 10))
             for p in (before, after)]  # fmt: skip
    axes[3].imshow(np.concatenate(lines), cmap="gray", vmin=-1, vmax=1)
    axes[3].set(title="samples; under each: optimised noise", xticks=[],
                yticks=[])  # fmt: skip
    figure.tight_layout()
    figure.savefig(machine.RESULTS / "gradients.png", dpi=110)


if __name__ == "__main__":
    pictures, noise = noise_for_another_digit()
    print(noise, flush=True)
    rows = table(trained())
    draw(rows, pictures)
    machine.write("gradients", {"adjoints": rows, "noise for another digit": noise})
