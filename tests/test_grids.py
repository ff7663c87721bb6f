"""Grids against the published spacings, SciPy's interpolation, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from jaxdiff import grids, processes
from jaxdiff.interpolation import pchip

pytestmark = pytest.mark.filterwarnings("error:.*:RuntimeWarning")

VP = processes.vp_linear()
EDM = processes.edm()
FLOW = processes.flow()
DDPM = processes.ddpm()
INNER_FLOW = processes.flow(t_min=0.01, t_max=0.98)
PROCESSES = {
    "vp": VP, "sub_vp": processes.sub_vp(), "cosine": processes.vp_cosine(), "ve": processes.ve(),
    "edm": EDM, "flow": INNER_FLOW, "ddpm": DDPM,
}  # fmt: skip
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
few_steps = pytest.mark.parametrize("steps", [1, 2, 3, 10])


def as_arrays(grid):
    return grids.from_arrays(grid.t, grid.alpha, grid.sigma)


def check_nodes(grid, process, t):
    """The nodes are the process at `t`, nothing else."""
    t = np.asarray(t, float)
    assert len(grid) == len(t) == grid.steps + 1
    np.testing.assert_allclose(grid.t, t, rtol=1e-12, atol=1e-13 * process.t_max)
    np.testing.assert_allclose(grid.alpha, process.alpha(grid.t), rtol=1e-14)
    np.testing.assert_allclose(grid.sigma, process.sigma(grid.t), rtol=1e-14)
    np.testing.assert_allclose(grid.lam, process.half_log_snr(grid.t), rtol=0, atol=1e-11)
    assert grid.t.dtype == grid.alpha.dtype == grid.sigma.dtype == grid.lam.dtype == np.float64


def check_zero_end(grid, process, t):
    """The nodes at `t`, then one of pure data."""
    assert len(grid) == len(t) + 1 and grid.ends == (False, True)
    last = process.t_min if process.data_time is None else process.data_time
    assert [a[-1] for a in (grid.t, grid.alpha, grid.sigma)] == [last, 1.0, 0.0]
    assert grid.lam[-1] == np.inf
    np.testing.assert_allclose(grid.t[:-1], t, rtol=1e-12, atol=1e-13 * process.t_max)
    np.testing.assert_allclose(grid.sigma[:-1], process.sigma(grid.t[:-1]), rtol=1e-14)


# --- spacings -----------------------------------------------------------------------------------


@every_process
@few_steps
@pytest.mark.parametrize("name, exponent", [("uniform", 1), ("quadratic", 2), ("power", 3)])
def test_powers_of_t(process, steps, name, exponent):
    """t_i = (t_max^(1/p) + i/n (t_min^(1/p) - t_max^(1/p)))^p."""
    options = {"exponent": exponent} if name == "power" else {}

    def nodes(n):
        u = np.arange(n + 1) / n if n else np.zeros(1)
        first, last = process.t_max ** (1 / exponent), process.t_min ** (1 / exponent)
        return (first + u * (last - first)) ** exponent

    grid = getattr(grids, name)(process, steps, **options)
    check_nodes(grid, process, nodes(steps))
    assert (grid.t[0], grid.t[-1]) == (process.t_max, process.t_min)
    assert grid.ends == (False, False) and not grid.backward
    zero = getattr(grids, name)(process, steps, end="zero", **options)
    check_zero_end(zero, process, nodes(steps - 1))


@every_process
@few_steps
def test_half_log_snr_is_uniform(process, steps):
    grid = grids.half_log_snr(process, steps)
    ends = process.half_log_snr(process.t_max), process.half_log_snr(process.t_min)
    lam = np.linspace(*ends, steps + 1)
    np.testing.assert_allclose(grid.lam, lam, rtol=0, atol=1e-11)
    check_nodes(grid, process, grid.t)
    assert (grid.t[0], grid.t[-1]) == (process.t_max, process.t_min)
    zero = grids.half_log_snr(process, steps, end="zero")
    shorter = grids.half_log_snr(process, steps - 1).t if steps > 1 else grid.t[:1]
    check_zero_end(zero, process, shorter)


@few_steps
def test_karras_is_edms_schedule(steps):
    """Equation 5: N sigmas from sigma_max to sigma_min, and then 0."""
    low, high, rho = 0.002, 80.0, 7
    i, n = np.arange(steps), max(steps - 1, 1)
    sigmas = (high ** (1 / rho) + i / n * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    check_zero_end(grids.karras(EDM, steps, end="zero"), EDM, sigmas)


@every_process
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_for_any_process(process, rho):
    """(sigma / alpha)^(1 / rho) is uniform."""
    grid = grids.karras(process, 9, rho=rho)
    root = (grid.sigma / grid.alpha) ** (1 / rho)
    np.testing.assert_allclose(root, np.linspace(root[0], root[-1], 10), rtol=1e-11, atol=0)
    check_nodes(grid, process, grid.t)
    assert (grid.t[0], grid.t[-1]) == (process.t_max, process.t_min)


def test_a_part_of_the_span():
    for spacing in (grids.uniform, grids.quadratic, grids.half_log_snr, grids.karras):
        grid = spacing(VP, 6, t_max=0.7, t_min=0.05)
        assert (grid.t[0], grid.t[-1]) == (0.7, 0.05) and len(grid) == 7
    # Within a span that has both ends, a part has none.
    assert grids.uniform(FLOW, 4).ends == (True, True)
    assert grids.uniform(FLOW, 4, t_max=0.9).ends == (False, True)
    assert grids.karras(FLOW, 4, t_max=0.9, t_min=0.1).ends == (False, False)


# diffusers' DDIMScheduler.set_timesteps (the names are Lin et al. 2024, table 2)
DIFFUSERS = {
    "linspace": lambda n, total: np.linspace(0, total - 1, n).round()[::-1],
    "leading": lambda n, total: (np.arange(n) * (total // n)).round()[::-1],
    # Its arange may give one timestep too many, -1, by rounding.
    "trailing": lambda n, total: np.round(np.arange(total, 0, -total / n))[:n] - 1,
}


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize("total", [1000, 50])
def test_discrete_spacings_are_diffusers(name, total):
    process = processes.ddpm(num_steps=total)
    spacing = getattr(grids, name)
    for steps in (1, 2, 3, 7, 10, 27, 31, 50):
        t = DIFFUSERS[name](steps, total)
        if name == "linspace" and steps == 1:
            t = [total - 1]  # diffusers starts one step at timestep 0
        grid = spacing(process, steps)
        check_zero_end(grid, process, t)
        assert grid.steps == steps and np.array_equal(grid.t, np.round(grid.t))
        if steps > 1:
            ended = spacing(process, steps, end="t_min")
            check_nodes(ended, process, t if t[-1] == 0 else [*t, 0])


def test_published_timesteps():
    """Lin et al. 2024, table 2: 10 steps of 1000, counted from 1 there."""
    published = {
        "leading": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
        "linspace": [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1],
        "trailing": [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100],
    }
    for name, t in published.items():
        np.testing.assert_array_equal(getattr(grids, name)(DDPM, 10).t[:-1] + 1, t)
    np.testing.assert_array_equal(grids.leading(DDPM, 4, offset=1).t, [751, 501, 251, 1, 0])


def test_discrete_spacings_with_zero_terminal_snr():
    process = processes.zero_terminal_snr(DDPM)
    grid = grids.trailing(process, 5)
    assert grid.ends == (True, True) and grid.alpha[0] == 0 and grid.lam[0] == -np.inf
    np.testing.assert_array_equal(grid.t, [999, 799, 599, 399, 199, 0])
    assert grids.leading(process, 5).ends == (False, True)
    again = grids.trailing(processes.zero_terminal_snr(process), 5)
    np.testing.assert_allclose(again.alpha, grid.alpha, rtol=1e-12)


# --- from arrays and times -----------------------------------------------------------------------


def test_from_arrays_keeps_what_it_is_given():
    t, alpha, sigma = [900, 900, 400, 0], [0.0, 0.1, 0.5, 1.0], [1.0, 0.9, 0.4, 0.0]
    grid = grids.from_arrays(t, alpha, sigma)  # t repeats: a network may round it
    np.testing.assert_array_equal(np.stack([grid.t, grid.alpha, grid.sigma]), [t, alpha, sigma])
    assert grid.ends == (True, True) and grid.steps == 3 and grid.xp is np
    lam = [-np.inf, np.log(1 / 9), np.log(5 / 4), np.inf]
    np.testing.assert_allclose(grid.lam, lam, rtol=1e-15)
    assert grid.node(2) == (400.0, 0.5, 0.4)


def test_from_times():
    grid = grids.from_times(VP, [0.9, 0.5, 0.2])
    check_nodes(grid, VP, [0.9, 0.5, 0.2])
    check_zero_end(grids.from_times(VP, [0.9, 0.5], end="zero"), VP, [0.9, 0.5])
    check_zero_end(grids.from_times(VP, np.array([0.9]), end="zero"), VP, [0.9])
    f, g2 = grid.rates()
    np.testing.assert_array_equal([f, g2], VP.rates(grid.t))


BAD_ARRAYS = {
    "not monotone": ([3, 2, 1], [0.1, 0.5, 0.4], [0.9, 0.5, 0.6], "1 and 2 have 0 and -0.405465"),
    "repeated": ([3, 2, 1], [0.1, 0.1, 0.4], [0.9, 0.9, 0.6], "strictly increase.*nodes 0 and 1"),
    "data to noise": ([1, 2], [0.9, 0.1], [0.1, 0.9], "from noise to data, but nodes 0 and 1"),
    "lengths": ([3, 2], [0.1, 0.5, 0.9], [0.9, 0.5, 0.1], r"got shapes \(2,\), \(3,\), \(3,\)"),
    "scalars": (1.0, 0.5, 0.5, r"got shapes \(\), \(\), \(\)"),
    "matrices": ([[1, 2]], [[0.1, 0.2]], [[0.9, 0.8]], r"shapes \(1, 2\)"),
    "one node": ([1.0], [0.5], [0.5], "at least 2 nodes .* got 1"),
    "nan": ([3, 2, 1], [0.1, np.nan, 0.9], [0.9, 0.5, 0.1], "finite, got 2.0, nan, 0.5 at node 1"),
    "infinite": ([3, 2], [0.1, 1.0], [np.inf, 0.1], "finite, got 3.0, 0.1, inf at node 0"),
    "alpha 0 inside": ([3, 2, 1], [0.0, 0.0, 0.9], [1.0, 1.0, 0.1], "only the first node may have"),
    "alpha 0 at the end": ([3, 2], [0.1, 0.0], [1.0, 0.1], "only the first node may have"),
    "sigma 0 at the start": ([3, 2], [0.1, 1.0], [0.0, 0.1], "the last sigma = 0. Got"),
    "sigma 0 inside": ([3, 2, 1], [0.1, 1, 1], [0.5, 0.0, 0.0], "the last sigma = 0. Got"),
    "negative": ([3, 2], [-0.1, 1.0], [1.0, 0.1], "must be positive"),
    "negative end": ([3, 2], [0.1, 1.0], [1.0, -0.1], "must be positive"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_nodes_are_named(name):
    *arrays, message = BAD_ARRAYS[name]
    with pytest.raises(ValueError, match=message):
        grids.from_arrays(*arrays)


@pytest.mark.parametrize("steps", [0, -3, 2.0, True, "ten", None])
def test_steps_must_be_a_positive_integer(steps):
    for spacing in (grids.uniform, grids.half_log_snr, grids.karras, grids.trailing):
        with pytest.raises(ValueError, match=f"integer of at least 1, got {steps!r}"):
            spacing(DDPM, steps)
    assert grids.uniform(VP, np.int64(3)).steps == 3


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: grids.uniform("vp", 3), TypeError, "expected a process .* got str"),
        (lambda: grids.from_times(None, [0.9, 0.1]), TypeError, "got NoneType"),
        (lambda: grids.uniform(VP, 3, end="data"), ValueError, "'t_min' or 'zero', got 'data'"),
        (lambda: grids.from_times(VP, [1.0, 0.1], end=0), ValueError, "got 0"),
        (lambda: grids.from_times(VP, [1.0]), ValueError, r"at least 2 nodes, got shape \(1,\)"),
        (lambda: grids.from_times(VP, 0.5, end="zero"), ValueError, r"got shape \(\)"),
        (lambda: grids.from_times(VP, [0.1, 0.9]), ValueError, "nodes 0 and 1"),
        (lambda: grids.uniform(VP, 3, t_max=0.1, t_min=0.2), ValueError, "got 0.1 and 0.2"),
        (lambda: grids.uniform(FLOW, 3, end="zero"), ValueError, "only the last sigma = 0"),
        (lambda: grids.power(VP, 3, exponent=0), ValueError, "exponent must be positive, got 0"),
        (lambda: grids.karras(VP, 3, rho=-7), ValueError, "rho must be positive, got -7"),
        (lambda: grids.karras(FLOW, 3), ValueError, "infinite at an end of .t_min=0.0, t_max=1.0"),
        (lambda: grids.half_log_snr(FLOW, 3, t_min=0.1), ValueError, "give t_max with alpha > 0"),
        (lambda: grids.leading(VP, 3), TypeError, "need a discrete process .* got VPLinear"),
        (lambda: grids.trailing(EDM, 3), TypeError, "got EDM"),
        (lambda: grids.linspace(DDPM, 1001), ValueError, "1001 steps.* has 1000 timesteps"),
        (lambda: grids.leading(DDPM, 2000), ValueError, "2000 steps"),
        (lambda: grids.leading(DDPM, 10, offset=100), ValueError, "offset 100 .* 0..999"),
        (lambda: grids.leading(DDPM, 10, offset=-1), ValueError, "offset -1"),
        (lambda: grids.leading(DDPM, 1, end="t_min"), ValueError, "use end='zero'"),
        (lambda: grids.half_log_snr(VP, 4).insert(99.0), ValueError, "99.0 is not between"),
        (lambda: grids.uniform(VP, 4).insert(np.nan), ValueError, "nan is not between"),
        (lambda: as_arrays(grids.uniform(VP, 4)).rates(), ValueError, "no process"),
        (lambda: as_arrays(grids.uniform(VP, 4)).at(9.0), ValueError, "9.0 lies outside"),
        (lambda: as_arrays(grids.uniform(FLOW, 2)).at(0.0), ValueError, "two nodes with finite"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_node_inserted_where_one_is_already():
    grid = grids.half_log_snr(VP, 4)
    for node in (0, 2, 4):
        with pytest.raises(ValueError, match="is not between two nodes"):
            grid.insert(grid.lam[node])


# --- nodes in between ---------------------------------------------------------------------------


@every_process
def test_at_is_exact_from_a_process(process):
    grid = grids.uniform(process, 4)
    exact = np.linspace(process.t_min, process.t_max, 23)[1:-1]
    lam = process.half_log_snr(exact)
    t, alpha, sigma = grid.at(lam)
    np.testing.assert_allclose(t, exact, rtol=1e-12)
    np.testing.assert_allclose(alpha, process.alpha(exact), rtol=1e-11)
    np.testing.assert_allclose(np.log(alpha / sigma), lam, rtol=0, atol=1e-11)


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_interpolation_is_scipys(count):
    """Rising, falling, flat and turning data; inside and at the nodes."""
    rng = np.random.default_rng(count)
    nodes = np.cumsum(rng.uniform(0.1, 2.0, count))
    x = np.sort(np.concatenate([np.linspace(nodes[0], nodes[-1], 101), nodes]))
    x = np.clip(x, nodes[0], nodes[-1])
    walk = rng.normal(size=count)
    for values in (np.cumsum(np.abs(walk)), -np.cumsum(walk**2), walk, np.round(walk), 0 * walk,
                   np.cumsum(np.exp(3 * walk))):  # fmt: skip
        expected = PchipInterpolator(nodes, values)(x)
        got = pchip(np, nodes, values, x)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13 * np.ptp(values) + 1e-14)


@every_process
def test_at_interpolates_monotonically_from_arrays(process):
    """t by SciPy's monotone cubic in lambda; alpha and sigma exactly, for the usual families."""
    exact = grids.half_log_snr(process, 8)
    grid = as_arrays(exact)
    lam = np.linspace(grid.lam[0], grid.lam[-1], 57)
    t, alpha, sigma = grid.at(lam)
    np.testing.assert_allclose(t, PchipInterpolator(grid.lam, grid.t)(lam), rtol=1e-12, atol=1e-12)
    assert np.all(np.diff(t) <= 0)
    np.testing.assert_allclose(np.log(alpha / sigma), lam, rtol=0, atol=1e-13)
    if not isinstance(process, processes.SubVP):
        _, true_alpha, true_sigma = exact.at(lam)
        np.testing.assert_allclose(alpha, true_alpha, rtol=1e-11)
        np.testing.assert_allclose(sigma, true_sigma, rtol=1e-11)
    for node in range(9):
        np.testing.assert_allclose(grid.at(grid.lam[node]), grid.node(node), rtol=1e-12)


