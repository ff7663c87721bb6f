"""The golden cases of `golden_cases.more_cases` in our terms: tableau, denoiser and noise."""

import dataclasses

import numpy as np
from replay import grid as grid_of
from replay import mixture

import jaxdiff as jd
from jaxdiff.solvers.ancestral import euler_ancestral, kdpm2_ancestral
from jaxdiff.solvers.consistency import consistency, tcd
from jaxdiff.solvers.dpm_solver_sde import (
    dpm_solver_pp_sde,
    dpm_solver_pp_sde_multistep,
    dpm_solver_sde_multistep,
)
from jaxdiff.solvers.dpm_solver_sde_nodes import dpm_solver_pp_sde_singlestep
from jaxdiff.solvers.pndm import ipndm, pndm
from jaxdiff.solvers.reverse_sde import euler_maruyama, reverse_diffusion
from jaxdiff.solvers.runge_kutta import kdpm2
from jaxdiff.solvers.sa_solver import sa_solver
from jaxdiff.solvers.singlestep import dpm_solver_singlestep


def nodes(case):
    """(t, alpha, sigma), also of a run that leaves its own grid: the levels of its calls."""
    if not case.facts["off_grid"]:
        return case.nodes.T
    kept = [i for i, call in enumerate(case.calls) if call[0] not in case.calls[:i, 0]]
    return np.vstack([case.calls[kept], [-1.0, *case.targets[-1]]]).T


def grid(case):
    if case.facts["off_grid"]:
        return jd.grids.from_arrays(*nodes(case))
    if case.scheduler != "dpm_solver_inverse":
        return grid_of(case)
    t, alpha, sigma = case.nodes[::-1].T.copy()
    if case.facts["repeated_node"]:
        sigma[0] *= 1.0 + 1e-11
    return jd.grids.from_arrays(t, alpha, sigma).reversed()


def solver_type(case):
    return case["solver_type"] or "midpoint"


def order(case):
    return case["solver_order"] or 2


def final(case):
    """diffusers' lower_order_final: below 15 steps, unless it is off."""
    return {
        "lower_order_final": False if case["lower_order_final"] is False else None,
        "euler_at_final": bool(case["euler_at_final"]),
    }


def integrand(case):
    return "eps" if case["algorithm_type"] in ("dpmsolver", "noise_prediction") else "x0"


def singlestep(case):
    k, steps = order(case), grid(case)
    # What set_timesteps makes of the option.
    lowered = case["lower_order_final"] or case.ends_at_zero or case.steps % k != 0
    if case["algorithm_type"] != "sde-dpmsolver++":
        return dpm_solver_singlestep(
            steps, k, integrand(case), "taylor" if solver_type(case) == "heun" else "midpoint",
            stages="nodes", lower_order_final=lowered,
        )  # fmt: skip
    return dpm_solver_pp_sde_singlestep(
        steps, k, solver_type=solver_type(case), variant="diffusers", lower_order_final=lowered
    )  # fmt: skip


def multistep(case):
    build = jd.solvers.dpm_solver_pp_multistep
    if integrand(case) == "eps":
        build = jd.solvers.dpm_solver_multistep
    return build(grid(case), order(case), solver_type(case), "published", **final(case))


def sde_multistep(case):
    options = {"order": order(case), "solver_type": solver_type(case), **final(case)}
    if case["algorithm_type"] == "sde-dpmsolver":
        return dpm_solver_sde_multistep(grid(case), **options)
    return dpm_solver_pp_sde_multistep(grid(case), variant="diffusers", **options)


def deis(case):
    lowered = case["lower_order_final"] is not False and case.steps < 15
    return jd.solvers.exponential_adams(
        grid(case), order(case), "eps", "lambda", lower_order_final=lowered
    )


def sa(case):
    tau = case["tau_func"]
    if tau is None:  # diffusers' default: on a step that begins at 200 <= t <= 800
        begin = dict(zip(case.nodes[1:, 0], case.nodes[:-1, 0]))

        def tau(t, alpha, sigma):
            return float(200 <= begin[t] <= 800)

    exact = integrand(case) == "eps" or highest_degree(case) == 0
    return sa_solver(
        grid(case), case["predictor_order"] or 2, case["corrector_order"] or 2, tau,
        integrand=integrand(case), variant="exact" if exact else "few_steps",
        lower_order_final=case["lower_order_final"] is not False,
    )  # fmt: skip


def highest_degree(case):
    """Of SA-Solver's polynomials."""
    orders = case["predictor_order"] or 2, case["corrector_order"] or 2
    return min(max(orders), case.steps) - 1


def plms(case):
    if case["skip_prk_steps"]:
        return pndm(grid(case), start="heun")
    return pndm(grid(case), stages="nodes")


