"""DPM-Solver-v3: the authors' code, its two degenerate cases, and what the statistics are worth."""

import calibrated_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import run_all
from oracles import BROAD, WIDE

import jaxdiff as jd
from jaxdiff.calibration import estimate_statistics, noised_states
from jaxdiff.solvers.dpm_solver_v3 import dpm_solver_v3
from jaxdiff.solvers.statistics import ModelStatistics, integrals

PROCESS = jd.processes.vp_linear()
PLAIN = {"corrector": "none", "lower_order_final": False}


def curves(bins, dim=4):
    """Smooth statistics of no network on the span of PROCESS."""
    lam = jd.grids.half_log_snr(PROCESS, bins).lam
    wave = np.linspace(0.0, 5.0, bins + 1)[:, None] + np.arange(dim)
    return ModelStatistics(lam, 0.5 + 0.4 * np.sin(wave), 0.5 * np.cos(wave), np.sin(2.0 * wave))


def mixture(found=BROAD, **options):
    return jd.gaussian_mixture(found.means, found.std, found.weights, PROCESS, **options)


# --- the authors' code ----------------------------------------------------------------------------


def official_tableau(facts, statistics, arrays):
    corrector = "none"
    if facts["use_corrector"]:
        corrector = "pseudo" if facts["c_pseudo"] else "same"
    statistics = statistics[facts["schedule"]]
    if facts["degenerated"]:
        ones, zeros = np.ones_like(statistics.l), np.zeros_like(statistics.l)
        statistics = ModelStatistics(statistics.lam, ones, zeros, zeros)
    return dpm_solver_v3(
        calibrated_cases.grid(arrays), statistics, order=facts["order"], pseudo=facts["p_pseudo"],
        corrector=corrector,
        correct_above=0.5 if facts["half"] else None,
        lower_order_final=facts["lower_order_final"], quadrature="trapezoid",
    )  # fmt: skip


def test_the_official_trajectories_are_met(x64):
    """Every input of the network and the result."""
    (_, shared), *runs = calibrated_cases.load("dpm_solver_v3")
    statistics = {
        name: ModelStatistics(shared[name], shared["l"], shared["s"], shared["b"])
        for name in ("linear", "edm")
    }
    tables = [official_tableau(facts, statistics, arrays) for facts, arrays in runs]
    starts = np.stack([arrays["start"] for _, arrays in runs])
    found = run_all(calibrated_cases.mixture("eps"), tables, starts, save="trajectory")
    assert len(runs) == 16
    for (facts, arrays), path, table in zip(runs, found, tables):
        expected = np.concatenate([arrays["inputs"], arrays["result"][None]])
        error = np.abs(path[: table.rows + 1] - expected).max((1, 2)) / np.abs(expected).max((1, 2))
        assert error.max() < 1e-11, (facts, error)


def test_the_bins_own_nodes_make_the_trapezoid_rule_the_authors():
    """Their integrals, written again: cumulative sums over the bins from the first."""
    found, i, j = curves(40), 7, 19
    lam = found.lam[:, None]

    def cumulative(values):
        cells = 0.5 * np.diff(lam, axis=0) * (values[1:] + values[:-1])
        return np.concatenate([np.zeros((1, 4)), np.cumsum(cells, 0)])

    L, S = cumulative(found.l), cumulative(found.s)
    B, I = cumulative(np.exp(-S) * found.b), cumulative(np.exp(L + S))  # noqa: E741
    C = cumulative(np.exp(L + S) * B)
    ours = integrals(found, found.lam[i], found.lam[j], 1, "trapezoid")
    np.testing.assert_allclose(ours.L, L[j] - L[i], rtol=1e-12)
    np.testing.assert_allclose(ours.B, np.exp(S[i]) * (B[j] - B[i]), rtol=1e-11)
    scale = np.exp(-L[i] - S[i])
    np.testing.assert_allclose(ours.E[0], scale * (I[j] - I[i]), rtol=1e-12)
    expected = np.exp(-L[i]) * (C[j] - C[i] - B[i] * (I[j] - I[i]))
    np.testing.assert_allclose(ours.C, expected, rtol=1e-10)