def test_at_interpolates_the_size_of_other_families():
    """Neither alpha, alpha + sigma nor alpha^2 + sigma^2 constant: the log of the last is."""
    grid = as_arrays(grids.half_log_snr(processes.sub_vp(), 6))
    lam = np.linspace(grid.lam[0], grid.lam[-1], 31)
    size = PchipInterpolator(grid.lam, np.log(grid.alpha**2 + grid.sigma**2))(lam)
    _, alpha, sigma = grid.at(lam)
    np.testing.assert_allclose(alpha**2 + sigma**2, np.exp(size), rtol=1e-12)
    np.testing.assert_allclose(alpha / sigma, np.exp(lam), rtol=1e-12)


def test_at_between_finite_nodes_of_a_grid_with_ends():
    whole = grids.uniform(FLOW, 8)
    grid = as_arrays(whole)
    assert grid.ends == (True, True)
    t, alpha, sigma = grid.at(0.3)
    np.testing.assert_allclose([alpha + sigma, np.log(alpha / sigma)], [1.0, 0.3], rtol=1e-14)
    inner = PchipInterpolator(whole.lam[1:-1], whole.t[1:-1])(0.3)
    np.testing.assert_allclose(t, inner, rtol=1e-13)
    with pytest.raises(ValueError, match="outside the grid"):
        grid.at(whole.lam[1] - 0.1)  # between alpha = 0 and the first finite node


