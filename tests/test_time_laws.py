"""Training times against their closed-form distributions; stratified and sharded draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import brentq

import jaxdiff as jd
from jaxdiff import losses

PROCESSES = {
    "vp_linear": jd.processes.vp_linear(),
    "sub_vp": jd.processes.sub_vp(),
    "ddpm": jd.processes.ddpm(),
    "ve": jd.processes.ve(),
    "edm": jd.processes.edm(),
    "flow": jd.processes.flow(shift=2.0),
}


def sd3_mode_cdf(t, scale):
    """P(f(U) <= t) for SD3's decreasing map f, by root finding."""

    def f(u):
        return 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)

    return np.array([1 - brentq(lambda u, a=a: f(u) - a, 0, 1) for a in np.atleast_1d(t)])


# law, options, CDF of (t - t_min) / (t_max - t_min)
SPAN_LAWS = [
    ("uniform", {}, stats.uniform.cdf),
    ("logit_normal", {}, lambda t: stats.norm.cdf(np.log(t / (1 - t)))),
    ("logit_normal", {"mean": -0.5, "std": 0.6},
     lambda t: stats.norm.cdf((np.log(t / (1 - t)) + 0.5) / 0.6)),
    ("mode", {}, lambda t: sd3_mode_cdf(t, 1.29)),
    ("mode", {"scale": -0.8}, lambda t: sd3_mode_cdf(t, -0.8)),
    # The integral of SD3's density 2 / (pi (1 - 2 t + 2 t^2)).
    ("cosmap", {}, lambda t: 0.5 + 2 / np.pi * np.arctan(2 * t - 1)),
]  # fmt: skip


@pytest.mark.parametrize(("law", "options", "cdf"), SPAN_LAWS)
def test_span_laws_have_their_distribution(law, options, cdf, x64):
    for process in (PROCESSES["flow"], PROCESSES["ddpm"]):
        length = process.t_max - process.t_min
        # The quantile function inverts the CDF ...
        s = np.linspace(0.05, 0.95, 25)
        t = losses.TIME_LAWS[law](jnp.asarray(cdf(s)), process, **options)
        np.testing.assert_allclose((t - process.t_min) / length, s, atol=1e-7)
        # ... and the draws follow it.
        t = losses.sample_times(law, jax.random.key(12), 4000, process, **options)
        assert t.shape == (4000,)
        assert stats.kstest(np.asarray((t - process.t_min) / length), cdf).pvalue > 0.01


def test_log_normal_sigma_is_edms_for_every_process(x64):
    others = {"integers", "log_normal_sigma"}
    assert set(losses.TIME_LAWS) == {law for law, _, _ in SPAN_LAWS} | others
    for name, process in PROCESSES.items():
        t = np.asarray(losses.sample_times("log_normal_sigma", jax.random.key(13), 4000, process))
        log_sigma = -process.half_log_snr(t)
        low, high = (-process.half_log_snr(s) for s in (process.t_min, process.t_max))
        assert process.t_min <= t.min() and t.max() <= process.t_max, name
        inside = (log_sigma > low + 1e-6) & (log_sigma < high - 1e-6)
        # Within the span the normal law, its tails on the ends.
        share = stats.norm.cdf((np.array([low, high]) + 1.2) / 1.2)
        for count, p in ((np.sum(log_sigma <= low + 1e-6), share[0]),
                         (np.sum(log_sigma >= high - 1e-6), 1 - share[1])):  # fmt: skip
            assert abs(count - 4000 * p) < 4 * np.sqrt(4000 * p + 1), name
        u = (stats.norm.cdf((log_sigma[inside] + 1.2) / 1.2) - share[0]) / (share[1] - share[0])
        assert stats.kstest(u, "uniform").pvalue > 0.01, name
    edm = losses.sample_times("log_normal_sigma", jax.random.key(14), 4000, PROCESSES["edm"],
                              mean=0.4, std=0.9)  # fmt: skip
    assert stats.kstest(np.log(edm), stats.norm(0.4, 0.9).cdf).pvalue > 0.01


def test_a_law_can_be_a_function():
    process = PROCESSES["flow"]
    key = jax.random.key(15)
    mine = losses.sample_times(lambda u, process, power: u**power, key, 8, process, power=2)
    np.testing.assert_allclose(
        mine, losses.sample_times("uniform", key, 8, process) ** 2, rtol=1e-6
    )


def test_integers_are_the_steps_of_a_discrete_process():
    process = jd.processes.ddpm(num_steps=10)
    u = jnp.asarray([1e-7, 0.05, 0.0999, 0.1001, 0.55, 0.8999, 0.9001, 1 - 6e-8])
    expected = [0, 0, 0, 1, 5, 8, 9, 9]
    np.testing.assert_array_equal(losses.TIME_LAWS["integers"](u, process), expected)
    t = losses.sample_times("integers", jax.random.key(0), 4000, process)
    counts = np.bincount(np.asarray(t).astype(int), minlength=10)
    assert np.sum(counts) == 4000 and stats.chisquare(counts).pvalue > 0.01
    with pytest.raises(ValueError, match="'integers' is for a ddpm process, got VPLinear"):
        losses.sample_times("integers", jax.random.key(0), 2, PROCESSES["vp_linear"])


