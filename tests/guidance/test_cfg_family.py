"""Rescaled, limited, CFG++, projected and CFG-Zero* guidance against the published steps in NumPy."""

import conditional
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import guidance
from jaxdiff.acceleration import average_cost

PROCESS = jd.processes.vp_linear()
MEANS = np.array([[2.0, 0.5], [-1.0, 1.5], [-0.5, -2.0]])
STD = np.array([0.5, 0.4, 0.6])
NULL = 3
ROWS = np.concatenate([np.eye(3), np.ones((1, 3))]).astype(bool)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 2))
LABELS = np.arange(6) % 3
LEVELS = 0.4, 0.6, 0.8


def network():
    return conditional.conditional_mixture(MEANS, STD, ROWS)


@jax.jit
def evaluated(net, x, cond, levels):
    return net(x, *levels, cond)


def halves(x=X, levels=LEVELS):
    """eps under the labels and under none, float64."""
    x, levels = jnp.asarray(x), tuple(map(float, levels))
    pair = [evaluated(network(), x, jnp.asarray(c), levels) for c in (LABELS, np.full(6, NULL))]
    return [np.asarray(e, np.float64) for e in pair]


def to_x0(eps, x=X, levels=LEVELS):
    return (np.asarray(x) - levels[2] * eps) / levels[1]


def call(denoiser, x=X, levels=LEVELS):
    return evaluated(denoiser, jnp.asarray(x), jnp.asarray(LABELS), levels)


def test_rescaled_guidance_is_the_papers(x64):
    """Lin et al., algorithm 2: a sample's std comes from the conditional prediction."""
    cond, uncond = halves()
    guided = uncond + 4.0 * (cond - uncond)
    ratio = cond.std(1, ddof=1) / guided.std(1, ddof=1)
    expected = 0.7 * guided * ratio[:, None] + 0.3 * guided
    got = call(guidance.classifier_free(network(), 4.0, NULL, rescale=0.7))
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    whole = call(guidance.classifier_free(network(), 4.0, NULL, rescale=1.0))
    np.testing.assert_allclose(np.std(whole, 1), cond.std(1), rtol=1e-9)