@pytest.mark.parametrize("source", [lambda g: g, as_arrays], ids=["process", "arrays"])
@pytest.mark.parametrize("backward", [False, True])
def test_insert(source, backward):
    grid = source(grids.uniform(VP, 4))
    grid = grid.reversed() if backward else grid
    lam = 0.4 * grid.lam[1] + 0.6 * grid.lam[2]
    new = grid.insert(lam)
    assert len(new) == 6 and new.backward is backward and new.ends == grid.ends
    np.testing.assert_array_equal(np.delete(new.t, 2), grid.t)
    np.testing.assert_array_equal(np.delete(new.alpha, 2), grid.alpha)
    np.testing.assert_array_equal([a[2] for a in (new.t, new.alpha, new.sigma)], grid.at(lam))
    np.testing.assert_allclose(new.lam[2], lam, rtol=1e-13)
    sign = -1 if backward else 1
    assert np.all(sign * np.diff(new.lam) > 0)
    if new._process is not None:
        np.testing.assert_allclose(new.sigma, VP.sigma(new.t), rtol=1e-14)
        np.testing.assert_array_equal(new.rates(), VP.rates(new.t))


def test_insert_next_to_the_ends():
    grid = grids.uniform(FLOW, 4)
    for lam, place in ((-9.0, 1), (9.0, 4)):
        new = grid.insert(lam)
        assert new.ends == (True, True) and len(new) == 6
        np.testing.assert_allclose(new.lam[place], lam, rtol=1e-12)
        np.testing.assert_allclose(new.t[place], 1 / (1 + np.exp(lam)), rtol=1e-12)


