"""The golden trajectories of diffusers' other schedulers, replayed as test_parity.py does."""

import pytest
from diffusers_tableaux import TABLEAUX, clips, denoiser, highest_degree, integrand, noise
from golden_cases import more_cases
from replay import Replay, start, to_vp

# Scheduler -> (cases matched, cases in DEVIATIONS).
COUNTS = {
    "dpm_solver_singlestep": (50, 0),
    "dpm_solver": (24, 0),
    "dpm_solver_sde_multistep": (33, 2),
    "edm_dpm_solver_sde": (8, 0),
    "cosine_dpm_solver": (9, 5),
    "dpm_solver_inverse": (20, 0),
    "deis": (25, 0),
    "sa_solver": (33, 11),
    "pndm": (20, 4),
    "ipndm": (2, 4),
    "lms": (18, 0),
    "kdpm2": (13, 0),
    "kdpm2_ancestral": (13, 0),
    "euler_ancestral": (11, 0),
    "dpm_solver_sde": (15, 0),
    "lcm": (14, 0),
    "tcd": (12, 0),
    "consistency": (8, 0),
    "unclip": (6, 0),
    "score_sde_ve": (5, 0),
    "score_sde_vp": (0, 3),
    "ddim_inverse": (7, 2),
    "flow_lcm": (5, 0),
    "flow_euler_ancestral": (6, 0),
}


# --- what diffusers does differently --------------------------------------------------------------

# reason -> (which cases, the first state that differs, whether diffusers' is NaN from there on)
DEVIATIONS = {
    "iPNDM: the first step, from alpha = 0, takes x0 = 0; we refuse it": (
        lambda c: c.scheduler == "ipndm" and c.calls[0, 1] == 0.0,
        lambda c: 1, False,
    ),
    "PNDM, v: a combination of outputs at several levels is converted as if of one": (
        lambda c: c.scheduler == "pndm" and c.prediction == "v",
        lambda c: 2, False,
    ),
    "PNDM: a step ends at a level that is not the next call's": (
        lambda c: c.scheduler == "pndm" and c.facts["off_grid"],
        lambda c: 1, False,
    ),
    "SDE multistep, a step of length 0: the root of a rounding error below 0 (in float64)": (
        lambda c: c.scheduler == "dpm_solver_sde_multistep" and c.facts["repeated_node"],
        lambda c: c.steps, True,
    ),
    "Cosine: the Brownian increment over a step of length 0 is 0/0": (
        lambda c: c.scheduler == "cosine_dpm_solver" and c.facts["repeated_node"],
        lambda c: c.steps, True,
    ),
    "SA-Solver: the slope's few-steps integral, but noise in the last step": (
        lambda c: c.scheduler == "sa_solver" and c["tau_func"] and integrand(c) == "x0"
        and highest_degree(c) > 0 and not c.facts["repeated_node"],
        lambda c: c.steps, False,
    ),
    "score_sde VP: steps of 1 / n on times (1 - eps) / (n - 1) apart": (
        lambda c: c.scheduler == "score_sde_vp",
        lambda c: 1, False,
    ),
    "DDIM inverse, x0 network: 0/0 at sigma = 0": (
        lambda c: c.scheduler == "ddim_inverse" and c.prediction == "x0",
        lambda c: 1, True,
    ),
    "DDIM inverse: x0 clipped beside an eps that is not, a pair that no inversion of ours takes": (
        lambda c: c.scheduler == "ddim_inverse" and clips(c),
        lambda c: 1, False,
    ),
}  # fmt: skip


# --- the replay -----------------------------------------------------------------------------------

REPLAY = Replay(
    more_cases,
    lambda case: TABLEAUX[case.scheduler](case),
    denoiser,
    noise,
    start,
    to_vp,
    DEVIATIONS,
)


@pytest.mark.parametrize("scheduler", COUNTS)
def test_every_trajectory_is_met_or_its_deviation_is_named(scheduler):
    members = [case for case in more_cases() if case.scheduler == scheduler]
    REPLAY.assert_met_or_named(members, COUNTS[scheduler])


@pytest.mark.parametrize("reason", DEVIATIONS)
def test_a_deviation_is_one(reason):
    """NaN where it says so, else far above rounding even from the nearest of our variants; only a
    start at alpha = 0 is refused."""
    _, first, is_nan = DEVIATIONS[reason]
    refusal = "alpha = 0" if "we refuse it" in reason else None
    for case in REPLAY.assert_deviates(reason, refusal):
        assert case.facts["nan_from"] == (first(case) if is_nan else None)


def test_no_case_is_left_out():
    assert len(REPLAY.states) == len(more_cases()) == 388
    assert [sum(column) for column in zip(*COUNTS.values())] == [357, 31]
