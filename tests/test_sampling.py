"""sample(): noise, keys, precision, pytrees, transformations, and what stochastic solvers sample."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import run_all
from oracles import BROAD, fitted_order

import jaxdiff as jd

PROCESS = jd.processes.vp_linear()
STOCHASTIC = {
    name: (entry, setting)
    for entry in jd.solvers.CATALOGUE.values()
    for name, setting in entry.settings.items()
    if not setting.deterministic
}


def mixture(**kwargs):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS, **kwargs)


def build(name, grid):
    entry, setting = STOCHASTIC[name]
    return entry.build(grid, **setting.options)


# --- noise and keys ------------------------------------------------------------------------------


def one_of_each_kind():
    """One noisy setting for each kind of table: the keys' handling knows no more of it."""
    grid = jd.grids.half_log_snr(PROCESS, 5, end="zero")
    kinds = {}
    for name in STOCHASTIC:
        t = build(name, grid)
        kind = t.registers > 1, t.history > 1, t.rows > t.draws, t.C is None, t.start.C is None
        kinds.setdefault(kind, name)
    return list(kinds.values())


@pytest.mark.parametrize("name", one_of_each_kind())
def test_a_sample_does_not_depend_on_its_batch(name):
    """8 batches of 1 equal 1 batch of 8, with the same per-sample keys: the noise bit for bit."""
    grid = jd.grids.half_log_snr(PROCESS, 6)
    keys = jd.sample_keys(jax.random.key(3), jnp.arange(8))
    x = PROCESS.prior(keys, (8, 2))
    tableau, run = build(name, grid), functools.partial(jd.sample, mixture())
    whole = run(tableau, x, keys)
    ones = jnp.concatenate([run(tableau, x[i : i + 1], keys[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(whole, ones, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(whole).max()))
    np.testing.assert_array_equal(run(tableau, x, jax.random.key(3)), whole)

    # The noise itself: rows that return it, without arithmetic that may round differently.
    noise_only = dataclasses.replace(tableau, A=0 * tableau.A, B=0 * tableau.B, C=0 * tableau.C + 1)
    traces = run(noise_only, x, keys, save="trajectory")
    each = [run(noise_only, x[i : i + 1], keys[i : i + 1], save="trajectory") for i in range(8)]
    np.testing.assert_array_equal(traces[1:], jnp.concatenate(each, 1)[1:])
    assert np.unique(np.asarray(traces[1])).size == 16


@pytest.mark.parametrize("name", one_of_each_kind())
def test_noise_may_be_given(name):
    """The draws a key makes, passed as an array, give the same samples."""
    grid = jd.grids.half_log_snr(PROCESS, 5, end="zero")
    tableau, x = build(name, grid), PROCESS.prior(jax.random.key(0), (4, 2))
    keys = jd.sample_keys(jax.random.key(1), jnp.arange(4))
    draws = [
        jax.vmap(lambda k, d=d: jax.random.normal(jax.random.fold_in(k, d), (2,)))(keys)
        for d in range(tableau.draws)
    ]
    given = jd.sample(mixture(), tableau, x, noise=jnp.stack(draws))
    drawn = jd.sample(mixture(), tableau, x, keys)
    np.testing.assert_allclose(given, drawn, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(drawn).max()))
    with pytest.raises(ValueError, match="noise must have shape"):
        jd.sample(mixture(), tableau, x, noise=jnp.zeros((tableau.draws + 1, 4, 2)))
    with pytest.raises(ValueError, match="stochastic: pass key= or noise="):
        jd.sample(mixture(), tableau, x)


def test_every_row_uses_a_draw_that_exists():
    for end in ("t_min", "zero"):
        for name in STOCHASTIC:
            table = build(name, jd.grids.half_log_snr(PROCESS, 5, end=end))
            assert table.draw.max() < table.draws, name
            noisy = np.zeros(table.rows, bool)
            if table.C is not None:
                noisy = np.any(np.asarray(table.C).reshape(table.rows, -1) != 0, 1)
            used = set(table.draw[noisy].tolist()) | ({0} if table.start.C is not None else set())
            assert used == set(range(table.draws)), name


def test_draws_count_rows_that_use_them():
    grid = jd.grids.half_log_snr(PROCESS, 5, end="zero")
    assert jd.solvers.ddpm(grid).draws == 4  # none in the step to sigma = 0
    assert jd.solvers.ddim(grid).draws == 0
    assert jd.solvers.heun(grid, s_churn=10.0).draws == 5
    assert jd.solvers.heun(grid, s_churn=10.0, s_max=20.0).draws < 5


# --- what stochastic solvers sample --------------------------------------------------------------


def test_stochastic_samplers_have_the_marginals_moments(x64):
    """Mean and covariance of the data's marginal at t_min, from 2,500 samples and 150 steps.

    Tolerances: 4 standard errors of the mean (0.09) and of the covariance (0.13), plus the bias of
    150 first-order steps. The variance alone is checked exactly in solvers/test_order.py.
    """
    grid = jd.grids.half_log_snr(PROCESS, 150, t_min=1e-2)
    rng = np.random.default_rng(0)
    x = BROAD.sample(rng, 2500, grid.alpha[0], grid.sigma[0])
    # Consistency samplers end at the data only with a consistency model.
    names = [name for name, (entry, _) in STOCHASTIC.items() if entry.family != "consistency"]
    tables = [build(name, grid) for name in names]
    mean, cov = BROAD.moments(grid.alpha[-1], grid.sigma[-1])
    # Every solver draws the same noise: drawn here once.
    noise = rng.normal(size=(max(table.draws for table in tables), *x.shape))
    for name, got in zip(names, run_all(mixture(), tables, x, noise=noise)):
        np.testing.assert_allclose(got.mean(0), mean, atol=0.1, err_msg=name)
        np.testing.assert_allclose(np.cov(got.T), cov, atol=0.15, err_msg=name)


def test_ancestral_steps_are_exact_for_a_point_mass(x64):
    """With all data at one point, x0 is known, and any number of DDPM steps keeps the marginal."""
    point = jd.gaussian_mixture(np.array([[0.7, -0.3]]), np.zeros(1), np.ones(1), PROCESS)
    grid = jd.grids.half_log_snr(PROCESS, 3, t_min=0.3)
    rng = np.random.default_rng(1)
    x = grid.alpha[0] * np.array([0.7, -0.3]) + grid.sigma[0] * rng.normal(size=(20000, 2))
    for tableau in (jd.solvers.ddpm(grid), jd.solvers.ddim(grid, eta=0.5)):
        got = np.asarray(jd.sample(point, tableau, x, jax.random.key(2)))
        np.testing.assert_allclose(got.mean(0), grid.alpha[-1] * np.array([0.7, -0.3]), atol=0.03)
        np.testing.assert_allclose(np.cov(got.T), grid.sigma[-1] ** 2 * np.eye(2), atol=0.03)


@pytest.mark.parametrize("name", ["ddpm"])
def test_strong_order_on_one_brownian_path(x64, name):
    """Step counts share the path: errors against 320 steps fall with order 1 (additive noise)."""
    path = jd.BrownianPath(PROCESS, "x0", jax.random.key(4))
    x = jnp.asarray(BROAD.sample(np.random.default_rng(2), 32, PROCESS.alpha(1.0), PROCESS.sigma(1.0)))
    ends = {
        n: np.asarray(
            jd.sample(mixture(), build(name, jd.grids.half_log_snr(PROCESS, n, t_min=0.05)), x,
                      noise=path)
        )
        for n in (20, 40, 80, 320)
    }  # fmt: skip
    errors = [np.sqrt(np.mean((ends[n] - ends[320]) ** 2)) for n in (20, 40, 80)]
    assert fitted_order([20, 40, 80], errors) >= 0.75
    # Other draws of the noise are not close: the path is what makes the runs comparable.
    other = jd.sample(
        mixture(), build(name, jd.grids.half_log_snr(PROCESS, 80, t_min=0.05)), x, jax.random.key(9)
    )
    assert np.sqrt(np.mean((np.asarray(other) - ends[320]) ** 2)) > 5 * errors[-1]


def test_a_brownian_path_is_one_form_and_fine_enough():
    grid = jd.grids.half_log_snr(PROCESS, 5)
    x, run = jnp.zeros((2, 2)), functools.partial(jd.sample, mixture())
    with pytest.raises(ValueError, match="belongs to x0, the path is 'eps'"):
        run(jd.solvers.ddpm(grid), x, noise=jd.BrownianPath(PROCESS, "eps", jax.random.key(0)))
    with pytest.raises(ValueError, match="no Brownian path"):
        tableau = jd.solvers.euler(grid, s_churn=5.0)
        run(tableau, x, noise=jd.BrownianPath(PROCESS, "x0", jax.random.key(0)))
    coarse = jd.BrownianPath(PROCESS, "x0", jax.random.key(0), tolerance=0.99)
    with pytest.raises(ValueError, match="smallest increment .* tolerance 0.99"):
        run(jd.solvers.ddpm(grid), x, noise=coarse)


# --- precision and structure ---------------------------------------------------------------------


def half_precision(params, x, t):
    return jnp.tanh(x.astype(jnp.bfloat16) * params)


def test_a_bfloat16_network_keeps_a_float32_state():
    grid = jd.grids.half_log_snr(PROCESS, 8)
    denoiser = jd.Denoiser(half_precision, "eps", jnp.bfloat16(0.8))
    x = PROCESS.prior(jax.random.key(0), (16, 2))
    got = jd.sample(denoiser, jd.solvers.unipc(grid), x)
    assert got.dtype == jnp.float32
    rounded = jd.Denoiser(
        lambda x, t: half_precision(jnp.bfloat16(0.8), x, t).astype(jnp.float32), "eps"
    )
    np.testing.assert_array_equal(got, jd.sample(rounded, jd.solvers.unipc(grid), x))
    promoted = jd.sample(denoiser, jd.solvers.unipc(grid), x.astype(jnp.bfloat16))
    assert promoted.dtype == jnp.float32


def leafwise(x, t):
    return {"a": 0.3 * x["a"] + t, "b": (jnp.sin(x["b"][0]),)}


@pytest.mark.parametrize("name", ["ddpm", "heun_churn"])
def test_a_pytree_is_sampled_leaf_by_leaf(x64, name):
    grid = jd.grids.half_log_snr(PROCESS, 4)
    rng = np.random.default_rng(5)
    x = {"a": rng.normal(size=(3, 2)), "b": (rng.normal(size=(3, 4, 1)),)}
    tableau = build(name, grid)
    noise = jax.tree.map(lambda a: rng.normal(size=(tableau.draws, *a.shape)), x)
    whole = jd.sample(jd.Denoiser(leafwise), tableau, x, noise=noise)
    a = jd.sample(jd.Denoiser(lambda x, t: 0.3 * x + t), tableau, x["a"], noise=noise["a"])
    b = jd.sample(jd.Denoiser(lambda x, t: jnp.sin(x)), tableau, x["b"][0], noise=noise["b"][0])
    np.testing.assert_allclose(whole["a"], a, rtol=1e-12)
    np.testing.assert_allclose(whole["b"][0], b, rtol=1e-12)
    keyed = jd.sample(jd.Denoiser(leafwise), tableau, x, jax.random.key(0))
    assert np.corrcoef(keyed["a"].ravel(), keyed["b"][0].ravel()[:6])[0, 1] < 0.99


# --- transformations -----------------------------------------------------------------------------


def test_jit_is_eager(x64):
    grid = jd.grids.half_log_snr(PROCESS, 5)
    tableau, x = jd.solvers.ddpm(grid), PROCESS.prior(jax.random.key(0), (4, 2), jnp.float64)
    eager = jd.sample(mixture(), tableau, x, jax.random.key(1))
    jitted = jax.jit(jd.sample, static_argnames="save")(mixture(), tableau, x, jax.random.key(1))
    np.testing.assert_allclose(jitted, eager, rtol=1e-12)
    inside = jax.jit(lambda x: jd.sample(mixture(), jd.solvers.ddpm(grid), x, jax.random.key(1)))
    np.testing.assert_allclose(inside(x), eager, rtol=1e-12)


@pytest.mark.parametrize("name", ["heun", "dpm_solver_pp_3m", "unipc"])
def test_the_gradient_reaches_the_grids_nodes(x64, name):
    """A builder run on traced times is the builder run on numbers, and so is its gradient."""
    times = np.array([1.0, 0.7, 0.45, 0.2, 0.05])
    x = PROCESS.prior(jax.random.key(0), (4, 2), jnp.float64)

    def end(t):
        tableau = jd.solvers.build(name, jd.grids.from_times(PROCESS, t))
        return jnp.sum(jd.sample(mixture(), tableau, x) ** 2)

    np.testing.assert_allclose(jax.jit(end)(jnp.asarray(times)), end(times), rtol=1e-10)
    gradient, h = jax.grad(end)(jnp.asarray(times)), 1e-6
    for i in range(1, 4):
        e = h * (np.arange(5) == i)
        slope = (end(times + e) - end(times - e)) / (2 * h)
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["dpm_solver_pp_2m", "unipc", "ddpm"])
def test_the_gradient_is_finite_where_the_grid_has_ends(x64, name):
    """From alpha = 0 to sigma = 0 with traced times."""
    flow = jd.processes.flow()
    x = jax.random.normal(jax.random.key(0), (4, 2))

    def end(inner):
        times = jnp.concatenate([jnp.ones(1), inner, jnp.zeros(1)])
        tableau = jd.solvers.build(name, jd.grids.from_times(flow, times, ends=(True, True)))
        return jnp.sum(jd.sample(mixture(), tableau, x, jax.random.key(1)) ** 2)

    inner = jnp.array([0.8, 0.5, 0.2])
    gradient, h = jax.grad(end)(inner), 1e-6
    for i in range(3):
        e = h * (np.arange(3) == i)
        slope = (end(inner + e) - end(inner - e)) / (2 * h)
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("end", ["t_min", "zero"])
def test_the_gradient_reaches_eta(x64, end):
    grid = jd.grids.half_log_snr(PROCESS, 5, end=end)
    x = PROCESS.prior(jax.random.key(0), (4, 2), jnp.float64)

    def end(eta):
        return jnp.sum(jd.sample(mixture(), jd.solvers.ddim(grid, eta), x, jax.random.key(1)) ** 2)

    slope = (end(0.5 + 1e-6) - end(0.5 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(end)(0.5), slope, rtol=1e-6)


# --- several tables ------------------------------------------------------------------------------


def test_concatenated_pieces_run_in_turn(x64):
    """A change of solver at a node is the two runs one after the other."""
    grid = jd.grids.half_log_snr(PROCESS, 8)
    halves = [
        jd.grids.from_times(PROCESS, grid.t[:5]), jd.grids.from_times(PROCESS, grid.t[4:])
    ]  # fmt: skip
    first = jd.solvers.dpm_solver_pp_multistep(halves[0], order=3)
    second = jd.solvers.ddpm(halves[1])
    x = PROCESS.prior(jax.random.key(0), (4, 2), jnp.float64)
    noise = np.random.default_rng(6).normal(size=(second.draws, 4, 2))
    middle = jd.sample(mixture(), first, x)
    expected = jd.sample(mixture(), second, middle, noise=noise)
    whole = jd.solvers.concatenate([first, second])
    assert (whole.nfe, whole.draws) == (8, second.draws)
    np.testing.assert_allclose(jd.sample(mixture(), whole, x, noise=noise), expected, rtol=1e-11)
    nodes = jd.sample(mixture(), whole, x, noise=noise, save="nodes")
    np.testing.assert_allclose(nodes[4], middle, rtol=1e-11)
    assert nodes.shape == (9, 4, 2)


def test_a_restart_adds_its_noise_between_the_pieces(x64):
    """Down to t = 0.2, noise back up to 0.6, down again: Restart's segment, as one table."""
    down = jd.grids.from_times(PROCESS, np.array([1.0, 0.6, 0.2]))
    again = jd.grids.from_times(PROCESS, np.array([0.6, 0.3, 0.1]))
    (_, a, s), (_, a1, s1) = down.node(2), again.node(0)
    scale, std = a1 / a, np.sqrt(s1**2 - (a1 / a * s) ** 2)
    second = jd.solvers.ddim(again)
    second = dataclasses.replace(
        second, start=jd.solvers.Start(np.array([scale]), np.array([std]))
    )
    x = PROCESS.prior(jax.random.key(0), (4, 2), jnp.float64)
    rng = np.random.default_rng(7)
    for first in (jd.solvers.ddim(down), jd.solvers.heun(down, s_churn=1.0)):
        whole = jd.solvers.concatenate([first, second])
        noise = rng.normal(size=(whole.draws, 4, 2))
        assert whole.draws == first.draws + 1
        middle = jd.sample(mixture(), first, x, noise=noise[: first.draws])
        up = scale * middle + std * noise[-1]
        expected = jd.sample(mixture(), jd.solvers.ddim(again), up)
        got = jd.sample(mixture(), whole, x, noise=noise)
        np.testing.assert_allclose(got, expected, rtol=1e-11)


def test_stacked_coefficients_with_some_of_a_samples_axes_are_those_of_its_last(x64):
    table = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 3))
    rng = np.random.default_rng(1)
    shapes = (), (3,), (2, 3), (2, 1)
    tables = [dataclasses.replace(table, d=rng.normal(size=(3, 1, *shape))) for shape in shapes]
    denoiser, x = jd.Denoiser(_half), jnp.asarray(rng.normal(size=(4, 2, 3)))
    found = jax.vmap(lambda t: jd.sample(denoiser, t, x))(jd.solvers.stack(tables))
    for got, one in zip(found, tables):
        np.testing.assert_allclose(got, jd.sample(denoiser, one, x), rtol=1e-12)
    with pytest.raises(ValueError, match=r"one shape of sample, got .*\(3,\) and \(2,\)"):
        jd.solvers.stack([tables[1], dataclasses.replace(table, d=np.zeros((3, 1, 2)))])


