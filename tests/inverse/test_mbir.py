"""DiffusionMBIR (Chung et al. 2023): its ADMM iteration, and volumes of digits from four projections."""

import dataclasses

import exact_digits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.inverse import Measurement, SliceTV, inpainting, matrix, mbir, radon, total_variation

KEY = jax.random.key(0)
PROCESS = jd.processes.ve(0.02, 20.0)
SHAPE = (8, 8, 1)


def test_an_iteration_is_the_published_one(x64):
    """`CS_routine` of the published code with one step of conjugate gradients, in NumPy."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 6))
    x, z, w, truth = rng.normal(size=(4, 7, 6))
    y, lam, rho = truth @ a.T, 0.04, 10.0

    def d(x):
        return np.roll(x, -1, 0) - x

    def dt(x):
        return np.roll(x, 1, 0) - x

    b = y @ a + rho * (dt(z) - dt(w))
    r = b - (x @ a.T @ a + rho * dt(d(x)))
    moved = x + np.sum(r * r) / np.sum(r * (r @ a.T @ a + rho * dt(d(r)))) * r
    wanted = d(moved) + w
    split = np.sign(wanted) * np.maximum(np.abs(wanted) - lam / rho, 0)
    model = SliceTV(lam, rho, periodic=True, iterations=1, tolerance=0.0)
    known = Measurement(matrix(a), y, 0.0)
    got = jax.jit(model.step)(known, *(jnp.asarray(c) for c in (x, z, w)))
    for ours, theirs in zip(got, (moved, split, wanted - split)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_total_variation_of_two_slices_in_closed_form(x64):
    """A = I: the slices move towards each other by at most lam, and meet halfway."""
    y = np.array([[1.0, 0.2, -3.0], [0.0, 0.1, 4.0]])
    known = Measurement(matrix(np.eye(3)), y, 0.0)
    got = total_variation(known, SliceTV(0.3, 1.0, tolerance=0.0), jnp.zeros((2, 3)), 200)
    move = np.clip((y[1] - y[0]) / 2, -0.3, 0.3)
    np.testing.assert_allclose(got, [y[0] + move, y[1] - move], atol=1e-8)


def blends(split, places, seed, count=1):
    """Volumes between two digits of a class: [count, slices, 8, 8, 1]."""
    source, rng, found = jd.data.digits(split), np.random.default_rng(seed), []
    for _ in range(count):
        same = np.flatnonzero(source.label == rng.integers(10))
        a, b = source.x[rng.choice(same, 2, replace=False)]
        s = np.asarray(places(rng))[:, None, None, None]
        found.append((1 - s) * a + s * b)
    return np.stack(found).astype(np.float32)


def test_volumes_from_four_projections():
    """Works when (DiffusionMBIR): PSNR above slices alone and TV alone, and smoother errors in z.

    Three held-out volumes of 8 slices, 4 views; the prior's images are single slices of others. All
    samplers are one vmapped program, lam = 0 being diffusion and data consistency slice by slice.
    """
    images = blends("train", lambda rng: [rng.uniform()], 0, 300)[:, 0]
    net = exact_digits.denoiser(images, np.zeros(300, int))
    scan = radon(SHAPE, np.pi * np.arange(4) / 4)
    operator = matrix(scan.dense(), SHAPE)
    volumes = blends("test", lambda rng: np.linspace(0, 1, 8), 10, 3)
    grid = jd.grids.half_log_snr(PROCESS, 40, end="zero")
    tableau = jd.solvers.predictor_corrector(grid)
    y = jnp.stack([operator(v) for v in volumes])
    x_T = PROCESS.prior(KEY, (8, *SHAPE))

    def run(lam, y):
        known = Measurement(operator, y, 0.0)
        control = mbir(tableau, grid, known, SliceTV(lam, 1.0))
        plain = total_variation(known, SliceTV(lam, 1.0), jnp.zeros_like(x_T), 100)
        return jd.sample(net, tableau, x_T, KEY, control=control), plain

    lams = jnp.asarray([0.0, 0.03, 0.1])
    found, plain = jax.vmap(jax.vmap(run, (None, 0)), (0, None))(lams, y)

    def psnr(x):
        return float(10 * np.log10(4 / np.mean((np.asarray(x) - volumes) ** 2)))

    alone, ours, tv = psnr(found[0]), psnr(found[2]), max(psnr(p) for p in plain[1:])
    assert ours > alone + 0.5 and ours > tv + 2.0, (ours, alone, tv)
    between = [
        np.abs(np.diff(np.asarray(f) - volumes, axis=1)).mean() for f in (found[0], found[2])
    ]
    assert between[1] < 0.5 * between[0], between
    # The last projection: what is measured is met.
    apart = np.asarray(jax.vmap(operator)(found[2]) - y)
    assert np.sqrt(np.mean(apart**2)) < 0.05 * np.sqrt(np.mean(y**2))


def test_conjugate_gradients_converge():
    """Works when (DiffusionMBIR): residual below 1e-4 of both sides, on a view-limited scan."""
    scan = radon(SHAPE, np.pi * np.arange(4) / 4)
    known = Measurement(
        matrix(scan.dense(), SHAPE), jnp.ones((8, *scan.measured)).reshape(8, -1), 0.0
    )
    model = SliceTV(0.1, 1.0, iterations=300)
    z, w, x = jax.random.normal(KEY, (3, 8, *SHAPE))
    b = model.target(known, z, w)
    left = b - model.normal(known, model.solve(known, x, b))
    assert jnp.linalg.norm(left) < 1e-4 * jnp.linalg.norm(b)


def test_without_lam_slices_are_alone():
    """Works when (DiffusionMBIR): lam = 0 is the method slice by slice."""
    images = jd.data.digits("train").x[:20]
    net = exact_digits.denoiser(images, np.zeros(20, int))
    operator = inpainting(np.random.default_rng(0).integers(0, 2, SHAPE))
    y = operator(jnp.asarray(images[:3]))
    grid = jd.grids.half_log_snr(PROCESS, 8, end="zero")
    tableau = jd.solvers.ddim(grid)
    x_T = PROCESS.prior(KEY, (3, *SHAPE))

    def run(x, y):
        control = mbir(tableau, grid, Measurement(operator, y, 0.0), SliceTV(0.0))
        return jd.sample(net, tableau, x, control=control)

    alone = jax.vmap(run)(x_T[:, None], y[:, None])[:, 0]
    np.testing.assert_allclose(run(x_T, y), alone, atol=1e-4)


def test_wrong_arguments_are_named():
    grid = jd.grids.half_log_snr(PROCESS, 4, end="zero")
    tableau, known = jd.solvers.ddim(grid), Measurement(matrix(np.eye(3)), np.ones(3), 0.0)
    with pytest.raises(ValueError, match="final must be .* got 'both'"):
        mbir(tableau, grid, known, final="both")
    with pytest.raises(ValueError, match="lam must be at least 0.*got -1.0"):
        mbir(tableau, grid, known, SliceTV(-1.0))
    with pytest.raises(TypeError, match="mbir takes a Tableau and its Grid, got Grid"):
        mbir(grid, grid, known)
    net = jd.gaussian_mixture(np.zeros((1, 4)), [1.0], [1.0])
    with pytest.raises(ValueError, match=r"mbir: the state has shape \(2, 4\)"):
        jd.sample(net, tableau, jnp.zeros((2, 4)), control=mbir(tableau, grid, known))


def test_the_last_sweep_is_the_published_one(x64):
    """x + A^T (y - A x) / (A^T A 1), entry by entry."""
    a = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    y, x = np.array([[1.0, -1.0]]), np.array([[0.3, 0.2, -0.5]])
    control = mbir(
        jd.solvers.ddim(grid := jd.grids.half_log_snr(PROCESS, 2)), grid,
        Measurement(matrix(a), y, 0.0), final="sweep",
    )  # fmt: skip
    want = x + (y - x @ a.T) @ a / (np.ones(3) @ a.T @ a)
    np.testing.assert_allclose(control._finish(jnp.asarray(x)), want, rtol=1e-12)
    kept = dataclasses.replace(control, final="none")
    np.testing.assert_array_equal(kept._finish(jnp.asarray(x)), x)
