"""Every golden trajectory of diffusers, replayed by `jaxdiff.sample` in float64.

`golden/README.md` describes the files, `replay.py` when a case matches. The table `DEVIATIONS`
names the cases where diffusers computes something else, and from which state on. The builders'
docstrings say the same in a sentence.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import cases
from replay import Replay, grid, mixture, recorded_noise, start, to_vp

import jaxdiff as jd

# Scheduler -> (cases matched, cases in DEVIATIONS).
COUNTS = {
    "ddim": (44, 2),
    "ddpm": (21, 2),
    "euler": (25, 1),
    "flow_euler": (13, 0),
    "edm_euler": (9, 2),
    "heun": (14, 0),
    "flow_heun": (5, 1),
    "dpm_solver_pp": (44, 0),
    "edm_dpm_solver_pp": (24, 0),
    "unipc": (50, 5),
}


# --- a case in our terms --------------------------------------------------------------------------


def ddim(case):
    options = {"eta": case["eta"] or 0.0, "outputs": 2 if keeps_eps(case) else 1}
    if not case.facts["off_grid"]:
        return jd.solvers.ddim(grid(case), **options)
    # Each step ends at a level that is not the next call's: a chain of one-step samplers.
    steps = [
        jd.grids.from_arrays([t, -1.0], [alpha, to[0]], [sigma, to[1]])
        for (t, alpha, sigma), to in zip(case.calls, case.targets)
    ]
    return jd.solvers.concatenate([jd.solvers.ddim(step, **options) for step in steps])


def ddpm(case):
    large = (case["variance_type"] or "").startswith("fixed_large")
    return jd.solvers.ddpm(grid(case), variance="fixed_large" if large else "fixed_small")


def euler(case):
    if not case["s_churn"]:
        return jd.solvers.euler(grid(case))
    names = {"s_churn": "s_churn", "s_tmin": "s_min", "s_tmax": "s_max", "s_noise": "s_noise"}
    churn = {ours: case[theirs] for theirs, ours in names.items() if case[theirs] is not None}
    # For v and EDM networks only the nearest of ours: see DEVIATIONS.
    keeps_eps_output = case.prediction == "eps" and case.levels != "edm"
    late = "before_noise" if keeps_eps_output else "before_noise_x0"
    return jd.solvers.euler(grid(case), churn_evaluation=late, **churn)


def flow_euler(case):
    """Starts at alpha = 0, where Euler for dx / dsigma is DDIM. `s_churn` has no effect there."""
    if case["stochastic_sampling"]:
        return jd.solvers.ddim(grid(case), eta=1.0, noise_scale="full")
    return jd.solvers.ddim(grid(case))


def heun(case):
    return jd.solvers.heun(grid(case), clock="flow" if case.levels == "flow" else "rho")


def dpm_solver_pp(case):
    return jd.solvers.dpm_solver_pp_multistep(
        grid(case), order=case["solver_order"] or 2, solver_type=case["solver_type"] or "midpoint",
        variant="published", lower_order_final=False if case["lower_order_final"] is False else None,
        euler_at_final=bool(case["euler_at_final"]),
    )  # fmt: skip


def unipc(case):
    off = case["disable_corrector"] or []
    return jd.solvers.unipc(
        grid(case), order=case["solver_order"] or 2, variant=case["solver_type"] or "bh2",
        integrand="eps" if case["predict_x0"] is False else "x0",
        corrector=[i not in off for i in range(case.steps)],
        lower_order_final=case["lower_order_final"] is not False,
    )  # fmt: skip


TABLEAUX = {
    "ddim": ddim, "ddpm": ddpm, "euler": euler, "edm_euler": euler, "flow_euler": flow_euler,
    "heun": heun, "flow_heun": heun, "dpm_solver_pp": dpm_solver_pp,
    "edm_dpm_solver_pp": dpm_solver_pp, "unipc": unipc,
}  # fmt: skip


def threshold(case):
    """None, "clip" or "dynamic"."""
    if case["thresholding"]:
        # With predict_x0=False UniPC ignores it.
        return None if case["predict_x0"] is False else "dynamic"
    default = case.scheduler in ("ddim", "ddpm")
    clips = default if case["clip_sample"] is None else case["clip_sample"]
    return "clip" if clips else None


def keeps_eps(case):
    """DDIM's default: x0 is clipped, the eps beside it is not."""
    clipped = threshold(case) and not case["use_clipped_model_output"]
    return bool(clipped) and case.scheduler == "ddim"


