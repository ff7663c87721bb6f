"""Log-likelihood by every estimator: error against cost on a mixture, bits a dimension of digits.

    python benchmarks/likelihood.py      # 10 minutes; results/likelihood.{json,png}

Mixture: 3 components in 16 dimensions, VP's linear schedule, 64 points, the exact denoiser and the
exact prior at t_max in float64; error is the root mean square over points in nats. Cost counts calls
of the denoiser and products with its Jacobian. Digits: the class-conditional network of tests/trained,
given the label, on held-out images with 17 levels, uniformly dequantised.
"""

import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import machine
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

import jaxdiff as jd
from jaxdiff import ode

DIM, POINTS, IMAGES = 16, 64, 64
PROCESS = jd.processes.vp_linear()


def pid(tolerance):
    return diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=ode.sample_norm)


def rms(error):
    return float(np.sqrt(np.mean(np.asarray(error) ** 2)))


def mixture():
    """{estimator: [{"cost", "rms", "bias"}, ...]} on a mixture near three planes."""
    rng = np.random.default_rng(0)
    bases = np.stack([np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] for _ in range(3)])
    covariances = (bases * np.array([1.0, 0.5] + [1e-3] * (DIM - 2))) @ bases.swapaxes(1, 2)
    denoiser = jd.gaussian_mixture(rng.normal(size=(3, DIM)), covariances, [0.3, 0.45, 0.25])
    exact = denoiser.params
    x0, _ = exact.sample(jax.random.key(0), (POINTS,))
    (a0, s0), (a1, s1) = (
        (float(PROCESS.alpha(t)), float(PROCESS.sigma(t))) for t in (PROCESS.t_min, PROCESS.t_max)
    )
    x = a0 * x0 + s0 * jax.random.normal(jax.random.key(1), x0.shape)
    truth = exact.log_density(x, a0, s0)
    options = {"prior": lambda x_T: exact.log_density(x_T, a1, s1), "key": jax.random.key(2)}

    def entry(cost, found, truth=truth):
        error = np.asarray(found - truth)
        return {"cost": int(cost), "rms": rms(error), "bias": float(error.mean())}

    figures = {}
    figures["exact trace"] = [
        entry(out.nfe, out.log_prob)
        for tolerance in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
        for out in [
            ode.log_likelihood(denoiser, PROCESS, x, stepsize_controller=pid(tolerance), **options)
        ]
    ]
    makers = {
        "Hutchinson, signs": ode.hutchinson,
        "Hutchinson, normal": lambda n: ode.hutchinson(n, "gaussian"),
        "Hutch++": ode.hutch_pp,
    }
    for name, make in makers.items():
        figures[name] = []
        for products in (1, 3, 6, 12):
            if name == "Hutch++" and products < 3:
                continue
            out = ode.log_likelihood(
                denoiser, PROCESS, x, trace=make(products), stepsize_controller=pid(1e-4), **options
            )
            figures[name].append(entry(out.nfe, out.log_prob))
    for name, reference in (("Ito, as published", None), ("Ito, with a reference", 1.0)):
        figures[name] = []
        for steps in (25, 100, 400):
            grid = jd.grids.half_log_snr(PROCESS, steps)
            table = jd.solvers.ddpm(grid)
            x_T = a1 * x0 + s1 * jax.random.normal(jax.random.key(3), x0.shape)
            control = jd.controls.ito_density(
                grid, table, denoiser, initial=exact.log_density(x_T, a1, s1), reference=reference
            )
            state = jd.sample(
                denoiser, table, x_T, jax.random.key(4), control=control, save="state"
            )
            end = exact.log_density(state.registers[0], a0, s0)
            figures[name].append(entry(steps, state.aux.log_density[0], end))
    # The bound is of the data, without the noise of t_min.
    clean = exact.log_density(x0, 1.0, 0.0)
    fitted = ode.importance_law(denoiser, PROCESS, x0, jax.random.key(7))
    for name, law in (("bound, uniform in lambda", None), ("bound, importance", fitted)):
        figures[name] = []
        for samples in (64, 512):
            out = ode.continuous_bound(
                denoiser, PROCESS, x0, jax.random.key(6), samples=samples, law=law
            )
            figures[name].append(entry(out.nfe, out.log_prob, clean))
    return figures


def digits():
    """Bits a dimension of held-out digits: by the flow, and by the bounds."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from trained.digits import denoiser, experiment

    data = jd.data.digits("test")
    pick = np.random.default_rng(0).permutation(len(data.x))[:IMAGES]
    x, cond = ode.to_levels(data.x[pick], 17), jnp.asarray(data.label[pick])
    process, dims, key = experiment("large").process, 64, jax.random.key(0)
    # The finest level has noise of a fifth of a grey level's width.
    t_min = float(process.time(-np.log(0.2 * ode.bin_width(17))))
    t_max = float(process.time(-4.5))
    network, figures = denoiser("large"), {}

    def record(name, cost, bits):
        bits = np.asarray(bits)
        figures[name] = {
            "bits_per_dim": float(bits.mean()), "standard_error": float(bits.std() / IMAGES**0.5),
            "cost": int(cost),
        }  # fmt: skip
        print(name, figures[name], flush=True)

    y = ode.uniform_dequantisation(key, x, 17)
    for name, trace in (
        ("flow, Hutchinson 4", ode.hutchinson(4)), ("flow, Hutch++ 12", ode.hutch_pp(12))
    ):  # fmt: skip
        out = ode.log_likelihood(
            network, process, y, cond=cond, trace=trace, key=key, t_min=t_min, t_max=t_max,
            stepsize_controller=pid(1e-3),
        )  # fmt: skip
        record(name, out.nfe, ode.bits_per_dim(out.log_prob, dims, 17))
        figures[name]["probe_error_bits"] = rms(out.standard_error) / dims / np.log(2)
    for decoder in ("categorical", "discretised_normal"):
        out = ode.continuous_bound(
            network, process, x, key, samples=64, cond=cond, t_min=t_min, t_max=t_max,
            decoder=decoder, levels=17,
        )  # fmt: skip
        record(f"bound, {decoder}", out.nfe, ode.bits_per_dim(out.log_prob, dims))
        figures[f"bound, {decoder}"]["reconstruction_bits"] = float(
            np.mean(out.reconstruction) / dims / np.log(2)
        )
    grid = jd.grids.half_log_snr(process, 100, t_min=t_min, t_max=t_max)
    out = ode.discrete_bound(
        network, grid, x, key, cond=cond, decoder="categorical", levels=17, variance="large"
    )
    record("bound, 100 steps", out.nfe, ode.bits_per_dim(out.log_prob, dims))
    return figures


def draw(figures, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, entries in figures.items():
        axis = axes[0] if name.startswith(("exact", "Hutch")) else axes[1]
        axis.loglog([e["cost"] for e in entries], [e["rms"] for e in entries], "o-", label=name)
    axes[0].set(title="log p(x) of given points", ylabel="RMS error, nats")
    axes[1].set(title="along a sampled path, and from below")
    for axis in axes:
        axis.set_xlabel("calls and Jacobian products a point")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with jax.enable_x64(True):
        found = mixture()
    draw(found, machine.RESULTS / "likelihood.png")
    machine.write("likelihood", {"mixture": found})
    machine.write("likelihood", {"mixture": found, "digits": digits()})
