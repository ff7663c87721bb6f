"""What the methods of `jaxdiff.acceleration` save, and what it costs.

    python benchmarks/acceleration.py            # a quarter of an hour on one core

Two networks of the digits (tests/trained), of 467,000 and 41,000 parameters: T-Stitch over the share of
the small one, Faster Diffusion over its key sets. A ring of eight Gaussians: DPM-OT and Denoising MCMC
against DDIM and Heun from pure noise at equal evaluations. Operations are those of matrix products and
convolutions (`jaxdiff.training.flops`); distances are sliced Wasserstein, beside those of real data.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxdiff as jd
from jaxdiff.acceleration import (
    PriorNoise,
    average_cost,
    denoising_langevin_gibbs,
    exact_levels,
    fit_map,
    key_rows,
    langevin_gibbs,
    propagate_encoder,
    row_switches,
    start_chain,
    stitch,
)
from jaxdiff.data import digits
from jaxdiff.metrics import conditional_accuracy, digit_classifier, sliced_wasserstein
from jaxdiff.training.flops import count

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import machine  # noqa: E402
from trained.digits import denoiser, experiment, variables  # noqa: E402

PROCESS = jd.processes.vp_cosine()
EDM = jd.processes.edm(0.01, 50.0)
ANGLES = np.arange(8) * np.pi / 4
MEANS = 2 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
WIDTH = 0.15


# --- digits ---------------------------------------------------------------------------------------


def operations(name: str) -> tuple[int, int]:
    """(encoder, decoder) of one evaluation of one image."""
    module, weights = experiment(name).module, variables(name)
    x, t, label = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, int)
    encode = functools.partial(module.apply, weights, method="encode")
    decode = functools.partial(module.apply, weights, method="decode")
    features = jax.eval_shape(encode, x, t, label)
    return count(encode, x, t, label), count(decode, features, t, label)


def quality(samples, label) -> dict:
    samples = np.clip(np.asarray(samples), -1, 1)
    distance = sliced_wasserstein(samples, digits("all").x, jax.random.key(1), 256)
    accuracy = conditional_accuracy(digit_classifier(), samples, np.asarray(label))
    return {"sliced_w2": round(distance, 4), "accuracy": round(accuracy, 3)}


def stitching(samples: int) -> list[dict]:
    tableau = jd.solvers.dpm_solver_pp_multistep(jd.grids.half_log_snr(PROCESS, 10))
    x = PROCESS.prior(jax.random.key(0), (samples, 8, 8, 1))
    label, costs = jnp.arange(samples) % 10, [sum(operations(n)) for n in ("small", "large")]
    rows = []
    for fraction in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        both = stitch([denoiser("small"), denoiser("large")], row_switches(tableau, fraction))
        found = quality(jd.sample(both, tableau, x, cond=label), label)
        cost = average_cost(both, tableau, costs)
        rows.append({"small": fraction, "operations": cost / costs[1], **found})
        print(rows[-1], flush=True)
    return rows


def propagation(samples: int) -> list[dict]:
    tableau = jd.solvers.ddim(jd.grids.uniform(PROCESS, 50, t_max=0.99, t_min=0.01))
    x = PROCESS.prior(jax.random.key(0), (samples, 8, 8, 1))
    label, plain = jnp.arange(samples) % 10, denoiser("large")
    down, up = operations("large")
    rows = []
    for keys in (1, 2, 5, 10, "50ls", "50ls2", "50ls3", "50ls4", "s2"):
        control = PriorNoise() if keys == "50ls" else None
        fast = propagate_encoder(plain, tableau, keys, x)
        encoded = len(key_rows(keys, 50))
        row = {"keys": str(keys), "encoder_runs": encoded}
        row |= {"operations": (encoded * down + 50 * up) / (50 * (down + up))}
        row |= quality(jd.sample(fast, tableau, x, cond=label), label)
        if control is not None:
            noisy = jd.sample(fast, tableau, x, cond=label, control=control)
            row["with_prior_noise"] = quality(noisy, label)
        rows.append(row)
        print(row, flush=True)
    return rows


# --- a ring of Gaussians --------------------------------------------------------------------------


def ring(process):
    return jd.gaussian_mixture(MEANS, [WIDTH] * 8, [1, 2] * 4, process)


def ring_quality(x, real) -> dict:
    x = np.asarray(x, np.float64).reshape(-1, 2)
    gap = np.min(np.linalg.norm(x[:, None] - MEANS, axis=-1), 1)
    return {
        "sliced_w2": round(sliced_wasserstein(x, real, jax.random.key(0), 64), 4),
        "off_mode": round(float(np.mean(gap > 4 * WIDTH)), 4),
    }


def heun_and_tweedie(steps, t_max):
    grid = jd.grids.karras(EDM, steps, t_max=t_max)
    return jd.solvers.denoise_to_zero(jd.solvers.heun(grid), grid)


# One function a number of steps: `build` is compared by identity.
BUILDS = {steps: functools.partial(heun_and_tweedie, steps) for steps in (1, 2, 4, 6)}


def exact_ring(real, samples: int) -> dict:
    """What as many real points get, the mean over draws."""
    draws = [np.roll(real, -i * samples, axis=0) for i in range(len(real) // samples)]
    found = [ring_quality(a[:samples], a[samples:]) for a in draws]
    means = {k: round(float(np.mean([row[k] for row in found])), 4) for k in found[0]}
    return {"method": "exact", "nfe": 0, **means}


def ring_curves(samples: int) -> list[dict]:
    vp = jd.processes.vp_linear()
    mixture = ring(EDM).params
    real = np.asarray(mixture.sample(jax.random.key(99), (60_000,))[0])
    rows = [exact_ring(real, samples)]

    def add(method, nfe, x):
        rows.append({"method": method, "nfe": nfe, **ring_quality(x, real)})
        print(rows[-1], flush=True)

    z, x_T = (p.prior(jax.random.key(1), (samples, 2)) for p in (vp, EDM))
    t = float(vp.time(0.0))
    data, _ = mixture.sample(jax.random.key(2), (512,))
    noise = jax.random.normal(jax.random.key(3), data.shape)
    transport = fit_map(vp.perturb(data, noise, t), jax.random.key(4)).map
    for nfe in (5, 10, 20, 40):
        grid = jd.grids.half_log_snr(vp, nfe)
        add("DDIM", nfe, jd.sample(ring(vp), jd.solvers.ddim(grid), z))
        short = jd.grids.half_log_snr(vp, nfe, t_max=t)
        add("DPM-OT", nfe, jd.sample(ring(vp), jd.solvers.ddim(short), transport(z)))
        grid = jd.grids.karras(EDM, nfe // 2)
        add("Heun", 2 * (nfe // 2), jd.sample(ring(EDM), jd.solvers.heun(grid), x_T))
    sigmas = np.geomspace(0.1, 2.0, 30)
    levels = exact_levels(mixture, sigmas)
    # Not counted: the starts, exact samples one a chain, and the 100 moves (see README).
    start, _ = mixture.sample(jax.random.key(5), (samples,))
    start = start + 0.5 * jax.random.normal(jax.random.key(6), start.shape)
    chain = start_chain(levels, start, jax.random.key(7))
    args = ring(EDM), EDM, levels, sigmas
    chain, _ = langevin_gibbs(*args, chain, jax.random.key(8), 100, 0.5, relative=True)
    for moves, steps in ((2, 1), (3, 2), (3, 4), (7, 6)):
        build = BUILDS[steps]
        found = denoising_langevin_gibbs(
            *args, chain, jax.random.key(9), build, 1, moves, 0.5, relative=True, select="last"
        )
        add("Denoising MCMC", moves + build(1.0).nfe, found.x)
    return rows


def draw(figures: dict) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    rows = figures["stitch"]
    axes[0].plot([r["operations"] for r in rows], [r["sliced_w2"] for r in rows], "o-")
    for r in rows:
        axes[0].annotate(f"{r['small']:g}", (r["operations"], r["sliced_w2"]), (4, 4),
                         textcoords="offset points", fontsize=8)  # fmt: skip
    axes[0].margins(0.1)
    axes[0].set_title("T-Stitch: share of steps of the small network", fontsize=10)
    for r in figures["encoder"]:
        axes[1].plot(r["operations"], r["sliced_w2"], "o", color="C0")
        name = {"1": "every step", "2": "every 2nd"}.get(r["keys"], r["keys"])
        name = f"every {name}th" if name.isdigit() else name
        axes[1].annotate(name, (r["operations"], r["sliced_w2"]), (4, 4),
                         textcoords="offset points", fontsize=8)  # fmt: skip
    axes[1].set_title("Faster Diffusion: rows that run the encoder", fontsize=10)
    axes[1].margins(0.1)
    axes[1].set_xlim(right=1.08)
    for axis in axes[:2]:
        axis.set_xlabel("operations, of the large network's")
        axis.set_ylabel("sliced W2 to the digits")
    rows = figures["ring"]
    for method in ("DDIM", "Heun", "DPM-OT", "Denoising MCMC"):
        own = [r for r in rows if r["method"] == method]
        axes[2].loglog([r["nfe"] for r in own], [r["sliced_w2"] for r in own], "o-", label=method)
    axes[2].axhline(rows[0]["sliced_w2"], color="grey", ls=":", label="as many real points")
    axes[2].set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    axes[2].minorticks_off()
    axes[2].set_xlabel("evaluations a sample")
    axes[2].set_ylabel("sliced W2 to the ring")
    axes[2].legend(fontsize=8)
    axes[2].set_title("Eight Gaussians", fontsize=10)
    figure.savefig(machine.RESULTS / "acceleration.png", dpi=130)


def main() -> None:
    names = ("small", "large")
    figures = {
        "operations": {n: dict(zip(("encoder", "decoder"), operations(n))) for n in names},
        "ring": ring_curves(8192),
        "stitch": stitching(500),
        "encoder": propagation(200),
    }
    draw(figures)
    machine.write("acceleration", figures)


if __name__ == "__main__":
    main()
