"""Faster Diffusion: the split UNet against the whole, rows by hand, and what it saves on digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained.digits import denoiser as digits_denoiser
from trained.digits import experiment, variables

import jaxdiff as jd
from jaxdiff.acceleration import KEY_SETS, PriorNoise, key_rows, propagate_encoder
from jaxdiff.data import digits
from jaxdiff.guidance import classifier_free
from jaxdiff.metrics import sliced_wasserstein
from jaxdiff.models import SongUNet, UNet, from_linen
from jaxdiff.training.flops import count

PROCESS = jd.processes.vp_cosine()
MODULE = UNet(
    width=8, multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,), head_channels=8,
    num_classes=3,
)  # fmt: skip
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
LABEL = jnp.array([0, 2])
TABLEAU = jd.solvers.dpm_solver_pp_multistep(jd.grids.half_log_snr(PROCESS, 6))


def random_weights(module):
    """Random weights everywhere, the layers that start at zero too."""
    made, rng = (
        jax.eval_shape(module.init, jax.random.key(1), X, 0.5, LABEL),
        np.random.default_rng(2),
    )
    return jax.tree.map(lambda a: 0.3 * rng.normal(size=a.shape).astype(np.float32), made)


@pytest.fixture(scope="module")
def tiny():
    return random_weights(MODULE)


@functools.partial(jax.jit, static_argnames=("module", "method"))
def apply(module, variables, x, t, cond, method=None):
    return module.apply(variables, x, t, cond, method=method)


def test_the_network_is_its_decoder_after_its_encoder(tiny):
    t = jnp.array([0.2, 0.7])
    features = apply(MODULE, tiny, X, t, LABEL, "encode")
    assert features.middle.shape == (2, 4, 4, 16)
    assert [a.shape[-1] for a in features.skips] == [8, 8, 8, 16]
    whole = apply(MODULE, tiny, X, t, LABEL)
    found = apply(MODULE, tiny, features, t, LABEL, "decode")
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    # The decoder has the time and the label of its own: with others it is another function.
    assert np.abs(apply(MODULE, tiny, features, t + 0.1, LABEL, "decode") - found).max() > 1e-3
    assert np.abs(apply(MODULE, tiny, features, t, LABEL[::-1], "decode") - found).max() > 1e-3


def test_an_ncsn_pp_splits_too():
    """With both pyramids, of the input image and of the output."""
    module = SongUNet.ncsn_pp(
        width=8, multipliers=(1, 2), num_blocks=1, attention_resolutions=(), num_classes=3,
        decoder="skip",
    )  # fmt: skip
    weights, t = random_weights(module), jnp.array([0.2, 0.7])
    features = apply(module, weights, X, t, LABEL, "encode")
    whole, found = (
        apply(module, weights, X, t, LABEL),
        apply(module, weights, features, t, LABEL, "decode"),
    )
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    fast = propagate_encoder(from_linen(module, weights, "v"), TABLEAU, 2, X)
    state = jd.sample(fast, TABLEAU, X, cond=LABEL, save="state")
    assert (int(state.memory.row), int(state.memory.encoded)) == (6, 3)


def test_the_key_sets_of_the_code():
    assert set(KEY_SETS) == {"50ls", "50ls2", "50ls3", "50ls4", "75ls", "100ls", "s2", "pro"}
    assert key_rows("50ls", 50) == (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert key_rows("pro", 50) == (0, 2, 5, 9, 14, 20, 27, 35, 44)
    assert key_rows(4, 10) == (0, 4, 8)
    assert key_rows("100ls", 100) == (
        *range(10), *range(10, 86, 5), *range(86, 100),
    )  # fmt: skip
    assert len(key_rows("75ls", 75)) == 10 + 12 + 9 and len(key_rows("s2", 50)) == 20 + 11 + 9
    for keys in ("40ls", 0, 1.5, True):
        with pytest.raises(ValueError, match="keys must be one of"):
            key_rows(keys, 50)


def by_hand(tiny, keys):
    """DDIM with the features of the last key row, a plain loop."""
    grid, x = jd.grids.half_log_snr(PROCESS, 6), X
    for i in range(6):
        t, a, s = (np.float32(v) for v in grid.node(i))
        _, a1, s1 = grid.node(i + 1)
        if i in keys:
            features = apply(MODULE, tiny, x, t, LABEL, "encode")
        v = apply(MODULE, tiny, features, t, LABEL, "decode")
        x = a1 * (a * x - s * v) + s1 * (s * x + a * v)
    return jd.solvers.ddim(grid), x


@pytest.mark.parametrize("parallel", [False, True])
def test_rows_between_keys_decode_the_last_keys_features(tiny, parallel):
    keys = (0, 1, 4)
    tableau, x0 = by_hand(tiny, keys)
    fast = propagate_encoder(from_linen(MODULE, tiny, "v"), tableau, keys, X, parallel)
    state = jd.sample(fast, tableau, X, cond=LABEL, save="state")
    np.testing.assert_allclose(state.registers[0], x0, rtol=1e-3, atol=1e-3)
    assert (int(state.memory.row), int(state.memory.encoded)) == (6, 3)


def test_all_keys_are_the_plain_sampler_and_parallel_is_sequential(tiny):
    """In a table with a history, under guidance; all keys to rounding of the split program."""
    plain = from_linen(MODULE, tiny, "v")
    both = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)

    def run(denoiser):
        return jd.sample(classifier_free(denoiser, 2.0, 3), TABLEAU, X, cond=LABEL)

    expected = run(plain)
    found = run(propagate_encoder(plain, TABLEAU, 1, both))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    one_by_one = run(propagate_encoder(plain, TABLEAU, 3, both))
    at_once = run(propagate_encoder(plain, TABLEAU, 3, both, parallel=True))
    np.testing.assert_allclose(at_once, one_by_one, rtol=1e-4, atol=1e-4)
    assert np.abs(one_by_one - expected).max() > 1e-2
    with pytest.raises(ValueError, match="told of a batch of 2, the network sees 4"):
        run(propagate_encoder(plain, TABLEAU, 3, X))


def test_parallel_refuses_other_levels_than_it_was_told(tiny):
    plain = from_linen(MODULE, tiny, "v")
    fast = propagate_encoder(plain, TABLEAU, 3, X, parallel=True)
    for steps, t_max in ((6, 0.9), (7, PROCESS.t_max)):
        other = jd.grids.half_log_snr(PROCESS, steps, t_max=t_max)
        with pytest.raises(ValueError, match="this one has other levels"):
            jd.sample(fast, jd.solvers.ddim(other), X, cond=LABEL)
    # alpha = 1 tells nothing: NaN.
    edm = jd.processes.edm()
    one, two = (jd.solvers.ddim(jd.grids.karras(edm, 6, t_max=t)) for t in (80.0, 60.0))
    fast = propagate_encoder(plain, one, 3, X, parallel=True)
    assert np.all(np.isfinite(jd.sample(fast, one, X, cond=LABEL)))
    assert np.all(np.isnan(jd.sample(fast, two, X, cond=LABEL)))


def test_prior_noise_is_added_below_half_of_the_time():
    """With x0 = 0, x' = (sigma' / sigma) (x + 0.003 x_T)."""
    grid = jd.grids.uniform(PROCESS, 10)
    nothing = jd.Denoiser(lambda x, t: 0.0 * x, "x0")
    found = jd.sample(nothing, jd.solvers.ddim(grid), X, control=PriorNoise())
    x = 1.0
    for i in range(10):
        x = grid.sigma[i + 1] / grid.sigma[i] * (x + 0.003 * (grid.t[i] < 0.5))
    np.testing.assert_allclose(found, x * X, rtol=1e-4)
    with pytest.raises(ValueError, match="finite"):
        PriorNoise(np.nan)


def test_bad_arguments(tiny):
    good = from_linen(MODULE, tiny, "v")
    with pytest.raises(TypeError, match="from_linen"):
        propagate_encoder(jd.Denoiser(lambda x, t: x, "v"), TABLEAU, 2, X)
    with pytest.raises(ValueError, match="training mode"):
        train = from_linen(MODULE, tiny, "v", train=True, rngs={"label": jax.random.key(0)})
        propagate_encoder(train, TABLEAU, 2, X)
    for keys in ((1, 2), (), (0, 6)):
        with pytest.raises(ValueError, match="rows from 0 to 5, 0 among them"):
            propagate_encoder(good, TABLEAU, keys, X)
    with pytest.raises(ValueError, match="not stacked"):
        propagate_encoder(good, jd.solvers.stack([TABLEAU] * 2), 2, X)


# --- row 47's measures, on the trained digits network ---------------------------------------------

COUNT = 50


@pytest.fixture(scope="module")
def trained_rows():
    """Ten keys ("50ls2") of 50 DDIM steps: plain samples, fast ones, and inputs of the plain rows."""
    tableau = jd.solvers.ddim(jd.grids.uniform(PROCESS, 50, t_max=0.99, t_min=0.01))
    x, label = PROCESS.prior(jax.random.key(0), (COUNT, 8, 8, 1)), jnp.arange(COUNT) % 10
    plain = digits_denoiser("large")
    inputs = jd.sample(plain, tableau, x, cond=label, save="trajectory")
    fast = propagate_encoder(plain, tableau, "50ls2", x)
    state = jd.sample(fast, tableau, x, cond=label, save="state")
    return tableau, label, inputs, state


def test_ten_keys_of_fifty_keep_the_quality(trained_rows):
    _, _, inputs, state = trained_rows
    assert 50 / int(state.memory.encoded) == 5.0
    real = digits("all").x

    def distance(x):
        return sliced_wasserstein(np.clip(x, -1, 1), real, jax.random.key(1), 128)

    assert distance(state.registers[0]) <= 1.1 * distance(inputs[-1])


def test_the_encoder_changes_no_more_than_the_decoder(trained_rows):
    """Relative change from row to row, of the bottleneck and of the last block.

    The paper's networks have a ratio far below 1 (half was the goal here). This one of 8 x 8 pixels has
    about 1: 0.063 a step for the bottleneck, 0.070 for the last block over all rows; the encoder's
    stays below in the last third only.
    """
    tableau, label, inputs, _ = trained_rows
    module, weights = experiment("large").module, variables("large")
    names = ("middle_block_1", "up_0_block_1")

    @jax.jit
    def features(x, t):
        _, kept = module.apply(
            weights, x, t, label[:20], capture_intermediates=lambda m, _: m.name in names,
            mutable=["intermediates"],
        )  # fmt: skip
        return [kept["intermediates"][name]["__call__"][0] for name in names]

    rows = [features(inputs[i][:20], jnp.float32(tableau.t[i])) for i in range(0, 50, 7)]
    close = [features(inputs[i + 1][:20], jnp.float32(tableau.t[i + 1])) for i in range(0, 49, 7)]

    def change(part):
        gaps = [
            np.linalg.norm(b[part] - a[part]) / np.linalg.norm(a[part]) for a, b in zip(rows, close)
        ]
        return float(np.mean(gaps))

    assert 0.8 < change(0) / change(1) < 1.1


def test_the_operations_saved():
    """Counted on the digits network: 10 of 50 encoders leave this share of the operations."""
    module, weights = experiment("large").module, variables("large")
    x, t = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
    label = jnp.zeros(1, int)
    encode = functools.partial(module.apply, weights, method="encode")
    decode = functools.partial(module.apply, weights, method="decode")
    down = count(encode, x, t, label)
    up = count(decode, jax.eval_shape(encode, x, t, label), t, label)
    whole = count(functools.partial(module.apply, weights), x, t, label)
    # Both parts embed the time: two products of the embedding more.
    embedding = 2 * 24 * 96 + 2 * 96 * 96
    assert down + up == whole + embedding
    # 28% of the operations are the encoder's: 10 of its runs in 50 rows leave 78%.
    assert round((10 * down + 50 * up) / (50 * whole), 2) == 0.78
