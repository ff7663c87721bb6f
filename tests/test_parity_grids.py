"""Our grids are the levels diffusers chooses, wherever its rule is a published one.

Compared is sigma / alpha of every node, and the timestep where the rule chooses timesteps.
"""

import collections

import numpy as np
from golden_cases import cases

import jaxdiff as jd

# Why a case's levels have no rule of ours -> which cases.
NOT_OURS = {
    "a step ends at a level that is not the next call's": lambda c: c.facts["off_grid"],
    "quantiles of a beta distribution": lambda c: c["use_beta_sigmas"],
    "log_linear: one level too many, so the run ends at sigma_min": lambda c: (
        c["interpolation_type"] == "log_linear"
    ),
    "linspace with one step starts at the data": lambda c: (
        spacing(c) == "linspace" and c.steps == 1 and c.scheduler in ("ddim", "euler", "heun")
    ),
    "linspace between integers interpolates sigma, not its logarithm": lambda c: (
        spacing(c) == "linspace" and c.steps == 3 and c.scheduler in ("euler", "heun")
    ),
    "abar = 2^-24 in place of zero SNR": lambda c: (
        c["rescale_betas_zero_snr"] and c.scheduler not in ("ddim", "ddpm")
    ),
    "timesteps above lambda = 5.1 are left out": lambda c: c["lambda_min_clipped"],
    "flow levels spaced in sigma": lambda c: (
        c.flow and (c["use_karras_sigmas"] or c["use_exponential_sigmas"])
    ),
    "UniPC's one flow step: from 1 - 1e-6": lambda c: (
        c.scheduler == "unipc" and c.flow and c.steps == 1
    ),
    "flow levels stretched to a terminal value": lambda c: c["shift_terminal"],
}
MULTISTEP = ("dpm_solver_pp", "unipc")


def spacing(case):
    default = "leading" if case.scheduler in ("ddim", "ddpm") else "linspace"
    return case["timestep_spacing"] or default


def process(case):
    if case.levels == "edm":
        return jd.processes.edm(0.002, case["sigma_max"] or 80.0)
    if case.flow:
        return jd.processes.flow(shift(case))
    schedule = case["beta_schedule"] or "linear"
    start, end = (0.00085, 0.012) if case.scheduler == "heun" else (1e-4, 0.02)
    if schedule == "squaredcos_cap_v2":
        made = jd.processes.ddpm("squaredcos")
    elif schedule == "sigmoid":
        betas = start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, 1000)))
        made = jd.processes.ddpm(betas=betas)
    else:
        made = jd.processes.ddpm(schedule, beta_start=start, beta_end=end)
    zero = case["rescale_betas_zero_snr"]
    return jd.processes.zero_terminal_snr(made) if zero else made


def shift(case):
    if case["use_dynamic_shifting"]:
        return case["mu"] if case["time_shift_type"] == "linear" else np.exp(case["mu"])
    return case["shift"] or case["flow_shift"] or 1.0


def timesteps(case):
    """(grid, how many of its nodes are the case's): leading, linspace, trailing.

    DPM-Solver++ and UniPC take one timestep more than steps, and the last is where they end
    (`final_sigmas_type="sigma_min"`, linspace) or is dropped.
    """
    rule, n = spacing(case), case.steps
    offset = {"offset": case["steps_offset"] or 0} if rule == "leading" else {}
    build = getattr(jd.grids, rule)
    if case.scheduler in MULTISTEP and rule != "trailing":
        whole = case["final_sigmas_type"] == "sigma_min" and rule == "linspace"
        return build(process(case), n + 1, end="t_min", **offset), n + whole
    end = "zero" if case.ends_at_zero else "t_min"
    grid = build(process(case), n, end=end, **offset)
    return grid, len(grid)


def sigmas(case, rule):
    """Karras or exponential levels between the ends of the table, or of the spaced timesteps."""
    whole, span = process(case), {}
    if case["sigma_min"] is not None:
        ends = {"t_max": case["sigma_max"], "t_min": case["sigma_min"]}
        span = {name: whole.time(-np.log(sigma)) for name, sigma in ends.items()}
    elif case.scheduler in ("euler", "heun"):
        spaced = getattr(jd.grids, spacing(case))(whole, case.steps)
        span = {"t_max": spaced.t[0], "t_min": spaced.t[-2]}
    end = "zero" if case.ends_at_zero else "t_min"
    levels = case.steps - (end == "t_min")  # there the last level is repeated
    if rule == "karras":
        return jd.grids.karras(whole, levels, case["rho"] or 7.0, end=end, **span)
    return jd.grids.half_log_snr(whole, levels, end=end, **span)


def flow_levels(case):
    """(grid, slice of its nodes that are the case's). sigma is the process's own; see README.md."""
    whole, n = process(case), case.steps
    if case.scheduler == "dpm_solver_pp":
        ends_early = case["final_sigmas_type"] == "sigma_min"
        return jd.grids.uniform(whole, n, t_max=0.999), slice(0, n if ends_early else n + 1)
    if case.scheduler == "unipc":  # 1 - 1e-6 for the first, 0 or a repetition for the last
        return jd.grids.uniform(whole, n, t_min=1e-3), slice(1, n)
    # `shift` is applied a first time to the smallest level, dynamic shifting is not.
    once = 1e-3 if case["use_dynamic_shifting"] else float(whole.sigma(1e-3))
    return jd.grids.uniform(whole, n, t_min=once, end="zero"), slice(0, n + 1)


def ours(case):
    """(name of the rule, grid, which of its nodes are the case's, whether its t are too)."""
    if case.flow:
        return "flow", *flow_levels(case), False
    by_sigma = {"karras": ["use_karras_sigmas"],
                "exponential": ["use_exponential_sigmas", "use_lu_lambdas"]}  # fmt: skip
    for rule, options in by_sigma.items():
        edm = case.levels == "edm" and (case["sigma_schedule"] or "karras") == rule
        if edm or any(case[option] for option in options):
            grid = sigmas(case, rule)
            return rule, grid, slice(0, len(grid)), False
    grid, count = timesteps(case)
    # Euler's continuous clock is log(sigma) / 4.
    return spacing(case), grid, slice(0, count), case["timestep_type"] != "continuous"


def test_our_grids_are_the_recorded_levels():
    seen, left_out = collections.Counter(), collections.Counter()
    for case in cases():
        reasons = [reason for reason, which in NOT_OURS.items() if which(case)]
        if reasons:
            left_out[reasons[0]] += 1
            continue
        rule, grid, part, clocked = ours(case)
        seen[rule] += 1
        with np.errstate(divide="ignore"):
            got = (grid.sigma / grid.alpha)[part]
            expected = (case.nodes[:, 2] / case.nodes[:, 1])[part]
        assert got.size
        np.testing.assert_allclose(got, expected, rtol=1e-9, err_msg=str(case))
        if clocked:  # but for the end, where no call is made
            calls = slice(0, min(part.stop, case.steps))
            np.testing.assert_array_equal(grid.t[calls], case.nodes[calls, 0], err_msg=str(case))
    assert set(left_out) == set(NOT_OURS)
    assert (seen.total(), left_out.total()) == (233, 29)
