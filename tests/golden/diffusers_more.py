"""More options for make_diffusers.py: the schedulers beside those of diffusers_cases.py."""

from diffusers_cases import (
    DYNAMIC,
    FLOW,
    FULL_ORDER,
    PLAIN,
    SIGMA_MIN,
    ZERO_SNR,
    betas,
    case,
    predictions,
    sigma_spacings,
    spacings,
)

DPM, SDE, SDE_PP = (
    {"algorithm_type": name} for name in ("dpmsolver", "sde-dpmsolver", "sde-dpmsolver++")
)
HEUN = {"solver_type": "heun"}
V = {"prediction_type": "v_prediction"}


def _short(*configs):
    """Cases of one, two and three steps."""
    return [case(c, n) for c in configs for n in (1, 2, 3)]


def _singlestep():
    orders = [{"solver_order": k} for k in (1, 2, 3)]
    cases = []
    for kind in ({}, SDE_PP):
        for o, steps in zip(orders, (10, 10, 9), strict=True):
            cases += [case({**o, **kind, **e}, steps) for e in ({}, SIGMA_MIN)]
        for o, steps in zip(orders[1:], (10, 9), strict=True):
            cases += [case({**o, **kind, **HEUN, **e}, steps) for e in ({}, SIGMA_MIN)]
    for o, steps in zip(orders, (10, 10, 9), strict=True):
        cases.append(case({**o, **DPM, **SIGMA_MIN}, steps))
        cases.append(case({**o, **DPM, **HEUN, **SIGMA_MIN}, steps))
    lowered = {"lower_order_final": True}
    cases += [case({**o, **lowered, **SIGMA_MIN}) for o in orders[1:]]
    cases += [case({**orders[2], **lowered}, steps) for steps in (9, 10, 11)]
    cases += [case({**orders[2], **c}, 9) for c in sigma_spacings()]
    cases += [case({**orders[1], **c, **SIGMA_MIN}) for c in sigma_spacings()[:2]]
    cases += [case({**orders[1], **c}) for c in (*predictions(), *betas(), DYNAMIC)]
    cases += [case({**orders[1], **DPM, **c, **SIGMA_MIN}) for c in predictions()]
    cases.append(case({**FLOW, "flow_shift": 3.0, **orders[2]}, 9))
    return cases + _short({"solver_order": 3}, {"solver_order": 2, **SIGMA_MIN})


def _dpm_eps():
    solvers = [{"solver_order": k, **DPM, **SIGMA_MIN} for k in (1, 2, 3)]
    solvers.append({**solvers[1], **HEUN})
    cases = [case(s) for s in solvers] + [case({**s, **FULL_ORDER}) for s in solvers[1:]]
    cases += [case({**solvers[1], "euler_at_final": True, **FULL_ORDER}), case(solvers[2], 16)]
    cases += [case({**solvers[1], **c}) for c in (*predictions(), *betas(), DYNAMIC)]
    cases += [case({**solvers[1], **c}) for c in spacings()]
    cases += [case({**solvers[1], **c}) for c in sigma_spacings("use_lu_lambdas")]
    return cases + _short(solvers[2])


def _dpm_sde():
    cases = []
    for kind, ends in ((SDE_PP, ({}, SIGMA_MIN)), (SDE, (SIGMA_MIN,))):
        solvers = [{"solver_order": k, **kind} for k in (1, 2)]
        solvers.append({"solver_order": 2, **HEUN, **kind})
        cases += [case({**s, **e}) for s in solvers for e in ends]
        cases += [case({**s, **FULL_ORDER, **SIGMA_MIN}) for s in solvers[1:]]
        cases.append(case({**solvers[1], **SIGMA_MIN, "use_karras_sigmas": True, **FULL_ORDER}))
        cases += [case({**solvers[1], **c, **ends[0]}) for c in (*predictions(), DYNAMIC)]
        cases += _short({**solvers[1], **ends[0]})
    third = {"solver_order": 3, **SDE_PP}
    cases += [case({**third, **e}) for e in ({}, SIGMA_MIN, {**SIGMA_MIN, **FULL_ORDER})]
    return cases + [case({**SDE_PP, **c}) for c in (*spacings(), *betas())]


def _edm_dpm_sde():
    # Order 3 is missing: diffusers raises (no such formula).
    solvers = [{"solver_order": k, **SDE_PP} for k in (1, 2)] + [{**SDE_PP, **HEUN}]
    cases = [case({**s, **e}) for s in solvers for e in ({}, SIGMA_MIN)]
    cases.append(case({**SDE_PP, "sigma_schedule": "exponential"}))
    return cases + [case({**SDE_PP, **V})]


