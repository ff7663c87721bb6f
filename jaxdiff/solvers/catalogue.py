"""The one list of solvers: it drives the tests, the README's table, `--solver` and its errors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxdiff.grids import Grid
from jaxdiff.names import check_options, unknown
from jaxdiff.solvers.dpm_solver_pp import dpm_solver_pp_multistep
from jaxdiff.solvers.first_order import ddim, ddpm
from jaxdiff.solvers.sigma import euler, heun
from jaxdiff.solvers.tableau import Tableau
from jaxdiff.solvers.unipc import unipc


class Setting(NamedTuple):
    """One named choice of a builder's options.

    `order`: what it converges at asymptotically, with sigma > 0 at the end (weak order if it draws
    noise). `integrand` and `ends` where they are not the entry's own.
    """

    options: Mapping[str, Any]
    order: float
    deterministic: bool = True
    integrand: str | None = None
    ends: tuple[bool, bool] | None = None


class Entry(NamedTuple):
    """A solver: its builder, its settings (the first is the default), and where it comes from.

    `integrand`: the prediction the solver works in. `ends`: (alpha = 0 at the noise end supported,
    sigma = 0 at the data end supported). `aliases`: other names, each of a setting.
    """

    name: str
    build: Callable[..., Tableau]
    settings: Mapping[str, Setting]
    nfe_per_step: int
    integrand: str
    ends: tuple[bool, bool]
    paper: str
    aliases: Mapping[str, str] = {}

    @property
    def order(self) -> float:
        """Order of the default setting."""
        return next(iter(self.settings.values())).order

    @property
    def deterministic(self) -> bool:
        """Whether the default setting draws no noise."""
        return next(iter(self.settings.values())).deterministic

    def ends_of(self, setting: Setting) -> tuple[bool, bool]:
        """The ends that a setting supports."""
        return self.ends if setting.ends is None else setting.ends

    def integrand_of(self, setting: Setting) -> str:
        """The prediction that a setting works in."""
        return setting.integrand or self.integrand


_DPMPP = "Lu et al. 2022, DPM-Solver++, arXiv:2211.01095"
_EDM = "Karras et al. 2022, EDM, arXiv:2206.00364"

_ENTRIES = (
    Entry(
        "ddim", ddim,
        {
            "ddim": Setting({}, 1),
            "ddim_eta1": Setting({"eta": 1.0}, 1, False),
            "ddim_two_outputs": Setting({"outputs": 2}, 1),
        },
        1, "x0", (True, True), "Song et al. 2021, DDIM, arXiv:2010.02502",
    ),
    Entry(
        "ddpm", ddpm,
        {
            "ddpm": Setting({}, 1, False),
            "ddpm_large": Setting({"variance": "fixed_large"}, 1, False),
        },
        1, "x0", (True, True), "Ho et al. 2020, DDPM, arXiv:2006.11239",
    ),
    Entry(
        "euler", euler,
        {"euler": Setting({}, 1), "euler_churn": Setting({"s_churn": 10.0}, 1, False)},
        1, "eps", (False, True), _EDM,
    ),
    Entry(
        "heun", heun,
        {
            "heun": Setting({}, 2),
            "heun_churn": Setting({"s_churn": 10.0}, 1, False),
            "heun_flow": Setting({"clock": "flow"}, 2, True, "flow", (True, True)),
        },
        2, "eps", (False, True), _EDM, {"edm": "heun"},
    ),
    Entry(
        "dpm_solver_pp_multistep", dpm_solver_pp_multistep,
        {
            "dpm_solver_pp_2m": Setting({"order": 2}, 2),
            "dpm_solver_pp_1m": Setting({"order": 1}, 1),
            "dpm_solver_pp_2m_heun": Setting({"order": 2, "solver_type": "heun"}, 2),
            "dpm_solver_pp_3m": Setting({"order": 3}, 2),
            "dpm_solver_pp_3m_singlestep": Setting({"order": 3, "start": "singlestep"}, 3),
            "dpm_solver_pp_3m_published": Setting(
                {"order": 3, "variant": "published", "start": "singlestep"}, 2
            ),
        },
        1, "x0", (True, True), _DPMPP,
        {"dpmpp_2m": "dpm_solver_pp_2m", "dpmpp_3m": "dpm_solver_pp_3m"},
    ),
    Entry(
        "unipc", unipc,
        {
            "unipc_2": Setting({"order": 2}, 3),
            "unipc_1": Setting({"order": 1}, 2),
            "unipc_3": Setting({"order": 3}, 3),
            "unipc_2_bh1": Setting({"order": 2, "variant": "bh1"}, 3),
            "unipc_3_bh1": Setting({"order": 3, "variant": "bh1"}, 3),
            "unipc_2_eps": Setting(
                {"order": 2, "integrand": "eps"}, 3, True, "eps", (False, True)
            ),
            "unip_2": Setting({"order": 2, "corrector": False}, 2),
        },
        1, "x0", (True, True), "Zhao et al. 2023, UniPC, arXiv:2302.04867",
    ),
)  # fmt: skip

CATALOGUE: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def names() -> list[str]:
    """Every name `build` takes: entries, their settings, aliases."""
    return sorted({n for e in _ENTRIES for n in (e.name, *e.settings, *e.aliases)})


def find(name: str) -> tuple[Entry, Mapping[str, Any]]:
    """(entry, options) of a solver, setting or alias; ValueError with the nearest names if unknown."""
    for entry in _ENTRIES:
        if name == entry.name:
            return entry, {}
        setting = entry.settings.get(entry.aliases.get(name, name))
        if setting is not None:
            return entry, setting.options
    raise ValueError(unknown("unknown solver", name, names()))


def build(name: str, grid: Grid, /, **options: Any) -> Tableau:
    """Build a solver by name: `build("unipc", grid, order=3)`. For configurations and commands.

    Raises ValueError for an unknown name or option, with the accepted ones; TypeError for text as
    an option that takes none; and what the builder raises.
    """
    entry, preset = find(name)
    check_options(f"solver {name!r}", entry.build, options, skip=1)
    return entry.build(grid, **{**preset, **options})


def markdown_table() -> str:
    """The catalogue as a Markdown table: the one in the README."""
    lines = [
        "| name | order | evaluations a step | noise | from alpha = 0 | to sigma = 0 | paper | file |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in _ENTRIES:
        path = entry.build.__module__.replace(".", "/") + ".py"
        for name, setting in entry.settings.items():
            from_noise, to_data = entry.ends_of(setting)
            cells = (
                f"`{name}`",
                f"{setting.order:g}" + ("" if setting.deterministic else " (weak)"),
                str(entry.nfe_per_step),
                "no" if setting.deterministic else "yes",
                "yes" if from_noise else "no",
                "yes" if to_data else "no",
                entry.paper,
                f"[{path.rsplit('/', 1)[1]}]({path})",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
