"""How the official codes that work in sigma are run: their options, grids and cases.

A reference takes a checkout and yields (sampler, options, run); run(recorder) returns (x_T, result,
nodes [n + 1, 3]), with the network and the noise from the recorder (see make_official.py).
"""

import functools
import importlib.util
import sys
import types
from unittest import mock

import numpy as np

BATCH, DIM = 3, 4
SHAPE = (BATCH, DIM, 1, 1)  # most of the codes want [batch, channels, height, width]
START = np.random.default_rng(20231107).standard_normal((BATCH, DIM))
SPAN = {"sigma_min": 0.03, "sigma_max": 14.6}


class View:
    """A module seen with other names."""

    def __init__(self, module, **names):
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name):
        return getattr(self._module, name)


def load(path, name, empty=(), folders=(), given=None):
    """Import one file, with empty modules for the names in `empty` and those `given`."""
    sys.path[:0] = [str(folder) for folder in folders]
    stand_ins = {**{module: mock.MagicMock() for module in empty}, **(given or {})}
    kept = {module: sys.modules[module] for module in stand_ins if module in sys.modules}
    sys.modules.update(stand_ins)
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for stand_in in stand_ins:
            del sys.modules[stand_in]
        sys.modules.update(kept)
    return module


def start(sigma=1.0):
    import torch

    return torch.from_numpy(START.reshape(SHAPE)) * sigma


def unit_alpha(sigma):
    return 1.0, sigma


def edm_nodes(sigmas):
    sigmas = np.array(sigmas, np.float64).reshape(-1)
    return np.column_stack([sigmas, np.ones_like(sigmas), sigmas])


def k_diffusion(root):
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(root / "k_diffusion")]
    sys.modules["k_diffusion"] = package
    vision = ("torchvision", "torchvision.transforms")
    load(root / "k_diffusion/utils.py", "k_diffusion.utils", ("PIL", "safetensors", *vision))
    k = load(root / "k_diffusion/sampling.py", "k_diffusion.sampling", ("torchdiffeq", "torchsde"))
    import torch

    def levels(options):
        make = getattr(k, f"get_sigmas_{options['grid']}")
        count = options["steps"] + (options["end"] == "sigma_min")
        sigmas = make(count) if options["grid"] == "vp" else make(count, **SPAN)
        return sigmas[: options["steps"] + 1]

    def brownian(recorder):
        """Increments of one path in sigma, as of k-diffusion's tree: [t, middle], then [t, end]."""
        known = {}

        def sampler(a, b):
            z = recorder.normal(like)
            if float(a) not in known:
                known[float(a)] = (b, z)
                return z
            middle, first = known[float(a)]
            parts = (a - middle).sqrt() * first + (middle - b).sqrt() * z
            return parts / (a - b).sqrt()

        like = start()
        return sampler

    def run(name, options, recorder):
        k.torch = View(torch, randn_like=recorder.normal)
        own = {o: v for o, v in options.items() if o not in ("grid", "steps", "end", "noise")}
        net = recorder.network("x0", unit_alpha)
        if name == "dpm_fast":
            x, own = start(SPAN["sigma_max"]), {**own, **SPAN}
            own["noise_sampler"] = lambda *args: recorder.normal(x)
            result = k.sample_dpm_fast(net, x, **own, disable=True)
            count = own["n"] // 3 + 1
            sigmas = np.exp(np.linspace(*np.log([SPAN["sigma_max"], SPAN["sigma_min"]]), count + 1))
            recorder.keep([own.get("eta", 0.0) > 0 and i < count - 1 for i in range(count)])
            return x, result, edm_nodes(sigmas)
        sigmas = levels(options)
        x = start(sigmas[0])
        if name == "dpmpp_sde" and options.get("noise") != "independent":
            own["noise_sampler"] = brownian(recorder)
        elif "eta" in options:
            own["noise_sampler"] = lambda *args: recorder.normal(x)
        result = getattr(k, f"sample_{name}")(net, x, sigmas, **own, disable=True)
        if name in ("euler", "heun", "dpm_2"):
            churned = (sigmas >= own.get("s_tmin", 0.0)) & (sigmas <= own.get("s_tmax", np.inf))
            recorder.keep([bool(c) and "s_churn" in own for c in churned[:-1]])
        elif own.get("eta") == 0.0:
            recorder.keep([False] * len(recorder.noise))
        return x, result, edm_nodes(sigmas)

    plain = {"grid": "karras", "steps": 6, "end": "zero"}
    ends = [plain, {**plain, "end": "sigma_min"}]
    churn = {"s_churn": 2.0, "s_tmin": 0.2, "s_tmax": 8.0, "s_noise": 1.01}
    cases = [(name, end) for name in ("euler", "heun", "dpm_2", "dpmpp_2m") for end in ends]
    cases += [(name, {**end, **churn}) for name in ("euler", "heun", "dpm_2") for end in ends]
    cases += [("lms", {**end, "order": order}) for end in ends for order in (1, 2, 3, 4)]
    noisy = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde",
             "dpmpp_2m_sde", "dpmpp_3m_sde")  # fmt: skip
    cases += [(name, {**end, "eta": eta}) for name in noisy for end in ends for eta in (0.0, 1.0)]
    cases += [(name, {**plain, "eta": 0.6, "s_noise": 0.9}) for name in noisy]
    cases += [("dpmpp_2m_sde", {**end, "eta": eta, "solver_type": "heun"})
              for end in ends for eta in (0.0, 1.0)]  # fmt: skip
    cases += [("dpmpp_sde", {**plain, "eta": eta, "r": 0.3}) for eta in (0.0, 1.0)]
    cases += [("dpmpp_sde", {**end, "eta": 1.0, "noise": "independent"}) for end in ends]
    cases += [("dpm_fast", {"n": n}) for n in (1, 2, 3, 6, 7, 8)]
    cases += [("dpm_fast", {"n": n, "eta": eta, "s_noise": s})
              for n, eta, s in ((6, 1.0, 1.0), (7, 1.0, 1.0), (8, 0.6, 0.9))]  # fmt: skip
    grids = [{"grid": grid, "steps": 5, "end": "zero"} for grid in ("exponential", "vp")]
    cases += [(name, grid) for name in ("dpm_2", "dpmpp_2m", "lms") for grid in grids]
    cases += [(name, {**plain, "steps": n, **({"eta": 1.0} if name in noisy else {})})
              for name in ("heun", "dpm_2", "lms", "dpmpp_2m", *noisy) for n in (1, 2)
              if (name, n) not in (("dpmpp_2m_sde", 1), ("dpmpp_3m_sde", 1))]  # fmt: skip
    for name, options in cases:
        yield name, options, functools.partial(run, name, options)


