"""Entries: solvers whose coefficients are measured on a network. Their settings take those of none."""

from jaxdiff.solvers.catalogue.entry import Entry, Setting
from jaxdiff.solvers.dpm_solver_v3 import dpm_solver_v3

_EPS = {"statistics": (0.0, -1.0, 0.0)}

ENTRIES = (
    Entry(
        "dpm_solver_v3", dpm_solver_v3,
        {
            "dpm_solver_v3_x0_3": Setting({}, 2),
            "dpm_solver_v3_x0_2_pseudo": Setting({"order": 2, "corrector": "pseudo"}, 2),
            "dpm_solver_v3_eps_3": Setting(_EPS, 2, integrand="eps"),
            "dpm_solver_v3_eps_2": Setting(
                {**_EPS, "order": 2, "corrector": "none"}, 2, integrand="eps"
            ),
        },
        1, "x0", (False, True), "dpm_solver_v3", "exponential Adams",
    ),
)  # fmt: skip
