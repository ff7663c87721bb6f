"""Entries: Runge-Kutta methods in sigma, deterministic or with churn."""

from jaxdiff.solvers.catalogue.entry import Entry, Exactness, Setting
from jaxdiff.solvers.sigma import euler, heun

ENTRIES = (
    Entry(
        "euler", euler,
        {
            "euler": Setting({}, 1, exact=Exactness("rho", 0)),
            "euler_churn": Setting({"s_churn": 10.0}, 1, False),
        },
        1, "eps", (False, True), "edm", "Runge-Kutta",
    ),
    Entry(
        "heun", heun,
        {
            "heun": Setting({}, 2, exact=Exactness("rho", 1)),
            "heun_churn": Setting({"s_churn": 10.0}, 1, False),
            "heun_flow": Setting(
                {"clock": "flow"}, 2, integrand="flow", ends=(True, True),
                exact=Exactness("tau", 1), paper="rectified_flow",
            ),
        },
        2, "eps", (False, True), "edm", "Runge-Kutta",
    ),
)  # fmt: skip