def edm(root):
    code = load(root / "generate.py", "edm_generate",
                ("click", "tqdm", "PIL", "PIL.Image", "dnnlib", "torch_utils"))  # fmt: skip

    def run(name, options, recorder):
        inner = recorder.network("x0", unit_alpha)
        fields = {"sigma_min": 0.0, "sigma_max": np.inf, "round_sigma": staticmethod(lambda s: s)}
        net = type("Net", (), {**fields, "__call__": lambda self, *args: inner(*args)})()
        result = getattr(code, name)(
            net, start(), randn_like=recorder.normal, num_steps=6, **options
        )
        # The levels: those of the calls at the start of each step.
        levels = recorder.calls[::2] if options.get("solver") != "euler" else recorder.calls
        sigmas = np.array([call[2] for call in levels])
        gamma = min(options.get("S_churn", 0.0) / 6, np.sqrt(2) - 1)
        for i in range(6):  # undo the churn
            low = sigmas[i] / (1 + gamma)
            inside = options.get("S_min", 0.0) <= low <= options.get("S_max", np.inf)
            sigmas[i] = low if inside else sigmas[i]
        churned = (sigmas >= options.get("S_min", 0.0)) & (sigmas <= options.get("S_max", np.inf))
        recorder.keep([bool(c) and gamma > 0 for c in churned])
        return start(sigmas[0]), result, edm_nodes([*sigmas, 0.0])

    churn = {"S_churn": 3.0, "S_min": 0.1, "S_max": 10.0, "S_noise": 1.003}
    cases = [("edm_sampler", {**SPAN, **c}) for c in ({}, {"rho": 5}, churn, {"S_churn": 20.0})]
    solvers = [{"solver": s, **c} for s in ("euler", "heun") for c in ({}, churn)]
    solvers += [{"solver": "heun", "alpha": a} for a in (0.5, 2 / 3)]
    cases += [("ablation_sampler", {**SPAN, **s}) for s in solvers]
    cases += [("ablation_sampler", {"discretization": d, "solver": s})
              for d in ("vp", "ve", "iddpm") for s in ("euler", "heun")]  # fmt: skip
    curved = ({"schedule": "vp", "scaling": "vp"}, {"schedule": "ve"})
    cases += [("ablation_sampler", {**SPAN, "solver": s, **c})
              for s in ("euler", "heun") for c in curved]  # fmt: skip
    others = [("vp", "none", "euler", 1), ("vp", "none", "heun", 1), ("vp", "none", "heun", 2 / 3),
              ("vp", "vp", "heun", 0.5), ("vp", "vp", "heun", 0.8), ("ve", "none", "heun", 0.5),
              ("ve", "vp", "euler", 1), ("ve", "vp", "heun", 1), ("ve", "vp", "heun", 2 / 3),
              ("linear", "vp", "euler", 1), ("linear", "vp", "heun", 1),
              ("linear", "vp", "heun", 0.5)]  # fmt: skip
    cases += [("ablation_sampler", {**SPAN, "schedule": schedule, "scaling": scaling,
                                    "solver": solver, "alpha": alpha})
              for schedule, scaling, solver, alpha in others]  # fmt: skip
    cases += [("ablation_sampler", {**SPAN, "solver": s, **c, **churn})
              for s in ("euler", "heun") for c in curved]  # fmt: skip
    # As published for VP and VE networks.
    cases += [("ablation_sampler", {"discretization": "vp", "solver": "heun", **curved[0]}),
              ("ablation_sampler", {"discretization": "ve", "solver": "heun", **curved[1]})]
    for name, options in cases:
        yield name, options, functools.partial(run, name, options)


