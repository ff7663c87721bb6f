"""The cost of the integrator: against a hand-written scan of the same rows, and the bare network.

    python benchmarks/integrator.py          # about 3 minutes; writes results/integrator.json

Run time is a ratio of medians over interleaved pairs in one process: A B A B ... on inputs that are
already on the device, each call waited for.
"""

import jax
import jax.numpy as jnp
import machine
import numpy as np
from pairs import paired

import jaxdiff as jd
from jaxdiff.config import complete, load
from jaxdiff.experiment import make_experiment, make_source
from jaxdiff.predictions import PREDICTIONS
from jaxdiff.settings import SECTIONS

COMPILE = "/jax/core/compile/backend_compile_duration"
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: compiled.append(duration) if event == COMPILE else None
)
PROCESS = jd.processes.vp_linear()
SOLVERS = ("ddim", "heun", "dpm_solver_pp_3m", "unipc_3")


def by_scan(denoiser, tableau, x):
    """The rows of a deterministic one-output tableau in `jax.lax.scan`, nothing else."""
    column = PREDICTIONS.index(denoiser.prediction)
    table = jax.tree.map(
        lambda a: jnp.asarray(a, x.dtype),
        (tableau.A, tableau.B[..., 0], tableau.u[:, 0, column], tableau.w[:, 0, column],
         tableau.t, tableau.alpha, tableau.sigma),
    )  # fmt: skip

    def row(carry, coefficients):
        s, history = carry
        a, b, u, w, t, alpha, sigma = coefficients
        m = u * denoiser(s[0], t, alpha, sigma) + w * s[0]
        history = (m, *history[:-1])
        s = tuple(
            sum(a[i, j] * s[j] for j in range(len(s)))
            + sum(b[i, k] * history[k] for k in range(len(history)))
            for i in range(len(s))
        )
        return (s, history), None

    start = (x,) * tableau.registers, (jnp.zeros_like(x),) * tableau.history
    return jax.lax.scan(row, start, table)[0][0][0]


def network(params, x, t):
    h = x
    for w in params:
        h = jnp.tanh(h @ w + t)
    return h


def equality():
    """Largest difference between sample and the scan, float64, 50 steps on a mixture."""
    with jax.enable_x64(True):
        mixture = jd.gaussian_mixture(
            np.array([[1.0, 0.2], [-0.9, 0.6]]), np.array([0.4, 0.6]), np.ones(2), PROCESS, "v"
        )
        x = PROCESS.prior(jax.random.key(0), (64, 2), jnp.float64)
        grid = jd.grids.half_log_snr(PROCESS, 50)
        out = {}
        for name in SOLVERS:
            tableau = jd.solvers.build(name, grid)
            gap = jnp.abs(jd.sample(mixture, tableau, x) - by_scan(mixture, tableau, x))
            out[name] = float(gap.max())
        return out


def against_scan(rounds=60):
    """Run time of jitted sample over the jitted scan: a 4 x 512 network at batch 64, 20 steps."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = [jax.random.normal(k, (512, 512)) / 23.0 for k in keys]
    denoiser = jd.Denoiser(network, "eps", params)
    x = PROCESS.prior(jax.random.key(1), (64, 512))
    out = {}
    for name in SOLVERS:
        tableau = jd.solvers.build(name, jd.grids.half_log_snr(PROCESS, 20))
        table = jax.tree.map(jnp.asarray, tableau)
        ours = jax.jit(lambda d, x, table=table: jd.sample(d, table, x))
        scan = jax.jit(lambda d, x, tableau=tableau: by_scan(d, tableau, x))
        np.testing.assert_allclose(ours(denoiser, x), scan(denoiser, x), rtol=1e-3, atol=1e-3)
        out[name] = paired(lambda: ours(denoiser, x), lambda: scan(denoiser, x), rounds)  # noqa: B023
    return out


def against_network(config="configs/digits.py", rounds=60):
    """Eager sample over (rows x one call of the jitted network): the digits DiT, batch 64."""
    config = complete(load(config, SECTIONS), SECTIONS)
    source = make_source(config)
    experiment = make_experiment(config, source.shape, source.num_classes)
    denoiser = experiment.denoiser(experiment.init(jax.random.key(0)))
    x = experiment.process.prior(jax.random.key(1), (64, *experiment.shape))
    cond = jnp.arange(64) % 10
    bare = jax.jit(lambda d, x, t, a, s, c: d(x, t, a, s, c))
    out = {}
    for name in ("ddim", "dpm_solver_pp_2m", "unipc_2"):
        tableau = jd.solvers.build(name, jd.grids.half_log_snr(experiment.process, 20))
        t, a, s = (jnp.float32(v[3]) for v in (tableau.t, tableau.alpha, tableau.sigma))

        def calls(rows=tableau.rows, t=t, a=a, s=s):
            y = x
            for _ in range(rows):
                y = bare(denoiser, y, t, a, s, cond)
            return y

        def ours(tableau=tableau):
            return jd.sample(denoiser, tableau, x, cond=cond)

        jax.block_until_ready((calls(), ours()))
        out[name] = paired(ours, calls, rounds)
    return out


def second_solver():
    """Programs compiled by the first and by the second solver of one shape."""
    grid = jd.grids.half_log_snr(PROCESS, 13)
    denoiser = jd.Denoiser(network, "eps", [jnp.eye(3)])
    x = jnp.ones((5, 3))
    counts = []
    for tableau in (jd.solvers.ddim(grid), jd.solvers.euler(grid), jd.solvers.ddim(grid)):
        before = len(compiled)
        jax.block_until_ready(jd.sample(denoiser, tableau, x))
        counts.append(len(compiled) - before)
    return {"first": counts[0], "second": counts[1], "again": counts[2]}


if __name__ == "__main__":
    machine.write(
        "integrator",
        {
            "float64 difference from lax.scan, 50 steps": equality(),
            "run time over lax.scan [quartiles]": against_scan(),
            "run time over rows x bare network, digits DiT, batch 64 [quartiles]": against_network(),
            "programs compiled": second_solver(),
        },
    )
