"""Entries: methods with momentum, and bi-directional ones."""

from jaxdiff.solvers.bdia import bdia
from jaxdiff.solvers.belm import belm
from jaxdiff.solvers.catalogue.entry import Entry, Setting
from jaxdiff.solvers.dual_fast import dual_fast_multistep
from jaxdiff.solvers.edict import edict
from jaxdiff.solvers.momentum import ghvb, heavy_ball_multistep

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "ghvb", ghvb,
        {
            "ghvb_2": Setting({}, 2),
            "ghvb_1": Setting({"order": 1}, 1),
            "ghvb_3": Setting({"order": 3}, 2),
            "ghvb_4": Setting({"order": 4}, 2),
            "ghvb_3_variable": Setting({"order": 3, "coefficients": "variable"}, 2),
            "ghvb_4_variable": Setting({"order": 4, "coefficients": "variable"}, 2),
        },
        1, "eps", (False, True), "ghvb", "momentum",
    ),
    Entry(
        "heavy_ball_multistep", heavy_ball_multistep,
        {
            "heavy_ball_plms": Setting({"base": "ipndm", "order": 4}, 1),
            "nesterov_plms": Setting(
                {"base": "ipndm", "order": 4, "variant": "nesterov"}, 1
            ),
            "heavy_ball_ipndm_2": Setting({"base": "ipndm", "order": 2}, 1),
            "heavy_ball_dpm_solver_pp_2m": Setting(
                {"base": "dpm_solver_pp", "order": 2}, 1, integrand="x0", ends=(True, True)
            ),
            "heavy_ball_dpm_solver_pp_2m_published": Setting(
                {"base": "dpm_solver_pp", "order": 2, "skip_first_order": True}, 1,
                integrand="x0", ends=(True, True),
            ),
            "heavy_ball_unipc_2": Setting(
                {"base": "unipc", "order": 2}, 1, integrand="x0", ends=(True, True)
            ),
        },
        1, "eps", (False, True), "ghvb", "momentum",
    ),
    Entry(
        "bdia", bdia,
        {
            "bdia_ddim": Setting({}, 2),
            "bdia_ddim_half": Setting({"gamma": 0.5}, 1),
            "bdia_edm": Setting(
                {"base": "edm", "gamma": 0.5}, 1, integrand="eps", ends=(False, True)
            ),
            "bdia_dpm_solver_pp": Setting({"base": "dpm_solver_pp"}, 2),
        },
        1, "x0", (True, True), "bdia", "bi-directional",
    ),
    Entry(
        "belm", belm,
        {
            "belm": Setting({}, 2),
            "belm_flow": Setting(
                {"integrand": "flow"}, 2, integrand="flow", ends=(True, True)
            ),
            "belm_v": Setting({"integrand": "v"}, 2, integrand="v", ends=(True, True)),
        },
        1, "eps", (False, True), "belm", "bi-directional",
    ),
    Entry(
        "edict", edict,
        {"edict": Setting({}, 1), "edict_in_turn": Setting({"alternate": False}, 1)},
        2, "eps", (False, True), "edict", "bi-directional",
    ),
    Entry(
        "dual_fast_multistep", dual_fast_multistep,
        {
            "dual_fast_ddim": Setting({}, 1),
            "dual_fast_ddim_linear": Setting({"schedule": "linear"}, 1),
            "dual_fast_dpm_solver_2m": Setting(
                {"base": "dpm_solver", "order": 2}, 1, integrand="eps", ends=(False, True)
            ),
            "dual_fast_dpm_solver_pp_2m": Setting({"order": 2}, 1),
        },
        1, "x0", (True, True), "dual_fast", "error compensation",
    ),
)  # fmt: skip
