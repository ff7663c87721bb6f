"""The golden trajectories of the authors' own codes, replayed by `jaxdiff.sample` in float64.

`golden/OFFICIAL.md` describes the files, `replay.py` when a case matches. The table `DEVIATIONS`
names the cases where a reference computes something else, and from which state on.
"""

import collections

import jax
import numpy as np
import pytest
from official_cases import cases
from official_tableaux import TABLEAUX
from replay import TOLERANCE, Replay, mixture, recorded_noise

import jaxdiff as jd

# Reference -> (cases matched, cases in DEVIATIONS, cases whose integrals are Riemann sums).
COUNTS = {
    "k_diffusion": (93, 0, 0),
    "edm": (38, 0, 0),
    "dpm_solver": (79, 0, 0),
    "unipc": (56, 0, 0),
    "diff_sampler": (61, 2, 12),
    "deis": (13, 0, 18),
    "pndm": (6, 0, 0),
    "bdia": (6, 0, 0),
    "momentum": (17, 2, 0),
    "sa_solver": (38, 0, 0),
    "er_sde": (43, 0, 0),
    "restart": (4, 0, 0),
}


def thresholded(case):
    if case.reference == "diff_sampler":
        return bool(case["predict_x0"])
    return case["correcting_x0_fn"] is not None


def tableau(case):
    found = TABLEAUX[case.reference](case)
    assert found.rows == len(case.states) - 1, str(case)
    assert found.draws == len(case.noise) or REPLAY.deviation(case), str(case)
    return found


def denoiser(case):
    """Imagen's rule with the quantile 0.995 and no cap on the threshold, or the plain network."""
    inner = mixture(case.prediction)
    return jd.dynamic_threshold(inner, 0.995, np.inf) if thresholded(case) else inner


def start(case):
    return (
        case.start / np.hypot(1.0, case.nodes[0, 2]) if case["deis_mode"] == "tab" else case.start
    )


def scale(case):
    """Ours over the recorded states, whose alpha is 1."""
    if case["deis_mode"] != "tab":
        return np.ones(len(case.states))
    return 1.0 / np.hypot(1.0, np.append(case.calls[:, 2], case.nodes[-1, 2]))


# --- what the references do differently -----------------------------------------------------------

# reason -> (which cases, the first state that differs, never NaN)
DEVIATIONS = {
    "diff-sampler: the last step to x0 is not thresholded, the others are": (
        lambda c: c.reference == "diff_sampler" and c["predict_x0"] and c["denoise_to_zero"],
        lambda c: len(c.calls), False,
    ),
    "Momentum, v: the velocity starts at the network's v, not at its eps": (
        lambda c: c.reference == "momentum" and c.prediction == "v",
        lambda c: 1, False,
    ),
}  # fmt: skip


def points(case):
    """Number of points of DEIS's Riemann sums, if the case has them."""
    return case["num_item"] or case["N"]


# --- the replay -----------------------------------------------------------------------------------


REPLAY = Replay(cases, tableau, denoiser, recorded_noise, start, scale, DEVIATIONS)


@pytest.mark.parametrize("reference", COUNTS)
def test_every_trajectory_is_met_or_its_deviation_is_named(reference):
    members = [case for case in cases() if case.reference == reference]
    exact = [case for case in members if not points(case)]
    *counts, riemann = COUNTS[reference]
    assert len(members) - len(exact) == riemann
    REPLAY.assert_met_or_named(exact, tuple(counts))


@pytest.mark.parametrize("reason", DEVIATIONS)
def test_a_deviation_is_one(reason):
    """Far above rounding even from the nearest of our variants."""
    REPLAY.assert_deviates(reason)


def riemann_groups():
    """DEIS's cases that differ in the number of points alone, fewest first."""
    groups = collections.defaultdict(list)
    for case in cases():
        if points(case):
            key = {k: v for k, v in case.facts["options"].items() if k not in ("num_item", "N")}
            groups[case.reference, *key.items()].append(case)
    return {str(key): sorted(members, key=points) for key, members in groups.items()}


@pytest.mark.parametrize("group", riemann_groups())
def test_deis_is_met_in_the_limit_of_its_riemann_sums(group):
    """With n, 2 n and 4 n points the error is a / n + b / n^2 + ...: the limit is ours."""
    members = riemann_groups()[group]
    assert [points(case) for case in members] == [10000, 20000, 40000]
    off = np.array([REPLAY.errors(case).max() for case in members])
    np.testing.assert_allclose(off[:-1] / off[1:], 2.0, rtol=0.01)
    assert 1e-6 < off[0] < 1e-2
    few, more, most = (case.states for case in members)
    once, again = 2.0 * more - few, 2.0 * most - more
    limit = (4.0 * again - once) / 3.0
    assert np.all(REPLAY.errors(members[0], limit) <= TOLERANCE)


def test_no_case_is_left_out():
    assert len(REPLAY.states) == len(cases()) == 488
    assert sum(map(sum, COUNTS.values())) == 488


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_our_mixture_is_the_recorded_network(x64, prediction):
    found = [c for c in cases() if c.prediction == prediction]
    x, outputs = (np.concatenate(p) for p in zip(*((c.states[:-1], c.outputs) for c in found)))
    t, alpha, sigma = np.concatenate([c.calls for c in found]).T
    ours = jax.jit(jax.vmap(mixture(prediction)))(x, t, alpha, sigma)
    np.testing.assert_allclose(ours, outputs, rtol=0, atol=1e-12 * np.abs(outputs).max())
