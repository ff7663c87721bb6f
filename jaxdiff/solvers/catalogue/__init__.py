"""The one list of solvers: it drives the tests, the README's table, `--solver` and its errors."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.grids import Grid
from jaxdiff.names import check_options, unknown
from jaxdiff.solvers.catalogue import (
    ancestral,
    empirical,
    exponential,
    momentum,
    multistep,
    runge_kutta,
    sde,
    sigma,
    singlestep,
    stochastic,
)
from jaxdiff.solvers.catalogue.aliases import ALIASES
from jaxdiff.solvers.catalogue.entry import Entry, Setting
from jaxdiff.solvers.papers import PAPERS
from jaxdiff.solvers.tableau import Tableau

CATALOGUE: Mapping[str, Entry] = {
    entry.name: entry
    for family in (
        exponential, empirical, multistep, singlestep, sigma, runge_kutta, momentum, stochastic,
        ancestral, sde,
    )
    for entry in family.ENTRIES
}  # fmt: skip

def names() -> list[str]:
    """Every name `build` takes: entries, their settings, aliases."""
    return sorted({*ALIASES, *(n for e in CATALOGUE.values() for n in (e.name, *e.settings))})


def find(name: str) -> tuple[Entry, Mapping[str, Any]]:
    """(entry, options) of a solver, setting or alias; ValueError with the nearest names if unknown."""
    meant = ALIASES[name].setting if name in ALIASES else name
    for entry in CATALOGUE.values():
        if meant == entry.name:
            return entry, {}
        if meant in entry.settings:
            return entry, entry.settings[meant].options
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
    entry, _ = find(name)
    alias = ALIASES.get(name)
    meant = alias.setting if alias else name
    setting = entry.settings.get(meant, next(iter(entry.settings.values())))
    paper = (alias and alias.paper) or setting.paper or entry.paper
    return PAPERS[paper].bibtex(paper)


def own_grid(name: str) -> tuple[str, Mapping[str, Any]] | None:
    """The grid that an alias implies, ("karras", {"rho": 7.0}) for "DPM++ 2M Karras"; else None."""
    alias = ALIASES.get(name)
    return None if alias is None or alias.grid is None else (alias.grid, alias.grid_options)


_HEAD = ("order", "evaluations a step", "noise", "from alpha = 0", "to sigma = 0")


def markdown_table() -> str:
    """One row a builder, by its default setting: the table of the README."""
    rows = [("builder", "family", *_HEAD, "settings", "paper", "file")]
    for entry in CATALOGUE.values():
        default = next(iter(entry.settings.values()))
        path = entry.build.__module__.replace(".", "/") + ".py"
        rows.append((
            f"`{entry.name}`", entry.family, *_facts(entry, default), str(len(entry.settings)),
            PAPERS[entry.paper].reference, f"[{path.rsplit('/', 1)[1]}]({path})",
        ))  # fmt: skip
    return _markdown(rows)


def settings_table() -> str:
    """One row a setting: the table of docs/solvers.md."""
    rows = [("name", "builder and options", "integrand", *_HEAD, "also called")]
    for entry in CATALOGUE.values():
        for name, setting in entry.settings.items():
            options = "".join(
                f", {key}={getattr(value, '__name__', repr(value))}"
                for key, value in setting.options.items()
            )
            others = [other for other, alias in ALIASES.items() if alias.setting == name]
            plain = [n for n in others if not n.endswith((" Karras", " Exponential"))]
            rows.append((
                f"`{name}`", f"`{entry.name}(grid{options})`", entry.integrand_of(setting),
                *_facts(entry, setting), ", ".join(plain),
            ))  # fmt: skip
    return _markdown(rows)


def _facts(entry: Entry, setting: Setting) -> tuple[str, ...]:
    sign = "-" if setting.extra < 0 else "+"
    extra = f" {sign} {abs(setting.extra)} once" if setting.extra else ""
    return (
        f"{setting.order:g}" + ("" if setting.deterministic else " (weak)"),
        f"{entry.nfe_per_step_of(setting)}{extra}",
        "no" if setting.deterministic else "yes",
        *("yes" if end else "no" for end in entry.ends_of(setting)),
    )


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