def diff_sampler(root):
    folder = root / "diff-solvers-main"
    code = load(folder / "solvers.py", "diff_sampler_solvers", folders=[folder])

    def run(name, options, recorder):
        own = {"num_steps": 7, **SPAN, **options}
        places = ("num_steps", "sigma_min", "sigma_max", "schedule_type", "schedule_rho")
        sigmas = code.get_schedule(**{p: own[p] for p in places if p in own})
        if name == "deis":
            mode, points = own.pop("deis_mode"), own.pop("N", 10000)
            # The list for rhoAB counts orders from 0.
            highest = own["max_order"] - (mode == "rhoab")
            own["coeff_list"] = code.get_deis_coeff_list(sigmas, highest, points, mode)
        net = recorder.network("x0", unit_alpha)
        result = getattr(code, f"{name}_sampler")(net, start(), **own)
        return start(sigmas[0]), result, edm_nodes(sigmas)

    extras = ({"afs": True}, {"denoise_to_zero": True})
    cases = [(name, o) for name in ("euler", "heun", "dpm_2") for o in ({}, *extras)]
    cases += [("dpm_2", {"r": 0.3}), ("heun", {"num_steps": 2}), ("heun", {"num_steps": 3})]
    # Order 1 raises an IndexError.
    adams = [{"max_order": k, **o} for k in (2, 3, 4) for o in ({}, extras[0])]
    adams += [{"max_order": 3, **extras[1]}]
    adams += [{"max_order": 3, "schedule_type": s} for s in ("logsnr", "time_uniform")]
    cases += [(name, o) for name in ("ipndm", "ipndm_v") for o in adams]
    cases += [("deis", {"deis_mode": "tab", "max_order": k, "N": n, **o}) for k in (2, 3, 4)
              for o in ({}, extras[0]) for n in (10000, 20000, 40000)
              if k == 3 or not o]  # fmt: skip
    cases += [("deis", {"deis_mode": "rhoab", "max_order": k}) for k in (2, 3, 4)]
    for predict_x0 in (True, False):
        kind = {"predict_x0": predict_x0}
        cases += [("dpm_pp", {**kind, "max_order": k}) for k in (1, 2, 3)]
        more = (*extras, {"lower_order_final": False})
        cases += [("dpm_pp", {**kind, "max_order": 3, **o}) for o in more]
        cases += [("unipc", {**kind, "variant": v, "max_order": k})
                  for v in ("bh1", "bh2") for k in (1, 2, 3)]  # fmt: skip
        cases += [("unipc", {**kind, "variant": "bh2", "max_order": 3, **o}) for o in more]
    for name, options in cases:
        yield name, options, functools.partial(run, name, options)


