"""Golden runs of official codes that adapt to the network or the state (golden/make_calibrated.py)."""

import functools
import json
from pathlib import Path

import golden_cases
import numpy as np

import jaxdiff as jd


@functools.cache
def load(name):
    """The cases of one reference: (facts, arrays by name)."""
    with np.load(Path(__file__).parent / "golden" / f"calibrated_{name}.npz") as z:
        facts = json.loads(z["info"].tobytes())["cases"]
        found = [{} for _ in facts]
        for key in z.files:
            if key != "info":
                index, _, kept = key.partition("/")
                found[int(index)][kept] = z[key]
    return list(zip(facts, found))


def mixture(prediction):
    """The network of every case, in the precision that is on."""
    return jd.gaussian_mixture(**golden_cases.mixture(), prediction=prediction)


def grid(arrays):
    """The grid of a case."""
    return jd.grids.from_arrays(*arrays["nodes"].T)
