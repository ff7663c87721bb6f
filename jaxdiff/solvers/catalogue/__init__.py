"""The one list of solvers: it drives the tests, the README's table, `--solver` and its errors."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.grids import Grid
from jaxdiff.names import check_options, unknown
from jaxdiff.solvers.catalogue import (
    ancestral,
    exponential,
    momentum,
    multistep,
    runge_kutta,
    sde,
    sigma,
    singlestep,
    stochastic,
)
from jaxdiff.solvers.catalogue.entry import Entry
from jaxdiff.solvers.papers import PAPERS
from jaxdiff.solvers.tableau import Tableau

CATALOGUE: Mapping[str, Entry] = {
    entry.name: entry
    for family in (
        exponential, multistep, singlestep, sigma, runge_kutta, momentum, stochastic, ancestral, sde,
    )
    for entry in family.ENTRIES
}  # fmt: skip

# Names that others use for one of our settings.
ALIASES: Mapping[str, str] = {
    "edm": "heun",
    "dpmpp_2m": "dpm_solver_pp_2m",
    "dpmpp_3m": "dpm_solver_pp_3m",
}


def names() -> list[str]:
    """Every name `build` takes: entries, their settings, aliases."""
    return sorted({*ALIASES, *(n for e in CATALOGUE.values() for n in (e.name, *e.settings))})


def find(name: str) -> tuple[Entry, Mapping[str, Any]]:
    """(entry, options) of a solver, setting or alias; ValueError with the nearest names if unknown."""
    name_ = ALIASES.get(name, name)
    for entry in CATALOGUE.values():
        if name_ == entry.name:
            return entry, {}
        if name_ in entry.settings:
            return entry, entry.settings[name_].options
    raise ValueError(unknown("unknown solver", name, names()))


def build(name: str, grid: Grid, /, **options: Any) -> Tableau:
    """Build a solver by name: `build("unipc", grid, order=3)`. For configurations and commands.

    Raises ValueError for an unknown name or option, with the accepted ones; TypeError for text as
    an option that takes none; and what the builder raises.
    """
    entry, preset = find(name)
    check_options(f"solver {name!r}", entry.build, options, skip=1)
    return entry.build(grid, **{**preset, **options})


def citation(name: str) -> str:
    """BibTeX of the paper that a solver, setting or alias comes from. Raises as `find` does."""
    paper = find(name)[0].paper
    return PAPERS[paper].bibtex(paper)


def markdown_table() -> str:
    """The catalogue as a Markdown table: the one in the README."""
    lines = [
        "| name | order | evaluations a step | noise | from alpha = 0 | to sigma = 0 | paper | file |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in CATALOGUE.values():
        path = entry.build.__module__.replace(".", "/") + ".py"
        for name, setting in entry.settings.items():
            from_noise, to_data = entry.ends_of(setting)
            cells = (
                f"`{name}`",
                f"{setting.order:g}" + ("" if setting.deterministic else " (weak)"),
                str(entry.nfe_per_step_of(setting)),
                "no" if setting.deterministic else "yes",
                "yes" if from_noise else "no",
                "yes" if to_data else "no",
                PAPERS[entry.paper].reference,
                f"[{path.rsplit('/', 1)[1]}]({path})",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
