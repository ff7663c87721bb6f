"""The Time-Shift sampler: the time it reads, the paper's loop, and the released one."""

import calibrated_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.controls import coupled, time_shift
from jaxdiff.controls.time_shift import Levels

CASES = calibrated_cases.load("time_shift")
PROCESS = jd.processes.vp_linear()
DISCRETE = jd.processes.ddpm()
GRID = jd.grids.from_times(DISCRETE, np.arange(901.0, 0.0, -100.0))


def start():
    return np.random.default_rng(8).standard_normal((3, 4)) * [[0.6], [0.9], [1.2]]


@pytest.mark.parametrize("tau", np.linspace(0.1, 0.6, 6))
def test_the_time_is_recovered_from_the_variance(tau):
    """x = sigma_tau z in 4096 dimensions, the nominal time up to 0.1 away.

    The variance is known to 2.2%, which in t is 0.001 at 0.1 and 0.07 at 0.6, where it saturates:
    the median of 256 states, and one state as far as that allows.
    """
    t = np.linspace(1.0, 1e-3, 1000)
    levels = Levels(t, PROCESS.alpha(t), PROCESS.sigma(t))
    x = PROCESS.sigma(tau) * np.random.default_rng(0).standard_normal((256, 4096))
    near = tau + 0.1 * np.random.default_rng(1).uniform(-1.0, 1.0)
    found = coupled(jnp.asarray(x), near, PROCESS.alpha(near), PROCESS.sigma(near), levels, 2.0)
    assert abs(np.median(found[0]) - tau) < 0.01
    f, g2 = PROCESS.rates(tau)
    slope = -2.0 * f * PROCESS.alpha(tau) ** 2
    deviation = PROCESS.sigma(tau) ** 2 * np.sqrt(2.0 / 4095.0) / slope
    assert np.abs(found[0] - tau).max() < 5.0 * deviation + 0.001 or tau > 0.4
    np.testing.assert_allclose(found[1:], (PROCESS.alpha(found[0]), PROCESS.sigma(found[0])), 1e-4)
    edge = coupled(jnp.asarray(x), near, PROCESS.alpha(near), PROCESS.sigma(near), levels, 0.0)
    np.testing.assert_allclose(edge[0], near, rtol=1e-6)


def corrected(grid):
    return jd.solvers.unipc(grid, 2)


BUILDERS = [jd.solvers.ddim, jd.solvers.ddpm, jd.solvers.pndm, jd.solvers.deis, corrected]


@pytest.mark.parametrize(("build", "mode"), [
    (build, mode) for build in BUILDERS for mode in ("paper", "target", "network")
    if (build, mode) != (corrected, "target")
])  # fmt: skip
def test_a_window_of_0_is_the_tableau(build, mode):
    """Bit for bit; and an array of 0 under jit, where the window is not known, to rounding."""
    table, denoiser = build(GRID), calibrated_cases.mixture("eps")
    key = jax.random.key(0)

    @jax.jit
    def run(window):
        shifted, control = time_shift(denoiser, table, GRID, window, mode=mode)
        return jd.sample(shifted, table, start(), key, control=control)

    base = jd.sample(denoiser, table, start(), key)
    shifted, control = time_shift(denoiser, table, GRID, 0, mode=mode)
    assert np.array_equal(jd.sample(shifted, table, start(), key, control=control), base)
    np.testing.assert_allclose(run(0.0), base, rtol=0, atol=1e-5)
    assert np.abs(run(80.0) - base).max() > 1e-3


@pytest.mark.parametrize(("facts", "arrays"), CASES, ids=[str(f) for f, _ in CASES])
def test_the_released_solver_makes_the_same_states(x64, facts, arrays):
    grid = jd.grids.from_times(DISCRETE, arrays["nodes"][:, 0])
    np.testing.assert_allclose(
        np.stack([grid.alpha, grid.sigma], -1), arrays["nodes"][:, 1:], rtol=1e-9
    )
    table = {
        "euler": lambda: jd.solvers.ddim(grid),
        "s_pndm": lambda: jd.solvers.pndm(grid, 2, start="heun"),
        "ddpm": lambda: jd.solvers.ddim(grid, facts["eta"]),
    }[facts["method"]]()
    shifted, control = time_shift(
        calibrated_cases.mixture("eps"), table, grid, facts["window"], facts["cutoff"], "target"
    )
    # The last step is drawn for too.
    found = jd.sample(
        shifted, table, arrays["start"], noise=arrays["noise"] if facts["eta"] else None,
        control=control, save="trajectory",
    )  # fmt: skip
    want = np.concatenate([arrays["inputs"], arrays["result"][None]])
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-8 * abs(want).max())


