"""Entries: integrators of the reverse SDE."""

from jaxdiff.solvers.catalogue.entry import Entry, Exactness, Setting
from jaxdiff.solvers.er_sde import er_sde
from jaxdiff.solvers.gddim import gddim
from jaxdiff.solvers.reverse_sde import euler_maruyama, reverse_diffusion
from jaxdiff.solvers.sa_solver import sa_solver
from jaxdiff.solvers.seeds import seeds

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "sa_solver", sa_solver,
        {
            "sa_solver_3_4": Setting({}, 2, False, strong=1),
            "sa_solver_1": Setting({"predictor": 1, "corrector": 0}, 1, False, strong=1),
            "sa_solver_2": Setting({"predictor": 2, "corrector": 0}, 2, False, strong=1),
            "sa_solver_2_2": Setting({"predictor": 2, "corrector": 2}, 2, False, strong=1),
            "sa_solver_tau_half": Setting({"tau": 0.5}, 2, False, strong=1),
            # Noise begins and ends at nodes, which move with the steps: by order 1/2 in the path.
            "sa_solver_window": Setting({"window": (0.05, 1.0)}, 2, False, strong=0.5),
            "sa_solver_few_steps": Setting(
                {"predictor": 2, "corrector": 2, "variant": "few_steps", "lower_order_final": True},
                2, False, strong=0.5,
            ),
            "sa_solver_pece": Setting(
                {"mode": "pece"}, 2, False, nfe_per_step=2, extra=-1, strong=1
            ),
            "sa_solver_correct_last": Setting({"correct_last": True}, 2, False, extra=1, strong=1),
            "sa_solver_eps": Setting(
                {"integrand": "eps", "predictor": 2, "corrector": 2}, 2, False, integrand="eps",
                ends=(False, True), strong=1,
            ),
            "sa_solver_ode": Setting({"tau": 0.0, "predictor": 2}, 3),
        },
        1, "x0", (True, True), "sa_solver", "stochastic exponential",
    ),
    Entry(
        "seeds", seeds,
        {
            "seeds_1": Setting({}, 1, False, strong=1),
            "seeds_2": Setting({"stages": 2}, 2, False, nfe_per_step=2, strong=1),
            "seeds_2_phi_2": Setting(
                {"stages": 2, "weights": "phi_2"}, 2, False, nfe_per_step=2, strong=1
            ),
            # 2 in the limit: the error changes its sign at about 20 steps.
            "seeds_3": Setting({"stages": 3}, 1.5, False, nfe_per_step=3, strong=1),
            "seeds_1_eps": Setting(
                {"integrand": "eps"}, 1, False, integrand="eps", ends=(False, True), strong=1
            ),
            "seeds_2_eps": Setting(
                {"stages": 2, "integrand": "eps"}, 2, False, integrand="eps", ends=(False, True),
                nfe_per_step=2, strong=1,
            ),
            "seeds_3_eps": Setting(
                {"stages": 3, "integrand": "eps"}, 2, False, integrand="eps", ends=(False, True),
                nfe_per_step=3, strong=1,
            ),
            "seeds_3_ode": Setting({"stages": 3, "tau": 0.0}, 3, nfe_per_step=3),
        },
        1, "x0", (True, True), "seeds", "stochastic exponential",
    ),
    Entry(
        "er_sde", er_sde,
        {
            "er_sde_3": Setting({}, 2, False),
            "er_sde_2": Setting({"order": 2}, 2, False),
            "er_sde_1": Setting({"order": 1}, 1, False),
            "er_sde_2_sde": Setting({"order": 2, "noise_scale": "sde"}, 2, False, strong=1),
            "er_sde_3_ode": Setting({"noise_scale": "ode"}, 2, exact=Exactness("rho", 2)),
            "er_sde_3_published": Setting({"variant": "published"}, 1, False),
            "er_sde_3_ode_published": Setting(
                {"variant": "published", "noise_scale": "ode"}, 1, exact=Exactness("rho", 0)
            ),
        },
        1, "x0", (True, True), "er_sde", "stochastic exponential",
    ),
    Entry(
        "euler_maruyama", euler_maruyama,
        {
            "euler_maruyama": Setting({}, 1, False, strong=1),
            "euler_maruyama_ode": Setting({"tau": 0.0}, 1),
        },
        1, "eps", (False, True), "score_sde", "reverse SDE",
    ),
    Entry(
        "reverse_diffusion", reverse_diffusion,
        {
            "reverse_diffusion": Setting({}, 1, False, strong=1),
            "reverse_diffusion_ode": Setting({"tau": 0.0}, 1),
        },
        1, "eps", (False, True), "score_sde", "reverse SDE",
    ),
    Entry(
        "gddim", gddim,
        {
            "gddim": Setting({}, 1, exact=Exactness("rho", 0)),
            "gddim_2": Setting({"order": 2}, 2, exact=Exactness("lambda", 1)),
            "gddim_tau_1": Setting({"tau": 1.0}, 1, False),
        },
        1, "eps", (False, True), "gddim", "exponential Adams",
    ),
)  # fmt: skip
