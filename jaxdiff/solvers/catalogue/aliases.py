"""What others call our settings: names of user interfaces, of diffusers and of k-diffusion."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Alias(NamedTuple):
    """A setting of ours, and the grid (a function of `jaxdiff.grids`) that the name implies, if any.

    `paper`: a key of `jaxdiff.solvers.papers.PAPERS`, where it is not the setting's.
    """

    setting: str
    grid: str | None = None
    grid_options: Mapping[str, Any] = {}
    paper: str | None = None


# Of these, "<name> Karras" and "<name> Exponential" exist too.
_INTERFACES = {
    "Euler": "euler", "Euler a": "euler_ancestral", "Heun": "heun", "LMS": "lms",
    "DPM2": "kdpm2", "DPM2 a": "kdpm2_ancestral", "DPM++ 2S a": "dpm_solver_pp_2s_ancestral",
    "DPM++ 2M": "dpm_solver_pp_2m", "DPM++ SDE": "dpm_solver_pp_sde",
    "DPM++ 2M SDE": "dpm_solver_pp_2m_sde", "DPM++ 2M SDE Heun": "dpm_solver_pp_2m_sde_heun",
    "DPM++ 3M SDE": "dpm_solver_pp_3m_sde",
    "DPM fast": "dpm_solver_3s_fast", "DEIS": "deis_tab2", "UniPC": "unipc_2",
    "DDIM": "ddim", "DDPM": "ddpm", "PLMS": "plms", "Restart": "restart",
    "LCM": "consistency", "TCD": "tcd",
}  # fmt: skip
_SUFFIXES = (("",), (" Karras", "karras", {"rho": 7.0}), (" Exponential", "half_log_snr"))
_PAPERS = {"LCM": "lcm"}

# diffusers' multistep schedulers leave out timestep 0.
_WITHOUT_ZERO = {"keep_zero": False}

_OTHERS = {
    "edm": Alias("heun", "karras", {"rho": 7.0}),
    "dpmpp_2m": Alias("dpm_solver_pp_2m"),
    "dpmpp_3m": Alias("dpm_solver_pp_3m"),
    # k-diffusion
    "sample_euler": Alias("euler"),
    "sample_euler_ancestral": Alias("euler_ancestral"),
    "sample_heun": Alias("heun"),
    "sample_lms": Alias("lms"),
    "sample_dpm_2": Alias("kdpm2"),
    "sample_dpm_2_ancestral": Alias("kdpm2_ancestral"),
    "sample_dpm_fast": Alias("dpm_solver_3s_fast", "half_log_snr"),
    "sample_dpmpp_2s_ancestral": Alias("dpm_solver_pp_2s_ancestral"),
    "sample_dpmpp_sde": Alias("dpm_solver_pp_sde"),
    "sample_dpmpp_2m": Alias("dpm_solver_pp_2m"),
    "sample_dpmpp_2m_sde": Alias("dpm_solver_pp_2m_sde"),
    "sample_dpmpp_3m_sde": Alias("dpm_solver_pp_3m_sde"),
    # diffusers
    "LCMScheduler": Alias("consistency", "leading", paper="lcm"),
    "TCDScheduler": Alias("tcd", "leading"),
    "IPNDMScheduler": Alias("ipndm_4"),
    "DDIMScheduler": Alias("ddim", "leading"),
    "DDPMScheduler": Alias("ddpm", "leading"),
    "PNDMScheduler": Alias("f_pndm", "leading"),
    "LMSDiscreteScheduler": Alias("lms", "linspace"),
    "EulerDiscreteScheduler": Alias("euler", "linspace"),
    "EulerAncestralDiscreteScheduler": Alias("euler_ancestral", "linspace"),
    "HeunDiscreteScheduler": Alias("heun", "linspace"),
    "KDPM2DiscreteScheduler": Alias("kdpm2", "linspace"),
    "KDPM2AncestralDiscreteScheduler": Alias("kdpm2_ancestral", "linspace"),
    "DPMSolverMultistepScheduler": Alias("dpm_solver_pp_2m", "linspace", _WITHOUT_ZERO),
    "DPMSolverSinglestepScheduler": Alias("dpm_solver_pp_2s_nodes", "linspace", _WITHOUT_ZERO),
    "DPMSolverSDEScheduler": Alias("dpm_solver_pp_sde", "linspace"),
    "DEISMultistepScheduler": Alias("dpm_solver_2m_heun", "linspace", _WITHOUT_ZERO),
    "UniPCMultistepScheduler": Alias("unipc_2", "linspace", _WITHOUT_ZERO),
    "FlowMatchEulerDiscreteScheduler": Alias("euler_flow", "uniform"),
    "FlowMatchHeunDiscreteScheduler": Alias("heun_flow", "uniform"),
    "EDMEulerScheduler": Alias("euler", "karras", {"rho": 7.0}),
}

ALIASES: Mapping[str, Alias] = {
    **{
        name + suffix: Alias(setting, *grid, paper=_PAPERS.get(name))
        for name, setting in _INTERFACES.items()
        for suffix, *grid in _SUFFIXES
    },
    **_OTHERS,
}
