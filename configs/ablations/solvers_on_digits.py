"""Which sampler for the digits network? Twelve solvers, two grids, five budgets, three seeds.

    jaxdiff train --config configs/digits.py --workdir runs/digits
    jaxdiff ablate --config configs/ablations/solvers_on_digits.py --workdir runs/solvers_on_digits

Writes table.csv, table.json, report.md and its pictures into the folder; a sweep that was stopped
goes on there.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    common = {"nfe": (5, 6, 8, 10, 20), "grid": ("half_log_snr", "logistic"), "seed": (0, 1, 2)}
    solvers = (
        "ddim", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc_2", "unipc_3", "deis_tab3",
        "ipndm_4", "ghvb_3", "adams_flow_3", "adams_pc_2_4",
    )  # fmt: skip
    config.ablation = {
        "run": "runs/digits",
        "axes": (
            {"solver": solvers, **common},
            {"solver": ("heun", "dpm_solver_pp_2s"), **common, "nfe": (6, 8, 10, 20)},
        ),
        "count": 64,
        "reference": {"solver": "dpm_solver_pp_2m", "grid": "half_log_snr", "steps": 1000},
        "metrics": ("mmd", "conditional_accuracy"),
    }  # fmt: skip
    return config