def by_the_paper(denoiser, x, window, cutoff, eta=0.0, noise=None):
    """The coupled time instead of t, in the network and in the step's coefficients."""
    steps = np.arange(1000.0)
    alphas, sigmas = DISCRETE.alpha(steps), DISCRETE.sigma(steps)
    for i in range(GRID.steps):
        t = np.full(len(x), GRID.t[i])
        if i and GRID.t[i] > cutoff:
            near = np.abs(steps - GRID.t[i]) <= window / 2
            distance = np.abs(x.var(1, ddof=1)[:, None] - sigmas**2)
            t = np.argmin(np.where(near, distance, np.inf), 1)
        a, s = alphas[t.astype(int)][:, None], sigmas[t.astype(int)][:, None]
        _, a1, s1 = GRID.node(i + 1)
        eps = np.asarray(denoiser(x, *(jnp.asarray(v).ravel() for v in (t, a, s))))
        c = eta * s1 * np.sqrt(1.0 - (a * s1 / (s * a1)) ** 2)
        x = a1 * (x - s * eps) / a + np.sqrt(s1**2 - c**2) * eps
        x = x if noise is None else x + c * noise[i]
    return x


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_ddim_and_ddpm_are_the_papers_algorithm(x64, prediction):
    want = by_the_paper(calibrated_cases.mixture("eps"), start(), 60, 250)
    table = jd.solvers.ddim(GRID)
    shifted, control = time_shift(calibrated_cases.mixture(prediction), table, GRID, 60, 250)
    found = jd.sample(shifted, table, start(), control=control)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-9)
    noise = np.random.default_rng(2).standard_normal((GRID.steps, 3, 4))
    want = by_the_paper(calibrated_cases.mixture("eps"), start(), 60, 250, 1.0, noise)
    table = jd.solvers.ddpm(GRID)
    shifted, control = time_shift(calibrated_cases.mixture(prediction), table, GRID, 60, 250)
    found = jd.sample(shifted, table, start(), noise=noise, control=control)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-9)


def test_a_multistep_row_starts_from_the_moved_state(x64):
    """AB2 in eps: alpha x0 + sigma eps at the row's level, then the tableau's step and memory."""
    denoiser = calibrated_cases.mixture("eps")
    table = jd.solvers.deis(GRID, 2, "rho")
    choice, control = time_shift(denoiser, table, GRID, 60)
    steps = np.arange(1000.0)
    levels = Levels(steps, DISCRETE.alpha(steps), DISCRETE.sigma(steps))
    x, old = start(), None
    for i in range(GRID.steps):
        level = GRID.node(i)
        t, a, s = level if i == 0 else coupled(jnp.asarray(x), *level, levels, 60)
        a, s = np.reshape(a, (-1, 1)), np.reshape(s, (-1, 1))
        eps = np.asarray(denoiser(jnp.asarray(x), t, *(jnp.asarray(v).ravel() for v in (a, s))))
        x = level[1] * (x - s * eps) / a + level[2] * eps
        of = np.asarray(table.B[i, 0, :, 0])
        x, old = table.A[i, 0, 0] * x + of[0] * eps + (0 if old is None else of[1] * old), eps
    found = jd.sample(choice, table, start(), control=control)
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-9)


def test_network_time_alone(x64):
    """DEIS as released: eps of the coupled time in the tableau's own step."""
    denoiser, table = calibrated_cases.mixture("eps"), jd.solvers.ddim(GRID)
    shifted, control = time_shift(denoiser, table, GRID, 60, mode="network")
    assert control is None
    steps = np.arange(1000.0)
    levels = Levels(steps, DISCRETE.alpha(steps), DISCRETE.sigma(steps))
    x = jnp.asarray(start())
    for i in range(GRID.steps):
        t, a, s = GRID.node(i) if i == 0 else coupled(x, *GRID.node(i), levels, 60)
        eps = denoiser(x, t, a, s)
        (_, a0, s0), (_, a1, s1) = GRID.node(i), GRID.node(i + 1)
        x = a1 / a0 * x + (s1 - a1 / a0 * s0) * eps
    np.testing.assert_allclose(jd.sample(shifted, table, start()), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("change", "message"), [
    (dict(window=-1), "window must be a number"),
    (dict(cutoff=np.nan), "cutoff must be a number"),
    (dict(mode="source"), "mode must be one of"),
    (dict(tableau=jd.solvers.euler_maruyama(GRID)), "takes ddpm"),
    (dict(tableau=corrected(GRID), mode="target"), "no row of this tableau"),
    (dict(grid=jd.grids.from_arrays(*GRID.node(slice(None)))), "no process"),
])  # fmt: skip
def test_what_it_does_not_take(change, message):
    call = {"tableau": jd.solvers.ddim(GRID), "grid": GRID, "window": 40, **change}
    with pytest.raises(ValueError, match=message):
        time_shift(calibrated_cases.mixture("eps"), **call)
