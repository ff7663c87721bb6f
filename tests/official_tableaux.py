"""The official samplers in our terms: a recorded case (official_cases.py) to our tableau."""

import dataclasses
import json

import numpy as np

import jaxdiff as jd
from jaxdiff.solvers.ancestral import (
    dpm_solver_pp_2s_ancestral,
    euler_ancestral,
    kdpm2_ancestral,
)
from jaxdiff.solvers.bdia import bdia
from jaxdiff.solvers.dpm_solver_sde import dpm_solver_pp_sde, dpm_solver_pp_sde_multistep
from jaxdiff.solvers.er_sde import er_sde
from jaxdiff.solvers.momentum import ghvb, heavy_ball
from jaxdiff.solvers.pndm import ipndm, pndm
from jaxdiff.solvers.restart import Interval, restart
from jaxdiff.solvers.runge_kutta import kdpm2, runge_kutta, two_stage_method
from jaxdiff.solvers.sa_solver import sa_solver
from jaxdiff.solvers.singlestep import dpm_solver_singlestep, singlestep_plan


def edm_grid(case):
    return jd.grids.from_times(jd.processes.edm(), case.nodes[:, 2])


def bare_grid(case):
    """The recorded nodes, without a process."""
    return jd.grids.from_arrays(*case.nodes.T)


def vp_grid(case):
    """With its process, which is that of DPM-Solver, UniPC and DEIS unless the case is discrete."""
    if case["schedule"] == "discrete":
        return bare_grid(case)
    return jd.grids.from_times(jd.processes.vp_linear(0.1, 20.0), case.nodes[:, 0])


def edm_vp(sigma_min, sigma_max):
    """The linear VP process whose sigma / alpha is sigma_min at t = 1e-3 and sigma_max at 1."""
    low, high, t = np.log1p(sigma_min**2), np.log1p(sigma_max**2), 1e-3
    slope = 2.0 * (low / t - high) / (t - 1.0)
    beta_min = high - 0.5 * slope
    return dataclasses.replace(
        jd.processes.vp_linear(), beta_min=beta_min, beta_max=beta_min + slope
    )


def deis_grid(case):
    """diff-sampler's VP process for DEIS's time, whatever the grid.

    Its beta at t = 0 is negative, which `vp_linear` refuses.
    """
    process = edm_vp(0.002, 80.0)
    return jd.grids.from_times(process, process.time(-np.log(case.nodes[:, 2])))


def options(case, **names):
    """Our options from theirs, where they are given."""
    return {ours: case[theirs] for ours, theirs in names.items() if case[theirs] is not None}


def finish(case, tableau, grid):
    """The analytic first step and the last step to x0, where the case has them."""
    if case["afs"]:
        sigma = case.nodes[0, 2]
        spread = np.sqrt(sigma * (np.hypot(1.0, sigma) - sigma))  # eps = x / sqrt(1 + sigma^2)
        tableau = jd.solvers.analytic_first_step(tableau, std=spread)
    return jd.solvers.denoise_to_zero(tableau, grid) if case["denoise_to_zero"] else tableau


def multistep(case, grid, order, data, lowered):
    build = jd.solvers.dpm_solver_pp_multistep if data else jd.solvers.dpm_solver_multistep
    kind = "heun" if case["solver_type"] == "taylor" else "midpoint"
    return build(grid, order, kind, "published", lower_order_final=lowered)


