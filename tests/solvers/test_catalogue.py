"""Properties of every solver of the catalogue, from the catalogue."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import DETERMINISTIC, SETTINGS, build, run_all
from oracles import BROAD

import jaxdiff as jd
from jaxdiff.settings import GRIDS
from jaxdiff.solvers.catalogue import ALIASES

PROCESS = jd.processes.vp_linear()
FLOW = jd.processes.flow()


def mixture(prediction="x0", process=PROCESS):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, process, prediction)


def integrand(name):
    entry, setting = SETTINGS[name]
    return entry.integrand_of(setting)


def start(rng, count, grid):
    return BROAD.sample(rng, count, grid.alpha[0], grid.sigma[0])


@functools.cache
def short_runs():
    """Every solver with 1, 2, 3 and 5 steps, to sigma > 0 and to sigma = 0: {case: (table, x)}."""
    with jax.enable_x64(True):
        cases = {}
        for end in ("t_min", "zero"):
            for steps in (1, 2, 3, 5):
                grid = jd.grids.half_log_snr(PROCESS, steps, end=end)
                for name in SETTINGS:
                    cases[name, steps, end] = build(name, grid)
        x = jnp.asarray(start(np.random.default_rng(0), 4, jd.grids.uniform(PROCESS, 1)))
        out = run_all(mixture(), list(cases.values()), x, key=jax.random.key(0))
        return x, dict(zip(cases, zip(cases.values(), out)))


@pytest.mark.parametrize("end", ["t_min", "zero"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_to_three_steps_end_at_data(steps, end):
    """Finite, and where the data are: within 4.5 of the mean, whose spread is about 1.1.

    Methods that integrate eps, flow or v, and noisy ones, are only finite: a first step from rho =
    152 to 2 extrapolates a prediction that has nothing to do with what follows.
    """
    _, runs = short_runs()
    for name, (_, setting) in SETTINGS.items():
        _, x = runs[name, steps, end]
        assert np.all(np.isfinite(x)), name
        stable = setting.options.get("variable") != "kappa"  # alpha / sigma extrapolates far
        if integrand(name) == "x0" and setting.deterministic and stable:
            assert np.abs(x).max() < 4.5, name


def one_of_each_kind():
    """One setting for each kind of table; which is what padding in a stack depends on."""
    grid = jd.grids.half_log_snr(PROCESS, 3)
    kinds = {}
    for name in SETTINGS:
        t = build(name, grid)
        kind = (t.rows > 3, t.registers, t.history > 1, t.outputs, t.C is None, t.start.C is None)
        kinds.setdefault((*kind, t.d is None), name)
    return list(kinds.values())


@pytest.mark.parametrize("name", one_of_each_kind())
def test_stacked_is_looped(x64, name):
    x, runs = short_runs()
    tableau, stacked = runs[name, 3, "t_min"]
    looped = jd.sample(mixture(), tableau, x, jax.random.key(0))
    np.testing.assert_allclose(stacked, looped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_nfe_is_the_number_of_evaluations(name):
    """As the entry states: per step, one less in a two-evaluation step to sigma = 0."""
    entry, setting = SETTINGS[name]
    grid = jd.grids.half_log_snr(PROCESS, 20)
    each, extra = entry.nfe_per_step_of(setting), setting.extra
    tableau = build(name, grid)
    assert tableau.nfe == 20 * each + extra == tableau.rows
    final = build(name, jd.grids.half_log_snr(PROCESS, 20, end="zero"))
    # EDICT's last step has two as well, for its pair.
    last = 1 if setting.options.get("lower_order_final") or entry.name == "edict" else each
    assert final.nfe == 20 * each + extra - (last - 1)
    both = jd.solvers.stack([tableau, final])
    np.testing.assert_array_equal(both.nfe, [tableau.nfe, final.nfe])


def test_one_step_to_sigma_zero_is_the_denoised_state():
    """With one step to sigma = 0 every method is x0(x_T): the limit, in closed form.

    But for those that add noise before they evaluate, for v, whose first-order step is not DDIM, and
    EDICT, which mixes in its second state.
    """
    x, runs = short_runs()
    grid = jd.grids.uniform(PROCESS, 1)
    alpha, sigma = grid.alpha[0], grid.sigma[0]
    x = np.asarray(x)
    expected = (x + sigma**2 * BROAD.score(x, alpha, sigma)) / alpha
    compared = 0
    for name in SETTINGS:
        table, got = runs[name, 1, "zero"]
        mixed = SETTINGS[name][0].name == "edict"
        if table.start.C is None and integrand(name) != "v" and not mixed:
            np.testing.assert_allclose(got, expected, rtol=1e-9, err_msg=name)
            compared += 1
    assert compared > 0.9 * len(SETTINGS)


def test_pure_noise_is_supported_or_refused():
    """From alpha = 0, where x_T says nothing: one step is the mean of the data, 40 its spread."""
    supported = []
    for name, (entry, setting) in SETTINGS.items():
        if entry.ends_of(setting)[0]:
            supported.append(name)
        else:
            with pytest.raises(ValueError, match="alpha = 0"):
                build(name, jd.grids.uniform(FLOW, 4))
    x = np.random.default_rng(2).normal(size=(2000, 2))
    mean, cov = BROAD.moments()

    def run(steps, count):
        tables = [build(name, jd.grids.uniform(FLOW, steps)) for name in supported]
        # The same for every solver: drawn here once.
        draws = max(table.draws for table in tables)
        noise = np.random.default_rng(3).normal(size=(draws, count, 2))
        return run_all(mixture(process=FLOW), tables, x[:count], noise=noise)

    with jax.enable_x64(True):
        many, one = run(40, 2000), run(1, 4)
    for name, samples, single in zip(supported, many, one):
        # Consistency samplers end at the data only with a consistency model.
        if SETTINGS[name][0].family != "consistency":
            np.testing.assert_allclose(np.mean(samples, 0), mean, atol=0.12, err_msg=name)
            np.testing.assert_allclose(np.cov(samples.T), cov, atol=0.2, err_msg=name)
        if integrand(name) != "v":
            np.testing.assert_allclose(single, np.tile(mean, (4, 1)), atol=1e-12, err_msg=name)


def test_an_eps_network_at_pure_noise_is_named():
    grid = jd.grids.uniform(FLOW, 4)
    with pytest.raises(ValueError, match="alpha = 0.*'eps' network.*v, x0 or flow"):
        jd.sample(mixture("eps"), jd.solvers.ddim(grid), jnp.zeros((2, 2)))


# Bi-directional methods may amplify rounding: BDIA with gamma < 1 in every step, O-BELM where steps
# grow in its clock, EDICT where its two states part (tests/solvers/test_bdia.py, _belm, _edict).
AMPLIFYING = ("belm_flow", "belm_v", "edict", "edict_in_turn")
ROUNDED = [
    name for name in DETERMINISTIC
    if SETTINGS[name][1].options.get("gamma", 1.0) == 1.0 and name not in AMPLIFYING
]  # fmt: skip


@pytest.mark.parametrize("spacing", ["half_log_snr", "karras", "uniform", "quadratic"])
def test_float32_is_close_to_float64(spacing):
    """To 1e-4 at the 99th percentile, 10 and 50 steps, every deterministic solver."""
    few, many = (getattr(jd.grids, spacing)(PROCESS, steps) for steps in (10, 50))
    x = start(np.random.default_rng(3), 100, few)  # the grids begin at one noise level
    cases = [(name, grid) for grid in (few, many) for name in ROUNDED]
    tables, results = [build(*case) for case in cases], {}
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            ends = run_all(mixture(), tables, jnp.asarray(x, dtype))
            results[dtype] = np.asarray(ends, np.float64)
    error = np.abs(results[np.float32] - results[np.float64]).max(-1)
    worst = np.quantile(error, 0.99, axis=1)
    assert worst.max() < 1e-4, {(n, g.steps): w for (n, g), w in zip(cases, worst) if w >= 1e-4}


def test_a_solver_encodes_and_decodes(x64):
    """A reversed grid runs from data to noise: at 400 steps back and forth meet to 1e-3."""
    grid = jd.grids.half_log_snr(PROCESS, 400)
    x = start(np.random.default_rng(4), 16, grid)
    for name in ("ddim", "heun", "dpm_solver_pp_2m", "unipc_2"):
        forth = jd.sample(mixture(), build(name, grid), x)
        back = jd.sample(mixture(), build(name, grid.reversed()), forth)
        order = SETTINGS[name][1].order
        assert np.median(np.abs(back - x)) < (2e-2 if order == 1 else 1e-3), name


# --- by name -------------------------------------------------------------------------------------


def test_every_name_builds_and_a_wrong_one_names_the_nearest():
    grid = jd.grids.half_log_snr(PROCESS, 4)
    for name in jd.solvers.names():
        assert jd.solvers.build(name, grid).nfe >= 4
    with pytest.raises(ValueError, match="unknown solver 'unipcc'; did you mean unipc"):
        jd.solvers.build("unipcc", grid)
    with pytest.raises(ValueError, match="no option 'etta'.*eta"):
        jd.solvers.build("ddim", grid, etta=1.0)


def test_names_are_unique():
    every = [n for e in jd.solvers.CATALOGUE.values() for n in {e.name, *e.settings}]
    assert len(every) == len(set(every))
    assert {alias.setting for alias in ALIASES.values()} <= set(every)
    assert not set(ALIASES) & set(every)
    grid_names = {alias.grid for alias in ALIASES.values()} - {None}
    assert grid_names <= set(GRIDS)
    assert jd.solvers.own_grid("DPM++ 2M Karras") == ("karras", {"rho": 7.0})
    assert jd.solvers.own_grid("DPM++ 2M") is None


def test_every_entry_can_be_cited():
    for name in jd.solvers.CATALOGUE:
        assert jd.solvers.citation(name).startswith("@article{")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"eta": -1.0}, "eta must not be negative, got -1.0"),
        ("ddim", {"outputs": 3}, "outputs must be 1 or 2"),
        ("ddim", {"eta": 3.0}, "more noise than sigma"),
        ("ddpm", {"variance": "big"}, "variance must be 'fixed_small' or 'fixed_large'"),
        ("dpm_solver_pp_multistep", {"order": 4}, "order must be an integer from 1 to 3, got 4"),
        ("dpm_solver_pp_multistep", {"start": "rampp"}, "start must be one of"),
        ("dpm_solver_pp_multistep", {"order": True}, "order must be an integer from 1 to 3, got True"),
        ("unipc", {"order": 0}, "order must be an integer from 1 to 6, got 0"),
        ("unipc", {"order": 2.0}, "order must be an integer from 1 to 6, got 2.0"),
        ("ddim", {"outputs": True}, "outputs must be 1 or 2, got True"),
        ("unipc", {"variant": "bh3"}, "variant must be one of .*'bh1', 'bh2', 'vary_coeff'"),
        ("unipc", {"corrector": [True]}, "corrector must be one flag or 4, got 1"),
        ("heun", {"s_churn": -1.0}, "s_churn=-1.0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        jd.solvers.build(name, jd.grids.half_log_snr(PROCESS, 4), **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"eta": None}, "eta must be a number or an array, got None"),
        ("ddim", {"eta": True}, "eta must be a number or an array, got True"),
        ("unipc", {"corrector": None}, "corrector must be one flag or a sequence of 4, got None"),
        ("euler", {"s_churn": None}, "s_churn must be a number known on the host, got None"),
    ],
)
def test_options_of_a_wrong_type_are_named(name, options, message):
    with pytest.raises(TypeError, match=message):
        jd.solvers.build(name, jd.grids.half_log_snr(PROCESS, 4), **options)


def test_numbers_in_jax_arrays_build_on_the_host():
    """A concrete eta, or a grid of concrete JAX arrays, makes the float64 table of its numbers."""
    grid = jd.grids.half_log_snr(PROCESS, 4)
    table = jd.solvers.ddim(grid, jnp.float32(0.5))
    assert isinstance(table.A, np.ndarray)
    np.testing.assert_array_equal(table.C, jd.solvers.ddim(grid, 0.5).C)


def test_noise_does_not_run_backward():
    grid = jd.grids.half_log_snr(PROCESS, 4).reversed()
    for name in ("ddim_eta1", "ddpm", "euler_churn"):
        with pytest.raises(ValueError, match="noise to data|eta = 0"):
            build(name, grid)
