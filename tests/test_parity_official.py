"""The golden trajectories of the authors' own codes, replayed by `jaxdiff.sample` in float64.

`golden/OFFICIAL.md` describes the files. A case matches if every recorded state (the network's
input in each call, and the result) is met to 1e-8 of that state's largest entry. The table
`DEVIATIONS` names the cases where a reference computes something else, and from which state on:
there, and only there, the trajectories must part.
"""

import collections
import functools

import golden_cases
import jax
import numpy as np
import pytest
from official_cases import cases
from official_tableaux import TABLEAUX

import jaxdiff as jd

TOLERANCE = 1e-8
# Reference -> (cases matched, cases in DEVIATIONS, cases whose integrals are Riemann sums).
COUNTS = {
    "k_diffusion": (90, 3, 0),
    "edm": (16, 4, 0),
    "dpm_solver": (79, 0, 0),
    "unipc": (56, 0, 0),
    "diff_sampler": (61, 2, 12),
    "deis": (13, 0, 18),
    "pndm": (6, 0, 0),
    "bdia": (6, 0, 0),
    "momentum": (17, 2, 0),
    "sa_solver": (34, 4, 0),
    "er_sde": (43, 0, 0),
    "restart": (4, 0, 0),
}


@functools.cache
def mixture(prediction):
    return jd.gaussian_mixture(**golden_cases.mixture(), prediction=prediction)


@functools.cache
def denoiser(prediction, thresholded):
    """Imagen's rule with the quantile 0.995 and no cap on the threshold, or the plain network."""
    inner = mixture(prediction)
    return jd.dynamic_threshold(inner, 0.995, np.inf) if thresholded else inner


def thresholded(case):
    if case.reference == "diff_sampler":
        return bool(case["predict_x0"])
    return case["correcting_x0_fn"] is not None


def scales(case):
    """(x_T, states) in our coordinates over the recorded ones."""
    if case["deis_mode"] != "tab":
        return 1.0, 1.0
    levels = np.append(case.calls[:, 2], case.nodes[-1, 2])
    return 1.0 / np.hypot(1.0, case.nodes[0, 2]), 1.0 / np.hypot(1.0, levels)[:, None, None]


# --- what the references do differently -----------------------------------------------------------

# reason -> (which cases, the first state that differs)
DEVIATIONS = {
    "EDM's ablation: Euler and Heun for dx / dt in the schedules' own t, linear drift included": (
        lambda c: c["schedule"] in ("vp", "ve"),
        lambda c: 1,
    ),
    "diff-sampler: the last step to x0 is not thresholded, the others are": (
        lambda c: c.reference == "diff_sampler" and c["predict_x0"] and c["denoise_to_zero"],
        lambda c: len(c.calls),
    ),
    "Momentum, v: the velocity starts at the network's v, not at its eps": (
        lambda c: c.reference == "momentum" and c.prediction == "v",
        lambda c: 1,
    ),
    "SA-Solver's more_steps: the last state is corrected, and evaluated again for x0": (
        lambda c: c["mode"] == "more_steps" and c["corrector_order"] > 0,
        lambda c: c.steps + 1,
    ),
    "dpm_fast with noise is not offered": (
        lambda c: c.sampler == "dpm_fast" and c["eta"],
        lambda c: 1,
    ),
}


def deviation(case):
    """The state from which a case must differ, or None if it must match."""
    found = [first(case) for which, first in DEVIATIONS.values() if which(case)]
    assert len(found) <= 1, str(case)
    return found[0] if found else None


def points(case):
    """Number of points of DEIS's Riemann sums, if the case has them."""
    return case["num_item"] or case["N"]


# --- the replay -----------------------------------------------------------------------------------


@functools.cache
def replayed():
    """{case: our states}: one vmapped program a denoiser, with and without noise."""
    groups, out = collections.defaultdict(list), {}
    with jax.enable_x64(True):
        for case in cases():
            tableau = TABLEAUX[case.reference](case)
            assert tableau.rows == len(case.states) - 1, str(case)
            assert tableau.draws == len(case.noise) or deviation(case), str(case)
            key = case.prediction, thresholded(case), tableau.draws > 0
            groups[key].append((case, tableau))
        for (prediction, rule, noisy), members in groups.items():
            model, tableaux = denoiser(prediction, rule), [tableau for _, tableau in members]
            x = np.stack([scales(case)[0] * case.start for case, _ in members])
            unused = [max(t.draws for t in tableaux) - t.draws for t in tableaux]
            noise = np.stack([
                np.pad(case.noise[: t.draws], ((0, n), (0, 0), (0, 0)))
                for (case, t), n in zip(members, unused)
            ])  # fmt: skip
            run = functools.partial(jd.sample, model, save="trajectory")
            over_cases = jax.vmap(lambda t, x, z: run(t, x, noise=z if noisy else None))  # noqa: B023
            states = np.asarray(over_cases(jd.solvers.stack(tableaux), x, noise))
            for (case, tableau), found in zip(members, states):
                out[case] = found[: tableau.rows + 1]
    return out


def errors(case, recorded=None):
    """Of every recorded state, relative to its largest entry."""
    expected = scales(case)[1] * (case.states if recorded is None else recorded)
    ours = replayed()[case]
    assert ours.shape == expected.shape and np.all(np.isfinite(ours)), str(case)
    return np.abs(ours - expected).max((1, 2)) / np.abs(expected).max((1, 2))


@pytest.mark.parametrize("reference", COUNTS)
def test_every_trajectory_is_met_or_its_deviation_is_named(reference):
    members = [case for case in cases() if case.reference == reference]
    exact = [case for case in members if not points(case)]
    expected = {str(case): deviation(case) for case in exact}
    first_wrong = {}
    for case in exact:
        bad = np.flatnonzero(~(errors(case) <= TOLERANCE)).tolist()
        first_wrong[str(case)] = bad[0] if bad else None
    assert first_wrong == expected
    deviating = sum(first is not None for first in expected.values())
    counts = len(exact) - deviating, deviating, len(members) - len(exact)
    assert counts == COUNTS[reference]


@pytest.mark.parametrize("reason", DEVIATIONS)
def test_a_deviation_is_one(reason):
    """Far above rounding even from the nearest of our variants."""
    which, first = DEVIATIONS[reason]
    found = [case for case in cases() if which(case)]
    assert found
    assert all(errors(case)[first(case)] > 1e-4 for case in found)


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
    off = np.array([errors(case).max() for case in members])
    np.testing.assert_allclose(off[:-1] / off[1:], 2.0, rtol=0.01)
    assert 1e-6 < off[0] < 1e-2
    few, more, most = (case.states for case in members)
    once, again = 2.0 * more - few, 2.0 * most - more
    limit = (4.0 * again - once) / 3.0
    assert np.all(errors(members[0], limit) <= TOLERANCE)


def test_no_case_is_left_out():
    assert len(replayed()) == len(cases()) == 470
    assert sum(map(sum, COUNTS.values())) == 470


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_our_mixture_is_the_recorded_network(x64, prediction):
    found = [c for c in cases() if c.prediction == prediction]
    x, outputs = (np.concatenate(p) for p in zip(*((c.states[:-1], c.outputs) for c in found)))
    t, alpha, sigma = np.concatenate([c.calls for c in found]).T
    ours = jax.jit(jax.vmap(mixture(prediction)))(x, t, alpha, sigma)
    np.testing.assert_allclose(ours, outputs, rtol=0, atol=1e-12 * np.abs(outputs).max())
