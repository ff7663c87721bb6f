"""What denoisers know: classes of held-out digits, information maps, intrinsic dimension.

    python benchmarks/diagnostics.py --images 100 --times 32    # 4 minutes of one core

writes results/diagnostics.{json,png}. The digits network is the larger of tests/trained: 467 thousand
weights, trained on 1,442 digits. Two concepts of a digit ("even", "has a loop") are decomposed with the
exact denoiser of a kernel density of training digits, whose concepts are sets of components.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import matplotlib.pyplot as plt
import numpy as np

import jaxdiff as jd
from jaxdiff import diagnostics
from jaxdiff.denoisers import level

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from trained import digits  # noqa: E402

KEY = jax.random.key(0)
STAGES = (((1, 5), (4, 1)), ((2, 4), (8, 1)), ((4, 3), (16, 1)))
FIT = 50


def tables(folder, images, times):
    """{name: [images, classes, times]} of the network, with and without shared noise."""
    held = jd.data.digits("test")
    t = diagnostics.even_times(digits.experiment("large").process, times)
    found = {}
    for name in ("shared", "own"):
        file = None if folder is None else Path(folder) / f"{name}.npy"
        if file is None or not file.exists():
            errors = np.asarray(diagnostics.class_errors(
                digits.denoiser("large"), digits.experiment("large").process, held.x[:images],
                np.arange(10), t, KEY, paired=name == "shared",
            ))  # fmt: skip
            if file is not None:
                np.save(file, errors)
        found[name] = errors if file is None else np.load(file)
    return found, held.label[:images]


def classification(folder, images, times):
    """Accuracy against evaluations an image."""
    process = digits.experiment("large").process
    held = jd.data.digits("test")
    errors, label = tables(folder, images, times)
    t = diagnostics.even_times(process, times)

    def accuracy(table, weights, rows=slice(None)):
        found = diagnostics.log_posterior(table, weights)
        return round(float(np.mean(found.argmax(1)[rows] == label[rows])), 4)

    curves = {}
    for count in 2 ** np.arange(int(np.log2(times)) + 1):
        some = np.arange(times // count // 2, times, times // count)
        weights = {
            name: diagnostics.time_weights(process, t[some], name) for name in ("simple", "elbo")
        }
        for noise, table in errors.items():
            for name, w in weights.items():
                line = curves.setdefault(f"{noise} noise, {name}", {})
                line[int(10 * count)] = accuracy(table[:, :, some], w)
        table = errors["shared"][:, :, some]
        fitted = diagnostics.fit_weights(table[:FIT], label[:FIT])
        line = curves.setdefault(f"shared noise, fitted to {FIT} (the others)", {})
        line[int(10 * count)] = accuracy(table, fitted, slice(FIT, None))
    line = curves["shared noise, in stages"] = {}
    for stages in STAGES:
        found = diagnostics.classify(
            digits.denoiser("large"), process, held.x[:images], np.arange(10), KEY, stages=stages
        )
        line[found.evaluations] = round(float(np.mean(found.index == label)), 4)
    trained = jd.metrics.digit_classifier().predict(held.x[:images])
    return {
        "images": images,
        "the classifier trained on the same digits": round(float(np.mean(trained == label)), 4),
        "accuracy by evaluations": curves,
    }


# --- information ----------------------------------------------------------------------------------

EVEN, LOOP = {0, 2, 4, 6, 8}, {0, 6, 8, 9}
SHOWN = (8, 6, 2, 9)


def _eps(params, x, levels, cond):
    mixture, table = params
    chosen = dataclasses.replace(mixture, log_weights=table[cond])
    return chosen.expected_noise(x, *levels[1:])


def concepts(each=60, scale=0.35):
    """The kernel density of training digits; cond: 0 none, 1 even (or odd), 2 loop (or none), 3 both.

    Conditions come in fours, one for every truth of (even, loop).
    """
    train = jd.data.digits("train")
    means = np.concatenate([train.x[train.label == c][:each].reshape(each, 64) for c in range(10)])
    sets = []
    for even in (True, False):
        for loop in (True, False):
            y1 = [(c in EVEN) == even for c in range(10)]
            y2 = [(c in LOOP) == loop for c in range(10)]
            sets += [np.ones(10), y1, y2, np.logical_and(y1, y2)]
    share = np.repeat(np.asarray(sets, float), each, axis=1)
    with np.errstate(divide="ignore"):
        table = jnp.asarray(np.log(share / share.sum(1, keepdims=True)), jnp.float32)
    mixture = jd.gaussian_mixture(means, np.full(10 * each, scale), np.ones(10 * each)).params
    return jd.Denoiser(_eps, "eps", (mixture, table), level)


def information():
    """Maps of held-out digits: (images, the network's i(x; label), the parts of two concepts)."""
    held = jd.data.digits("test")
    x = np.stack([held.x[held.label == c][1] for c in SHOWN])
    process = digits.experiment("large").process
    nodes = diagnostics.logistic_nodes(process, 50, loc=0.0, scale=2.0)
    label = diagnostics.pointwise_information(
        digits.denoiser("large"), process, x, np.array(SHOWN), digits.NULL, nodes, KEY, draws=4,
        by_element=True, form="orthogonal",
    )  # fmt: skip
    first = 4 * np.array([2 * (c not in EVEN) + (c not in LOOP) for c in SHOWN])
    nodes = diagnostics.logistic_nodes(process, 80, loc=0.0, scale=2.0)
    parts = diagnostics.partial_information(
        concepts(), process, x.reshape(-1, 64), first + 1, first + 2, first + 3, 0 * first, nodes,
        KEY, draws=8, by_element=True, form="orthogonal",
    )  # fmt: skip
    return x, label, [np.asarray(part).reshape(x.shape) for part in parts]


# --- dimension ------------------------------------------------------------------------------------

SIGMAS = (0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.7)


def _on_sphere(dimension, ambient, count=16):
    y = np.random.default_rng(0).normal(size=(count, dimension + 1))
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return np.pad(y, ((0, 0), (0, ambient - dimension - 1))).astype(np.float32)


def dimension():
    """Mean estimates against sigma of a variance-preserving process."""
    process = jd.processes.vp_cosine()
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0][:, :2]
    plane = jd.gaussian_mixture(np.zeros((1, 6)), (basis @ basis.T)[None], np.ones(1))
    held = jd.data.digits("test").x[:6]
    cases = {
        "circle in 3 dimensions": (diagnostics.sphere(1, 3), _on_sphere(1, 3), None),
        "sphere in 5": (diagnostics.sphere(2, 5), _on_sphere(2, 5), None),
        "plane in 6": (plane, plane.params.sample(KEY, (16,))[0], None),
        "digits in 64 (network)": (digits.denoiser("large"), held, np.full(6, digits.NULL)),
    }
    found = {}
    for name, (denoiser, x, cond) in cases.items():
        probes = {} if cond is None else {"probes": 16, "key": KEY}
        found[name] = {}
        for sigma in SIGMAS:
            t = float(process.time(0.5 * np.log(1 / sigma**2 - 1)))
            value = diagnostics.flipd(denoiser, process, x, t, cond, **probes)
            count = 256 if cond is not None else None
            bundle = diagnostics.normal_bundle(denoiser, process, x, t, KEY, cond, count)
            found[name][sigma] = {
                "flipd": round(float(np.mean(value)), 3),
                "normal bundle": round(float(np.mean(bundle.dimension)), 3),
            }
    return found