@pytest.mark.parametrize("law", sorted(set(losses.TIME_LAWS) - {"integers"}))
def test_a_uniform_draw_of_zero_stays_inside(law, monkeypatch):
    # Once in 2^23 float32 draws u is 0, where a normal's quantile is infinite and sigma may be 0.
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.zeros(()))
    for stratified in (False, True):
        t = losses.sample_times(law, jax.random.key(0), 2, PROCESSES["flow"], stratified=stratified)
        assert 0 < t[0] < 0.01


def test_stratified_times_hold_one_sample_a_stratum():
    process, batch = PROCESSES["flow"], 64
    gaps = []
    for seed in range(20):
        t = losses.sample_times("uniform", jax.random.key(seed), batch, process, stratified=True)
        np.testing.assert_allclose(np.diff(np.sort(t)), 1 / batch, atol=3e-7)
        gaps.append(float(t[5]))
    assert np.ptp(gaps) > 0.5  # each sample still wanders over the whole span
    many = jax.vmap(lambda k: losses.sample_times("uniform", k, 4, process, stratified=True))
    t = np.asarray(many(jax.random.split(jax.random.key(16), 3000)))
    for i in range(4):
        assert stats.kstest(t[:, i], "uniform").pvalue > 0.01


def test_stratification_reduces_the_variance_of_the_loss():
    # The exact denoiser's noise error for N(0, v), from 1 at the noise end to 0 at the data end.
    process, batch, v = jd.processes.flow(), 64, 0.5

    def curve(t):
        return (1 - t) ** 2 * v / ((1 - t) ** 2 * v + t**2)

    truth = quad(curve, 0, 1)[0]
    # Theory: 1 / (12 batch^2) for a curve that jumps by 1, against variance / batch.
    ratio = (quad(lambda t: curve(t) ** 2, 0, 1)[0] - truth**2) * 12 * batch
    keys = jax.random.split(jax.random.key(17), 400)
    means = {}
    for stratified in (False, True):
        draw_times = jax.jit(
            jax.vmap(
                lambda k, s=stratified: losses.sample_times(
                    "uniform", k, batch, process, stratified=s
                )
            )
        )
        means[stratified] = curve(np.asarray(draw_times(keys), np.float64)).mean(1)
        error = means[stratified].std() / np.sqrt(400)
        assert abs(means[stratified].mean() - truth) < 4 * error + 1e-6
    assert ratio > 50 and 0.6 < means[False].var() / means[True].var() / ratio < 1.7


@pytest.mark.parametrize("stratified", [False, True])
def test_pieces_of_a_batch_draw_the_whole_batchs_times(stratified):
    process, key = PROCESSES["vp_linear"], jax.random.key(18)
    options = {"stratified": stratified, "mean": -0.3}
    whole = losses.sample_times("logit_normal", key, 8, process, **options)
    pieces = [
        losses.sample_times("logit_normal", key, 2, process, ids=ids, total=8, **options)
        for ids in np.arange(8).reshape(4, 2)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    if not stratified:
        keys = jd.sample_keys(key, np.arange(8))
        own = losses.sample_times("logit_normal", keys[3:5], 2, process, mean=-0.3)
        np.testing.assert_array_equal(own, whole[3:5])

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def local(ids):
        return losses.sample_times("logit_normal", key, 2, process, ids=ids, total=8, **options)

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_allclose(mapped(jnp.arange(8)), whole, rtol=1e-6)

    def careless(ids):
        return losses.sample_times("logit_normal", key, 2, process, **options)

    with pytest.raises(ValueError, match="manual mesh axes"):
        jax.shard_map(careless, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.arange(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"law": "logitnormal"}, "'logitnormal'; did you mean logit_normal.*choose from"),
        ({"law": "uniform", "std": 1.0}, r"'uniform' has no option 'std'; it takes \['stratified'\]"),
        ({"stratifed": True}, r"did you mean stratified\? it takes \['stratified'\]"),
        ({"law": "logit_normal", "std": 0.0}, "std must be positive"),
        ({"law": "mode", "scale": 2.0}, r"\[-1, 2 / \(pi - 2\)\], got 2.0"),
        ({"batch": 0}, "at least 1, got 0"),
        ({"ids": np.arange(3)}, r"4 integers, got int64 of shape \(3,\)"),
        ({"ids": np.ones(4)}, "4 integers, got float64"),
        ({"ids": np.arange(4), "stratified": True}, "need total"),
        ({"ids": np.arange(4), "stratified": True, "total": 3}, "0 to 2, got 0 to 3"),
        ({"total": 8, "stratified": True}, "need ids and total"),
        ({"key": jax.random.split(jax.random.key(0), 4), "stratified": True}, "one key for the"),
        ({"key": jax.random.split(jax.random.key(0), 5)}, "5 keys for 4 samples"),
    ],
)
def test_bad_time_draws_say_what_is_accepted(arguments, message):
    full = {"law": "uniform", "key": jax.random.key(0), "batch": 4, "process": PROCESSES["flow"]}
    with pytest.raises(ValueError, match=message):
        losses.sample_times(**{**full, **arguments})