def test_cfg_plus_plus_renoises_without_condition(x64):
    """The step of the authors' BaseDDIMCFGpp, for every row."""
    grid = jd.grids.uniform(PROCESS, 4)
    x = X
    for i in range(4):
        (t, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        cond, uncond = halves(x, (t, a, s))
        x0 = (x - s * (uncond + 0.6 * (cond - uncond))) / a
        x = a1 * x0 + s1 * uncond
    guided = guidance.cfg_plus_plus(network(), 0.6, NULL)
    got = jd.sample(guided, jd.solvers.ddim(grid, outputs=2), jnp.asarray(X), cond=LABELS)
    np.testing.assert_allclose(got, x, rtol=1e-8)


def project(cond, uncond, scale, eta, threshold, momentum=0.0, before=0.0):
    """Sadat et al.'s normalized guidance on x_0."""
    d = cond - uncond + momentum * before
    average = d
    size = np.linalg.norm(d, axis=1, keepdims=True)
    d = d * np.minimum(1.0, threshold / size)
    unit = cond / np.linalg.norm(cond, axis=1, keepdims=True)
    along = np.sum(d * unit, 1, keepdims=True) * unit
    return cond + (scale - 1) * (d - along + eta * along), average


@pytest.mark.parametrize("eta, threshold", [(0.0, 1.5), (0.3, np.inf)])
def test_projected_guidance_is_the_papers(x64, eta, threshold):
    cond, uncond = (to_x0(e) for e in halves())
    expected, _ = project(cond, uncond, 5.0, eta, threshold)
    got = call(guidance.adaptive_projected(network(), 5.0, NULL, eta, threshold))
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_projected_guidance_without_its_parts_is_plain(x64):
    plain = guidance.classifier_free(network(), 5.0, NULL).predict(
        "x0", jnp.asarray(X), *LEVELS, jnp.asarray(LABELS)
    )
    got = call(guidance.adaptive_projected(network(), 5.0, NULL, eta=1.0))
    np.testing.assert_allclose(got, plain, rtol=1e-9)


def test_momentum_sums_the_differences_of_a_sampler(x64):
    grid = jd.grids.uniform(PROCESS, 4)
    x, average = X, 0.0
    for i in range(4):
        (t, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        cond, uncond = (to_x0(e, x, (t, a, s)) for e in halves(x, (t, a, s)))
        x0, average = project(cond, uncond, 3.0, 0.0, 2.5, -0.5, average)
        x = a1 * x0 + s1 / s * (x - a * x0)
    x_T = jnp.asarray(X)
    guided = guidance.adaptive_projected(network(), 3.0, NULL, 0.0, 2.5, -0.5, like=x_T)
    state = jd.sample(guided, jd.solvers.ddim(grid), x_T, cond=LABELS, save="state")
    np.testing.assert_allclose(state.registers[0], x, rtol=1e-8)
    np.testing.assert_allclose(state.memory.average, average, rtol=1e-8)


def test_zero_star_is_the_papers(x64):
    levels = 0.4, 0.6, 0.4
    cond, uncond = ((e - to_x0(e, levels=levels)) for e in halves(levels=levels))
    share = np.sum(cond * uncond, 1, keepdims=True) / np.sum(uncond**2, 1, keepdims=True)
    expected = share * uncond + 3.0 * (cond - share * uncond)
    guided = guidance.cfg_zero_star(network(), 3.0, NULL, zero_above=0.96)
    assert guided.prediction == "flow"
    np.testing.assert_allclose(call(guided, levels=levels), expected, rtol=1e-6)
    np.testing.assert_array_equal(call(guided, levels=(0.97, 0.03, 0.97)), 0.0)


def test_thresholding_goes_around_guidance(x64):
    """Imagen's dynamic thresholding is of the guided x_0."""
    cond, uncond = (to_x0(e) for e in halves())
    guided = uncond + 6.0 * (cond - uncond)
    size = np.maximum(np.quantile(np.abs(guided), 0.8, axis=1, keepdims=True), 1.0)
    thresholded = jd.dynamic_threshold(guidance.classifier_free(network(), 6.0, NULL), 0.8)
    np.testing.assert_allclose(call(thresholded), np.clip(guided, -size, size) / size, rtol=1e-8)
    assert thresholded.cost == 2


# --- intervals ------------------------------------------------------------------------------------


def counting(params, x, t, cond, *, memory):
    out = network()(x, *t, cond)
    return out, memory + x.shape[0]


GRID = jd.grids.uniform(PROCESS, 10)
TABLE = jd.solvers.ddim(GRID)
TIMES = np.asarray(TABLE.t)


def test_outside_the_interval_the_network_runs_once():
    """Kynkaanniemi et al.: rows 3 to 6 guided, and the network sees each sample 10 + 4 times."""
    counted = jd.Denoiser(counting, params=0, time=lambda *a: a, memory=jnp.asarray(0))
    low, high = float(TIMES[6]), float(TIMES[3])
    guided = guidance.classifier_free(counted, 3.0, NULL, interval=(low, high))
    state = jd.sample(guided, TABLE, jnp.asarray(X), cond=LABELS, save="state")
    assert [int(m) for m in state.memory] == [18, 48, 18]
    assert average_cost(guided, TABLE) * TABLE.nfe == pytest.approx(14)

    scales = np.where((TIMES >= low) & (TIMES <= high), 3.0, 1.0)
    x = X
    for i in range(10):
        (t, a, s), (_, a1, s1) = GRID.node(i), GRID.node(i + 1)
        cond, uncond = halves(x, (t, a, s))
        eps = uncond + scales[i] * (cond - uncond)
        x = a1 * (x - s * eps) / a + s1 * eps
    np.testing.assert_allclose(state.registers[0], x, rtol=1e-4, atol=1e-4)


def test_an_interval_has_the_same_rows_on_every_clock():
    levels = [np.asarray(a, np.float32) for a in (TABLE.t, TABLE.alpha, TABLE.sigma)]
    noise = levels[2] / levels[1]
    guided = guidance.classifier_free(network(), 3.0, NULL)
    for clock, low, high in (
        ("t", TIMES[6], TIMES[3]),
        ("noise_level", 0.999 * noise[6], 1.001 * noise[3]),
        ("half_log_snr", -np.log(noise[3]) - 1e-3, -np.log(noise[6]) + 1e-3),
    ):
        limited = guidance.limited(guided, network(), low, high, clock, PROCESS)
        found = limited.fn.place(limited.params[1], *map(jnp.asarray, levels))
        np.testing.assert_array_equal(found, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2])


def test_a_limited_interval_is_nearer_to_the_class():
    """The paper's claim, on a mixture: guidance at high noise moves samples beyond their class.

    Energy distance to the class of label 0, 400 samples, s = 4: 0.97 with guidance everywhere, 0.48
    with it in the middle, and the network runs less often.
    """
    n = 400
    start = jax.random.normal(jax.random.key(0), (n, 2))
    exact = MEANS[0] + STD[0] * RNG.normal(size=(n, 2))
    labels = jnp.zeros(n, int)
    table = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 20))
    guided = guidance.classifier_free(network(), 4.0, NULL)
    middle = guidance.limited(guided, network(), 0.1, 0.4)

    def distance(denoiser):
        return jd.metrics.energy_distance(jd.sample(denoiser, table, start, cond=labels), exact)

    assert distance(middle) < 0.6 * distance(guided)
    assert average_cost(middle, table) < 1.5


