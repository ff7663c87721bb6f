"""Operators of inverse problems against their matrices, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from operator_cases import CASES, COLOUR, IMAGE, ITERATED, LOPSIDED, MASK

from jaxdiff import inverse

over_all = pytest.mark.parametrize("name", CASES)
RIDGES = np.array([0.3, 2.0])


def flat(a):
    return np.asarray(a, np.float64).reshape(len(a), -1)


@functools.cache
def computed(name):
    """(operator, x, y, everything it does with them), in one program of float64."""
    with jax.enable_x64(True):
        operator = CASES[name]()
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(2, *operator.shape)))
        y = jnp.asarray(rng.normal(size=(2, *operator.measured)))
        spectrum = operator.spectrum()

        # One of those that iterate will do: their solves are one piece of code, long to compile.
        skipped = name in ITERATED - {"reflected blur"}

        def everything(operator, spectrum, x, y):
            n, m = spectrum.right(x).shape[1], spectrum.left(y).shape[1]
            right = spectrum.right(jnp.eye(n).reshape(n, *operator.shape))
            left = spectrum.left(jnp.eye(m).reshape(m, *operator.measured))
            return {
                "dense": operator.dense(), "A x": operator(x), "A^T y": operator.adjoint(y),
                "V": right, "U": left,
                "I": (spectrum.right_back(right), spectrum.left_back(left)),
                **({} if skipped else {
                    "solve": operator.solve(y, RIDGES, rtol=1e-12),
                    "solve 1": operator.solve(y, 0.3, rtol=1e-12)[:1],
                    "pinv": operator.pinv(y),
                }),
            }  # fmt: skip

        found = jax.jit(everything)(operator, spectrum, x, y)
        assert (operator._left() is None) == (name in ITERATED)
        return spectrum, x, y, jax.tree.map(np.asarray, found)


@over_all
def test_the_adjoint_and_the_matrix(name):
    """<A x, y> = <x, A^T y>, and both are what the matrix does."""
    _, x, y, found = computed(name)
    np.testing.assert_allclose(np.vdot(found["A x"], y), np.vdot(x, found["A^T y"]), rtol=1e-12)
    np.testing.assert_allclose(flat(found["A x"]), flat(x) @ found["dense"].T, atol=1e-12)
    np.testing.assert_allclose(flat(found["A^T y"]), flat(y) @ found["dense"], atol=1e-12)


@over_all
def test_the_spectrum_is_a_singular_value_decomposition(name):
    spectrum, _, _, found = computed(name)
    # Rows are V^T e_i and U^T e_i: V and U themselves.
    dense, right, left = found["dense"], found["V"], found["U"]
    for basis, same in zip((right, left), found["I"]):
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
        np.testing.assert_allclose(flat(same), np.eye(len(basis)), atol=1e-12)
    r = min(dense.shape)
    values = np.asarray(spectrum.values)
    assert values.shape == (r,) and np.all(values >= 0)
    np.testing.assert_allclose((left[:, :r] * values) @ right[:, :r].T, dense, atol=1e-12)
    want = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(np.sort(values)[::-1], want, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CASES.keys() - ITERATED) + ["reflected blur"])
def test_solve_and_pinv_against_dense_algebra(name):
    """Of data that no x explains exactly; a ridge for all, and one each."""
    _, _, y, found = computed(name)
    dense = found["dense"]
    for ridge, row, got in zip(RIDGES, flat(y), flat(found["solve"])):
        want = np.linalg.solve(dense @ dense.T + ridge * np.eye(len(dense)), row)
        np.testing.assert_allclose(got, want, atol=1e-9)
    np.testing.assert_allclose(found["solve 1"], found["solve"][:1], atol=1e-9)
    want = flat(y) @ np.linalg.pinv(dense, rcond=1e-12).T
    atol = 1e-5 if name in ITERATED else 1e-10
    np.testing.assert_allclose(flat(found["pinv"]), want, atol=atol)


def test_the_pseudo_inverse_is_whole_at_the_size_of_images():
    """float32, 256 x 256 x 3: a blur whose gain is 0.2 to 1 is undone, and a bicubic reduction."""
    shape = (256, 256, 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *shape)), jnp.float32)
    kernel = np.zeros((3, 3))
    kernel[1, 1], kernel[0, 1], kernel[2, 1], kernel[1, 0], kernel[1, 2] = 0.6, 0.1, 0.1, 0.1, 0.1
    op = inverse.blur(shape, kernel)
    np.testing.assert_allclose(op.pinv(op(x)), x, atol=1e-4)
    np.testing.assert_allclose(op.solve(op(op.adjoint(x)), 0.0), x, atol=1e-3)
    down = inverse.bicubic_down(shape, 4)
    y = x[:, :64, :64]
    np.testing.assert_allclose(down(down.pinv(y)), y, atol=1e-4)


def test_a_matrix_without_full_rank():
    """In float32 too what rounding leaves of a singular value of 0 is not divided by."""
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(6, 2)) @ rng.normal(size=(2, 5))
    op, y = inverse.matrix(dense), rng.normal(size=(3, 6))
    inverted = np.linalg.pinv(dense, rcond=1e-10)
    seen = jnp.asarray(y, jnp.float32)
    np.testing.assert_allclose(op.pinv(seen), y @ inverted.T, atol=1e-4)
    want = y @ inverted.T @ inverted
    np.testing.assert_allclose(op.solve(seen, 0.0), want, atol=1e-4)


def test_convolution_is_scipys(x64):
    x = np.random.default_rng(0).normal(size=(1, *IMAGE))
    scipy_modes = {"wrap": "wrap", "reflect": "mirror", "symmetric": "reflect", "edge": "nearest",
                   "constant": "constant"}  # fmt: skip
    for mode, theirs in scipy_modes.items():
        for kernel in (LOPSIDED, LOPSIDED[:2, :4]):
            got = inverse.blur(IMAGE, kernel, mode)(jnp.asarray(x))[0]
            want = scipy.ndimage.convolve(x[0], kernel, mode=theirs)
            np.testing.assert_allclose(got, want, atol=1e-12)


def test_bicubic_is_jax_images(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *COLOUR)))
    want = jax.image.resize(x, (1, 2, 3, 2), "cubic", antialias=True)
    np.testing.assert_allclose(inverse.bicubic_down(COLOUR, 2)(x), want, atol=1e-6)


def test_fourier_holds_the_complex_coefficients(x64):
    x = np.random.default_rng(0).normal(size=(1, *IMAGE))
    f = np.fft.fft2(x, norm="ortho")
    op = inverse.fourier(MASK)
    known = MASK | np.roll(MASK[::-1, ::-1], (1, 1), (0, 1))
    np.testing.assert_allclose(op(jnp.asarray(x)), known * (f.real - f.imag), atol=1e-12)


def test_radon_projects(x64):
    """Mass is kept, a point is where the angle puts it, and 0 and 90 degrees are sums of pixels."""
    shape = (9, 9)
    x = np.zeros((1, *shape))
    x[0, 2, 6] = 2.0  # 2 to the right of the centre, 2 above it
    y = np.asarray(inverse.radon(shape, [0.0, np.pi / 2, 0.7], detectors=13)(jnp.asarray(x))[0])
    np.testing.assert_allclose(y.sum(1), 2.0, rtol=0.1)
    s = np.arange(13) - 6
    for row, angle in zip(y, (0.0, np.pi / 2, 0.7)):
        np.testing.assert_allclose(row @ s / row.sum(), 2 * np.cos(angle) + 2 * np.sin(angle), atol=0.1)
    image = np.random.default_rng(0).normal(size=(1, *shape))
    y = inverse.radon(shape, [0.0, np.pi / 2], detectors=9)(jnp.asarray(image))[0]
    np.testing.assert_allclose(y[0], image[0].sum(0), atol=1e-12)
    np.testing.assert_allclose(y[1], image[0].sum(1)[::-1], atol=1e-12)


def test_kernels():
    kernel = inverse.gaussian_kernel(9, 1.5)
    offsets = np.arange(9) - 4
    np.testing.assert_allclose(kernel.sum(), 1.0)
    np.testing.assert_allclose(kernel.sum(0) @ offsets**2, 1.5**2, rtol=0.04)  # 2.7 std are kept
    np.testing.assert_allclose(kernel[4, 6] / kernel[4, 4], np.exp(-0.5 * (2 / 1.5) ** 2))
    kernel = inverse.motion_kernel(9, 6.0, np.pi / 6)
    across, up = kernel.sum(0) @ offsets, -kernel.sum(1) @ offsets
    np.testing.assert_allclose([kernel.sum(), across, up], [1, 0, 0], atol=1e-12)
    both = -offsets[:, None] * offsets[None] * kernel  # x y, y upwards
    np.testing.assert_allclose(both.sum(), 36 / 12 * np.cos(np.pi / 6) * np.sin(np.pi / 6), rtol=0.03)


def test_operators_are_data():
    """Another mask of the shape, under jit and vmap; gradients with respect to a kernel."""
    x = jnp.ones((2, 3))
    masks = jnp.asarray([[1.0, 0, 1], [0, 1, 1]])
    got = jax.jit(jax.vmap(lambda m: inverse.inpainting(m).adjoint(x)))(masks)
    np.testing.assert_array_equal(got, jnp.broadcast_to(masks[:, None], (2, 2, 3)))
    ops = jax.tree.map(lambda *a: jnp.stack(a), *(inverse.inpainting(m) for m in masks))
    got = jax.vmap(lambda op: op(x))(ops)
    np.testing.assert_array_equal(got, jnp.broadcast_to(masks[:, None], (2, 2, 3)))
    gradient = jax.grad(lambda k: jnp.sum(inverse.blur((4, 4), k)(jnp.ones((1, 4, 4)))))
    np.testing.assert_allclose(gradient(jnp.ones((3, 3))), np.full((3, 3), 16.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: inverse.inpainting([0.0, 0.5]), ValueError, "0 or 1"),
        (lambda: inverse.inpainting(np.ones((2, 3)), (3, 2)), ValueError, "does not fit"),
        (lambda: inverse.box_down((6, 8), 4), ValueError, "divides"),
        (lambda: inverse.box_down((6,), 2), ValueError, "at least 2"),
        (lambda: inverse.bicubic_down((6, 8), True), ValueError, "divides"),
        (lambda: inverse.blur((2, 2), np.ones((3, 3))), ValueError, "no larger"),
        (lambda: inverse.blur((4, 4), np.full((3, 3), np.nan)), ValueError, "finite"),
        (lambda: inverse.blur((4, 4), np.ones((3, 3)), "mirror"), ValueError, "choose from"),
        (lambda: inverse.radon((4, 4), []), ValueError, "at least one"),
        (lambda: inverse.matrix(np.ones(3)), ValueError, "matrix"),
        (lambda: inverse.matrix(np.ones((2, 3)), (2, 2)), ValueError, "3 columns"),
        (lambda: inverse.gaussian_kernel(4, 1.0), ValueError, "odd"),
        (lambda: inverse.gaussian_kernel(5, 0.0), ValueError, "positive"),
        (lambda: inverse.motion_kernel(5, 9.0), ValueError, "does not fit"),
        (lambda: inverse.compose(inverse.inpainting(np.ones(3)), "f"), TypeError, "str"),
        (
            lambda: inverse.inpainting(np.ones(3)) @ inverse.matrix(np.ones((2, 3))),
            ValueError, "measures",
        ),
        (lambda: inverse.inpainting(np.ones(3))(jnp.ones((2, 4))), ValueError, r"\(2, 4\)"),
        (lambda: inverse.inpainting(np.ones(3)).adjoint(jnp.ones(3)), ValueError, r"\(3,\)"),
        (lambda: inverse.inpainting(np.ones(3)).solve(jnp.ones((1, 3)), -1), ValueError, "-1"),
        (
            lambda: inverse.blur((80, 80), np.ones((3, 3)), "edge").spectrum(),
            ValueError, "too large",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
