"""PSNR and SSIM of every posterior sampler on real images: held-out digits and photographs.

    python benchmarks/restoration.py                # writes results/restoration.json, _digits.png, ...
    python benchmarks/restoration.py photographs    # these alone; the others as stored

Digits: the trained network of tests/trained, without labels, on 32 digits it never saw. Photographs: a
mixture of 8 Gaussians with full covariances of 12 x 12 patches of one photograph of scikit-learn's,
asked about 32 patches of the other. Three measurements of each, with noise of 0.05 for values in
[-1, 1]: two fifths of the pixels, means of 2 x 2, and a blur. About 50 evaluations; the methods and
strengths are those of benchmarks/inverse.py, the strength of each problem the one of the list that is
best by PSNR on 32 other images. One draw for each image, clipped to [-1, 1]; PSNR is the mean over
images, SSIM that of the sheet of all (a digit is smaller than SSIM's window).
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import inverse as samplers
import jax
import jax.numpy as jnp
import machine
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images
from sklearn.mixture import GaussianMixture

import jaxdiff as jd
from jaxdiff import inverse
from jaxdiff.denoisers import level

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from trained.digits import NULL, denoiser, experiment  # noqa: E402

COUNT, ROWS, NFE, STD, PATCH = 32, 4, 50, 0.05, 12
KEY = jax.random.key(0)
DRAWN = ("A^+ y", "DPS", "PiGDM, score", "MMPS, 3 iterations", "FlowChef", "DDRM", "DiffPIR")


class Images(NamedTuple):
    """A prior, and images to restore: to score, and others to choose strengths with, [32, h, w, 1]."""

    denoiser: jd.Denoiser
    process: Any
    cond: Any
    scored: np.ndarray
    others: np.ndarray


def digits():
    x = np.asarray(jd.data.digits("test").x, np.float32)
    x = x[np.random.default_rng(0).permutation(len(x))]
    process = experiment("large").process
    cond = jnp.full(COUNT, NULL)
    return Images(denoiser("large"), process, cond, x[:COUNT], x[COUNT : 2 * COUNT])


def photographs():
    rng = np.random.default_rng(0)

    def grey(photo):
        light = photo[:426] @ [0.299, 0.587, 0.114] / 127.5 - 1.0
        return light.reshape(213, 2, 320, 2).mean((1, 3))

    temple, flower = (grey(photo) for photo in load_sample_images().images)
    corners = zip(rng.integers(0, 213 - PATCH, 6000), rng.integers(0, 320 - PATCH, 6000))
    patches = np.stack([temple[i : i + PATCH, j : j + PATCH].ravel() for i, j in corners])
    fit = GaussianMixture(
        8, reg_covar=1e-4, max_iter=8, tol=0.2, init_params="random_from_data", random_state=0
    ).fit(patches)
    mixture = jd.gaussian_mixture(fit.means_, fit.covariances_, fit.weights_)

    def region(top, left):
        high, wide = ROWS, COUNT // ROWS
        whole = flower[top : top + high * PATCH, left : left + wide * PATCH]
        cut = whole.reshape(high, PATCH, wide, PATCH).transpose(0, 2, 1, 3)
        return cut.reshape(COUNT, PATCH, PATCH, 1).astype(np.float32)

    process = jd.processes.vp_linear()
    prior = jd.Denoiser(_mixture_x0, "x0", mixture.params, level)
    return Images(prior, process, None, region(60, 110), region(110, 110))


def _mixture_x0(mixture, x, levels):
    """E[x_0 | x_t] of images, by a mixture of vectors."""
    return mixture.denoise(x.reshape(len(x), -1), *levels[1:]).reshape(x.shape)


def problems(images):
    """{name: (measurement of the scored images, of the others)}; square matrices, of one structure."""
    shape, rng = images.scored.shape[1:], np.random.default_rng(1)
    found = {
        "inpainting": inverse.inpainting(rng.random(shape) < 0.4),
        "super-resolution": inverse.box_down(shape, 2),
        "deblurring": inverse.blur(shape, inverse.gaussian_kernel(5, 1.0)),
    }
    out = {}
    for name, operator in found.items():
        rows, size = np.asarray(operator.dense()), int(np.prod(shape))
        square = inverse.matrix(np.pad(rows, ((0, size - len(rows)), (0, 0))), shape)
        out[name] = [
            inverse.measure(square, x, STD, jax.random.key(seed))
            for seed, x in enumerate((images.scored, images.others))
        ]
    return out


def sheet(x):
    """All images in one, [rows h, columns w]."""
    n, h, w, _ = x.shape
    return x.reshape(ROWS, n // ROWS, h, w).transpose(0, 2, 1, 3).reshape(ROWS * h, -1)


def figures(x, truth):
    x = np.asarray(x, np.float64)
    if not np.all(np.isfinite(x)):
        return None
    x = np.clip(x, -1, 1)
    return {
        "psnr": float(jd.metrics.psnr(x, truth).mean()),
        "ssim": float(jd.metrics.ssim(sheet(x)[None], sheet(truth)[None])[0]),
    }


def runner(images, method) -> Callable[..., Any]:
    """(measurement, strength) -> samples, one program."""
    grid = jd.grids.half_log_snr(images.process, NFE // method.evaluations, t_max=0.98, end="zero")
    x_T = images.process.prior(jax.random.key(5), images.scored.shape)

    def run(denoiser, measurement, strength):
        guided, tableau, control = method.make(denoiser, grid, measurement, strength)
        return jd.sample(guided, tableau, x_T, key=KEY, cond=images.cond, control=control)

    return functools.partial(jax.jit(run), images.denoiser)


def restored(images, method, measurements):
    """({problem: figures}, {problem: samples})."""
    run, scores, pictures = runner(images, method), {}, {}
    for name, (scored, others) in measurements.items():
        strength = method.strengths[0]
        if len(method.strengths) > 1:
            found = {s: figures(run(others, s), images.others) for s in method.strengths}
            strength = max((s for s in found if found[s]), key=lambda s: found[s]["psnr"])
        x = np.asarray(run(scored, strength))
        scores[name], pictures[name] = figures(x, images.scored), x
        if len(method.strengths) > 1 and scores[name]:
            scores[name]["strength"] = strength
    return scores, pictures


def measured(name, images):
    """({method: {problem: figures}}, {method: {problem: samples}})."""
    measurements = problems(images)
    inverted = {p: np.asarray(m.operator.pinv(m.y)) for p, (m, _) in measurements.items()}
    scores = {"A^+ y": {p: figures(x, images.scored) for p, x in inverted.items()}}
    pictures = {"A^+ y": inverted}
    for method, made in samplers.METHODS.items():
        scores[method], pictures[method] = restored(images, made, measurements)
        print(name, method, {p: f and round(f["psnr"], 1) for p, f in scores[method].items()},
              flush=True)  # fmt: skip
    return scores, pictures


def draw(images, pictures, path):
    measured = list(pictures["A^+ y"])
    shown = ["true", *DRAWN]
    figure, axes = plt.subplots(len(shown), len(measured), figsize=(8, 1.3 * len(shown) + 0.4))
    for row, method in zip(axes, shown):
        for axis, problem in zip(row, measured):
            x = images.scored if method == "true" else pictures[method][problem]
            axis.imshow(sheet(np.clip(x, -1, 1)), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(method, fontsize=8)
    for axis, problem in zip(axes[0], measured):
        axis.set_title(problem, fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=90)


def main(names):
    sets = {"digits": digits, "photographs": photographs}
    for name in names or sets:
        images = sets[name]()
        scores, pictures = measured(name, images)
        machine.RESULTS.mkdir(exist_ok=True)
        draw(images, pictures, machine.RESULTS / f"restoration_{name}.png")
        path, stored = machine.RESULTS / "restoration.json", {}
        if path.exists():
            stored = json.loads(path.read_text())
        machine.write("restoration", {k: v for k, v in stored.items() if k in sets} | {name: scores})


if __name__ == "__main__":
    main(sys.argv[1:])