# --- the picture ----------------------------------------------------------------------------------


def draw(classes, maps, dimensions, path):
    figure = plt.figure(figsize=(13, 8.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    left, right = top.subplots(1, 2)
    for name, line in classes["accuracy by evaluations"].items():
        style = "o-" if "shared" in name else "x--"
        left.semilogx(list(line), list(line.values()), style, ms=4, lw=1.2, label=name)
    left.axhline(
        classes["the classifier trained on the same digits"], color="k", lw=0.8,
        label="classifier trained on the same digits",
    )  # fmt: skip
    left.set(xlabel="network evaluations an image", ylabel="accuracy on held-out digits")
    left.grid(alpha=0.3)
    left.legend(fontsize=7.5)
    for color, (name, line) in zip(("C0", "C1", "C2", "C3"), dimensions.items()):
        for what, style in (("flipd", "o-"), ("normal bundle", "s:")):
            values = [entry[what] for entry in line.values()]
            right.loglog(list(line), values, style, color=color, ms=4, lw=1.2,
                         label=f"{name}: {what}")  # fmt: skip
    right.set(xlabel="sigma", ylabel="estimated dimension", yticks=(1, 2, 4, 8, 16, 32, 64),
              yticklabels=(1, 2, 4, 8, 16, 32, 64))  # fmt: skip
    right.minorticks_off()
    right.grid(alpha=0.3)
    right.legend(fontsize=7, ncols=2)
    x, label, parts = maps
    titles = (
        "digit", "i(x; label), network", "redundancy", 'unique: "even / odd"',
        'unique: "loop / none"', "synergy",
    )  # fmt: skip
    axes = bottom.subplots(len(x), len(titles))
    limit = max(np.abs(part).max() for part in parts)
    for row in range(len(x)):
        images = (x[row], label[row], *(part[row] for part in parts))
        for column, (axis, image) in enumerate(zip(axes[row], images)):
            kind = {"cmap": "gray"} if column == 0 else (
                {"cmap": "magma", "vmin": 0, "vmax": label.max()} if column == 1
                else {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
            )  # fmt: skip
            axis.imshow(image[..., 0], **kind)
            axis.set(xticks=[], yticks=[])
            if column:
                axis.set_xlabel(f"{image.sum():.1f} nats", fontsize=7, labelpad=1)
            if row == 0:
                axis.set_title(titles[column], fontsize=9)
    figure.savefig(path, dpi=110)


def main(folder, images, times):
    maps = information()
    dimensions = dimension()
    classes = classification(folder, images, times)
    draw(classes, maps, dimensions, machine.RESULTS / "diagnostics.png")
    _, label, parts = maps
    names = ("redundancy", "unique: even", "unique: loop", "synergy")
    machine.write("diagnostics", {
        "classification": classes,
        "nats about a digit": {
            str(c): {"label (network)": round(float(label[i].sum()), 2)} | {
                name: round(float(part[i].sum()), 2) for name, part in zip(names, parts)
            }
            for i, c in enumerate(SHOWN)
        },
        "dimension by sigma": dimensions,
    })  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", help="a folder that keeps the tables of errors, to go on there")
    parser.add_argument("--images", type=int, default=300, help="held-out digits")
    parser.add_argument("--times", type=int, default=64, help="draws of noise, a power of 2")
    given = parser.parse_args()
    main(given.keep, given.images, given.times)
