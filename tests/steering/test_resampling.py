"""Resampling schemes against their counts' exact mean and bounds, inside groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.steering import SCHEMES, Resampler, ancestors, effective_sample_size

WEIGHTS = np.array([0.05, 0.3, 0.0, 0.15, 0.5])
with np.errstate(divide="ignore"):
    LOG = np.log(WEIGHTS) + 3.0  # a constant changes nothing


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_have_the_right_mean_and_the_scheme_s_bounds(scheme):
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda k: ancestors(k, LOG, scheme))(keys))
    copies = np.stack([np.sum(drawn == i, 1) for i in range(5)], 1)
    wanted = 5 * WEIGHTS
    # Binomial counts have the largest variance of the four: four standard errors of it.
    error = np.sqrt(wanted * (1 - WEIGHTS) / len(keys))
    assert np.all(np.abs(copies.mean(0) - wanted) <= 4 * error)
    assert copies[:, 2].max() == 0
    binomial = wanted * (1 - WEIGHTS)
    if scheme == "multinomial":
        np.testing.assert_allclose(copies.var(0), binomial, rtol=0.1, atol=1e-12)
    else:
        assert np.all(copies.var(0) <= binomial + 1e-9)
    if scheme == "systematic":
        assert np.all((copies >= np.floor(wanted)) & (copies <= np.ceil(wanted)))
    if scheme == "residual":
        assert np.all(copies >= np.floor(wanted))


@pytest.mark.parametrize("scheme", ["systematic", "residual"])
def test_equal_weights_keep_every_particle(scheme):
    """For any number of them, also where 1 / k is not a float."""
    draw = jax.jit(ancestors, static_argnums=2)
    for k in (1, 49):
        found = draw(jax.random.key(k), np.full(k, -700.0, np.float32), scheme)
        np.testing.assert_array_equal(np.sort(found), np.arange(k))


def test_effective_sample_size():
    np.testing.assert_allclose(effective_sample_size(LOG), 1.0 / np.sum(WEIGHTS**2), rtol=1e-6)
    rows = np.array([[0.0, 0.0, 0.0, 0.0], [0.0, -np.inf, -np.inf, -np.inf]])
    np.testing.assert_allclose(effective_sample_size(rows + 500.0), [4.0, 1.0], rtol=1e-5)


def test_groups_exchange_nothing_and_are_judged_apart():
    """Three groups of four: equal weights, one survivor, and one below the threshold."""
    with np.errstate(divide="ignore"):
        log_weights = np.log([1.0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0.01, 0.01]).astype(np.float32)
    index, chosen = jax.jit(Resampler(4, threshold=0.6))(jax.random.key(0), log_weights)
    np.testing.assert_array_equal(chosen, [False, True, True])
    index = np.asarray(index)
    np.testing.assert_array_equal(index[:4], np.arange(4))
    np.testing.assert_array_equal(index[4:8], [6] * 4)
    assert set(index[8:]) == {8, 9}
    # A group draws by its first sample's key: in another batch, the same.
    keys = jd.sample_keys(jax.random.key(1), np.arange(12))
    draw = jax.jit(Resampler(4, "multinomial", 1))
    (whole, _), (alone, _) = draw(keys, log_weights), draw(keys[8:], log_weights[8:])
    np.testing.assert_array_equal(whole[8:] - 8, alone)


def test_bad_input_is_named():
    key, nan = jax.random.key(0), np.float32(np.nan)
    with pytest.raises(ValueError, match="particles must be an integer from 1 .* got 0"):
        Resampler(0)
    with pytest.raises(ValueError, match="scheme must be one of .* got 'best'"):
        ancestors(key, LOG, "best")
    with pytest.raises(ValueError, match="threshold must be a finite number >= 0, got -1"):
        Resampler(2, threshold=-1)
    with pytest.raises(ValueError, match="log_weights must be .k. with k >= 1"):
        ancestors(key, np.zeros(0, np.float32))
    with pytest.raises(ValueError, match="groups of 3 particles .* multiple, got 4"):
        Resampler(3)(key, jnp.zeros(4))
    with pytest.raises(ValueError, match="pass key="):
        Resampler(2)(None, jnp.zeros(4))
    for bad in ([-np.inf, -np.inf], [0.0, nan], [0.0, np.inf]):
        with pytest.raises(ValueError, match="degenerate weights"):
            ancestors(key, np.array(bad, np.float32))


def test_degenerate_weights_inside_a_program_are_an_error_too():
    run = jax.jit(lambda w: ancestors(jax.random.key(0), w))
    run(jnp.zeros(2)).block_until_ready()
    with pytest.raises(Exception, match="degenerate weights"):
        run(jnp.full(2, -jnp.inf)).block_until_ready()