def to_data(case):
    """The grid of a consistency sampler: its last level is the data."""
    t, alpha, sigma = nodes(case).copy()
    alpha[-1], sigma[-1] = 1.0, 0.0
    return jd.grids.from_arrays(t, alpha, sigma)


def discrete(case):
    schedule = case["beta_schedule"] or "scaled_linear"
    if schedule == "squaredcos_cap_v2":
        return jd.processes.ddpm("squaredcos")
    return jd.processes.ddpm(schedule, beta_start=0.00085, beta_end=0.012)


def trajectory_consistency(case):
    eta = 0.3 if case["eta"] is None else case["eta"]
    return tcd(jd.grids.from_times(discrete(case), case.nodes[:, 0].astype(int)), eta)


def score_vp(case):
    process = jd.processes.vp_linear(0.1, case["beta_max"] or 20.0)
    return euler_maruyama(jd.grids.from_times(process, case.calls[:, 0], end="zero"))


def ddim_inverse(case):
    """DDIM from data to noise, each network asked at the level where the step ends."""
    alpha, sigma = np.vstack([START_OF_INVERSE[case["set_alpha_to_one"]], case.targets])[::-1].T
    t = [*case.calls[::-1, 0], -1.0]
    table = jd.solvers.deis(jd.grids.from_arrays(t, alpha, sigma).reversed(), 1)
    levels = dict(zip(("t", "alpha", "sigma"), case.calls.T.copy()))
    return dataclasses.replace(table, **levels)


# The data's level: sigma = 0, from which no grid of ours starts, or that of timestep 0.
START_OF_INVERSE = {None: (1.0, 1e-13), False: (np.sqrt(1.0 - 1e-4), np.sqrt(1e-4))}


TABLEAUX = {
    "dpm_solver_singlestep": singlestep,
    "dpm_solver": multistep,
    "dpm_solver_inverse": multistep,
    "dpm_solver_sde_multistep": sde_multistep,
    "edm_dpm_solver_sde": sde_multistep,
    "cosine_dpm_solver": sde_multistep,
    "deis": deis,
    "sa_solver": sa,
    "pndm": plms,
    "ipndm": lambda case: ipndm(grid(case)),
    "lms": lambda case: jd.solvers.lms(grid(case), case["order"] or 4),
    "kdpm2": lambda case: kdpm2(grid(case)),
    "kdpm2_ancestral": lambda case: kdpm2_ancestral(grid(case)),
    "euler_ancestral": lambda case: euler_ancestral(grid(case)),
    "dpm_solver_sde": lambda case: dpm_solver_pp_sde(
        grid(case), s_noise=1.0 if case["s_noise"] is None else case["s_noise"], variant="published"
    ),
    "lcm": lambda case: consistency(to_data(case)),
    "flow_lcm": lambda case: consistency(grid(case)),
    "consistency": lambda case: consistency(to_data(case)),
    "tcd": trajectory_consistency,
    "unclip": lambda case: jd.solvers.ddpm(grid(case)),
    "score_sde_ve": lambda case: reverse_diffusion(grid(case)),
    "score_sde_vp": score_vp,
    "ddim_inverse": ddim_inverse,
    "flow_euler_ancestral": lambda case: euler_ancestral(
        grid(case), 1.0 if case["eta"] is None else case["eta"], down="flow"
    ),
}


def noise(case, draws):
    """The recorded draws as ours, [draws, batch, dim]."""
    z = case.noise.copy()
    if case.facts["repeated_node"]:  # a step of length 0 has none, one of length 1e-11 has
        z[case.steps - 1 :] = 0.0
    if case.scheduler == "sa_solver" and case["tau_func"] is None:  # ours where tau is 1 only
        z = z[(case.calls[:, 0] >= 200) & (case.calls[:, 0] <= 800)]
    if case.scheduler == "consistency":  # the noise of sigma^2 - sigma_min^2
        rho = case.targets[: len(z), 1]
        z *= (case["s_noise"] or 1.0) * np.sqrt(1.0 - (0.002 / rho) ** 2)[:, None, None]
    return np.pad(z, ((0, max(0, draws - len(z))), (0, 0), (0, 0)))[:draws]


def clips(case):
    default = {"unclip": True, "ddim_inverse": True}.get(case.scheduler, False)
    if case.scheduler == "consistency":
        return case["clip_denoised"] is not False
    return default if case["clip_sample"] is None else case["clip_sample"]


def denoiser(case):
    converts = case.levels != "edm" and case.scheduler != "lcm"
    found = mixture(case.prediction if converts else "x0")
    if case["thresholding"]:
        limits = case["dynamic_thresholding_ratio"], case["sample_max_value"]
        found = jd.dynamic_threshold(found, *limits)
    elif clips(case):
        limit = case["clip_sample_range"] or 1.0
        found = jd.clip_x0(found, -limit, limit)
    if case.scheduler == "lcm":
        return jd.latent_consistency_boundary(found, case["timestep_scaling"] or 10.0)
    return found