def er_sde(root):
    code = load(root / "er_sde_solver.py", "er_sde_solver")
    import torch

    # NumPy and torch no longer mix as the code does.
    code.np = View(np, sum=torch.sum, arange=lambda count, dtype: torch.arange(count))

    def run(name, options, recorder):
        code.torch = View(torch, randn_like=recorder.normal)
        kind = functools.partial(code.customized_func, func_type=options["func_type"])
        solver = code.ER_SDE_Solver(sde_type=name[:2])
        rho = torch.linspace(SPAN["sigma_max"] ** 0.2, SPAN["sigma_min"] ** 0.2, 7) ** 5
        rho = torch.cat([rho[:6], torch.zeros(1)]) if options["end"] == "zero" else rho
        alpha = torch.ones(7) if name[:2] == "ve" else 1 / (1 + rho**2).sqrt()
        at = {float(r): (float(a), float(r * a)) for r, a in zip(rho, alpha, strict=True)}
        net = recorder.network("x0", lambda t: at[float(t)])
        x = start(alpha[0] * rho[0])
        levels = (rho,) if name[:2] == "ve" else (alpha, alpha * rho)
        result = getattr(solver, name)(net, x, *levels, rho, kind)
        up = [kind(b) / kind(a) for a, b in zip(rho[:-1], rho[1:], strict=True)]
        variance = rho[1:] ** 2 - (rho[:-1] * torch.stack(up)) ** 2
        recorder.keep((variance.abs() >= 1e-6).tolist())
        return x, result, np.array([[r, *at[r]] for r in rho.tolist()])

    names = ("ve_1_order", "ve_2_order_taylor", "ve_3_order_taylor", "vp_1_order")
    for name in names:
        for kind in (1, 2, 4, 7):
            for end in ("zero", "sigma_min"):
                options = {"func_type": kind, "end": end}
                yield name, options, functools.partial(run, name, options)
    for name in ("ve_3_order_taylor", "vp_2_order_taylor", "vp_3_order_taylor"):
        for kind in (3, 5, 6, 7):
            options = {"func_type": kind, "end": "sigma_min"}
            if name[:2] == "vp" or kind != 7:
                yield name, options, functools.partial(run, name, options)


def restart(root):
    empty = ("click", "tqdm", "PIL", "PIL.Image", "dnnlib", "torch_utils", "torchvision",
             "torchvision.utils")  # fmt: skip
    code = load(root / "benchmarks/generate_restart.py", "generate_restart", empty)
    import torch

    code.torch = View(torch, float=torch.float64)

    def run(options, recorder):
        inner = recorder.network("x0", unit_alpha)
        fields = {"sigma_min": 0.0, "sigma_max": np.inf, "round_sigma": staticmethod(lambda s: s),
                  "img_channels": DIM, "img_resolution": 1}  # fmt: skip
        net = type("Net", (), {**fields, "__call__": lambda self, *args: inner(*args)})()
        own = {**SPAN, **options}
        result = code.restart_sampler(net, start(), randn_like=recorder.normal, **own)
        # Each step draws, multiplied by 0; a restart draws once more, just before a step.
        last = recorder.drawn_in[1:] + [None]
        recorder.keep([a == b for a, b in zip(recorder.drawn_in, last, strict=True)])
        root, count = 1 / 7, options["num_steps"]
        ends = own["sigma_max"] ** root, own["sigma_min"] ** root
        sigmas = np.append(np.linspace(*ends, count) ** 7, 0.0)
        return start(sigmas[0]), result, edm_nodes(sigmas)

    infos = ("", '{"0": [3, 1, 0.3, 2.0]}', '{"0": [3, 2, 0.2, 1.0], "1": [4, 1, 2.0, 9.0]}')
    for info in infos:
        options = {"num_steps": 6, "restart_info": info, "S_noise": 1.0}
        yield "restart", options, functools.partial(run, options)
    options = {"num_steps": 6, "restart_info": infos[1], "S_noise": 1.003}
    yield "restart", options, functools.partial(run, options)