def raw_edm(params, x, c_noise):
    """EDM's raw network F of the mixture, from its input c_in x and its clock log(sigma) / 4."""
    gmm, sigma_data = params
    sigma = jnp.exp(4.0 * c_noise)
    size = jnp.sqrt(sigma**2 + sigma_data**2)
    skip, x = (sigma_data / size) ** 2, size * x
    return (gmm.denoise(x, 1.0, sigma) - skip * x) * size / (sigma * sigma_data)


def edm_params(case):
    sigma_data = case["sigma_data"] or 0.5
    return mixture("x0").params, sigma_data


def network(case):
    if case.levels != "edm":
        return mixture(case.prediction)
    return jd.precondition(raw_edm, edm_params(case)[1], edm_params(case))


def denoiser(case):
    rule, inner, keep = threshold(case), network(case), keeps_eps(case)
    if rule == "dynamic":
        quantile = case["dynamic_thresholding_ratio"] or 0.995
        cap = case["sample_max_value"] or 1.0
        return jd.dynamic_threshold(inner, quantile, cap, keep_eps=keep)
    if rule == "clip":
        limit = case["clip_sample_range"] or 1.0
        return jd.clip_x0(inner, -limit, limit, keep_eps=keep)
    return inner


# --- what diffusers does differently --------------------------------------------------------------


def first_churn(case):
    return case.facts["drawn_in_call"][0] + 1


# reason -> (which cases, the first state that differs, whether diffusers' is NaN from there on)
DEVIATIONS = {
    "DDIM: an eps network at alpha = 0 is NaN; we refuse it": (
        lambda c: c.scheduler == "ddim" and c.prediction == "eps" and c.calls[0, 1] == 0.0,
        lambda c: 1, True,
    ),
    "DDIM, eta = 1 from alpha = 0: NaN where sigma'^2 - s^2 rounds below 0": (
        lambda c: c.scheduler == "ddim" and c["eta"] == 1.0 and c.calls[0, 1] == 0.0
        and c.steps == 12,
        lambda c: 1, True,
    ),
    "DDPM, fixed_large: the forward step's noise in a step from t > 0 to sigma = 0": (
        lambda c: c.scheduler == "ddpm" and c["variance_type"] == "fixed_large"
        and c.ends_at_zero and c.calls[-1, 0] > 0,
        lambda c: c.steps, False,
    ),
    "DDPM, fixed_large_log: the square root of a logarithm": (
        lambda c: c["variance_type"] == "fixed_large_log",
        lambda c: 1, True,
    ),
    "Euler, v: the noised state is converted with the level before the noise": (
        lambda c: c.scheduler == "euler" and c.prediction == "v" and c["s_churn"],
        first_churn, False,
    ),
    "EDM Euler: the raw network's output is kept over the noise": (
        lambda c: c.scheduler == "edm_euler" and c["s_churn"],
        first_churn, False,
    ),
    "Flow Heun: churn adds noise and leaves alpha as it is": (
        lambda c: c.scheduler == "flow_heun" and c["s_churn"],
        first_churn, False,
    ),
    "UniPC to sigma = 0: NaN with bh1, in eps, and without lower_order_final": (
        lambda c: c.scheduler == "unipc" and c.ends_at_zero and (c["solver_type"] == "bh1"
        or c["predict_x0"] is False or c["lower_order_final"] is False),
        lambda c: c.steps, True,
    ),
    "UniPC, order 3 in a step of length 0: NaN": (
        lambda c: c.scheduler == "unipc" and c.facts["repeated_node"]
        and c["lower_order_final"] is False and c["solver_order"] == 3,
        lambda c: c.steps, True,
    ),
}  # fmt: skip


# --- the replay -----------------------------------------------------------------------------------


REPLAY = Replay(
    cases, lambda case: TABLEAUX[case.scheduler](case), denoiser, recorded_noise, start, to_vp,
    DEVIATIONS,
)  # fmt: skip


@pytest.mark.parametrize("scheduler", COUNTS)
def test_every_trajectory_is_met_or_its_deviation_is_named(scheduler):
    members = [case for case in cases() if case.scheduler == scheduler]
    REPLAY.assert_met_or_named(members, COUNTS[scheduler])


