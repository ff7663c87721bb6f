"""Golden trajectories replayed by `jaxdiff.sample` in float64, and what is asserted of them.

A case matches if every recorded state (the network's input in each call, and the result) is met to
1e-8 of that state's largest entry. The others are named as deviations: there, and only there, the
trajectories must part.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import golden_cases
import jax
import numpy as np

import jaxdiff as jd
from jaxdiff.sampling import check_call

TOLERANCE = 1e-8


@functools.cache
def mixture(prediction):
    return jd.gaussian_mixture(**golden_cases.mixture(), prediction=prediction)


def recorded_noise(case, draws):
    """As many of the recorded draws as there are; a table of fewer uses none of the others."""
    return np.pad(case.noise[:draws], ((0, max(0, draws - len(case.noise))), (0, 0), (0, 0)))


# --- diffusers' cases in our coordinates ----------------------------------------------------------


def to_vp(case):
    """The scale of each recorded state in our coordinates.

    diffusers' v is that of the variance-preserving state, also where its states have alpha = 1.
    """
    if case.levels != "unit_alpha" or case.prediction != "v":
        return np.ones(len(case.states))
    levels = np.concatenate([case.calls[:, 1:], case.targets[-1:]])
    return 1.0 / np.hypot(*levels.T)


def start(case):
    return to_vp(case)[0] * case.states[0]


def grid(case):
    t, alpha, sigma = case.nodes.T.copy()
    if case.facts["repeated_node"]:
        if case["eta"]:  # noise of variance 0: the identity
            t, alpha, sigma = t[:-1], alpha[:-1], sigma[:-1]
        else:
            sigma[-1] *= 1.0 - 1e-11
    if case.levels == "unit_alpha" and case.prediction == "v":
        size = np.hypot(alpha, sigma)
        alpha, sigma = alpha / size, sigma / size
    return jd.grids.from_arrays(t, alpha, sigma)


# --- the replay -----------------------------------------------------------------------------------


@jax.jit
def _trajectories(model, tables, x, z):
    def one(model, table, x, z):
        return jd.sample(model, table, x, noise=z, save="trajectory")

    return jax.vmap(one)(model, tables, x, z)


@dataclasses.dataclass(frozen=True)
class Replay:
    """Recorded cases and ours.

    Attributes:
      cases: () -> every case.
      tableau, denoiser: case -> ours; a ValueError is a refusal of the case.
      noise: (case, draws) -> the recorded noise as ours, [draws, batch, dim].
      start: case -> our x_T.
      scale: case -> ours over the recorded state, for each state.
      deviations: reason -> (which cases, the first state that differs, whether the recorded one is
        NaN from there on).
    """

    cases: Callable[[], list[Any]]
    tableau: Callable
    denoiser: Callable
    noise: Callable
    start: Callable
    scale: Callable
    deviations: Mapping[str, tuple[Callable, Callable, bool]]

    @functools.cached_property
    def states(self):
        """{case: our states, or the message of the error}, one vmapped program a kind of denoiser."""
        groups, out = collections.defaultdict(list), {}
        with jax.enable_x64(True):
            for case in self.cases():
                x = self.start(case)
                try:
                    table, model = self.tableau(case), self.denoiser(case)
                    z = self.noise(case, table.draws)
                    check_call(model, table, x, None, z, None, "trajectory", None, None)
                except ValueError as error:
                    out[case] = str(error)
                else:
                    # A stack is as blind as its blindest table.
                    table = dataclasses.replace(table, blind=())
                    groups[jax.tree.structure(model)].append((case, table, model, x))
            for members in groups.values():
                found, tables, models, x = zip(*members)
                draws = max(1, *(table.draws for table in tables))
                z = np.stack([self.noise(case, draws) for case in found])
                model = jax.tree.map(lambda *leaves: np.stack(leaves), *models)
                states = _trajectories(model, jd.solvers.stack(tables), np.stack(x), z)
                for case, table, path in zip(found, tables, np.asarray(states)):
                    out[case] = path[: table.rows + 1]
        return out

    def errors(self, case, recorded=None):
        """Of every recorded state, relative to its largest entry; NaN where that is not finite."""
        recorded = case.states if recorded is None else recorded
        ours, expected = self.states[case], self.scale(case)[:, None, None] * recorded
        if len(ours) < len(expected):  # a dropped node: the identity
            ours = np.concatenate([ours, ours[-1:]])
        assert ours.shape == expected.shape and np.all(np.isfinite(ours)), str(case)
        with np.errstate(invalid="ignore"):
            return np.abs(ours - expected).max((1, 2)) / np.abs(expected).max((1, 2))

    def deviation(self, case):
        """The state from which a case must differ, or None if it must match."""
        found = [first(case) for which, first, _ in self.deviations.values() if which(case)]
        assert len(found) <= 1, str(case)
        return found[0] if found else None

    def assert_met_or_named(self, members, counts):
        """`counts` of the members: those that match, and those that deviate where they must."""
        first_wrong, expected = {}, {str(case): self.deviation(case) for case in members}
        for case in members:
            refused = isinstance(self.states[case], str)
            bad = [1] if refused else np.flatnonzero(~(self.errors(case) <= TOLERANCE)).tolist()
            first_wrong[str(case)] = bad[0] if bad else None
        assert first_wrong == expected
        deviating = sum(first is not None for first in expected.values())
        assert (len(members) - deviating, deviating) == counts

    def assert_deviates(self, reason, refusal=None):
        """NaN where it says so, else far above rounding; refused with words that match, if any."""
        which, first, is_nan = self.deviations[reason]
        found = [case for case in self.cases() if which(case)]
        assert found
        for case in found:
            if refusal is not None:
                assert refusal in self.states[case]
            else:
                assert is_nan or self.errors(case)[first(case)] > 1e-4
        return found