def test_reversed():
    grid = grids.uniform(processes.flow(2.0), 5)
    back = grid.reversed()
    np.testing.assert_array_equal(back.t, grid.t[::-1])
    np.testing.assert_array_equal(back.lam, grid.lam[::-1])
    assert back.backward and back.ends == grid.ends == (True, True)
    assert (back.lam[0], back.lam[-1]) == (np.inf, -np.inf)
    again = back.reversed()
    np.testing.assert_array_equal(again.sigma, grid.sigma)
    assert not again.backward
    np.testing.assert_array_equal(back.at(0.2), grid.at(0.2))
    arrays = as_arrays(grids.uniform(VP, 5))
    np.testing.assert_array_equal(arrays.reversed().at(0.2), arrays.at(0.2))


# --- traced -------------------------------------------------------------------------------------


def test_gradients_through_times_nodes_and_insertions(x64):
    """d/dt of a function of every node, of a node in between and of an inserted one."""

    def value(t, lam, xp):
        grid = grids.from_times(VP, t, end="zero")
        between = grid.at(0.3 * grid.lam[0] + 0.7 * grid.lam[1])
        new = grid.insert(lam)
        weights = np.arange(1.0, 5.0)
        total = (weights * grid.sigma).sum() + (weights[:3] * grid.lam[:3]).sum() + sum(between)
        return total + (np.arange(5.0) * new.alpha).sum() + (np.arange(5.0) * new.t).sum()

    t, lam = np.array([0.9, 0.5, 0.2]), -1.0
    got = jax.jit(jax.grad(lambda t, lam: value(t, lam, jnp), (0, 1)))(jnp.asarray(t), lam)
    np.testing.assert_allclose(
        jax.jit(lambda t: value(t, lam, jnp))(jnp.asarray(t)), value(t, lam, np), rtol=1e-13
    )
    step = 1e-6
    for i in range(3):
        moved = t + step * np.eye(3)[i], t - step * np.eye(3)[i]
        expected = (value(moved[0], lam, np) - value(moved[1], lam, np)) / (2 * step)
        np.testing.assert_allclose(got[0][i], expected, rtol=1e-7)
    expected = (value(t, lam + step, np) - value(t, lam - step, np)) / (2 * step)
    np.testing.assert_allclose(got[1], expected, rtol=1e-7)


