"""How the official codes on variance-preserving schedules are run (see official_sigma.py)."""

import functools
import sys
import types

import numpy as np
from official_sigma import BATCH, SHAPE, START, View, load, start


def vp_levels(schedule):
    return lambda t: (schedule.marginal_alpha(t.view(1)), schedule.marginal_std(t.view(1)))


def vp_schedule(code, kind):
    import torch

    if kind == "discrete":
        betas = torch.linspace(1e-4, 0.02, 1000)
        return code.NoiseScheduleVP("discrete", betas=betas, dtype=torch.float64)
    return code.NoiseScheduleVP("linear", dtype=torch.float64)


def vp_nodes(schedule, times):
    pair = vp_levels(schedule)
    return np.array([[float(t), *(float(a) for a in pair(t))] for t in times])


def dpm_solver(root):
    code = load(root / "dpm_solver_pytorch.py", "dpm_solver_pytorch")

    def run(options, recorder):
        own = dict(options)
        schedule = vp_schedule(code, own.pop("schedule", "linear"))
        net = recorder.network("eps", vp_levels(schedule))
        threshold = own.pop("correcting_x0_fn", None)
        solver = code.DPM_Solver(net, schedule, own.pop("algorithm_type"), threshold)
        result = solver.sample(start(), t_end=1e-3, **own)
        place = (own["skip_type"], 1.0, 1e-3)
        if own["method"] == "singlestep":
            orders = solver.get_orders_and_timesteps_for_singlestep_solver
            times, _ = orders(own["steps"], own["order"], *place, "cpu")
        else:
            single = own["method"] == "singlestep_fixed"
            count = own["steps"] // own["order"] if single else own["steps"]
            times = solver.get_time_steps(*place, count, "cpu")
        return start(), result, vp_nodes(schedule, times)

    skips = ("time_uniform", "logSNR", "time_quadratic")
    taylor, full = {"solver_type": "taylor"}, {"lower_order_final": False}
    for kind in ("dpmsolver", "dpmsolver++"):
        multi = [(2, 7, s, {}) for s in skips] + [(3, 7, s, {}) for s in skips]
        multi += [(k, 7, "logSNR", o) for k in (2, 3) for o in (taylor, full, {**taylor, **full})]
        multi += [(1, 5, "time_uniform", {}), (3, 11, "time_quadratic", {}), (3, 3, "logSNR", {})]
        multi += [(2, 2, "logSNR", {}), (2, 5, "time_uniform", {"denoise_to_zero": True})]
        multi += [(k, 6, "time_uniform", {"schedule": "discrete"}) for k in (2, 3)]
        single = [(k, 7, s, o) for k in (2, 3) for s in skips for o in ({}, taylor)]
        single += [(3, n, "logSNR", {}) for n in (6, 8)] + [(1, 4, "logSNR", {})]
        single += [(2, 6, "logSNR", {}), (3, 5, "logSNR", {"denoise_to_zero": True})]
        fixed = [(2, 6, "logSNR", {}), (3, 6, "logSNR", {}), (3, 6, "time_quadratic", {})]
        for method, group in (("multistep", multi), ("singlestep", single),
                              ("singlestep_fixed", fixed)):  # fmt: skip
            for order, steps, skip, extra in group:
                options = {"algorithm_type": kind, "method": method, "order": order,
                           "steps": steps, "skip_type": skip, **extra}  # fmt: skip
                yield method, options, functools.partial(run, options)
    options = {"algorithm_type": "dpmsolver++", "method": "multistep", "order": 2, "steps": 7,
               "skip_type": "logSNR", "correcting_x0_fn": "dynamic_thresholding"}  # fmt: skip
    yield "multistep", options, functools.partial(run, options)


def unipc(root):
    code = load(root / "uni_pc.py", "official_uni_pc")

    def run(options, recorder):
        own = dict(options)
        schedule = vp_schedule(code, "linear")
        net = recorder.network("eps", vp_levels(schedule))
        kind, variant = own.pop("algorithm_type"), own.pop("variant")
        solver = code.UniPC(net, schedule, algorithm_type=kind, variant=variant)
        result = solver.sample(start(), t_end=1e-3, **own)
        times = solver.get_time_steps(own["skip_type"], 1.0, 1e-3, own["steps"], "cpu")
        return start(), result, vp_nodes(schedule, times)

    full = {"lower_order_final": False}
    for kind in ("data_prediction", "noise_prediction"):
        for variant in ("bh1", "bh2", "vary_coeff"):
            group = [(order, 7, "logSNR", {}) for order in (1, 2, 3)]
            group += [(order, 7, "logSNR", full) for order in (2, 3)]
            group += [(3, 7, "time_uniform", {}), (2, 7, "time_quadratic", {})]
            group += [(3, 3, "logSNR", {}), (2, 5, "logSNR", {"denoise_to_zero": True})]
            group += [(4, 7, "logSNR", {})] if variant == "bh2" else []
            for order, steps, skip, extra in group:
                options = {"algorithm_type": kind, "variant": variant, "order": order,
                           "steps": steps, "skip_type": skip, **extra}  # fmt: skip
                yield "unipc", options, functools.partial(run, options)


