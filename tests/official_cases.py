"""The golden trajectories of official codes (golden/OFFICIAL.md says what each name means)."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

REFERENCES = (
    "k_diffusion", "edm", "dpm_solver", "unipc", "diff_sampler", "deis", "pndm", "bdia", "momentum",
    "sa_solver", "er_sde", "restart",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One run. `case[option]` is an option of the reference's sampler, or None."""

    reference: str
    facts: dict[str, Any]
    start: np.ndarray
    states: np.ndarray
    outputs: np.ndarray
    calls: np.ndarray
    nodes: np.ndarray
    noise: np.ndarray

    def __getitem__(self, option):
        return self.facts["options"].get(option)

    def __str__(self):
        return f"{self.reference} {self.facts['name']}"

    @property
    def sampler(self):
        return self.facts["sampler"]

    @property
    def prediction(self):
        if self.reference in ("k_diffusion", "edm", "diff_sampler", "er_sde", "restart"):
            return "x0"
        return "v" if self["prediction_type"] == "v_prediction" else "eps"

    @property
    def steps(self):
        return len(self.nodes) - 1


@functools.cache
def cases():
    """Every case, in the order of the files."""
    found = []
    for name in REFERENCES:
        with np.load(Path(__file__).parent / "golden" / f"official_{name}.npz") as z:
            info = json.loads(z["info"].tobytes())
            columns = {key: z[key] for key in z.files if key != "info"}
        for facts in info["cases"]:
            arrays = {key: columns[key][slice(*facts["rows"][key])] for key in columns}
            start = arrays.pop("start")[0]
            options = facts["options"]
            if options.get("mode") == "more_steps" and not options["corrector_order"]:
                # SA-Solver evaluates its last state once more, where nothing has corrected it.
                for key in ("states", "outputs", "calls"):
                    arrays[key] = np.delete(arrays[key], len(arrays["nodes"]), axis=0)
            found.append(Case(name, facts, start, **arrays))
    return found
