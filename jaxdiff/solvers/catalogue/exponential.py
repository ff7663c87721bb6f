"""Entries: exponential integrators with one evaluation a step."""

from jaxdiff.solvers.adams import deis, exponential_adams, lms
from jaxdiff.solvers.catalogue.entry import Entry, Exactness, Setting
from jaxdiff.solvers.dpm_solver import dpm_solver_multistep, dpm_solver_pp_multistep
from jaxdiff.solvers.first_order import ddim
from jaxdiff.solvers.unipc import unipc

ENTRIES = (
    Entry(
        "ddim", ddim,
        {
            "ddim": Setting({}, 1, exact=Exactness("lambda", 0)),
            "ddim_eta1": Setting({"eta": 1.0}, 1, False, strong=1),
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
        "dpm_solver_multistep", dpm_solver_multistep,
        {
            "dpm_solver_2m": Setting({"order": 2}, 2),
            "dpm_solver_2m_heun": Setting(
                {"order": 2, "solver_type": "heun"}, 2, exact=Exactness("lambda", 1)
            ),
            "dpm_solver_3m": Setting({"order": 3}, 2, exact=Exactness("lambda", 2)),
            "dpm_solver_3m_singlestep": Setting(
                {"order": 3, "start": "singlestep"}, 3, extra=1, exact=Exactness("lambda", 2)
            ),
            "dpm_solver_3m_published": Setting(
                {"order": 3, "variant": "published", "start": "singlestep"}, 2, extra=1,
                exact=Exactness("lambda", 1),
            ),
        },
        1, "eps", (False, True), "dpm_solver", "exponential Adams",
    ),
    Entry(
        "deis", deis,
        {
            "deis_tab3": Setting({"order": 4}, 2, exact=Exactness("t", 3)),
            "deis_tab1": Setting({"order": 2}, 2, exact=Exactness("t", 1)),
            "deis_tab2": Setting({"order": 3}, 2, exact=Exactness("t", 2)),
            "deis_tab2_singlestep": Setting(
                {"order": 3, "start": "singlestep"}, 3, extra=1, exact=Exactness("t", 2)
            ),
            "deis_tab3_runge_kutta": Setting(
                {"order": 4, "start": "runge_kutta"}, 4, extra=9, exact=Exactness("t", 3)
            ),
            "deis_rhoab2": Setting(
                {"order": 3, "variable": "rho"}, 2, exact=Exactness("rho", 2)
            ),
            "deis_rhoab3": Setting(
                {"order": 4, "variable": "rho"}, 2, exact=Exactness("rho", 3)
            ),
        },
        1, "eps", (False, True), "deis", "exponential Adams",
    ),
    Entry(
        "lms", lms,
        {"lms": Setting({}, 2, exact=Exactness("rho", 3))},
        1, "eps", (False, True), "deis", "exponential Adams",
    ),
    Entry(
        "exponential_adams", exponential_adams,
        {
            "adams_x0_2": Setting({"order": 2}, 2, exact=Exactness("lambda", 1)),
            "adams_x0_angle_4": Setting(
                {"order": 4, "variable": "angle"}, 2, exact=Exactness("angle", 3)
            ),
            "adams_x0_root_kappa_2": Setting(
                {"order": 2, "variable": "kappa", "power": 0.5}, 2,
                exact=Exactness("kappa", 1, 0.5),
            ),
            "adams_v_3": Setting(
                {"order": 3, "integrand": "v", "variable": "angle", "start": "singlestep"}, 3,
                integrand="v", extra=1, exact=Exactness("angle", 2),
            ),
            "adams_v_lambda_2": Setting(
                {"order": 2, "integrand": "v"}, 2, integrand="v", exact=Exactness("lambda", 1)
            ),
            "adams_flow_3": Setting(
                {"order": 3, "integrand": "flow", "variable": "tau"}, 2, integrand="flow",
                exact=Exactness("tau", 2),
            ),
            "adams_eps_root_t_4": Setting(
                {"order": 4, "integrand": "eps", "variable": "t", "power": 0.5}, 2,
                integrand="eps", ends=(False, True), exact=Exactness("t", 3, 0.5),
            ),
            "adams_eps_t_5_runge_kutta": Setting(
                {"order": 5, "integrand": "eps", "variable": "t", "start": "runge_kutta"}, 5,
                integrand="eps", ends=(False, True), extra=12, exact=Exactness("t", 4),
            ),
            "adams_v_4_runge_kutta": Setting(
                {"order": 4, "integrand": "v", "variable": "angle", "start": "runge_kutta"}, 4,
                integrand="v", extra=9, exact=Exactness("angle", 3),
            ),
            "adams_pc_3_4_runge_kutta": Setting(
                {"order": 3, "corrector": 4, "integrand": "flow", "variable": "tau",
                 "start": "runge_kutta"}, 4, integrand="flow", extra=6,
            ),
            "adams_eps_3_blend": Setting(
                {"order": 3, "integrand": "eps", "blend": 0.5}, 2, integrand="eps",
                ends=(False, True), exact=Exactness("lambda", 1),
            ),
            "adams_pc_2_4": Setting({"order": 2, "corrector": 4}, 3),
            "adams_pc_1_4_eps": Setting(
                {"order": 1, "corrector": 4, "integrand": "eps", "variable": "rho"}, 2,
                integrand="eps", ends=(False, True),
            ),
            "adams_pc_3_5_singlestep": Setting(
                {"order": 3, "corrector": 5, "start": "singlestep"}, 4, extra=1
            ),
            # What benchmarks/quality.py chooses most often with 4 to 8 evaluations, and with more.
            "flow_pc_2": Setting(
                {"order": 2, "corrector": 4, "integrand": "flow", "variable": "angle",
                 "blend": 0.5}, 2, integrand="flow",
            ),
            "flow_pc_3": Setting(
                {"order": 3, "corrector": 4, "integrand": "flow", "variable": "angle"}, 3,
                integrand="flow",
            ),
        },
        1, "x0", (True, True), "deis", "exponential Adams",
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
            "unipc_2_vary_coeff": Setting({"order": 2, "variant": "vary_coeff"}, 3),
            "unipc_2_vary_coeff_published": Setting(
                {"order": 2, "variant": "vary_coeff_published"}, 1
            ),
            "unipc_3_vary_coeff_published": Setting(
                {"order": 3, "variant": "vary_coeff_published"}, 1
            ),
            "unip_2": Setting({"order": 2, "corrector": False}, 2),
        },
        1, "x0", (True, True), "unipc", "predictor-corrector",
    ),
)  # fmt: skip