@pytest.mark.parametrize("reason", DEVIATIONS)
def test_a_deviation_is_one(reason):
    """NaN where it says so, else far above rounding even from the nearest of our variants; only an
    eps network at alpha = 0 is refused."""
    _, first, is_nan = DEVIATIONS[reason]
    refusal = "'eps' network does not determine" if "we refuse it" in reason else None
    for case in REPLAY.assert_deviates(reason, refusal):
        assert case.facts["nan_from"] == (first(case) if is_nan else None)


def test_no_case_is_left_out():
    assert len(REPLAY.states) == len(cases()) == 262
    assert [sum(column) for column in zip(*COUNTS.values())] == [249, 13]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_our_mixture_is_the_recorded_network(x64, prediction):
    found = [c for c in cases() if c.levels != "edm" and c.prediction == prediction]
    x = np.concatenate([(to_vp(c)[:, None, None] * c.states)[:-1] for c in found])
    t, alpha, sigma = np.concatenate([c.calls for c in found]).T
    size = np.hypot(alpha, sigma) if prediction == "v" else 1.0
    outputs = np.concatenate([c.outputs for c in found])
    finite = np.isfinite(outputs).all((1, 2))
    ours = jax.jit(jax.vmap(mixture(prediction)))(x, t, alpha / size, sigma / size)
    assert finite.sum() > 50
    scale = np.abs(outputs[finite]).max()
    np.testing.assert_allclose(ours[finite], outputs[finite], rtol=0, atol=1e-12 * scale)


def test_our_raw_edm_network_is_the_recorded_one(x64):
    """At the input and the clock that `precondition` gives it; diffusers negates it for v."""
    found = [c for c in cases() if c.levels == "edm"]
    x, calls, outputs, sigma_data = (
        np.concatenate(parts)
        for parts in (
            [c.states[:-1] for c in found],
            [c.calls for c in found],
            [-c.outputs if c.prediction == "v" else c.outputs for c in found],
            [np.full(len(c.calls), edm_params(c)[1]) for c in found],
        )
    )
    over_calls = jax.jit(jax.vmap(see_edm, ((None, 0), 0, 0, 0, 0)))
    ours, clock = over_calls((mixture("x0").params, sigma_data), x, *calls.T)
    np.testing.assert_allclose(ours, outputs, rtol=0, atol=1e-11)
    np.testing.assert_allclose(clock, calls[:, 0], rtol=1e-12, atol=1e-14)


def see_edm(params, *call):
    """(output, clock) of the raw network inside `precondition`."""
    seen = []

    def spy(params, x, c_noise):
        seen.append((raw_edm(params, x, c_noise), c_noise))
        return seen[-1][0]

    jd.precondition(spy, params[1], params)(*call)
    return seen[-1]


def test_heun_in_the_flow_clock_is_one_sampler_for_every_process(x64):
    """The recorded one, up to the state's scale alpha + sigma, which is 1 for flow."""
    vp = jd.grids.half_log_snr(jd.processes.vp_linear(), 5)
    size = vp.alpha + vp.sigma
    flow = jd.grids.from_arrays(vp.t, vp.alpha / size, vp.sigma / size)
    x = np.random.default_rng(0).normal(size=(3, 4))
    got, expected = (
        jd.sample(mixture("flow"), jd.solvers.heun(g, clock="flow"), x * g.alpha[0], save="nodes")
        for g in (vp, flow)
    )
    np.testing.assert_allclose(got, size[:, None, None] * expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"noise_scale": "all"}, "noise_scale must be 'posterior' or 'full', got 'all'"),
        ("ddim", {"noise_scale": "full", "eta": 1.5}, "more noise than sigma"),
        ("euler", {"churn_evaluation": "never"}, "churn_evaluation must be one of .* 'never'"),
        ("heun", {"clock": "tau"}, "clock must be 'rho' or 'flow', got 'tau'"),
        ("heun", {"clock": "flow", "s_churn": 1.0}, "takes no churn, got s_churn=1.0"),
    ],
)
def test_bad_variants_are_named(name, options, message):
    steps = jd.grids.half_log_snr(jd.processes.vp_linear(), 4)
    with pytest.raises(ValueError, match=message):
        jd.solvers.build(name, steps, **options)
