"""The options of every recorded run of make_diffusers.py, one list of cases a file."""

PLAIN = {"clip_sample": False}
DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.3}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
FULL_ORDER = {"lower_order_final": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SPAN = {"sigma_min": 0.03, "sigma_max": 14.6}
CHURN = {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 50.0, "s_noise": 1.007}


def spacings(**config):
    return [{"timestep_spacing": s, **config} for s in ("leading", "linspace", "trailing")]


def predictions(kinds=("sample", "v_prediction"), **config):
    return [{"prediction_type": kind, **config} for kind in kinds]


def betas(**config):
    return [{"beta_schedule": b, **config} for b in ("scaled_linear", "squaredcos_cap_v2")]


def case(config=None, steps=10, step=None, setup=None):
    """One run: the constructor's options, number of steps, options of step and set_timesteps."""
    one = {"config": config or {}, "step": step or {}, "setup": setup or {}, "steps": steps}
    options = (f"{k}={v}" for part in ("config", "step", "setup") for k, v in one[part].items())
    return {"name": ",".join([f"n={steps}", *options]), **one}


def _ddim():
    cases = [case({**c, **PLAIN}, step={"eta": e}) for e in (0.0, 0.5, 1.0) for c in spacings()]
    clipped = {"use_clipped_model_output": True}
    for clip in ({}, {"clip_sample_range": 0.5}, DYNAMIC, {"thresholding": True}):
        cases += [case(clip), case(clip, step=clipped)]
    cases += [case(step={"eta": 1.0}), case(step={"eta": 1.0, **clipped})]
    cases.append(case(PLAIN, step=clipped))
    for offset in (0, 1):
        last = {"set_alpha_to_one": False, "steps_offset": offset, **PLAIN}
        cases += [case(last, step={"eta": eta}) for eta in (0.0, 1.0)]
    cases += [case(c) for c in (*predictions(**PLAIN), *predictions(), *betas(**PLAIN))]
    kinds = ("epsilon", "sample", "v_prediction")
    cases += [case({**c, **ZERO_SNR, **PLAIN}) for c in predictions(kinds)]
    v = {"prediction_type": "v_prediction", **ZERO_SNR, **PLAIN}
    cases += [case(v, n, {"eta": e}) for e, n in ((0.5, 10), (1.0, 10), (1.0, 12))]
    cases.append(case({"prediction_type": "v_prediction", **ZERO_SNR}))
    cases += [case({**c, **PLAIN}, n) for c in spacings() for n in (1, 2, 3)]
    return cases


def _ddpm():
    variances = ("fixed_small", "fixed_small_log", "fixed_large")
    cases = [case({"variance_type": v, **PLAIN, **c}) for v in variances for c in spacings()]
    cases.append(case({"variance_type": "fixed_large_log", **PLAIN}))
    cases += [case(c) for c in ({}, {"variance_type": "fixed_large"}, DYNAMIC)]
    cases += [case(c) for c in (*predictions(**PLAIN), *betas(**PLAIN))]
    cases += [case({**c, **ZERO_SNR, **PLAIN}) for c in predictions()]
    cases += [case({"beta_schedule": "sigmoid", **PLAIN})]
    return cases + [case(PLAIN, n) for n in (1, 2, 3)]


def sigma_spacings(*extra):
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", *extra)
    return [{name: True} for name in names]


def _euler():
    cases = [case(c) for c in (*spacings(), *sigma_spacings(), *predictions(), *betas())]
    cases.append(case({"timestep_spacing": "leading", "steps_offset": 1}))
    cases.append(case({"timestep_spacing": "leading", "use_karras_sigmas": True}))
    cases.append(case({"use_karras_sigmas": True, **SPAN}))
    cases += [case(c) for c in (SIGMA_MIN, {**SIGMA_MIN, "use_karras_sigmas": True})]
    cases.append(case({"interpolation_type": "log_linear"}))
    v = {"prediction_type": "v_prediction"}
    cases += [case({**v, **ZERO_SNR}), case({**v, "timestep_type": "continuous"})]
    cases += [case(c, step=CHURN) for c in ({}, *predictions())]
    cases.append(case({}, step={"s_churn": 20.0}))
    cases += [case({}, n) for n in (1, 2, 3)]
    return cases + [case({"timestep_spacing": "trailing"}, 1)]


def _flow_euler():
    cases = [case(c) for c in ({}, {"shift": 3.0}, *sigma_spacings())]
    dynamic = {"use_dynamic_shifting": True}
    cases.append(case(dynamic, setup={"mu": 1.15}))
    cases.append(case({**dynamic, "time_shift_type": "linear"}, setup={"mu": 2.0}))
    cases.append(case({"shift": 3.0, "shift_terminal": 0.1}))
    cases.append(case({"stochastic_sampling": True, "shift": 3.0}))
    cases.append(case({}, step=CHURN))
    return cases + [case({"shift": 3.0}, n) for n in (1, 2, 3)]


def _edm_euler():
    options = ({}, {"sigma_schedule": "exponential"}, {"rho": 5.0, "sigma_max": 20.0}, SIGMA_MIN)
    cases = [case(c) for c in (*options, {"sigma_data": 1.0}, *predictions(("v_prediction",)))]
    cases += [case(c, step=CHURN) for c in ({}, *predictions(("v_prediction",)))]
    return cases + [case({}, n) for n in (1, 2, 3)]


def _heun():
    cases = [case(c) for c in (*spacings(), *sigma_spacings(), *predictions())]
    cases += [case(c) for c in ({"clip_sample": True}, {"beta_schedule": "squaredcos_cap_v2"})]
    return cases + [case({}, n) for n in (1, 2, 3)] + [case({"timestep_spacing": "trailing"}, 1)]


def _flow_heun():
    return [case(), case({"shift": 3.0}), *(case({"shift": 3.0}, n) for n in (1, 2, 3)),
            case(step={"s_churn": 3.0})]  # fmt: skip


def _dpm_common():
    """Cases that DPMSolverMultistepScheduler and its EDM version share."""
    solvers = [{"solver_order": k} for k in (1, 2, 3)] + [{"solver_type": "heun"}]
    cases = [case({**s, **e}) for s in solvers for e in ({}, SIGMA_MIN)]
    cases += [case({**s, **e, **FULL_ORDER}) for s in solvers[1:] for e in ({}, SIGMA_MIN)]
    cases.append(case({**SIGMA_MIN, **FULL_ORDER, "euler_at_final": True}))
    cases += [case({"solver_order": 3, **e}, 16) for e in ({}, SIGMA_MIN)]
    return cases + [case({"solver_order": 3}, n) for n in (1, 2, 3)] + [case(DYNAMIC)]


def _dpm():
    cases = _dpm_common() + [case(c) for c in (*spacings(), *predictions(), *betas())]
    sigmas = sigma_spacings("use_lu_lambdas")
    cases += [case(c) for c in (*sigmas, {**sigmas[0], **SIGMA_MIN}, {**sigmas[3], **SIGMA_MIN})]
    cases.append(case({**sigmas[0], **SIGMA_MIN, **FULL_ORDER, "solver_order": 3}))
    cases.append(case({"prediction_type": "v_prediction", **ZERO_SNR}))
    cases += [case({**FLOW, "flow_shift": s}) for s in (1.0, 3.0)]
    cases.append(case({**FLOW, "flow_shift": 3.0, **SIGMA_MIN}))
    cosine = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    cases += [case({**cosine, "timestep_spacing": s}) for s in ("linspace", "trailing")]
    cases.append(case({"timestep_spacing": "leading", "steps_offset": 1}))
    return cases + [case({"timestep_spacing": "trailing"}, n) for n in (1, 3)]


def _edm_dpm():
    options = ({"sigma_schedule": "exponential"}, {"rho": 5.0, "sigma_max": 20.0})
    return _dpm_common() + [case(c) for c in (*options, *predictions(("v_prediction",)))]


def _unipc():
    orders = [{"solver_order": k} for k in (1, 2, 3)]
    cases = []
    for kind in ("bh1", "bh2"):
        for data in (True, False):
            solver = {"solver_type": kind, "predict_x0": data}
            cases += [case({**o, **solver, **SIGMA_MIN}) for o in orders]
            cases += [case({**o, **solver}) for o in orders[1:2]]
    cases += [case(o) for o in orders]
    # Order 3 to sigma = 0 without lower_order_final is missing: diffusers raises (singular system).
    cases += [case({**o, **FULL_ORDER, **SIGMA_MIN}) for o in orders[1:]]
    cases.append(case({"solver_order": 2, **FULL_ORDER}))
    disabled = ([0], [0, 1, 2], [*range(10)])
    cases += [case({"solver_order": 3, "disable_corrector": d}) for d in disabled]
    cases += [case(c) for c in (*spacings(), *predictions(), *betas(), DYNAMIC)]
    cases += [case({**c, "predict_x0": False, **SIGMA_MIN}) for c in (*predictions(), DYNAMIC)]
    sigmas = sigma_spacings()
    cases += [case(c) for c in (*sigmas, {**sigmas[0], **SIGMA_MIN}, {**sigmas[0], **SPAN})]
    cases.append(case({**sigmas[0], **SIGMA_MIN, **FULL_ORDER, "solver_order": 3}))
    cases.append(case({"prediction_type": "v_prediction", **ZERO_SNR}))
    cases += [case({**FLOW, "flow_shift": s}) for s in (1.0, 3.0)]
    cases += [case({**FLOW, **c}) for c in (SIGMA_MIN, {"use_karras_sigmas": True})]
    cases.append(case({**FLOW, "use_dynamic_shifting": True}, setup={"mu": 1.15}))
    cases.append(case({**FLOW, "shift_terminal": 0.1}))
    cases += [case({**FLOW, "flow_shift": 3.0}, n) for n in (1, 2)]
    return cases + [case({"solver_order": 3}, n) for n in (1, 2, 3, 16)]


# File name -> (scheduler class, family of its levels, its cases).
SCHEDULERS = {
    "ddim": ("DDIMScheduler", "alphas_cumprod", _ddim),
    "ddpm": ("DDPMScheduler", "alphas_cumprod", _ddpm),
    "euler": ("EulerDiscreteScheduler", "unit_alpha", _euler),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", "flow", _flow_euler),
    "edm_euler": ("EDMEulerScheduler", "edm", _edm_euler),
    "heun": ("HeunDiscreteScheduler", "unit_alpha", _heun),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", "flow", _flow_heun),
    "dpm_solver_pp": ("DPMSolverMultistepScheduler", "own", _dpm),
    "edm_dpm_solver_pp": ("EDMDPMSolverMultistepScheduler", "edm", _edm_dpm),
    "unipc": ("UniPCMultistepScheduler", "own", _unipc),
}
