"""The catalogue as the tests take it: every setting by name, and many tables run at once."""

import collections
import functools

import jax
import numpy as np

import jaxdiff as jd

SETTINGS = {
    name: (entry, setting)
    for entry in jd.solvers.CATALOGUE.values()
    for name, setting in entry.settings.items()
}
DETERMINISTIC = [name for name, (_, setting) in SETTINGS.items() if setting.deterministic]
NOISY = [name for name in SETTINGS if name not in DETERMINISTIC]
FAMILIES = sorted({entry.family for entry, _ in SETTINGS.values()})


def members(family, names=SETTINGS):
    return [name for name in names if SETTINGS[name][0].family == family]


def build(name, grid):
    entry, setting = SETTINGS[name]
    return entry.build(grid, **setting.options)


def run_all(denoiser, tables, x, **options):
    """The results of `jd.sample` for each table; x [batch, ...], or [tables, batch, ...].

    Tables of about as many rows share a vmapped program.
    """
    groups, out = collections.defaultdict(list), [None] * len(tables)
    for i, table in enumerate(tables):
        groups[int(np.ceil(np.log2(table.rows / 1.2)))].append(i)
    for chosen in groups.values():
        stacked = jd.solvers.stack([tables[i] for i in chosen])
        starts = x[np.asarray(chosen)] if np.ndim(x) == 3 else x
        run = functools.partial(jd.sample, denoiser, **options)
        ends = jax.vmap(run, (0, 0 if np.ndim(x) == 3 else None))(stacked, starts)
        for i, end in zip(chosen, np.asarray(ends)):
            out[i] = end
    return out
