"""phi functions against 60-digit series, and the weights they give against quadrature."""

import functools
from decimal import Decimal, localcontext
from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from jaxdiff.solvers.phi import interpolation_weights, phi

pytestmark = pytest.mark.filterwarnings("error:.*:RuntimeWarning")


@functools.cache
def exact(k, h):
    """sum_j h^j / (j + k)!, with digits enough for the cancellation of the alternating sum."""
    with localcontext() as context:
        context.prec = 90
        h, term, total, j = Decimal(h), Decimal(1) / factorial(k), Decimal(0), 0
        while j < abs(h) or abs(term) > Decimal(10) ** -85:
            total += term
            j += 1
            term *= h / (j + k)
        return total


def relative_error(got, k, h):
    with localcontext() as context:
        context.prec = 60
        return float(abs((Decimal(float(got)) - exact(k, h)) / exact(k, h)))


def test_the_reference_satisfies_the_recurrence():
    """phi_0 = exp; h phi_k + 1 / (k-1)! = phi_{k-1}: the definition, in exact decimals."""
    with localcontext() as context:
        context.prec = 60
        for h in (-50.0, -1.0, 1e-8, 0.5, 50.0):
            assert abs(exact(0, h) / Decimal(h).exp() - 1) < Decimal(10) ** -40
            for k in range(1, 6):
                left = Decimal(h) * exact(k, h) + Decimal(1) / factorial(k - 1)
                assert abs(left / exact(k - 1, h) - 1) < Decimal(10) ** -28


MAGNITUDES = np.unique(np.concatenate([
    np.geomspace(1e-8, 50, 120), np.linspace(1.9, 2.6, 29), [np.nextafter(2.0, 0), 2.0, 1e-300]
]))  # fmt: skip


@pytest.mark.parametrize("k", range(6))
def test_phi_from_tiny_to_large(k):
    """A few units in the last place from 1e-8 to 50, either sign; also around the switch at 2."""
    h = np.concatenate([-MAGNITUDES[::-1], [0.0], MAGNITUDES])
    got = phi(k, h)
    errors = [relative_error(g, k, float(x)) for g, x in zip(got, h)]
    # The recurrence loses a factor of about (k + 1) / h a level; its worst place is h = 2.
    assert max(errors) < (1e-15 if k < 4 else 1e-14)
    assert got[len(MAGNITUDES)] == 1 / factorial(k)
    assert got.dtype == np.float64 and phi(k, 0.5) == phi(k, np.array([0.5]))[0]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.integers(0, 5), st.floats(-50, 50, allow_subnormal=False))
def test_phi_anywhere(k, h):
    assert relative_error(phi(k, h), k, h) < 1e-14


def test_phi_on_a_device(x64):
    h = np.concatenate([-MAGNITUDES, [0.0], MAGNITUDES])
    for k in range(5):
        got = phi(k, jnp.asarray(h))
        assert isinstance(got, jax.Array)
        np.testing.assert_allclose(got, phi(k, h), rtol=2e-14)


def test_phi_in_float32():
    h = np.concatenate([-MAGNITUDES, MAGNITUDES]).astype(np.float32)
    for k in range(4):
        got = phi(k, jnp.asarray(h))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, phi(k, h.astype(np.float64)), rtol=1e-5)


def test_the_derivative_is_finite_and_right_everywhere(x64):
    """phi_k' = sum_j j h^(j-1) / (j + k)! = phi_k - k phi_{k+1}; at 0 it is 1 / (k + 1)!."""
    h = np.array([-50.0, -2.0, -1e-8, 0.0, 1e-8, 1.3, 2.0, 20.0])

    @jax.jit
    def slopes(h):
        return [jax.vmap(jax.grad(functools.partial(phi, k)))(h) for k in range(5)]

    for k, got in enumerate(slopes(jnp.asarray(h))):
        for slope, x in zip(got, h):
            with localcontext() as context:
                context.prec = 90
                # Term by term: j / (j + k)! = 1 / (j + k - 1)! - k / (j + k)!.
                expected = exact(k, float(x)) - k * exact(k + 1, float(x))
            np.testing.assert_allclose(slope, float(expected), rtol=1e-12)
        np.testing.assert_allclose(got[3], 1 / factorial(k + 1), rtol=1e-15)


