"""What the catalogue says of a solver."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxdiff.solvers.tableau import Tableau


class Exactness(NamedTuple):
    """The last step integrates polynomials of `degree` in `variable` exactly.

    `variable` as in `jaxdiff.solvers.clocks.VARIABLES`, to the power `power`.
    """

    variable: str
    degree: int
    power: float = 1.0


class Setting(NamedTuple):
    """One named choice of a builder's options.

    `order`: what it converges at asymptotically on any smooth grid with alpha > 0 at the noise end and
    sigma > 0 at the data end (weak order if it draws noise; 0 if it has a bias that stays).
    `integrand`, `ends`, `nfe_per_step` and `paper` where they are not the entry's own. `extra`:
    evaluations beyond nfe_per_step a step, of the start, or (below 0) fewer, of lower-order last
    steps. `exact`: the integrands that it integrates exactly, if there are any. `strong`: strong
    order on a Brownian path, for noisy settings whose rows carry its clock.
    """

    options: Mapping[str, Any]
    order: float
    deterministic: bool = True
    integrand: str | None = None
    ends: tuple[bool, bool] | None = None
    nfe_per_step: int | None = None
    extra: int = 0
    exact: Exactness | None = None
    strong: float | None = None
    paper: str | None = None


class Entry(NamedTuple):
    """A solver: its builder, its settings (the first is the default), and where it comes from.

    `family`: what it is, in two words. `integrand`: the prediction the solver works in. `ends`:
    (alpha = 0 at the noise end supported, sigma = 0 at the data end supported). `paper`: a key of
    `jaxdiff.solvers.papers.PAPERS`.
    """

    name: str
    build: Callable[..., Tableau]
    settings: Mapping[str, Setting]
    nfe_per_step: int
    integrand: str
    ends: tuple[bool, bool]
    paper: str
    family: str

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

    def nfe_per_step_of(self, setting: Setting) -> int:
        """Evaluations a step of a setting."""
        return self.nfe_per_step if setting.nfe_per_step is None else setting.nfe_per_step
