"""Entries: classical Runge-Kutta methods in any clock."""

from jaxdiff.solvers.catalogue.entry import Entry, Exactness, Setting
from jaxdiff.solvers.runge_kutta import kdpm2, runge_kutta

FLOW = {"integrand": "flow", "ends": (True, True), "paper": "rectified_flow"}
TWO = {"nfe_per_step": 2, "paper": "edm"}

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "runge_kutta", runge_kutta,
        {
            "rk4": Setting({}, 4, exact=Exactness("rho", 3)),
            "rk38": Setting({"method": "rk38"}, 4, exact=Exactness("rho", 3)),
            "rk4_lambda": Setting({"clock": "lambda"}, 4),
            "kutta3_flow": Setting(
                {"method": "kutta3", "clock": "tau"}, 3, nfe_per_step=3,
                exact=Exactness("tau", 3), **FLOW,
            ),
            "kutta3_angle": Setting(
                {"method": "kutta3", "clock": "angle"}, 3, integrand="v", ends=(True, True),
                nfe_per_step=3, exact=Exactness("angle", 3),
            ),
            "rk4_kappa": Setting(
                {"clock": "kappa"}, 4, integrand="x0", ends=(True, True),
                exact=Exactness("kappa", 3),
            ),
            "deis_rhork_kutta": Setting(
                {"method": "kutta3"}, 3, nfe_per_step=3, exact=Exactness("rho", 3)
            ),
            "deis_rhork_heun3": Setting(
                {"method": "heun3"}, 3, nfe_per_step=3, exact=Exactness("rho", 2)
            ),
            "deis_rhork_ralston": Setting(
                {"method": "bogacki_shampine"}, 3, nfe_per_step=3, exact=Exactness("rho", 2)
            ),
            "deis_rhork_van_der_houwen": Setting(
                {"method": "van_der_houwen3"}, 3, nfe_per_step=3, exact=Exactness("rho", 2)
            ),
            "deis_rhork_ssprk": Setting(
                {"method": "ssprk3"}, 3, nfe_per_step=3, exact=Exactness("rho", 3)
            ),
            "deis_rhork_midpoint": Setting(
                {"method": "midpoint"}, 2, nfe_per_step=2, exact=Exactness("rho", 1)
            ),
            "midpoint_flow": Setting(
                {"method": "midpoint", "clock": "tau"}, 2, nfe_per_step=2,
                exact=Exactness("tau", 1), **FLOW,
            ),
            "euler_flow": Setting(
                {"method": "euler", "clock": "tau"}, 1, nfe_per_step=1,
                exact=Exactness("tau", 0), **FLOW,
            ),
            "ralston_lambda": Setting(
                {"method": "ralston", "clock": "lambda"}, 2, nfe_per_step=2
            ),
            # EDM's ablation: the VP and VE schedules' own clocks, VP's scaling.
            "euler_t": Setting(
                {"method": "euler", "clock": "t"}, 1, nfe_per_step=1, paper="edm"
            ),
            "heun_t": Setting({"method": "heun", "clock": "t"}, 2, **TWO),
            "midpoint_t": Setting({"method": "midpoint", "clock": "t"}, 2, **TWO),
            "ralston_t": Setting({"method": "ralston", "clock": "t"}, 2, **TWO),
            "heun_t_unscaled": Setting(
                {"method": "heun", "clock": "t", "scaling": "none"}, 2, **TWO
            ),
            "heun_rho2": Setting({"method": "heun", "clock": "rho2"}, 2, **TWO),
            "heun_t_churn": Setting(
                {"method": "heun", "clock": "t", "s_churn": 10.0}, 2, False, **TWO
            ),
            "heun_vp_scaling": Setting({"method": "heun", "scaling": "vp"}, 2, **TWO),
        },
        4, "eps", (False, True), "deis", "Runge-Kutta",
    ),
    Entry(
        "kdpm2", kdpm2,
        {
            "kdpm2": Setting({}, 2, exact=Exactness("rho", 0)),
            "kdpm2_churn": Setting({"s_churn": 10.0}, 2, False),
        },
        2, "eps", (False, True), "k_diffusion", "Runge-Kutta",
    ),
)  # fmt: skip