def k_diffusion_official(case):
    grid, name = edm_grid(case), case.sampler
    noise = options(case, eta="eta", s_noise="s_noise")
    churn = options(case, s_churn="s_churn", s_min="s_tmin", s_max="s_tmax", s_noise="s_noise")
    if name in ("euler", "heun"):
        return getattr(jd.solvers, name)(grid, **churn)
    if name == "dpm_2":
        return kdpm2(grid, **churn)
    if name == "lms":
        return jd.solvers.lms(grid, case["order"] or 4)
    if name == "dpmpp_2m":
        return jd.solvers.dpm_solver_pp_multistep(grid, 2, lower_order_final=False)
    if name == "dpm_fast":
        plan = singlestep_plan(case["n"])
        return dpm_solver_singlestep(grid, 3, "eps", plan=plan, **noise)
    if name == "dpmpp_sde":
        # Its eta is the square root of ours.
        noise["eta"] **= 2
        kind = "independent" if case["noise"] == "independent" else "published"
        return dpm_solver_pp_sde(grid, **noise, r=case["r"] or 0.5, variant=kind)
    if name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
        order = int(name[6])
        kind = case["solver_type"] or ("midpoint" if order == 2 else "heun")
        return dpm_solver_pp_sde_multistep(
            grid, order, **noise, solver_type=kind, variant="published", lower_order_final=False
        )
    ancestrals = {
        "euler_ancestral": euler_ancestral,
        "dpm_2_ancestral": kdpm2_ancestral,
        "dpmpp_2s_ancestral": dpm_solver_pp_2s_ancestral,
    }
    return ancestrals[name](grid, **noise)


def edm_official(case):
    churn = options(case, s_churn="S_churn", s_min="S_min", s_max="S_max", s_noise="S_noise")
    if case["alpha"] or case["schedule"]:
        method = "euler" if case["solver"] == "euler" else two_stage_method(case["alpha"] or 1.0)
        sigmas = case.nodes[:-1, 2]
        clock = {"vp": edm_vp(sigmas[-1], sigmas[0]), "ve": "rho2"}.get(case["schedule"], "rho")
        scaling = case["scaling"] or "none"
        return runge_kutta(edm_grid(case), method, clock, "clock", scaling, **churn)
    return getattr(jd.solvers, case["solver"] or "heun")(edm_grid(case), **churn)


def dpm_solver_official(case):
    grid, data = vp_grid(case), case["algorithm_type"] == "dpmsolver++"
    if case["method"] == "multistep":
        lowered = case["lower_order_final"] is not False and case["steps"] < 10
        return finish(case, multistep(case, grid, case["order"], data, lowered), grid)
    plan = [case["order"]] * case.steps
    if case["method"] == "singlestep":
        plan = singlestep_plan(case["steps"], case["order"])
    inner, stages = grid, "at"
    if case["skip_type"] != "logSNR":  # their stages divide a step in time
        times = np.append(case.calls[:, 0], case.nodes[-1, 0])
        inner, stages = jd.grids.from_times(jd.processes.vp_linear(0.1, 20.0), times), "nodes"
    tableau = dpm_solver_singlestep(
        inner, case["order"], "x0" if data else "eps", case["solver_type"] or "dpmsolver",
        plan=plan, stages=stages,
    )  # fmt: skip
    return finish(case, tableau, grid)


def unipc_official(case):
    grid, data = vp_grid(case), case["algorithm_type"] == "data_prediction"
    variant = case["variant"].replace("vary_coeff", "vary_coeff_published")
    tableau = jd.solvers.unipc(
        grid, case["order"], variant, "x0" if data else "eps",
        lower_order_final=case["lower_order_final"] is not False,
    )  # fmt: skip
    return finish(case, tableau, grid)


def diff_sampler_official(case):
    grid, order = edm_grid(case), case["max_order"]
    lowered = case["lower_order_final"] is not False
    if case.sampler in ("euler", "heun"):
        tableau = getattr(jd.solvers, case.sampler)(grid)
    elif case.sampler == "dpm_2":
        tableau = kdpm2(grid, **options(case, r="r"))
    elif case.sampler == "ipndm":
        tableau = ipndm(grid, order)
    elif case.sampler == "ipndm_v":
        tableau = ipndm(grid, order, "published")
    elif case.sampler == "deis" and case["deis_mode"] == "rhoab":
        tableau = jd.solvers.deis(grid, order, "rho")
    elif case.sampler == "deis":
        tableau = jd.solvers.deis(deis_grid(case), order, "t")
    elif case.sampler == "dpm_pp":
        tableau = multistep(case, grid, order, case["predict_x0"], lowered)
    else:
        kind = "x0" if case["predict_x0"] else "eps"
        tableau = jd.solvers.unipc(
            grid, order, case["variant"], kind, lower_order_final=lowered
        )
    return finish(case, tableau, grid)