@pytest.mark.parametrize("clock", ["noise_level", "half_log_snr"])
def test_both_ends_of_an_interval_are_included(clock):
    """Kynkaanniemi et al.: the intervals from row to row of 50, in whose ends float32 rounds logs."""
    table = jd.solvers.ddim(jd.grids.uniform(PROCESS, 50))
    levels = [jnp.asarray(a, jnp.float32) for a in (table.t, table.alpha, table.sigma)]
    level = np.asarray(table.sigma) / np.asarray(table.alpha)
    level = level if clock == "noise_level" else -np.log(level)
    guided = guidance.classifier_free(network(), 3.0, NULL)
    for first in range(5, 45):
        ends = sorted([level[first], level[first + 3]])
        limited = guidance.limited(guided, network(), *ends, clock)
        found = limited.fn.place(limited.params[1], *levels)
        np.testing.assert_array_equal(np.flatnonzero(found == 1), first + np.arange(4))


def test_an_open_side_of_an_interval_reaches_alpha_0():
    """There the half-log-SNR is -inf, and the noise level inf."""
    levels = [jnp.asarray(v) for v in (1.0, 0.0, 1.0)]
    guided = guidance.classifier_free(network(), 3.0, NULL)
    for low, high, clock in ((-np.inf, 0.0, "half_log_snr"), (1.0, np.inf, "noise_level")):
        limited = guidance.limited(guided, network(), low, high, clock)
        assert int(limited.fn.place(limited.params[1], *levels)) == 1


@pytest.mark.parametrize(
    "low, high, clock, process, message",
    [
        (0.7, 0.3, "t", None, "low <= high"),
        (-0.5, -0.1, "t", None, "outside time"),
        (-0.1, 0.5, "t", None, "outside time"),
        (0.5, 3.0, "t", PROCESS, "outside the process's t, from 0.001 to 1"),
        (0.1, 1e9, "noise_level", PROCESS, "outside the process's noise_level"),
        (0.1, 0.2, "rows", None, "clock must be one of"),
    ],
)
def test_an_interval_outside_time_is_an_error(low, high, clock, process, message):
    guided = guidance.classifier_free(network(), 3.0, NULL)
    with pytest.raises(ValueError, match=message):
        guidance.limited(guided, network(), low, high, clock, process)
    if clock == "t":
        with pytest.raises(ValueError, match=message):
            guidance.classifier_free(network(), 3.0, NULL, interval=(low, high), process=process)


# --- unconditional models, bad numbers ------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        jd.gaussian_mixture(MEANS, STD, np.ones(3)),
        jd.Denoiser(lambda x, t: x),
        jd.Denoiser(lambda params, x, t: x, params=1.0),
        jd.clip_x0(jd.gaussian_mixture(MEANS, STD, np.ones(3))),
        guidance.limited(*[jd.gaussian_mixture(MEANS, STD, np.ones(3))] * 2, 0.2, 0.8),
        guidance.autoguidance(*[jd.gaussian_mixture(MEANS, STD, np.ones(3))] * 2, 2.0),
        guidance.product([jd.clip_x0(jd.Denoiser(lambda x, t: x))] * 2),
    ],
)
def test_a_scale_for_an_unconditional_model_is_an_error(wrapped):
    for make in (
        guidance.classifier_free, guidance.cfg_plus_plus, guidance.cfg_zero_star,
        guidance.adaptive_projected, guidance.adaptive_guidance,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="needs a conditional model"):
            make(wrapped, 2.0, NULL)


