"""Editing held-out digits to another class: what stays and what changes, method by method.

    python benchmarks/editing.py    # about 4 minutes on one core; results/editing.{json,png}

Each of 120 digits of the test split is edited to the class five further. "kept" is the root mean
square distance to the digit that was edited, "class" the share that `jaxdiff.metrics.digit_classifier`
gives the target's class. Two denoisers: the exact one of narrow Gaussians on the training digits, and
the larger trained network of tests/trained. Evaluations are counted for a sample, inversion included.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import matplotlib.pyplot as plt
import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import exact_digits  # noqa: E402
from trained import digits  # noqa: E402

import jaxdiff as jd  # noqa: E402
from jaxdiff import editing  # noqa: E402

KEY, STEPS, COUNT = jax.random.key(0), 40, 120
SKIPS = (0, 12, 20, 24, 28)
PROCESS = jd.processes.vp_cosine()
GRID = jd.grids.half_log_snr(PROCESS, STEPS, t_max=0.995, t_min=0.01)


def edits(denoiser, x0, source, target):
    """{method: (evaluations, edited)}."""
    found = {}
    for skip in SKIPS:
        grid = jd.grids.from_times(PROCESS, GRID.t[skip:])
        back = jd.sample(denoiser, jd.solvers.ddim(grid.reversed()), x0, cond=source)
        y = jd.sample(denoiser, jd.solvers.ddim(grid), back, cond=target)
        found[f"DDIM inversion, skip {skip}"] = 2 * grid.steps, y
    ddpm = jd.solvers.ddim(GRID, eta=1.0)
    for name, encode in (
        ("edit-friendly", editing.edit_friendly), ("CycleDiffusion", editing.dpm_encoder),
    ):  # fmt: skip
        code = encode(denoiser, ddpm, x0, KEY, source)
        for skip in SKIPS:
            y = editing.replay(denoiser, ddpm, code, target, skip)
            found[f"{name}, skip {skip}"] = 2 * (STEPS - skip), y
    for steps in (2, 4, 12, 40):
        grid = jd.grids.half_log_snr(PROCESS, steps, t_max=0.995, end="zero")
        y = editing.ddcm(denoiser, grid, x0, KEY, source, target)
        found[f"DDCM, {steps} steps"] = 2 * steps, y
    return found


def main():
    test = jd.data.digits("test")
    x, labels = test.x[:COUNT], test.label[:COUNT]
    target = (labels + 5) % 10
    classifier = jd.metrics.digit_classifier()
    others = np.stack([test.x[COUNT:][np.flatnonzero(test.label[COUNT:] == k)[0]] for k in target])

    def measure(y):
        y = np.clip(np.asarray(y), -1, 1)
        kept = np.sqrt(np.mean((y - x) ** 2, (1, 2, 3))).mean()
        return {"kept": float(kept), "class": float(np.mean(classifier.predict(y) == target))}

    train = jd.data.digits("train")
    models = {
        "exact": exact_digits.denoiser(train.x, train.label), "network": digits.denoiser("large"),
    }  # fmt: skip
    table = {"another digit of the class": measure(others)}
    for model, denoiser in models.items():
        arrays = jnp.asarray(x), jnp.asarray(labels), jnp.asarray(target)
        for name, (evaluations, y) in edits(denoiser, *arrays).items():
            row = {"evaluations": evaluations, **measure(y)}
            table.setdefault(name, {})[model] = row
            print(model, name, row, flush=True)
    machine.write("editing", {"steps": STEPS, "digits": COUNT, "edits": table})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    families = ("DDIM inversion", "edit-friendly", "CycleDiffusion", "DDCM")
    for axis, model in zip(axes, models):
        for family, marker in zip(families, "os^D"):
            rows = [row[model] for name, row in table.items() if name.startswith(family)]
            points = [(row["kept"], row["class"]) for row in rows]
            axis.plot(*zip(*points), marker=marker, label=family)
        axis.axvline(table["another digit of the class"]["kept"], color="0.7", lw=1)
        axis.set(title=model, xlabel="distance to the edited digit")
    axes[0].set_ylabel("share of the target's class")
    axes[0].legend(fontsize=8)
    figure.savefig(machine.RESULTS / "editing.png", dpi=110)


if __name__ == "__main__":
    main()
