"""Golden trajectories of the authors' own sampling codes in float64, for the parity tests.

    git clone https://github.com/crowsonkb/k-diffusion       # and so on
    pip install torch diffusers numpy scipy tqdm
    python tests/golden/make_official.py k_diffusion=k-diffusion dpm_solver=dpm-solver ...
    pip install jax numpy
    python tests/golden/make_official.py deis=deis

Each argument is a name of `REFERENCES` and a checkout, and writes official_<name>.npz. Needed only
to make the files again: the tests read them with NumPy. Nothing of those repositories is kept here;
names, commits and versions are written inside each file, and OFFICIAL.md describes the contents.

The network is that of diffusers_*.npz: E[x0 | x], E[eps | x] or v of its Gaussian mixture at the
(alpha, sigma) of the call. float64 everywhere: torch's default type is set to it, `Tensor.float`
keeps it, and a dispatch mode raises if a float32 tensor appears. Modules that the samplers do not
use (networks, downloads, command lines) are replaced by empty ones.
"""

import contextlib
import importlib
import io
import json
import platform
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import official_sigma
import official_vp
from official_sigma import BATCH, DIM

HERE = Path(__file__).parent
with np.load(HERE / "diffusers_ddim.npz") as z:
    MIXTURE = json.loads(z["info"].tobytes())["mixture"]


def posterior(x, alpha, sigma):
    """E[x0 | x] and E[eps | x] of the mixture at x = alpha x0 + sigma eps; x [batch, dim]."""
    weights, means, scales = (np.asarray(MIXTURE[k]) for k in ("weights", "means", "scales"))
    centred = x[:, None] - alpha * means
    var = (alpha * scales) ** 2 + sigma**2
    logits = np.log(weights) - 0.5 * np.sum(centred**2 / var + np.log(var), axis=-1)
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share = (share / share.sum(axis=1, keepdims=True))[..., None]
    x0 = np.sum(share * (means + alpha * scales**2 / var * centred), axis=1)
    return x0, np.sum(share * sigma / var * centred, axis=1)


class Recorder:
    """The network and the noise of one run, and all that passes through them.

    `levels(t)` is (alpha, sigma) of a call at time t; `wrap` makes the reference's arrays.
    """

    def __init__(self, wrap):
        self.wrap, self.rng = wrap, np.random.default_rng(7)
        self.inputs, self.outputs, self.calls, self.noise, self.drawn_in = [], [], [], [], []

    def network(self, prediction, levels):
        def evaluate(x, t, *args, **kwargs):
            clock = t.reshape(-1)[0]
            alpha, sigma = (float(np.asarray(a).reshape(-1)[0]) for a in levels(clock))
            self.inputs.append(np.array(np.asarray(x)).reshape(BATCH, DIM))
            x0, eps = posterior(self.inputs[-1], alpha, sigma)
            v = alpha * eps - sigma * x0
            self.outputs.append({"x0": x0, "eps": eps, "v": v}[prediction])
            self.calls.append((float(clock), alpha, sigma))
            return self.wrap(self.outputs[-1].reshape(x.shape))

        return evaluate

    def normal(self, like, *args, **kwargs):
        self.noise.append(self.rng.standard_normal((BATCH, DIM)))
        self.drawn_in.append(len(self.calls) - 1)
        return self.wrap(self.noise[-1].reshape(like.shape))

    def keep(self, wanted):
        """Forget the draws that the sampler multiplies by 0."""
        pairs = [(z, i) for z, i, k in zip(self.noise, self.drawn_in, wanted, strict=True) if k]
        self.noise, self.drawn_in = [z for z, _ in pairs], [i for _, i in pairs]


REFERENCES = {
    "k_diffusion": ("crowsonkb/k-diffusion", official_sigma.k_diffusion),
    "edm": ("NVlabs/edm", official_sigma.edm),
    "dpm_solver": ("LuChengTHU/dpm-solver", official_vp.dpm_solver),
    "unipc": ("wl-zhao/UniPC", official_vp.unipc),
    "diff_sampler": ("zju-pi/diff-sampler", official_sigma.diff_sampler),
    "deis": ("qsh-zh/deis", official_vp.deis),
    "pndm": ("luping-liu/PNDM", official_vp.pndm),
    "bdia": ("guoqiang-zhang-x/BDIA", official_vp.bdia),
    "sa_solver": ("scxue/SA-Solver", official_vp.sa_solver),
    "er_sde": ("QinpengCui/ER-SDE-Solver", official_sigma.er_sde),
    "restart": ("Newbeeer/diffusion_restart_sampling", official_sigma.restart),
    "momentum": ("sWizad/momentum-diffusion", official_vp.momentum),
}


@contextlib.contextmanager
def double_torch():
    """torch with float64 as its only float; yields how to make its tensors."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class NoFloat32(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves((args, kwargs, out)):
                if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                    raise TypeError(f"float32 in {func}")
            return out

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), NoFloat32():
        yield torch.from_numpy


@contextlib.contextmanager
def double_jax():
    import jax.numpy as jnp

    yield jnp.asarray


def record(sampler, options, run, recorder):
    """(facts for the JSON, arrays) of one case."""
    with contextlib.redirect_stdout(io.StringIO()):
        first, result, nodes = run(recorder)
    first, result = (np.array(np.asarray(x)).reshape(BATCH, DIM) for x in (first, result))
    states = np.stack([*recorder.inputs, result])
    if not np.isfinite(states).all():
        raise RuntimeError(f"{sampler} {options}: not finite")
    text = ",".join(f"{k}={v}" for k, v in options.items())
    facts = {"sampler": sampler, "name": f"{sampler}: {text}", "options": options,
             "drawn_in_call": recorder.drawn_in}  # fmt: skip
    return facts, {
        "start": first[None],
        "states": states,
        "outputs": np.stack(recorder.outputs),
        "calls": np.array(recorder.calls),
        "nodes": nodes,
        "noise": np.reshape(recorder.noise, (-1, BATCH, DIM)),
    }


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        repository, cases = REFERENCES[name]
        git = ["git", "-C", path, "rev-parse", "HEAD"]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
        packages = ["numpy", "jax"] if name == "deis" else ["numpy", "scipy", "torch"]
        packages += ["diffusers"] if name == "momentum" else []
        versions = {p: importlib.import_module(p).__version__ for p in packages}
        info = {"repository": repository, "commit": commit, "mixture": MIXTURE, "cases": [],
                "versions": {**versions, "python": platform.python_version()}}  # fmt: skip
        columns = {}
        with double_jax() if name == "deis" else double_torch() as wrap:
            for sampler, options, run in cases(Path(path).resolve()):
                facts, arrays = record(sampler, options, run, Recorder(wrap))
                rows = {}
                for key, value in arrays.items():
                    column = columns.setdefault(key, [])
                    first = sum(map(len, column))
                    rows[key] = [first, first + len(value)]
                    column.append(value)
                info["cases"].append({**facts, "rows": rows})
        file = HERE / f"official_{name}.npz"
        text = np.frombuffer(json.dumps(info).encode(), dtype=np.uint8)
        np.savez_compressed(file, info=text, **{k: np.concatenate(v) for k, v in columns.items()})
        print(f"{file.name}: {len(info['cases'])} cases, {file.stat().st_size / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