def _deis():
    orders = [{"solver_order": k} for k in (1, 2, 3)]
    cases = [case(o) for o in orders] + [case({**o, **FULL_ORDER}) for o in orders[1:]]
    cases += [case(orders[2], 16)]
    cases += [case(c) for c in (*spacings(), *predictions(), *betas(), DYNAMIC)]
    cases += [case({**orders[k], **c}) for k in (1, 2) for c in sigma_spacings()]
    cases += [case({**orders[2], **c, **FULL_ORDER}) for c in sigma_spacings()[:1]]
    cases.append(case({**FLOW, "flow_shift": 3.0}))
    return cases + _short(orders[2])


def _pndm():
    plms = {"skip_prk_steps": True}
    one = {"set_alpha_to_one": True}
    cases = [case({**kind, **c}) for kind in ({}, plms) for c in ({}, one, {"steps_offset": 1}, V)]
    cases += [case({**plms, **one, **c}) for c in (*spacings(), *betas())]
    cases += [case({**one, **c}) for c in (*spacings(), *betas())]
    cases += [case({**plms, **one}, n) for n in (2, 3, 4, 5)]
    return cases + [case(one, n) for n in (4, 5)]


def _ipndm():
    cases = [case({}, n) for n in (1, 2, 3, 10)]
    levels = {"trained_betas": [0.995, 0.98, 0.94, 0.87, 0.77, 0.64, 0.5, 0.36, 0.22, 0.1, 0.03]}
    return cases + [case(levels), case({"trained_betas": [*levels["trained_betas"][:-1], 0.0]})]


def _sigma_common(kinds):
    """Cases of the schedulers that follow k-diffusion."""
    cases = [case(c) for c in (*spacings(), *sigma_spacings(), *predictions(kinds))]
    cases.append(case({"timestep_spacing": "leading", "steps_offset": 1}))
    cases.append(case({"beta_schedule": "squaredcos_cap_v2"}))
    return cases + _short({}) + [case({"timestep_spacing": "trailing"}, 1)]


def _lms():
    cases = _sigma_common(("sample", "v_prediction"))
    return cases + [case({}, step={"order": k}) for k in (1, 2, 3, 5)]


def _second_order():
    return _sigma_common(("v_prediction",))


def _euler_ancestral():
    cases = [case(c) for c in (*spacings(), V, *betas(), {**V, **ZERO_SNR})]
    return cases + _short({}) + [case({"timestep_spacing": "trailing"}, 1)]


def _dpm_solver_sde():
    cases = _sigma_common(("v_prediction",))
    return cases + [case({}, step={"s_noise": s}) for s in (0.0, 1.007)]


def _cosine():
    solvers = ({"solver_order": 1}, {}, HEUN)
    cases = [case({**s, **e}) for s in solvers for e in ({}, SIGMA_MIN)]
    cases.append(case({**SIGMA_MIN, **FULL_ORDER}))
    cases += [case(c) for c in ({"sigma_schedule": "karras"}, {"prediction_type": "epsilon"})]
    cases += [case({"euler_at_final": True, **SIGMA_MIN, **FULL_ORDER}), case({"sigma_data": 0.5})]
    return cases + _short({})


def _sa():
    cases = []
    for kind in ("data_prediction", "noise_prediction"):
        algorithm = {"algorithm_type": kind}
        for predictor, corrector in ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4)):
            orders = {"predictor_order": predictor, "corrector_order": corrector}
            cases += [case({**algorithm, **orders, "tau_func": tau}) for tau in (0.0, 1.0)]
        cases += [case({**algorithm, "tau_func": tau, **FULL_ORDER}) for tau in (0.4, 1.0)]
        cases += [case({**algorithm, **c, "tau_func": 0.6}) for c in predictions()]
    cases += [case(c) for c in (*spacings(), *betas(), DYNAMIC)]
    karras = {"use_karras_sigmas": True, "tau_func": 0.5}
    cases += [case(karras), case({**karras, **FULL_ORDER})]
    cases.append(case({**FLOW, "flow_shift": 3.0, "tau_func": 0.5}))
    return cases + _short({"predictor_order": 3, "corrector_order": 4, "tau_func": 1.0})


def _lcm():
    cases = [case(c, 4) for c in ({}, *predictions(), *betas(), {"clip_sample": True})]
    cases += [case({"timestep_scaling": 1.0}, 4), case(ZERO_SNR | V, 4)]
    cases += [case({}, 4, setup={"original_inference_steps": 20}), case(DYNAMIC, 4)]
    return cases + _short({}) + [case({}, 8)]


