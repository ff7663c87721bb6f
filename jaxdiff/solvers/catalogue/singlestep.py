"""Entries: exponential Runge-Kutta methods, several evaluations a step."""

from jaxdiff.solvers.catalogue.entry import Entry, Exactness, Setting
from jaxdiff.solvers.exponential_rk import exponential_rk
from jaxdiff.solvers.singlestep import dpm_solver_singlestep

EPS = {"integrand": "eps", "ends": (False, True)}
DATA = {"integrand": "x0", "ends": (True, True), "paper": "dpm_solver_pp"}

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "dpm_solver_singlestep", dpm_solver_singlestep,
        {
            "dpm_solver_2s": Setting({}, 2, exact=Exactness("lambda", 0)),
            "dpm_solver_2s_taylor": Setting(
                {"solver_type": "taylor"}, 2, exact=Exactness("lambda", 1)
            ),
            "dpm_solver_2s_nodes": Setting({"stages": "nodes"}, 2, nfe_per_step=1),
            "dpm_solver_3s": Setting(
                {"order": 3}, 3, nfe_per_step=3, exact=Exactness("lambda", 1)
            ),
            "dpm_solver_3s_taylor": Setting(
                {"order": 3, "solver_type": "taylor"}, 3, nfe_per_step=3,
                exact=Exactness("lambda", 2),
            ),
            "dpm_solver_pp_2s": Setting(
                {"integrand": "x0"}, 2, exact=Exactness("lambda", 0), **DATA
            ),
            "dpm_solver_pp_2s_taylor": Setting(
                {"integrand": "x0", "solver_type": "taylor"}, 2, exact=Exactness("lambda", 1),
                **DATA,
            ),
            "dpm_solver_pp_2s_nodes": Setting(
                {"integrand": "x0", "stages": "nodes"}, 2, nfe_per_step=1, **DATA
            ),
            "dpm_solver_pp_2s_nodes_taylor": Setting(
                {"integrand": "x0", "stages": "nodes", "solver_type": "taylor"}, 2,
                nfe_per_step=1, **DATA,
            ),
            "dpm_solver_pp_3s": Setting(
                {"order": 3, "integrand": "x0"}, 3, nfe_per_step=3,
                exact=Exactness("lambda", 1), **DATA,
            ),
            "dpm_solver_pp_3s_taylor": Setting(
                {"order": 3, "integrand": "x0", "solver_type": "taylor"}, 3, nfe_per_step=3,
                exact=Exactness("lambda", 2), **DATA,
            ),
            "dpm_solver_pp_3s_midpoint": Setting(
                {"order": 3, "integrand": "x0", "solver_type": "midpoint"}, 3, nfe_per_step=3,
                exact=Exactness("lambda", 1), **DATA,
            ),
            "dpm_solver_pp_3s_wide": Setting(
                {"order": 3, "integrand": "x0", "r1": 0.5, "r2": 1.0}, 2, nfe_per_step=3,
                exact=Exactness("lambda", 1), **DATA,
            ),
            "dpm_solver_pp_3s_nodes": Setting(
                {"order": 3, "integrand": "x0", "stages": "nodes"}, 1.5, nfe_per_step=1, **DATA
            ),
            "dpm_solver_3s_fast": Setting(
                {"order": 3, "lower_order_final": True}, 2, nfe_per_step=3, extra=-3,
                exact=Exactness("lambda", 0),
            ),
            "dpm_solver_3s_ancestral": Setting(
                {"order": 3, "eta": 1.0}, 3, False, nfe_per_step=3, strong=1, paper="k_diffusion"
            ),
            "dpm_solver_3s_ancestral_eta_half": Setting(
                {"order": 3, "eta": 0.5}, 3, False, nfe_per_step=3, strong=1, paper="k_diffusion"
            ),
            "dpm_solver_pp_3s_ancestral": Setting(
                {"order": 3, "integrand": "x0", "eta": 1.0}, 3, False, integrand="x0",
                ends=(True, True), nfe_per_step=3, strong=1, paper="k_diffusion",
            ),
        },
        2, "eps", (False, True), "dpm_solver", "exponential Runge-Kutta",
    ),
    Entry(
        "exponential_rk", exponential_rk,
        {
            "etdrk4_krogstad": Setting({}, 4, exact=Exactness("lambda", 2)),
            "etdrk4_krogstad_eps": Setting(
                {"integrand": "eps"}, 4, exact=Exactness("lambda", 2), **EPS
            ),
            "etdrk4": Setting({"method": "etdrk4"}, 4, exact=Exactness("lambda", 2)),
            "etdrk4_strehmel_weiner": Setting(
                {"method": "strehmel_weiner"}, 4, exact=Exactness("lambda", 2)
            ),
            "exponential_rk_ho4": Setting(
                {"method": "ho4"}, 4, nfe_per_step=5, exact=Exactness("lambda", 2)
            ),
            "etd3rk": Setting(
                {"method": "etd3rk"}, 3, nfe_per_step=3, exact=Exactness("lambda", 2)
            ),
            "res_3s": Setting(
                {"method": "ho3", "c2": 0.5, "c3": 1.0}, 3, nfe_per_step=3,
                exact=Exactness("lambda", 1),
            ),
            "res_3s_eps": Setting(
                {"method": "ho3", "c2": 0.5, "c3": 1.0, "integrand": "eps"}, 3, nfe_per_step=3,
                exact=Exactness("lambda", 1), **EPS,
            ),
            "etd2rk": Setting(
                {"method": "ho2", "c2": 1.0}, 2, nfe_per_step=2, exact=Exactness("lambda", 1)
            ),
        },
        4, "x0", (True, True), "exponential_rk", "exponential Runge-Kutta",
    ),
)  # fmt: skip
