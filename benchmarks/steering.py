"""Distance to known targets against particles: weights for annealing, guidance, products and rewards.

    python benchmarks/steering.py

One-dimensional mixtures with exact scores, so every target density is known. 8,192 samples in groups of
k particles; a group is resampled for itself, and its weighted particles count as one sample of size k.
Total variation to the truth over 40 bins. Writes results/steering.{json,png}; two minutes on one core.
"""

import jax
import jax.numpy as jnp
import machine
import matplotlib.pyplot as plt
import numpy as np

import jaxdiff as jd
from jaxdiff.guidance import product
from jaxdiff.steering import corrector, fk_steering, start

TOTAL, STEPS = 8192, 250
PARTICLES = (1, 4, 16, 64, 256, 1024)
PROCESS = jd.processes.edm(0.01, 20.0)
GRID = jd.grids.karras(PROCESS, STEPS)
TABLE = jd.solvers.euler_maruyama(GRID)
MEANS, STDS = [[-1.5], [0.5], [2.0]], [0.5, 0.3, 0.6]
PLACES, EDGES = np.linspace(-5, 5, 20_001), np.linspace(-4, 5, 41)
KEYS = jax.random.split(jax.random.key(0), 3)


def mixture(weights):
    return jd.gaussian_mixture(MEANS, STDS, weights, prediction="eps")


WHOLE, PART = mixture([0.3, 0.3, 0.4]), mixture([0.1, 0.3, 0.6])


def log_density(model):
    return np.asarray(model.params.log_density(jnp.asarray(PLACES[:, None]), 1.0, 0.0), np.float64)


def masses(log_p):
    """Of the bins, under the normalised density."""
    cdf = np.cumsum(np.exp(log_p - log_p.max()))
    return np.diff(np.interp(EDGES, PLACES, cdf / cdf[-1]))


def variation(x, log_weights, particles, truth):
    log_weights = np.asarray(log_weights, np.float64).reshape(-1, particles)
    w = np.exp(log_weights - log_weights.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True) * len(w)
    found = np.histogram(np.asarray(x)[:, 0], EDGES, weights=w.ravel())[0]
    return 0.5 * float(np.abs(found - truth).sum() + abs((1 - found.sum()) - (1 - truth.sum())))


def corrected(models, exponents, particles, tau=1.0, **options):
    composed = product(models, exponents, keep_parts=True)
    sampler = jd.solvers.euler_maruyama(GRID, tau)
    table, control = corrector(composed, GRID, sampler, particles, **options)
    x_T = start(composed, PROCESS, KEYS[0], (TOTAL, 1))
    return sampled(composed, table, x_T, control)


def sampled(denoiser, table, x_T, control):
    noise = jax.random.normal(KEYS[2], (table.draws, *x_T.shape))
    state = jd.sample(
        denoiser, table, x_T, KEYS[1], noise=noise, control=control, save="state"
    )  # fmt: skip
    return state.registers[0], state.aux.log_weights


def bump(x):
    return -0.5 * (x[:, 0] - 3.0) ** 2


def steered(particles, rows):
    x_T = PROCESS.prior(KEYS[0], (TOTAL, 1))
    control = fk_steering(
        WHOLE, TABLE, bump, 1.5, rows=rows, particles=particles, finish="weights"
    )
    return sampled(WHOLE, TABLE, x_T, control)


def main():
    problems = {
        "annealing, q^2": ([WHOLE], [2.0]),
        "guidance, scale 4": ([WHOLE, PART], [-3.0, 4.0]),
        "product, q1 q2": ([WHOLE, PART], [1.0, 1.0]),
    }
    figures = {}
    for name, (models, exponents) in problems.items():
        log_p = sum(b * log_density(m) for m, b in zip(models, exponents))
        truth = masses(log_p)
        methods = {
            "resampling": {}, "importance weights": {"threshold": 0.0},
            "birth and death": {"scheme": "birth_death"}, "resampling, tau = 3": {"tau": 3.0},
        }  # fmt: skip
        figures[name] = {
            method: [
                variation(*corrected(models, exponents, k, **options), k, truth) for k in PARTICLES
            ]
            for method, options in methods.items()
        } | floor(truth)
    tilted = log_density(WHOLE) + 1.5 * np.asarray(bump(PLACES[:, None]))
    truth = masses(tilted)
    rows = range(24, STEPS - 1, 25)
    figures["reward, 1.5 r(x)"] = {
        "resampling": [variation(*steered(k, rows), k, truth) for k in PARTICLES],
        "importance weights": [variation(*steered(k, ()), k, truth) for k in PARTICLES],
    } | floor(truth)
    machine.write("steering", {
        "total samples": TOTAL, "steps": STEPS, "particles": list(PARTICLES),
        "total variation to the target": figures,
    })  # fmt: skip
    draw(figures)


def floor(truth):
    """What as many exact samples have, on average."""
    rng, rest = np.random.default_rng(0), 1 - truth.sum()
    drawn = rng.multinomial(TOTAL, [*truth, rest], size=50) / TOTAL
    return {"exact samples": float(np.mean(0.5 * np.abs(drawn - [*truth, rest]).sum(1)))}


def draw(figures):
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True)
    for axis, (name, methods) in zip(axes, figures.items()):
        for method, values in methods.items():
            if method == "exact samples":
                axis.axhline(values, color="0.6", linestyle=":", label="exact samples")
            else:
                axis.plot(PARTICLES, values, marker="o", markersize=4, label=method)
        axis.set(title=name, xlabel="particles in a group", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("total variation to the target")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(machine.RESULTS / "steering.png", dpi=110)


if __name__ == "__main__":
    main()