def test_gauss_is_exact_where_the_trapezoid_converges():
    """On twice the bins of the same polygon the trapezoid's error falls by four."""
    coarse = curves(20)

    def refined(times):
        lam = np.linspace(coarse.lam[0], coarse.lam[-1], 20 * times + 1)
        polygons = (
            np.stack([np.interp(lam, coarse.lam, column) for column in values.T], -1)
            for values in (coarse.l, coarse.s, coarse.b)
        )
        return ModelStatistics(lam, *polygons)

    span = float(coarse.lam[3]) + 0.1, float(coarse.lam[9]) - 0.07
    exact = integrals(coarse, *span, 3, "gauss")
    again = integrals(refined(2), *span, 3, "gauss")
    errors = []
    for times in (8, 16):
        found = integrals(refined(times), *span, 3, "trapezoid")
        errors.append([
            np.abs(a - b).max()
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact))
        ])  # fmt: skip
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(exact)):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    ratios = np.array(errors[0])[2:] / np.array(errors[1])[2:]  # L and S are exact at once
    np.testing.assert_allclose(ratios, 4.0, rtol=0.1)


# --- degenerate statistics ------------------------------------------------------------------------


@pytest.mark.parametrize("statistics, builder", [
    ((1.0, 0.0, 0.0), jd.solvers.dpm_solver_pp_multistep),
    ((0.0, -1.0, 0.0), jd.solvers.dpm_solver_multistep),
])  # fmt: skip
@pytest.mark.parametrize("grid", ["vp", "edm", "backward"])
def test_constants_give_the_multistep_methods(x64, statistics, builder, grid):
    grid = {
        "vp": jd.grids.uniform(PROCESS, 7),
        "edm": jd.grids.karras(jd.processes.edm(sigma_min=0.02, sigma_max=20.0), 6),
        "backward": jd.grids.half_log_snr(PROCESS, 8).reversed(),
    }[grid]
    orders = (1, 2, 3)
    ours = [dpm_solver_v3(grid, statistics, order, **PLAIN) for order in orders]
    theirs = [builder(grid, order, "heun", lower_order_final=False) for order in orders]
    x = float(np.hypot(grid.alpha[0], grid.sigma[0])) * np.random.default_rng(0).normal(size=(5, 2))
    ends = run_all(mixture(prediction="v"), [*ours, *theirs], x)
    for order, a, b in zip(orders, ends[:3], ends[3:]):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11, err_msg=str(order))