def _half(x, t):
    return 0.5 * x


def test_stack_and_concatenate_refuse_what_they_cannot_do():
    grid = jd.grids.half_log_snr(PROCESS, 3)
    stacked = jd.solvers.stack([jd.solvers.ddim(grid)] * 2)
    for function in (jd.solvers.stack, jd.solvers.concatenate):
        with pytest.raises(ValueError, match="at least one"):
            function([])
        with pytest.raises(TypeError, match="got Grid"):
            function([grid])
        with pytest.raises(ValueError, match="stacked already"):
            function([stacked])
    with pytest.raises(ValueError, match="under jax.vmap"):
        jd.sample(mixture(), stacked, jnp.zeros((2, 2)))


def test_save_nodes_are_the_solution_at_the_grids_nodes(x64):
    """One run's nodes are the ends of runs over the grid's first k steps, inner stages left out."""
    grid = jd.grids.half_log_snr(PROCESS, 4)
    x = PROCESS.prior(jax.random.key(0), (4, 2), jnp.float64)
    for name in ("heun", "dpm_solver_pp_3m_singlestep", "euler_churn", "heun_churn"):
        options = {"lower_order_final": False} if name.startswith("dpm") else {}
        tableau = jd.solvers.build(name, grid, **options)
        noise = jnp.asarray(np.random.default_rng(8).normal(size=(max(tableau.draws, 1), 4, 2)))
        nodes = jd.sample(mixture(), tableau, x, noise=noise[: tableau.draws] if tableau.draws else None,
                          save="nodes")  # fmt: skip
        assert nodes.shape == (5, 4, 2)
        np.testing.assert_array_equal(nodes[0], x)
        parts = []
        for k in range(1, 5):
            # Churn is s_churn / steps a step.
            if "churn" in name:
                options = {"s_churn": 10.0 * k / 4}
            part = jd.grids.from_times(PROCESS, grid.t[: k + 1])
            parts.append(jd.solvers.build(name, part, **options))
        run = functools.partial(jd.sample, mixture(), x_T=x, noise=noise)
        ends = jax.vmap(run)(tableau=jd.solvers.stack(parts))
        np.testing.assert_allclose(nodes[1:], ends, rtol=1e-10)


def test_the_first_node_is_x_T_also_in_one_churned_step_to_sigma_zero(x64):
    grid = jd.grids.uniform(PROCESS, 1, end="zero")
    x = PROCESS.prior(jax.random.key(0), (4, 2), jnp.float64)
    for solver in (jd.solvers.euler, jd.solvers.heun):
        tableau = solver(grid, s_churn=0.3)
        nodes = jd.sample(mixture(), tableau, x, jax.random.key(1), save="nodes")
        np.testing.assert_array_equal(nodes[0], x)
        np.testing.assert_array_equal(
            nodes[1], jd.sample(mixture(), tableau, x, jax.random.key(1))
        )


def test_a_progress_meter_reports(capsys):
    import diffrax

    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 5))
    out = jd.sample(
        mixture(), tableau, jnp.zeros((2, 2)), progress_meter=diffrax.TextProgressMeter()
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert "100.00%" in capsys.readouterr().out
