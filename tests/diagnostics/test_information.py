"""Information from denoising errors against log p(x | y) - log p(x), and its decomposition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conditional import conditional_mixture, log_densities

import jaxdiff as jd
from jaxdiff import diagnostics

PROCESS = jd.processes.vp_cosine()
# Conditions: none; y1 (components 0 and 1); y2 (0 and 2); both (0).
NONE, FIRST, SECOND, BOTH = range(4)
SUBSETS = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], bool)
MEANS = 1.2 * np.random.default_rng(0).normal(size=(4, 3))
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def mixture():
    return conditional_mixture(MEANS, np.full(4, 0.5), SUBSETS)


@pytest.fixture(scope="module")
def examples():
    noise = 0.5 * np.random.default_rng(1).normal(size=(6, 3))
    return (MEANS[[0, 0, 0, 1, 2, 3]] + noise).astype(np.float32)


@pytest.fixture(scope="module")
def exact(mixture, examples):
    """i(x; y1), i(x; y2), i(x; y1, y2)."""
    log_p = log_densities(mixture, jnp.asarray(examples))
    return log_p[:, 1:] - log_p[:, :1]


@pytest.mark.parametrize("make", [
    lambda: diagnostics.uniform_nodes(PROCESS, 400),
    lambda: diagnostics.logistic_nodes(PROCESS, 400),
])  # fmt: skip
def test_information_is_a_difference_of_log_densities(mixture, examples, exact, make):
    """Within 0.05 nats by 400 nodes of the log-SNR, also where the condition is wrong."""
    found = diagnostics.pointwise_information(
        mixture, PROCESS, examples, FIRST, NONE, make(), KEY, draws=128, batch_size=8192
    )
    np.testing.assert_allclose(found, exact[:, 0], atol=0.05)
    assert np.ptp(exact[:, 0]) > 1


def test_information_beyond_a_condition(mixture, examples, exact):
    """i(x; y1 | y2) = i(x; y1, y2) - i(x; y2), one condition an example."""
    nodes = diagnostics.logistic_nodes(PROCESS, 400)
    cond, null = np.full(6, BOTH), np.full(6, SECOND)
    found = diagnostics.pointwise_information(
        mixture, PROCESS, examples, cond, null, nodes, KEY, draws=128, batch_size=8192
    )
    np.testing.assert_allclose(found, exact[:, 2] - exact[:, 1], atol=0.05)


def test_both_forms_have_the_same_mean():
    """Over x of p(x | y), with y one of two components: the mutual information, once by quadrature."""
    mixture = conditional_mixture([[-0.8], [0.8]], np.ones(2), [[1, 1], [1, 0]])
    u, w = np.polynomial.hermite_e.hermegauss(60)
    x = (u - 0.8)[:, None].astype(np.float32)
    log_p = log_densities(mixture, jnp.asarray(x))
    w = w / w.sum()
    want = w @ (log_p[:, 1] - log_p[:, 0])
    nodes = diagnostics.logistic_nodes(PROCESS, 100)
    orthogonal = diagnostics.pointwise_information(
        mixture, PROCESS, x, 1, 0, nodes, KEY, draws=16, form="orthogonal", batch_size=8192
    )
    assert np.all(orthogonal >= 0)
    np.testing.assert_allclose(w @ orthogonal, want, atol=0.01)


def test_a_decomposition_adds_up_and_its_maps_do(mixture, examples):
    nodes = diagnostics.logistic_nodes(PROCESS, 50)
    conds = (FIRST, SECOND, BOTH, NONE)
    whole = diagnostics.pointwise_information(
        mixture, PROCESS, examples, BOTH, NONE, nodes, KEY, draws=4
    )
    maps = diagnostics.pointwise_information(
        mixture, PROCESS, examples, BOTH, NONE, nodes, KEY, draws=4, by_element=True
    )
    np.testing.assert_allclose(maps.sum(1), whole, atol=1e-4)
    for surprisals in (None, (np.log(2), np.log(2))):
        parts = diagnostics.partial_information(
            mixture, PROCESS, examples, *conds, nodes, KEY, draws=4, surprisals=surprisals
        )
        np.testing.assert_allclose(sum(parts), whole, atol=1e-6 * np.abs(whole).max() + 1e-6)
    split = diagnostics.partial_information(
        mixture, PROCESS, examples, *conds, nodes, KEY, draws=4, by_element=True
    )
    np.testing.assert_allclose(sum(split), maps, atol=1e-5)
    with pytest.raises(ValueError, match="surprisals are of whole examples"):
        diagnostics.partial_information(
            mixture, PROCESS, examples, *conds, nodes, KEY, surprisals=surprisals, by_element=True
        )
    twice = diagnostics.partial_information(
        mixture, PROCESS, examples, FIRST, FIRST, FIRST, NONE, nodes, KEY, draws=4
    )
    assert max(np.abs(part).max() for part in twice[1:]) < 0.05
    assert np.abs(twice.redundancy).max() > 0.5


def averaged(distribution):
    """Mean (R, U1, U2, S) in bits of a table {(s1, s2, t): p}, by Finn & Lizier's redundancy."""

    def log_p(**known):
        return np.log2(sum(
            p for s, p in distribution.items()
            if all(s[("s1", "s2", "t").index(k)] == v for k, v in known.items())
        ))  # fmt: skip

    total = np.zeros(4)
    for (s1, s2, t), p in distribution.items():
        h = [-log_p(s1=s1), -log_p(s2=s2)]
        i = [
            log_p(**known, t=t) - log_p(t=t) - log_p(**known)
            for known in ({"s1": s1}, {"s2": s2}, {"s1": s1, "s2": s2})
        ]
        total += p * np.array(diagnostics.decompose(*i, surprisals=h))
    return total