def deis(root):
    import jax
    import jax._src.numpy.lax_numpy as inner
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    # A private function of jax that only the discrete process uses.
    inner._promote_dtypes_inexact = getattr(inner, "_promote_dtypes_inexact", None)
    sys.path.insert(0, str(root))
    import jax_deis
    from jax_deis import multistep

    per_step = multistep.get_coef_per_step_fn
    sde = jax_deis.VPSDE(*jax_deis.get_linear_alpha_fns(0.1, 20.0), 1e-3, 1.0)

    def levels(t):
        return jnp.sqrt(sde.t2alpha_fn(t)), jnp.sqrt(1 - sde.t2alpha_fn(t))

    def run(options, recorder):
        own = dict(options)
        points = own.pop("num_item", 10000)
        multistep.get_coef_per_step_fn = lambda *args: functools.partial(
            per_step(*args), num_item=points
        )
        net = recorder.network("eps", levels)
        sampler = jax_deis.get_sampler(sde, net, num_step=6, **own)
        with jax.disable_jit():
            result = sampler(jnp.asarray(START))
        times = jax_deis.sampler.get_rev_ts(sde, 6, own["ts_order"], ts_phase=own["ts_phase"])
        return START, result, np.array([[float(t), *map(float, levels(t))] for t in times])

    grid = {"ts_phase": "t", "ts_order": 2}
    # Order 0 raises a TypeError: it concatenates arrays of different dimensions.
    cases = [{"method": m, "ab_order": k, "num_item": n, **grid} for m in ("t_ab", "rho_ab")
             for k in (1, 2, 3) for n in (10000, 20000, 40000)]  # fmt: skip
    methods = ("1euler", "2heun", "3kutta", "3ral", "3heun", "3vdh", "3ssprk", "4rk")
    cases += [{"method": "rho_rk", "rk_method": m, **grid} for m in methods]
    others = ({"ts_phase": "log", "ts_order": 1}, {"ts_phase": "rho", "ts_order": 7})
    cases += [{"method": "rho_rk", "rk_method": m, **g}
              for g in others for m in ("2heun", "3kutta")]  # fmt: skip
    cases.append({"method": "ipndm", "ts_phase": "t", "ts_order": 1})
    for options in cases:
        yield options["method"], options, functools.partial(run, options)


