"""Grids against the published spacings, and what they refuse."""

import jax
import numpy as np
import pytest
from schedules import SPANS

from jaxdiff import gaussian_mixture, grids, processes, sample, solvers

pytestmark = pytest.mark.filterwarnings("error:.*:RuntimeWarning")

VP = processes.vp_linear()
EDM = processes.edm()
FLOW = processes.flow()
DDPM = processes.ddpm()
ZERO = processes.zero_terminal_snr(DDPM)
every_process = pytest.mark.parametrize("process", SPANS.values(), ids=SPANS)
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


@every_process
@pytest.mark.parametrize("exponent, center", [(0.75, 1.0), (1.0, 0.5), (0.3, 2.0)])
def test_logistic(process, exponent, center):
    """sigma^k / (sigma^k + (center alpha)^k) is uniform."""
    grid = grids.logistic(process, 9, exponent, center)
    noise, data = grid.sigma**exponent, (center * grid.alpha) ** exponent
    u = noise / (noise + data)
    np.testing.assert_allclose(u, np.linspace(u[0], u[-1], 10), rtol=1e-10, atol=1e-13)
    check_nodes(grid, process, grid.t)
    assert (grid.t[0], grid.t[-1]) == (process.t_max, process.t_min)


def test_logistic_is_the_shifted_flow_and_half_log_snr():
    """exponent 1 is uniform flow time shifted by center, exponent -> 0 uniform lambda."""
    flow = grids.logistic(FLOW, 8, 1.0, 4.0)
    assert flow.ends == (True, True)
    shifted = grids.shifted(grids.uniform(FLOW, 8), 4.0)
    np.testing.assert_allclose(flow.sigma, shifted.sigma, rtol=1e-12, atol=0)
    small, lam = grids.logistic(EDM, 8, 1e-5, 3.0).lam, grids.half_log_snr(EDM, 8).lam
    np.testing.assert_allclose(small, lam, rtol=0, atol=1e-4)


@every_process
@pytest.mark.parametrize("std", [1.0, 0.3, 5.0])
def test_arctan(process, std):
    grid = grids.arctan(process, 9, std)
    angle = np.arctan2(grid.sigma, std * grid.alpha)
    np.testing.assert_allclose(angle, np.linspace(angle[0], angle[-1], 10), rtol=1e-9, atol=1e-12)
    check_nodes(grid, process, grid.t)
    assert (grid.t[0], grid.t[-1]) == (process.t_max, process.t_min)


def test_arctan_of_a_whole_flow():
    """From alpha = 0 to sigma = 0: equal parts of a right angle; the slope in std is finite."""
    grid = grids.arctan(FLOW, 4)
    assert grid.ends == (True, True)
    angle = np.pi / 8 * np.arange(4, -1, -1)
    np.testing.assert_allclose(np.arctan2(grid.sigma, grid.alpha), angle)
    slope = jax.grad(lambda std: grids.arctan(FLOW, 4, std).sigma.sum())(0.7)
    tan = np.tan(angle[1:-1])
    np.testing.assert_allclose(slope, np.sum(tan / (1.0 + 0.7 * tan) ** 2), rtol=1e-5)


@pytest.mark.parametrize("process", [VP, EDM], ids=["vp", "edm"])
def test_arctan_is_best_for_ddim_on_gaussian_data(process):
    """x = 1 stands for the standard deviation: DDIM leaves prod cos(step) of the exact flow's.

    Its logarithm is concave in the steps, whose sum is fixed: equal ones are best.
    """
    std = 0.7
    grid = grids.arctan(process, 7, std)
    rho = grid.sigma / grid.alpha
    denoiser = gaussian_mixture(np.zeros((1, 2)), [std], [1.0], process)
    left = sample(denoiser, solvers.ddim(grid), np.ones((1, 2), np.float32))[0, 0]
    spread = grid.alpha * np.hypot(std, rho)
    step = np.arctan(rho[0] / std) - np.arctan(rho[-1] / std)
    np.testing.assert_allclose(left / (spread[-1] / spread[0]), np.cos(step / 7) ** 7, rtol=1e-4)


def test_a_part_of_the_span():
    names = "uniform", "quadratic", "half_log_snr", "karras", "logistic", "arctan"
    for spacing in (getattr(grids, name) for name in names):
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


def test_linspace_of_the_multistep_schedulers():
    """diffusers' DPMSolverMultistepScheduler: steps + 1 timesteps, the last left out."""
    for steps in (1, 2, 3, 10, 27):
        t = np.linspace(0, 999, steps + 1).round()[::-1][:-1]
        check_zero_end(grids.linspace(DDPM, steps, keep_zero=False), DDPM, t)


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
        (lambda: grids.logistic(VP, 3, 0.0), ValueError, "must be positive, got 0.0 and 1.0"),
        (lambda: grids.arctan(VP, 3, 0.0), ValueError, "std must be a positive number, got 0.0"),
        (lambda: grids.arctan(VP, 3, np.inf), ValueError, "std must be a positive number, got inf"),
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
        (lambda: grids.from_times(DDPM, [1200.0, 500.0]), ValueError, r"in \[0, 999\], got .1200"),
        (lambda: grids.from_times(ZERO, [900.0, -1.0]), ValueError, r"in \[0, 999\], got"),
        (lambda: grids.uniform(DDPM, 3, t_max=1200.0), ValueError, r"in \[0, 999\], got .1200"),
        (lambda: grids.half_log_snr(DDPM, 3, t_max=1200.0), ValueError, r"in \[0, 999\], got"),
        (lambda: grids.uniform(DDPM, 4).at(-6.0), ValueError, r"-6.0 lies outside the process's"),
        (lambda: grids.uniform(DDPM, 4).at(np.array([0.0, 9.0])), ValueError, "outside the proc"),
        (lambda: grids.trailing(DDPM, 4).insert(9.0), ValueError, "9.0 lies outside the process's"),
        (lambda: grids.trailing(ZERO, 4).at(9.0), ValueError, "9.0 lies outside the process's"),
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
