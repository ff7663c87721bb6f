"""Flows with known ends, to fit samplers to: mixtures, guided and not, and the digits network."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from quality import DIMS, PROCESSES, mixture

import jaxdiff as jd
from jaxdiff.denoisers import level
from jaxdiff.generation import balanced_labels
from jaxdiff.training.run import read_experiment, restore

GUIDED, DIGITS = "VP, 16-D, guidance", "digits network, guidance"
FITTED = 2.0  # the guidance scale to fit at


class Problem(NamedTuple):
    """A flow: its denoiser (of a guidance scale) and starts with their ends."""

    process: jd.processes.Process
    span: tuple[float, float]
    denoiser: Callable  # guidance scale -> Denoiser
    x: np.ndarray
    cond: np.ndarray | None
    ends: Callable  # guidance scale -> where the starts end
    fit: slice
    held: slice
    fresh: slice
    steps: int  # of Adam
    searched: int = 256  # starts to fit to that a search takes

    def data(self, part, scale):
        """Of some starts: (x, ends, cond)."""
        cond = None if self.cond is None else self.cond[part]
        return self.x[part], self.ends(scale)[part], cond

    def grid(self, name, steps):
        spacing = {
            "logistic": functools.partial(jd.grids.logistic, exponent=0.75),
            "half-log-SNR": jd.grids.half_log_snr, "quadratic": jd.grids.quadratic,
        }[name]  # fmt: skip
        return spacing(self.process, steps, t_max=self.span[0], t_min=self.span[1])

    def some(self, count=None):
        """The first starts to fit to, `count` at most; by default those that a search takes."""
        return slice(min(count or self.searched, self.fit.stop))

    def error(self, table, part, scale):
        x, ends, cond = self.data(part, scale)
        gap = np.asarray(jd.sample(self.denoiser(scale), table, x, cond=cond), np.float64) - ends
        return float(np.median(np.sqrt(np.mean(gap.reshape(len(gap), -1) ** 2, 1))))

    def best_of(self, tables, scale):
        """The table that does best on the held-out starts."""
        return min(tables, key=lambda t: np.nan_to_num(self.error(t, self.held, scale), nan=np.inf))


def of_mixture(kind, dim):
    process, t_max, t_min = PROCESSES[kind]
    mix = mixture(dim)
    levels = [(float(process.alpha(t)), float(process.sigma(t))) for t in (t_max, t_min)]
    x = mix.sample(np.random.default_rng(1000 + dim), 1792, *levels[0])
    ends = mix.flow(x, *levels)
    denoiser = jd.gaussian_mixture(mix.means, mix.std, mix.weights, process)
    return Problem(
        process, (t_max, t_min), lambda scale: denoiser, x.astype(np.float32), None,
        lambda scale: ends, slice(1024), slice(1024, 1280), slice(1280, None), 800,
    )  # fmt: skip


def _conditional(params, x, levels, cond):
    """E[x0 | x] of the whole mixture (cond 0), or of a quarter of its components (cond 1)."""
    whole, part = (m.denoise(x, *levels[1:]) for m in params)
    return jnp.where(cond[:, None] == 1, part, whole)


def _many_steps(denoiser, process, span, x, cond, steps=1000):
    grid = jd.grids.half_log_snr(process, steps, t_max=span[0], t_min=span[1])
    table = jd.solvers.build("dpm_solver_pp_2m", grid)
    return np.asarray(jd.sample(denoiser, table, x, cond=cond), np.float64)


def of_guidance():
    process, *span = next(iter(PROCESSES.values()))
    mix = mixture(16)
    whole = jd.gaussian_mixture(mix.means, mix.std, mix.weights)
    part = jd.gaussian_mixture(mix.means[:4], mix.std[:4], np.ones(4))
    inner = jd.Denoiser(_conditional, "x0", (whole.params, part.params), level)
    x = np.asarray(process.prior(jax.random.key(5), (1792, 16)))
    cond = np.ones(len(x), np.int32)

    def guided(scale):
        return jd.guidance.classifier_free(inner, scale, 0)

    @functools.cache
    def ends(scale):
        return _many_steps(guided(scale), process, span, x, cond)

    parts = slice(1024), slice(1024, 1280), slice(1280, None)
    return Problem(process, tuple(span), guided, x, cond, ends, *parts, 800)


def of_digits(run):
    """A network is dear: 64 starts to fit to, 32 to search with, ends of 250 steps, and at the scales
    not fitted to of the fresh starts alone."""
    experiment = read_experiment(run)
    variables = restore(experiment, run).ema
    process, count, first = experiment.process, 320, 128
    span = process.t_max, process.t_min
    x = np.asarray(process.prior(jax.random.key(6), (count, *experiment.shape)))
    labels = np.asarray(balanced_labels(experiment, count))

    @functools.cache
    def guided(scale):
        return jd.guidance.classifier_free(experiment.denoiser(variables), scale, 10)

    @functools.cache
    def ends(scale):
        skipped = 0 if scale == FITTED else first
        found = np.full(x.shape, np.nan)
        found[skipped:] = _many_steps(
            guided(scale), process, span, x[skipped:], labels[skipped:], 250
        )
        return found

    parts = slice(64), slice(64, first), slice(first, None)
    return Problem(process, span, guided, x, labels, ends, *parts, 150, 32)


def problems(run):
    """{name: function that makes the problem}."""
    found = {
        f"{kind}; {dim}-D": functools.partial(of_mixture, kind, dim)
        for kind, dim in itertools.product(PROCESSES, DIMS)
    }
    found[GUIDED] = of_guidance
    if run:
        found[DIGITS] = functools.partial(of_digits, run)
    return found