def _tcd():
    cases = [case({}, 4, {"eta": e}) for e in (0.0, 0.3, 0.5, 1.0)]
    cases += [case(c, 4) for c in (*predictions(), *betas())]
    return cases + _short({}) + [case({}, 8)]


def _consistency():
    cases = [case({**c, "clip_denoised": False}, n) for c in ({}, {"s_noise": 0.9}) for n in (2, 4)]
    cases += [case({"clip_denoised": False, "sigma_data": 1.0}, 4), case({}, 4)]
    return cases + [case({"clip_denoised": False}, n) for n in (1, 3)]


def _unclip():
    cases = [case({**PLAIN, **c}) for c in ({}, {"prediction_type": "sample"})]
    return cases + [case(), case({"clip_sample_range": 0.5})] + [case(PLAIN, n) for n in (2, 3)]


def _sde_ve():
    spans = ({"sigma_max": 20.0}, {}, {"sigma_max": 20.0, "sigma_min": 0.1})
    return [case(c) for c in spans] + [case(spans[0], 2), case(spans[0], 50)]


def _sde_vp():
    return [case({}, n) for n in (10, 50)] + [case({"beta_max": 12.0, "sampling_eps": 0.05})]


def _ddim_inverse():
    cases = [case({**PLAIN, **c}) for c in ({}, *predictions(), *betas())]
    cases.append(case({**PLAIN, "timestep_spacing": "trailing"}))
    cases.append(case({**PLAIN, "set_alpha_to_one": False, "steps_offset": 1}))
    return cases + [case(), case(PLAIN, 3)]


def _dpm_inverse():
    orders = [{"solver_order": k} for k in (1, 2, 3)]
    cases = [case({**o, **kind}) for o in orders for kind in ({}, DPM)]
    cases += [case({**o, **kind, **FULL_ORDER}) for o in orders[1:] for kind in ({}, DPM)]
    cases += [case(c) for c in (HEUN, *spacings()[1:], *predictions(), *betas())]
    return cases + _short(orders[2])


def _flow_lcm():
    cases = [case(c, 4) for c in ({}, {"shift": 3.0})]
    return cases + [case({"shift": 3.0}, n) for n in (1, 2, 3)]


def _flow_euler_ancestral():
    return [case({}, n) for n in (1, 2, 3, 10)] + [case({"eta": e}) for e in (0.0, 0.5)]


# File name -> (scheduler class, family of its levels, its cases).
SCHEDULERS = {
    "dpm_solver_singlestep": ("DPMSolverSinglestepScheduler", "own", _singlestep),
    "dpm_solver": ("DPMSolverMultistepScheduler", "own", _dpm_eps),
    "dpm_solver_sde_multistep": ("DPMSolverMultistepScheduler", "own", _dpm_sde),
    "edm_dpm_solver_sde": ("EDMDPMSolverMultistepScheduler", "edm", _edm_dpm_sde),
    "cosine_dpm_solver": ("CosineDPMSolverMultistepScheduler", "edm", _cosine),
    "dpm_solver_inverse": ("DPMSolverMultistepInverseScheduler", "own", _dpm_inverse),
    "deis": ("DEISMultistepScheduler", "own", _deis),
    "sa_solver": ("SASolverScheduler", "own", _sa),
    "pndm": ("PNDMScheduler", "alphas_cumprod", _pndm),
    "ipndm": ("IPNDMScheduler", "own", _ipndm),
    "lms": ("LMSDiscreteScheduler", "unit_alpha", _lms),
    "kdpm2": ("KDPM2DiscreteScheduler", "unit_alpha", _second_order),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", "unit_alpha", _second_order),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", "unit_alpha", _euler_ancestral),
    "dpm_solver_sde": ("DPMSolverSDEScheduler", "unit_alpha", _dpm_solver_sde),
    "lcm": ("LCMScheduler", "alphas_cumprod", _lcm),
    "tcd": ("TCDScheduler", "alphas_cumprod", _tcd),
    "consistency": ("CMStochasticIterativeScheduler", "consistency", _consistency),
    "unclip": ("UnCLIPScheduler", "alphas_cumprod", _unclip),
    "score_sde_ve": ("ScoreSdeVeScheduler", "unit_alpha", _sde_ve),
    "score_sde_vp": ("ScoreSdeVpScheduler", "own", _sde_vp),
    "ddim_inverse": ("DDIMInverseScheduler", "alphas_cumprod", _ddim_inverse),
    "flow_lcm": ("FlowMatchLCMScheduler", "flow", _flow_lcm),
    "flow_euler_ancestral": ("LTXEulerAncestralRFScheduler", "flow", _flow_euler_ancestral),
}
