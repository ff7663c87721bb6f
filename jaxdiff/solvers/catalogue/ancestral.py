"""Entries: ancestral samplers, several of them from k-diffusion, and the SDE-DPM-Solvers."""

from jaxdiff.solvers.ancestral import dpm_solver_pp_2s_ancestral, euler_ancestral, kdpm2_ancestral
from jaxdiff.solvers.catalogue.entry import Entry, Setting
from jaxdiff.solvers.dpm_solver_sde import (
    dpm_solver_pp_sde,
    dpm_solver_pp_sde_multistep,
    dpm_solver_sde_multistep,
)
from jaxdiff.solvers.dpm_solver_sde_nodes import dpm_solver_pp_sde_singlestep

FLOW = {"down": "flow"}

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "euler_ancestral", euler_ancestral,
        {
            "euler_ancestral": Setting({}, 1, False, strong=1),
            "euler_ancestral_eta_half": Setting({"eta": 0.5}, 1, False, strong=1),
            "euler_ancestral_flow": Setting(FLOW, 1, False, strong=1),
        },
        1, "x0", (True, True), "k_diffusion", "ancestral",
    ),
    Entry(
        "kdpm2_ancestral", kdpm2_ancestral,
        {
            "kdpm2_ancestral": Setting({}, 2, False, strong=1),
            "kdpm2_ancestral_flow": Setting(FLOW, 2, False, strong=1),
        },
        2, "eps", (False, True), "k_diffusion", "ancestral",
    ),
    Entry(
        "dpm_solver_pp_2s_ancestral", dpm_solver_pp_2s_ancestral,
        {
            "dpm_solver_pp_2s_ancestral": Setting({}, 2, False, strong=1),
            "dpm_solver_pp_2s_ancestral_flow": Setting(FLOW, 2, False, strong=1),
        },
        2, "x0", (True, True), "k_diffusion", "ancestral",
    ),
    Entry(
        "dpm_solver_pp_sde", dpm_solver_pp_sde,
        {
            "dpm_solver_pp_sde": Setting({}, 2, False, strong=1),
            "dpm_solver_pp_sde_eta_half": Setting({"eta": 0.5}, 2, False, strong=1),
            "dpm_solver_pp_sde_published": Setting({"variant": "published"}, 2, False, strong=1),
            "dpm_solver_pp_sde_independent": Setting({"variant": "independent"}, 1, False),
        },
        2, "x0", (True, True), "k_diffusion", "exponential SDE",
    ),
    Entry(
        "dpm_solver_pp_sde_singlestep", dpm_solver_pp_sde_singlestep,
        {
            # 2 in the limit: 1.9 and 1.8 at 320 to 640 steps.
            "dpm_solver_pp_3s_sde": Setting({}, 1.5, False, strong=1),
            "dpm_solver_pp_3s_sde_midpoint": Setting(
                {"solver_type": "midpoint"}, 1.5, False, strong=1
            ),
            "dpm_solver_pp_2s_sde": Setting({"order": 2}, 2, False, strong=1),
            # 1 in the limit: 0.93 at 160 to 640 steps.
            "dpm_solver_pp_2s_sde_diffusers": Setting(
                {"order": 2, "variant": "diffusers"}, 0.5, False
            ),
        },
        1, "x0", (True, True), "dpm_solver_pp", "exponential SDE",
    ),
    Entry(
        "dpm_solver_pp_sde_multistep", dpm_solver_pp_sde_multistep,
        {
            "dpm_solver_pp_2m_sde": Setting({}, 2, False, strong=1),
            "dpm_solver_pp_2m_sde_heun": Setting({"solver_type": "heun"}, 2, False, strong=1),
            "dpm_solver_pp_2m_sde_eta_half": Setting({"eta": 0.5}, 2, False, strong=1),
            "dpm_solver_pp_1m_sde": Setting({"order": 1}, 1, False, strong=1),
            "dpm_solver_pp_3m_sde": Setting(
                {"order": 3, "solver_type": "heun"}, 2, False, strong=1
            ),
            "dpm_solver_pp_3m_sde_published": Setting(
                {"order": 3, "solver_type": "heun", "variant": "published"}, 2, False, strong=1
            ),
            "dpm_solver_pp_3m_sde_diffusers": Setting(
                {"order": 3, "variant": "diffusers"}, 1, False
            ),
        },
        1, "x0", (True, True), "dpm_solver_pp", "exponential SDE",
    ),
    Entry(
        "dpm_solver_sde_multistep", dpm_solver_sde_multistep,
        {
            "dpm_solver_2m_sde": Setting({}, 2, False, strong=1),
            "dpm_solver_2m_sde_heun": Setting({"solver_type": "heun"}, 2, False, strong=1),
            "dpm_solver_1m_sde": Setting({"order": 1}, 1, False, strong=1),
            "dpm_solver_3m_sde": Setting({"order": 3}, 2, False, strong=1),
        },
        1, "eps", (False, True), "dpm_solver_pp", "exponential SDE",
    ),
)  # fmt: skip