def test_one_conditional_part_is_enough():
    plain = jd.gaussian_mixture(MEANS, STD, np.ones(3))
    parts = guidance.limited(network(), plain, 0.2, 0.8)
    assert guidance.classifier_free(parts, 2.0, NULL).cost == 2


def test_networks_without_classes_are_unconditional():
    unet = jd.models.UNet(width=4, multipliers=(1,), num_blocks=1, attention_resolutions=())
    net = jd.models.from_linen(unet, {"params": {}}, "v")  # found before anything runs
    table = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 2))
    guided = guidance.classifier_free(net, 2.0, 10)
    with pytest.raises(ValueError, match="num_classes"):
        jd.sample(guided, table, jnp.zeros((2, 8, 8, 1)), cond=jnp.zeros(2, int))


def linear(x, t, cond=None):
    return 0.3 * x


def test_eps_at_alpha_0_is_an_error_under_every_guidance():
    """There eps says nothing of x0; only where the grid has it, and only for the part that is asked."""
    eps, v = jd.Denoiser(linear, "eps"), jd.Denoiser(linear, "v")
    grid = jd.grids.uniform(jd.processes.flow(), 3)
    one, two = jd.solvers.ddim(grid), jd.solvers.ddim(grid, outputs=2)
    x, options = jnp.ones((4, 2)), {"cond": jnp.zeros(4)}
    for denoiser, table in (
        (guidance.cfg_plus_plus(eps, 0.5, 0.0), two),
        (guidance.adaptive_projected(eps, 2.0, 0.0), one),
        (guidance.cfg_zero_star(eps, 2.0, 0.0), one),
        (jd.clip_x0(eps), one),
        (jd.clip_x0(guidance.classifier_free(eps, 2.0, 0.0), keep_eps=True), two),
        (guidance.with_module(v, eps), one),
        (guidance.autoguidance(v, eps, 2.0), one),
        (guidance.limited(eps, v, 0.2, 1.0), one),
        (jd.clip_x0(guidance.limited(eps, v, 0.2, 1.0)), one),
        (guidance.limited(guidance.adaptive_projected(eps, 2.0, 0.0), v, 0.2, 1.0), one),
    ):
        with pytest.raises(ValueError, match="'eps' network does not determine"):
            jd.sample(denoiser, table, x, **options)
    for denoiser in (
        guidance.limited(eps, v, 0.2, 0.8),
        guidance.limited(guidance.adaptive_projected(eps, 2.0, 0.0), v, 0.2, 0.8),
    ):
        assert np.all(np.isfinite(jd.sample(denoiser, one, x, **options)))


def test_a_scale_of_another_batch_is_an_error():
    table = jd.solvers.ddim(jd.grids.uniform(PROCESS, 2))
    three, net = np.ones(3), network()
    for denoiser in (
        guidance.classifier_free(net, three, NULL),
        guidance.classifier_free(net, three, NULL, interval=(0.2, 0.8)),
        guidance.adaptive_projected(net, three, NULL),
        guidance.adaptive_guidance(net, three, NULL),
        guidance.autoguidance(net, net, three),
    ):
        with pytest.raises(ValueError, match=r"a scale must be a number or \[batch\] = \(6,\)"):
            jd.sample(denoiser, table, jnp.asarray(X), cond=jnp.asarray(LABELS))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: guidance.classifier_free(d, np.nan, NULL), "finite number"),
        (lambda d: guidance.classifier_free(d, np.ones((2, 2)), NULL), "finite number"),
        (
            lambda d: guidance.classifier_free(d, 2.0, NULL, rescale=1.5),
            r"rescale must be in \[0, 1\]",
        ),
        (lambda d: guidance.adaptive_projected(d, 2.0, NULL, eta=-1.0), "eta must be in"),
        (lambda d: guidance.adaptive_projected(d, 2.0, NULL, threshold=0.0), "threshold must be"),
        (lambda d: guidance.adaptive_projected(d, 2.0, NULL, momentum=-0.5), "needs like=x_T"),
        (lambda d: guidance.adaptive_guidance(d, 2.0, NULL, 1.2), "threshold is of a cosine"),
        (lambda d: guidance.adaptive_guidance(d, 2.0, NULL, batch=0), "batch must be a number"),
    ],
)
def test_numbers_out_of_range_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(network())
