"""Entries: exponential integrators with one evaluation a step."""

from jaxdiff.solvers.catalogue.entry import Entry, Exactness, Setting
from jaxdiff.solvers.dpm_solver_pp import dpm_solver_pp_multistep
from jaxdiff.solvers.first_order import ddim
from jaxdiff.solvers.unipc import unipc

ENTRIES = (
    Entry(
        "ddim", ddim,
        {
            "ddim": Setting({}, 1, exact=Exactness("lambda", 0)),
            "ddim_eta1": Setting({"eta": 1.0}, 1, False),
            "ddim_two_outputs": Setting({"outputs": 2}, 1),
        },
        1, "x0", (True, True), "ddim", "exponential Euler",
    ),
    Entry(
        "dpm_solver_pp_multistep", dpm_solver_pp_multistep,
        {
            "dpm_solver_pp_2m": Setting({"order": 2}, 2),
            "dpm_solver_pp_1m": Setting({"order": 1}, 1, exact=Exactness("lambda", 0)),
            "dpm_solver_pp_2m_heun": Setting(
                {"order": 2, "solver_type": "heun"}, 2, exact=Exactness("lambda", 1)
            ),
            "dpm_solver_pp_3m": Setting({"order": 3}, 2, exact=Exactness("lambda", 2)),
            "dpm_solver_pp_3m_singlestep": Setting(
                {"order": 3, "start": "singlestep"}, 3, extra=1, exact=Exactness("lambda", 2)
            ),
            "dpm_solver_pp_3m_published": Setting(
                {"order": 3, "variant": "published", "start": "singlestep"}, 2, extra=1,
                exact=Exactness("lambda", 1),
            ),
        },
        1, "x0", (True, True), "dpm_solver_pp", "exponential Adams",
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
                {"order": 2, "integrand": "eps"}, 3, integrand="eps", ends=(False, True)
            ),
            "unip_2": Setting({"order": 2, "corrector": False}, 2),
        },
        1, "x0", (True, True), "unipc", "predictor-corrector",
    ),
)  # fmt: skip
