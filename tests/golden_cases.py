"""The golden trajectories of diffusers (golden/README.md says what each name means)."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

SCHEDULERS = (
    "ddim", "ddpm", "euler", "flow_euler", "edm_euler", "heun", "flow_heun", "dpm_solver_pp",
    "edm_dpm_solver_pp", "unipc",
)  # fmt: skip
MORE_SCHEDULERS = (
    "dpm_solver_singlestep", "dpm_solver", "dpm_solver_sde_multistep", "edm_dpm_solver_sde",
    "cosine_dpm_solver", "dpm_solver_inverse", "deis", "sa_solver", "pndm", "ipndm", "lms", "kdpm2",
    "kdpm2_ancestral", "euler_ancestral", "dpm_solver_sde", "lcm", "tcd", "consistency", "unclip",
    "score_sde_ve", "score_sde_vp", "ddim_inverse", "flow_lcm", "flow_euler_ancestral",
)  # fmt: skip
_PREDICTIONS = {
    "epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow",
    "score": "score", "consistency": "x0",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One run. case[option] is an option of the constructor, `step` or `set_timesteps`, or None."""

    scheduler: str
    levels: str
    facts: dict[str, Any]
    states: np.ndarray
    outputs: np.ndarray
    calls: np.ndarray
    targets: np.ndarray
    nodes: np.ndarray
    noise: np.ndarray

    def __getitem__(self, option):
        return {**self.facts["config"], **self.facts["step"], **self.facts["setup"]}.get(option)

    def __str__(self):
        return f"{self.scheduler}: {self.facts['name']}"

    @property
    def prediction(self):
        return _PREDICTIONS[self.facts["prediction"]]

    @property
    def steps(self):
        return self.facts["steps"]

    @property
    def ends_at_zero(self):
        return self.targets[-1, 1] == 0.0

    @property
    def flow(self):
        return self.levels == "flow" or bool(self["use_flow_sigmas"])


@functools.cache
def _load(schedulers):
    found, mixtures = [], []
    for name in schedulers:
        with np.load(Path(__file__).parent / "golden" / f"diffusers_{name}.npz") as z:
            info = json.loads(z["info"].tobytes())
            columns = {key: z[key] for key in z.files if key != "info"}
        mixtures.append(info["mixture"])
        for facts in info["cases"]:
            arrays = {key: columns[key][slice(*facts["rows"][key])] for key in columns}
            found.append(Case(name, info["levels"], facts, **arrays))
    assert all(mixture == mixtures[0] for mixture in mixtures)
    return found, {key: np.array(value) for key, value in mixtures[0].items()}


def cases():
    """Every case of `SCHEDULERS`, in the order of the files."""
    return _load(SCHEDULERS)[0]


def more_cases():
    """Every case of `MORE_SCHEDULERS`."""
    return _load(MORE_SCHEDULERS)[0]


def mixture():
    """{"means", "scales", "weights"} of the mixture whose exact network made all of them."""
    return _load(SCHEDULERS)[1]