def test_a_corrector_over_constants_is_adams_moulton(x64):
    grid = jd.grids.half_log_snr(PROCESS, 7)
    ours = dpm_solver_v3(grid, (1.0, 0.0, 0.0), 3, lower_order_final=False)
    predictor = jd.solvers.exponential_adams(grid, 3, "x0")
    theirs = jd.solvers.corrected(predictor, grid, [0, 2, 3, 3, 3, 3, 3], "x0")
    x = np.random.default_rng(1).normal(size=(5, 2))
    a, b = (jd.sample(mixture(), table, x, save="nodes") for table in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_a_step_to_sigma_zero_is_the_denoised_state(x64):
    statistics = curves(9, dim=2)
    grid, longer = (jd.grids.half_log_snr(PROCESS, n, end=e) for n, e in ((4, "t_min"), (5, "zero")))
    np.testing.assert_allclose(longer.lam[:-1], grid.lam)
    x = np.random.default_rng(5).normal(size=(3, 2))
    tables = (dpm_solver_v3(g, statistics, 2, lower_order_final=False) for g in (grid, longer))
    short, long = (jd.sample(mixture(prediction="v"), table, x, save="nodes") for table in tables)
    np.testing.assert_allclose(long[:4], short[:4], rtol=1e-10)
    # The longer one also corrects node 4, which in the other is the last.
    alpha, sigma = grid.alpha[-1], grid.sigma[-1]
    predicted = jd.sample(
        mixture(prediction="v"), dpm_solver_v3(longer, statistics, 2, lower_order_final=False), x,
        save="trajectory",
    )[4]  # fmt: skip
    np.testing.assert_allclose(predicted, short[4], rtol=1e-10)
    eps = BROAD.eps(np.asarray(predicted), alpha, sigma)
    l_end = statistics.l[-1]
    f = (sigma * eps - l_end * predicted) / alpha
    np.testing.assert_allclose(long[5], (1.0 - l_end) * long[4] / alpha - f, rtol=1e-9)


# --- what they are worth --------------------------------------------------------------------------


@pytest.mark.parametrize("data", [BROAD, WIDE], ids=["broad", "wide"])
def test_statistics_of_1000_points_beat_both_predictions(x64, data):
    """120 bins, exact diagonals; RMSE to the exact flow at 6, 8 and 10 evaluations. At order 3
    uncorrected the noise prediction has up to half their error from 8 evaluations on."""
    bins, model = jd.grids.half_log_snr(PROCESS, 120), mixture(data)
    dim = data.means.shape[1]
    x0, _ = model.params.sample(jax.random.key(3), (1000,))
    found = estimate_statistics(model, bins, [noised_states(bins, x0, jax.random.key(1))])
    x = np.random.default_rng(0).normal(size=(64, dim))
    exact = data.flow(x, *((bins.alpha[i], bins.sigma[i]) for i in (0, -1)))
    cases = [(n, o, c) for n in (6, 8, 10) for o in (1, 2, 3) for c in ("none", "same")]
    tables = [
        dpm_solver_v3(jd.grids.half_log_snr(PROCESS, n), statistics, order, corrector=corrector)
        for n, order, corrector in cases
        for statistics in (found, (1.0, 0.0, 0.0), (0.0, -1.0, 0.0))
    ]
    ends = np.reshape(run_all(model, tables, x), (len(cases), 3, *x.shape))
    error = np.sqrt(np.mean((ends - exact) ** 2, (2, 3)))
    for case, (own, *others) in zip(cases, error):
        slack = 2.0 if case[0] > 6 and case[1:] == (3, "none") else 1.0
        assert own <= slack * min(others), (case, own, others)


# --- tables with the state's shape ----------------------------------------------------------------


def test_a_stack_with_plain_tables_and_a_traced_grid(x64):
    statistics, model = curves(4, dim=2), mixture(prediction="eps")
    grid = jd.grids.half_log_snr(PROCESS, 3)
    x = np.random.default_rng(2).normal(size=(4, 2))
    tables = [dpm_solver_v3(grid, statistics), jd.solvers.ddim(grid), dpm_solver_v3(grid, (1, 0, 0))]
    alone = [jd.sample(model, table, x) for table in tables]
    stacked = jax.vmap(lambda table: jd.sample(model, table, x))(jd.solvers.stack(tables))
    np.testing.assert_allclose(stacked, np.stack(alone), rtol=1e-10, atol=1e-12)

    @jax.jit
    def end(alpha, sigma, statistics):
        traced = jd.grids.from_arrays(grid.t, alpha, sigma)
        return jd.sample(model, dpm_solver_v3(traced, statistics), x)

    np.testing.assert_allclose(end(grid.alpha, grid.sigma, statistics), alone[0], rtol=1e-9)

    def loss(b):
        return jnp.sum(end(grid.alpha, grid.sigma, ModelStatistics(*_parts(statistics)[:3], b)))

    slope, step = jax.grad(loss)(statistics.b), 1e-5
    nudge = np.zeros_like(statistics.b)
    nudge[2, 1] = step
    fitted = (loss(statistics.b + nudge) - loss(statistics.b - nudge)) / (2.0 * step)
    np.testing.assert_allclose(slope[2, 1], fitted, rtol=1e-6)


def _parts(statistics):
    return [getattr(statistics, name) for name in ("lam", "l", "s", "b")]


def test_statistics_a_channel_are_those_of_all_its_pixels():
    """Also in float32, on images."""
    channel = curves(8, dim=3)
    pixels = ModelStatistics(
        channel.lam, *(np.tile(a[:, None, None], (1, 2, 2, 1)) for a in _parts(channel)[1:])
    )
    grid = jd.grids.half_log_snr(PROCESS, 4)
    model = jd.Denoiser(_smooth, "v")
    x = np.random.default_rng(3).normal(size=(5, 2, 2, 3)).astype(np.float32)
    wide, full = (jd.sample(model, dpm_solver_v3(grid, s), x) for s in (channel, pixels))
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, full, rtol=1e-5, atol=1e-5)
    one = ModelStatistics(channel.lam, *(a[:, 0] for a in _parts(channel)[1:]))
    single = jd.sample(model, dpm_solver_v3(grid, one), x)
    np.testing.assert_allclose(single[..., 0], wide[..., 0], rtol=1e-5, atol=1e-5)