def pndm(root):
    names = ("torchvision", "torchvision.utils", "torch.utils.tensorboard", "dataset", "model",
             "model.ema")  # fmt: skip
    code = load(root / "runner/runner.py", "pndm_runner", names, [root])
    schedules = load(root / "runner/schedule.py", "pndm_schedule", (), [root])
    betas = {"type": "linear", "beta_start": 1e-4, "beta_end": 0.02, "diffusion_step": 1000}

    def run(name, options, recorder):
        args = types.SimpleNamespace(device="cpu", method=name)
        schedule = schedules.Schedule(args, betas)

        def levels(t):  # those that `transfer` gives the call
            level = schedule.alphas_cump[int(t.long()) + 1]
            return level.sqrt(), (1 - level).sqrt()

        runner = types.SimpleNamespace(device="cpu", schedule=schedule)
        times = range(0, 1000, 1000 // options["steps"])
        net = recorder.network("eps", levels)
        result = code.Runner.sample_image(runner, start(), times, net)
        clocks = code.th.tensor([*reversed(times), -1.0])
        return start(), result, np.array([[float(t), *map(float, levels(t))] for t in clocks])

    for name in ("DDIM", "S-PNDM", "F-PNDM"):
        for steps in (5, 10):
            options = {"steps": steps}
            yield name, options, functools.partial(run, name, options)


def bdia(root):
    import torch

    folder = root / "text-to-image/stablediffusionV2/ldm"
    tools = load(folder / "modules/diffusionmodules/util.py", "bdia_util",
                 ("einops", "ldm", "ldm.util"))  # fmt: skip
    names = ("ldm", "ldm.modules", "ldm.modules.diffusionmodules")
    code = load(folder / "models/diffusion/BDIAddim.py", "bdia_ddim", names,
                given={"ldm.modules.diffusionmodules.util": tools})  # fmt: skip
    code.torch = View(torch, float32=torch.float64)

    def run(options, recorder):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        levels = torch.cumprod(1 - betas, 0)
        at = lambda t: (levels[int(t)].sqrt(), (1 - levels[int(t)]).sqrt())  # noqa: E731
        model = types.SimpleNamespace(
            num_timesteps=1000, device="cpu", betas=betas, alphas_cumprod=levels,
            alphas_cumprod_prev=torch.cat([torch.ones(1), levels[:-1]]), parameterization="eps",
            apply_model=recorder.network("eps", at),
        )  # fmt: skip
        sampler = code.BDIADDIMSampler(model, options["steps"], options["gamma"], device="cpu")
        result, _ = sampler.sample(options["steps"], BATCH, SHAPE[1:], x_T=start())
        times = [*reversed(sampler.ddim_timesteps.tolist()), 0]
        return start(), result, np.array([[t, *map(float, at(t))] for t in times])

    for steps, gamma in ((5, 0.0), (5, 0.5), (5, 1.0), (10, 0.3), (10, 1.0), (2, 0.7)):
        options = {"steps": steps, "gamma": gamma}
        yield "bdia_ddim", options, functools.partial(run, options)


def momentum(root):
    import torch
    from diffusers import DDIMScheduler
    from diffusers.schedulers import scheduling_ddim

    scheduling_ddim.torch = View(torch, float32=torch.float64)
    scheduling_ddim.np = View(np, float32=np.float64)
    code = load(root / "stable_diffusion/diffusion/momentum_scheduler.py", "momentum_scheduler")

    def run(name, options, recorder):
        kind = options.get("prediction_type", "epsilon")
        inner = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                              prediction_type=kind)  # fmt: skip
        inner.set_timesteps(options["steps"])
        table = inner.alphas_cumprod
        at = lambda t: (table[int(t)].sqrt(), (1 - table[int(t)]).sqrt())  # noqa: E731
        net = recorder.network("eps" if kind == "epsilon" else "v", at)
        outer, x = getattr(code, name)(inner, order=options["order"]), start()
        for t in inner.timesteps:
            x = outer.step(net(x, t), t, x)
        nodes = [[int(t), *map(float, at(t))] for t in inner.timesteps] + [[-1.0, 1.0, 0.0]]
        return start(), x, np.array(nodes)

    for name in ("PLMSWithHBScheduler", "GHVBScheduler", "PLMSWithNTScheduler"):
        for order in (1, 4, 0.8, 1.5, 2.3, 3.5, 4.8):
            if order % 1 or name == "GHVBScheduler":
                options = {"order": order, "steps": 8}
                yield name, options, functools.partial(run, name, options)
    options = {"order": 1.5, "steps": 8, "prediction_type": "v_prediction"}
    for name in ("PLMSWithHBScheduler", "GHVBScheduler"):
        yield name, options, functools.partial(run, name, options)


def sa_solver(root):
    code = load(root / "sa_solver.py", "official_sa_solver")
    import torch

    def run(options, recorder):
        code.torch = View(torch, randn_like=recorder.normal)
        code.tqdm = lambda steps: steps
        own = dict(options)
        schedule = vp_schedule(code, "linear")
        net = recorder.network("eps", vp_levels(schedule))
        size, kind = own.pop("tau"), own.pop("algorithm_type")
        solver = code.SASolver(net, schedule, kind)
        result = solver.sample(own.pop("mode"), start(), lambda t: size, t_end=1e-3, **own)
        place = (own["skip_type"], 1.0, 1e-3, own["steps"], own["skip_order"])
        times = solver.get_time_steps(*place, "cpu")
        # The first draw is not used; in few steps neither is the last, nor any without noise.
        last = len(recorder.noise) - (options["mode"] == "few_steps")
        recorder.keep([size > 0 and 0 < i < last for i in range(len(recorder.noise))])
        return start(), result, vp_nodes(schedule, times)

    grid = {"skip_type": "time", "skip_order": 2}
    base = {"algorithm_type": "data_prediction", "tau": 1.0, "mode": "few_steps", "steps": 7,
            "predictor_order": 3, "corrector_order": 4, "pc_mode": "PEC", **grid}  # fmt: skip
    changes = [{"predictor_order": p, "corrector_order": c}
               for p, c in ((1, 0), (2, 0), (3, 0), (1, 1), (1, 2), (2, 3), (3, 3), (4, 4))]  # fmt: skip
    changes += [{"tau": tau} for tau in (0.0, 0.5, 1.0)] + [{"pc_mode": "PECE"}]
    changes += [{"skip_type": "logSNR", "skip_order": 1}, {"steps": 3}, {"skip_type": "karras"}]
    changes += [{"mode": "more_steps", "predictor_order": p, "corrector_order": c, "tau": tau}
                for p, c, tau in ((1, 0, 1.0), (3, 0, 0.4), (3, 4, 1.0), (3, 4, 0.0))]  # fmt: skip
    for change in changes:
        for kind in ("data_prediction", "noise_prediction"):
            options = {**base, **change, "algorithm_type": kind}
            yield "sa_solver", options, functools.partial(run, options)