@pytest.mark.parametrize(("table", "want"), [
    # "PwUnq": one of the two tells t, the other always says 0.
    ({(0, 1, 1): 0.25, (1, 0, 1): 0.25, (0, 2, 2): 0.25, (2, 0, 2): 0.25}, (0, 0.5, 0.5, 0)),
    # "RdnErr": s1 is t; s2 is wrong once in four.
    ({(0, 0, 0): 0.375, (1, 1, 1): 0.375, (0, 1, 0): 0.125, (1, 0, 1): 0.125}, (1, 0, -0.811, 0.811)),
    # "Xor" of fair bits: only both together tell.
    ({(a, b, a ^ b): 0.25 for a, b in itertools.product((0, 1), repeat=2)}, (0, 0, 0, 1)),
])  # fmt: skip
def test_redundancy_of_the_examples_of_finn_and_lizier(table, want):
    """PwUnq and RdnErr as they publish them (2018); xor by hand."""
    np.testing.assert_allclose(averaged(table), want, atol=5e-4)


def test_the_least_information_is_the_default_redundancy():
    found = diagnostics.decompose(np.array([1.0, 0.2]), np.array([0.5, 0.4]), np.array([1.2, 2.0]))
    np.testing.assert_allclose(found, [[0.5, 0.2], [0.5, 0.0], [0.0, 0.2], [0.2, 1.6]], atol=1e-12)


def test_nodes_integrate_the_log_snr():
    """A logistic's density integrates to its probability, an odd function to 0; ends to the span."""
    for nodes in (
        diagnostics.uniform_nodes(PROCESS, 2000, -8.0, 8.0),
        diagnostics.logistic_nodes(PROCESS, 2000, 0.5, 1.5, -8.0, 8.0),
    ):
        a = 2 * PROCESS.half_log_snr(nodes.t)
        density = 1 / (4 * np.cosh(0.5 * a) ** 2)
        np.testing.assert_allclose(nodes.weight @ density, np.tanh(4.0), atol=1e-5)
        np.testing.assert_allclose(nodes.weight @ np.ones(2000), 16.0, rtol=1e-2)
    drawn = diagnostics.logistic_nodes(PROCESS, 20_000, 0.5, 1.5, -8.0, 8.0, key=KEY)
    a = 2 * PROCESS.half_log_snr(drawn.t)
    found = drawn.weight @ (1 / (4 * np.cosh(0.5 * a) ** 2))
    np.testing.assert_allclose(found, np.tanh(4.0), atol=0.02)
    assert abs(found - np.tanh(4.0)) > 1e-6


@pytest.mark.parametrize(("change", "message"), [
    ({"form": "exact"}, "form must be one of"),
    ({"draws": 0}, "draws must be at least 1"),
    ({"cond": np.zeros(3, int)}, "conditions must be numbers or"),
    ({"cond": {"label": 1}}, "one structure"),
    ({"batch_size": 0}, "batch_size"),
    ({"x0": np.zeros((6, 3), int)}, "floating point"),
])  # fmt: skip
def test_bad_input(mixture, examples, change, message):
    call = {
        "x0": examples, "cond": 1, "null": 0,
        "nodes": diagnostics.uniform_nodes(PROCESS, 3), "key": KEY,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        diagnostics.pointwise_information(mixture, PROCESS, **(call | change))


def test_bad_nodes():
    with pytest.raises(ValueError, match="scale"):
        diagnostics.logistic_nodes(PROCESS, 3, scale=0.0)
    with pytest.raises(ValueError, match="low"):
        diagnostics.uniform_nodes(PROCESS, 3, 2.0, 1.0)
    with pytest.raises(ValueError, match="reaches an end"):
        diagnostics.uniform_nodes(jd.processes.flow(), 3)