def test_gradients_through_arrays(x64):
    """Interpolation between traced nodes, against differences of the same on the host."""
    host = grids.half_log_snr(processes.sub_vp(), 4)
    nodes = np.stack([host.t, host.alpha, host.sigma])

    def value(nodes):
        t, alpha, sigma = grids.from_arrays(*nodes).at(0.7)
        return t + 2 * alpha + 3 * sigma

    got = jax.jit(jax.grad(value))(jnp.asarray(nodes))
    for index in [(0, 1), (1, 2), (2, 3), (2, 1)]:
        step = np.zeros_like(nodes)
        step[index] = 1e-6 * nodes[index]
        expected = (value(nodes + step) - value(nodes - step)) / (2e-6 * nodes[index])
        np.testing.assert_allclose(got[index], expected, rtol=1e-6, atol=1e-9)


def test_spacings_vmap_over_their_parameters(x64):
    """rho, exponent, the span and the process itself may be traced."""
    rhos = np.array([1.0, 5.0, 7.0])
    got = jax.vmap(lambda rho: grids.karras(EDM, 4, rho=rho).sigma)(jnp.asarray(rhos))
    np.testing.assert_allclose(got, [grids.karras(EDM, 4, rho=r).sigma for r in rhos], rtol=1e-12)
    got = jax.vmap(lambda p: grids.power(VP, 3, exponent=p).t)(jnp.asarray(rhos))
    np.testing.assert_allclose(got, [grids.power(VP, 3, exponent=p).t for p in rhos], rtol=1e-12)
    shifts = np.array([0.5, 3.0])
    got = jax.vmap(lambda s: grids.uniform(processes.flow(s), 3).lam)(jnp.asarray(shifts))
    np.testing.assert_allclose(
        got, [grids.uniform(processes.flow(s), 3).lam for s in shifts], rtol=1e-12
    )