DEIS_METHODS = {
    "1euler": "euler", "2heun": "heun", "3kutta": "kutta3", "3ral": "bogacki_shampine",
    "3heun": "heun3", "3vdh": "van_der_houwen3", "3ssprk": "ssprk3", "4rk": "rk4",
}  # fmt: skip


def deis_official(case):
    grid = vp_grid(case)
    if case.sampler == "ipndm":
        return ipndm(grid)
    if case.sampler == "rho_rk":
        return runge_kutta(grid, DEIS_METHODS[case["rk_method"]])
    variable = {"t_ab": "t", "rho_ab": "rho"}[case.sampler]
    return jd.solvers.deis(grid, case["ab_order"] + 1, variable)


def pndm_official(case):
    if case.sampler == "DDIM":
        return jd.solvers.ddim(bare_grid(case))
    if case.sampler == "S-PNDM":
        return pndm(bare_grid(case), 2, "heun")
    # The midpoints of the first three steps become nodes.
    nodes = np.insert(case.nodes, [1, 2, 3], case.calls[[1, 5, 9]], axis=0)
    return pndm(jd.grids.from_arrays(*nodes.T), stages="nodes")


def bdia_official(case):
    if case["gamma"] == 0.0:
        return jd.solvers.ddim(bare_grid(case))
    return bdia(bare_grid(case), case["gamma"])


def momentum_official(case):
    # Their order 2.3 is order 3 with beta = 0.3.
    order, grid = int(np.ceil(case["order"])), bare_grid(case)
    beta = case["order"] % 1 or 1.0
    if case.sampler == "GHVBScheduler":
        return ghvb(grid, order, beta)
    variant = "nesterov" if case.sampler == "PLMSWithNTScheduler" else "polyak"
    return heavy_ball(ipndm(grid, order), beta, variant=variant)


def sa_solver_official(case):
    grid, data = vp_grid(case), case["algorithm_type"] == "data_prediction"
    few, size = case["mode"] == "few_steps", case["tau"]
    tableau = sa_solver(
        grid, case["predictor_order"], case["corrector_order"],
        # In noise prediction the variant is the missing noise of the last step alone.
        tau=(lambda t, *_: size * (t > grid.t[-1])) if few and not data else size,
        integrand="x0" if data else "eps", mode=case["pc_mode"].lower(),
        variant="few_steps" if few and data else "exact", lower_order_final=True,
        correct_last=not few and case["corrector_order"] > 0,
    )  # fmt: skip
    return tableau if few else jd.solvers.denoise_to_zero(tableau, grid)


def er_sde_official(case):
    scale = ("ode", "sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5")[case["func_type"] - 1]
    return er_sde(bare_grid(case), int(case.sampler[3]), scale, "published")


def restart_official(case):
    found = json.loads(case["restart_info"] or "{}").values()
    intervals = [
        Interval(low, high, repeats, nodes - 1) for nodes, repeats, low, high in found
    ]
    return restart(edm_grid(case), intervals, case["S_noise"])


TABLEAUX = {
    "k_diffusion": k_diffusion_official, "edm": edm_official, "dpm_solver": dpm_solver_official,
    "unipc": unipc_official, "diff_sampler": diff_sampler_official, "deis": deis_official,
    "pndm": pndm_official, "bdia": bdia_official, "momentum": momentum_official,
    "sa_solver": sa_solver_official, "er_sde": er_sde_official, "restart": restart_official,
}  # fmt: skip