def test_phi_is_the_integral():
    """phi_k(h) = int_0^1 exp((1 - s) h) s^(k-1) / (k-1)! ds (Hochbruck & Ostermann 2010, 2.10)."""
    for k in (1, 2, 3, 4):
        for h in (-8.0, -0.3, 0.7, 5.0):
            value, _ = quad(
                lambda s, k=k, h=h: np.exp((1 - s) * h) * s ** (k - 1) / factorial(k - 1), 0, 1,
                epsabs=1e-15, epsrel=1e-13,
            )  # fmt: skip
            np.testing.assert_allclose(phi(k, h), value, rtol=1e-12)


def test_negative_orders_are_refused():
    with pytest.raises(ValueError, match="k >= 0, got -1"):
        phi(-1, 0.5)


# --- interpolation weights ------------------------------------------------------------------------

OFFSETS = {
    "one": [0.0],
    "two": [0.0, -0.4],
    "three": [0.0, -0.4, -0.7],
    "uneven": [0.0, -0.05, -1.9],
    "with the step's end": [0.8, 0.0, -0.3],
    "four": [0.0, -0.3, -0.5, -1.0],
}


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("h", [0.8, 0.05, 3.0, -0.5])
def test_weights_integrate_each_lagrange_polynomial(offsets, sign, h):
    """b_k = int_0^h exp(sign (h - s)) l_k(s) ds."""
    got = interpolation_weights(offsets, h, sign)
    nodes = np.asarray(offsets)
    for k in range(len(nodes)):
        others = np.delete(nodes, k)

        def integrand(s, others=others, node=nodes[k]):
            return np.exp(sign * (h - s)) * np.prod((s - others) / (node - others))

        expected, _ = quad(integrand, 0, h, epsabs=1e-14, epsrel=1e-12)
        np.testing.assert_allclose(got[k], expected, rtol=1e-10, atol=1e-12 * np.abs(got).max())


def test_weights_tend_to_adams_bashforth():
    """As h -> 0 the exponential is 1: the classical weights of equal steps."""
    h = 1e-6
    for classical in ([3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]):
        weights = interpolation_weights([-h * k for k in range(len(classical))], h)
        np.testing.assert_allclose(weights / h, classical, atol=3e-6)


def test_weights_sum_to_the_integral_of_one():
    """And are -expm1(-h) for one node: DDIM's step."""
    for h in (1e-8, 0.3, 20.0):
        whole = -np.expm1(-h)
        np.testing.assert_allclose(interpolation_weights([0.0], h), [whole], rtol=1e-15)
        offsets = [0.0, -0.7 * h, -1.1 * h]
        np.testing.assert_allclose(interpolation_weights(offsets, h).sum(), whole, rtol=1e-13)


def test_weights_of_traced_nodes(x64):
    """Differentiable in h and in the nodes."""

    def value(h, offset):
        return (interpolation_weights([0.0, offset, -1.0], h) * jnp.arange(1.0, 4)).sum()

    def host(h, offset):
        return (interpolation_weights([0.0, offset, -1.0], h) * np.arange(1.0, 4)).sum()

    at, step = (0.7, -0.4), 1e-6
    total, slopes = jax.jit(jax.value_and_grad(value, (0, 1)))(*map(jnp.asarray, at))
    np.testing.assert_allclose(total, host(*at), rtol=1e-13)
    expected = (
        (host(at[0] + step, at[1]) - host(at[0] - step, at[1])) / (2 * step),
        (host(at[0], at[1] + step) - host(at[0], at[1] - step)) / (2 * step),
    )
    np.testing.assert_allclose(slopes, expected, rtol=1e-8)