def test_ends_of_traced_grids_are_static():
    """They follow from the span; a traced end of it lies inside; `ends` overrides."""
    seen = {}

    def trace(t_max, t):
        seen["whole"] = grids.uniform(processes.flow(t_max), 3).ends
        seen["from a traced t_max"] = grids.uniform(FLOW, 3, t_max=t_max).ends
        seen["to zero"] = grids.uniform(VP, 3, t_max=t_max, end="zero").ends
        seen["part"] = grids.uniform(processes.flow(t_max), 3, t_max=0.5).ends
        seen["times"] = grids.from_times(FLOW, t).ends
        inner = grids.from_times(FLOW, t, ends=(False, False))
        seen["inner times"] = inner.ends
        seen["arrays"] = grids.from_arrays(t, 1 - t, t).ends
        seen["arrays with ends"] = grids.from_arrays(t, 1 - t, t, ends=[True, False]).ends
        return inner.lam, grids.from_times(FLOW, t).lam

    inner, whole = jax.jit(trace)(0.9, jnp.asarray([0.8, 0.5, 0.1]))
    assert seen == {
        "whole": (True, True), "from a traced t_max": (False, True), "to zero": (False, True),
        "part": (False, True), "times": (True, True), "inner times": (False, False),
        "arrays": (False, False), "arrays with ends": (True, False),
    }  # fmt: skip
    np.testing.assert_allclose(inner, np.log([0.25, 1.0, 9.0]), atol=1e-6)
    assert (whole[0], whole[-1]) == (-np.inf, np.inf)


def test_gradients_at_exact_ends_are_finite(x64):
    """lambda is infinite there; nothing that is finite may get a NaN from it."""

    def value(shift):
        grid = grids.uniform(processes.flow(shift), 4)
        return grid.lam[1:-1].sum() + grid.alpha.sum() + grid.sigma.sum()

    shift, step = 2.0, 1e-6
    expected = (value(shift + step) - value(shift - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(value)(shift), expected, rtol=1e-8)


def test_a_grid_is_a_pytree():
    grid = grids.half_log_snr(VP, 3)
    leaves, structure = jax.tree.flatten(grid)
    assert [np.shape(leaf) for leaf in leaves[:3]] == [(4,)] * 3
    np.testing.assert_array_equal(structure.unflatten(leaves).lam, grid.lam)
    doubled = jax.jit(lambda g: g.insert(0.0))(jax.tree.map(jnp.asarray, grid))
    np.testing.assert_allclose(doubled.lam, grid.insert(0.0).lam, atol=1e-5)
