"""Guidance of a trained network, method by method: what it costs, what it changes.

    python benchmarks/guidance.py    # about 3 minutes on one core; results/guidance.{json,png}

250 digits of the larger network of tests/trained, DPM-Solver++(2M) with 10 steps (CFG++: DDIM with 10),
with labels or without. "asked" is the share that `jaxdiff.metrics.digit_classifier` gives the label it
was asked for, "sure" its mean largest probability, "frechet" the distance of its features from those
of all real digits (of samples of real digits of this size: the file's "floor"). "evaluations" are the
network's for a sample; the bad version of autoguidance, a tenth of the weights, is counted in full.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import matplotlib.pyplot as plt
import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from trained import digits  # noqa: E402

import jaxdiff as jd  # noqa: E402
from jaxdiff import guidance  # noqa: E402
from jaxdiff.acceleration import average_cost  # noqa: E402

COUNT, STEPS, NULL = 250, 10, digits.NULL
PROCESS = jd.processes.vp_cosine()
GRID = jd.grids.half_log_snr(PROCESS, STEPS)
TABLE = jd.solvers.dpm_solver_pp_multistep(GRID)
TWO = jd.solvers.ddim(GRID, outputs=2)
START = jax.random.normal(jax.random.key(0), (COUNT, 8, 8, 1))
BLOCKS = ("down_1_attention_0", "middle_attention")


def with_labels(net, bad):
    """{method: (denoiser, tableau)} for class-conditional samples."""
    labels = jnp.arange(64) % 10
    noise = jax.random.normal(jax.random.key(1), (64, 8, 8, 1))
    fit = guidance.fit_linear_ag(guidance.record_guidance(net, 4.0, NULL, TABLE, noise, labels))
    cfg = lambda s, **options: guidance.classifier_free(net, s, NULL, **options)  # noqa: E731
    return {
        "no guidance": (net, TABLE),
        "CFG 2": (cfg(2.0), TABLE),
        "CFG 4": (cfg(4.0), TABLE),
        "CFG 4, rescale 0.7": (cfg(4.0, rescale=0.7), TABLE),
        "CFG 4, noise 0.3 to 3": (guidance.limited(cfg(4.0), net, 0.3, 3.0, "noise_level"), TABLE),
        "CFG 1 to 7 (linear)": (cfg(guidance.schedules.linear(1.0, 7.0)), TABLE),
        "CFG++ 0.6": (guidance.cfg_plus_plus(net, 0.6, NULL), TWO),
        "projected 4, eta 0": (guidance.adaptive_projected(net, 4.0, NULL), TABLE),
        "adaptive 4, 0.99 after 5": (
            guidance.adaptive_guidance(net, 4.0, NULL, 0.99, 5, COUNT), TABLE
        ),
        "LinearAG 4": (guidance.linear_guidance(net, 4.0, NULL, fit, START), TABLE),
        "autoguidance 2": (guidance.autoguidance(net, bad, 2.0), TABLE),
    }  # fmt: skip


def without_labels(net, bad):
    """{method: (denoiser, tableau)} for unconditional samples."""
    found = {"no guidance": (net, TABLE)}
    for s in (1.0, 2.0):
        found[f"PAG {s:g}"] = (guidance.perturbed_attention(net, s, BLOCKS), TABLE)
    found["SAG 0.5"] = (guidance.self_attention_guidance(net, 0.5), TABLE)
    for s in (1.5, 2.0, 3.0):
        found[f"autoguidance {s:g}"] = (guidance.autoguidance(net, bad, s), TABLE)
    return found


def evaluations(denoiser, tableau, memory):
    if hasattr(memory, "evaluations"):
        return int(memory.evaluations)
    try:
        return round(average_cost(denoiser, tableau) * tableau.nfe)
    except TypeError:  # no parts of its own
        return denoiser.cost * tableau.nfe


def measure(methods, cond, real):
    classifier = jd.metrics.digit_classifier()
    rows, pictures = {}, {}
    for name, (denoiser, tableau) in methods.items():
        state = jd.sample(denoiser, tableau, START, cond=cond, save="state")
        x = np.clip(np.asarray(state.registers[0]), -1, 1)
        rows[name] = {
            "evaluations": evaluations(denoiser, tableau, state.memory),
            "asked": float(np.mean(classifier.predict(x) == np.asarray(cond))),
            "sure": float(np.mean(np.max(jax.nn.softmax(classifier.logits(x), -1), 1))),
            "frechet": jd.metrics.frechet_distance(classifier.features(x), real),
        }
        pictures[name] = x[:20]
        print(name, rows[name], flush=True)
    return rows, pictures


def draw(parts):
    lines = [(name, x) for pictures in parts for name, x in pictures.items()]
    figure, axes = plt.subplots(len(lines), 1, figsize=(9, 0.52 * len(lines)))
    for axis, (name, x) in zip(axes, lines):
        axis.imshow(np.concatenate(list(x[..., 0]), 1), cmap="gray", vmin=-1, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout(pad=0.3)
    figure.savefig(machine.RESULTS / "guidance.png", dpi=110, bbox_inches="tight")


def main():
    net, bad = digits.denoiser("large"), digits.denoiser("small")
    classifier = jd.metrics.digit_classifier()
    data = jd.data.digits("all")
    real = classifier.features(data.x)
    labelled, first = measure(with_labels(net, bad), jnp.arange(COUNT) % 10, real)
    free, second = measure(without_labels(net, bad), jnp.full(COUNT, NULL), real)
    for row in free.values():
        del row["asked"]
    draw([first, second])
    floor = jd.metrics.real_floor(classifier, COUNT, len(data))
    machine.write("guidance", {"floor": floor, "with labels": labelled, "without": free})


if __name__ == "__main__":
    main()