def _smooth(x, t):
    return jnp.sin(x) * jnp.cos(t)


# --- files and bad input --------------------------------------------------------------------------


def test_a_file_holds_them(tmp_path):
    statistics, grid = curves(6), jd.grids.half_log_snr(PROCESS, 4)
    path = tmp_path / "statistics.npz"
    statistics.save(path)
    for a, b in zip(_parts(ModelStatistics.load(path)), _parts(statistics)):
        np.testing.assert_array_equal(a, b)
    named = jd.solvers.build("dpm_solver_v3", grid, statistics=str(path), order=2)
    jax.tree.map(np.testing.assert_array_equal, named, dpm_solver_v3(grid, statistics, 2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", lam=np.arange(3.0))
    for name, message in (("none.npz", "no file"), ("text.npz", "no file"), ("other.npz", "no file")):
        with pytest.raises(ValueError, match=message):
            dpm_solver_v3(grid, str(tmp_path / name))
    with pytest.raises(ValueError, match=".npz"):
        statistics.save(tmp_path / "statistics.json")


GOOD = curves(6)
BAD = {
    "cover half-log-SNRs": dict(statistics=ModelStatistics(*(a[2:] for a in _parts(GOOD)))),
    "must increase": dict(statistics=ModelStatistics(GOOD.lam[::-1], *_parts(GOOD)[1:])),
    "one shape": dict(statistics=ModelStatistics(GOOD.lam, GOOD.l, GOOD.s[:, 0], GOOD.b)),
    "finite": dict(statistics=ModelStatistics(GOOD.lam, GOOD.l, GOOD.s, np.full_like(GOOD.b, np.inf))),
    "order must be": dict(order=4),
    "corrector must be": dict(corrector="more"),
    "quadrature must be": dict(quadrature="simpson"),
    "have no bins": dict(statistics=(1.0, 0.0, 0.0), quadrature="trapezoid"),
    "needs a corrector": dict(corrector="none", correct_above=0.5),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message):
    options = {"statistics": GOOD, **BAD[message]}
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message):
        dpm_solver_v3(jd.grids.half_log_snr(PROCESS, 4), **options)


def test_bad_statistics():
    grid = jd.grids.half_log_snr(PROCESS, 4)
    for given in ((1.0, 0.0), ("1", 0.0, 0.0), None, {"l": 1.0}):
        with pytest.raises(TypeError, match="three numbers"):
            dpm_solver_v3(grid, given)
    with pytest.raises(ValueError, match="alpha = 0"):
        dpm_solver_v3(jd.grids.uniform(jd.processes.flow(), 4), GOOD)
