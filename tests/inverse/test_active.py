"""Active Diffusion Subsampling (Nolan et al. 2025): what it measures next, and what that is worth."""

import dataclasses

import exact_digits
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy.special import logsumexp

import jaxdiff as jd
from jaxdiff.inverse import (
    acquisition_times,
    active_dps,
    active_sample,
    corrected,
    dps_step,
    fourier,
    inpainting,
    matrix,
    measure,
)

KEY = jax.random.key(0)
PROCESS = jd.processes.vp_cosine()
LEVEL = (0.5, 0.8, 0.6)


def mixture(dim=4):
    rng = np.random.default_rng(5)
    return jd.gaussian_mixture(rng.normal(size=(6, dim)), [0.3] * 6, np.ones(6))


@pytest.mark.parametrize("criterion", ["entropy", "variance"])
def test_the_choice_is_the_published_one(x64, criterion):
    """The criterion in NumPy, over columns of two entries; what is measured is never chosen again."""
    net, operator = mixture(), inpainting(np.ones(4))
    groups, particles = np.array([0, 1, 0, 1]), 5
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2 * particles, 4)))
    y = np.random.default_rng(1).normal(size=(2, 4))
    active = active_dps(
        net, operator, y, particles, [0.9, 0.1], bandwidth=0.7, groups=groups, criterion=criterion
    )
    beliefs = np.asarray(jax.jit(lambda: net(x, *LEVEL))()).reshape(
        2, particles, 2, 2
    )  # [problem, particle, half, column]
    if criterion == "variance":
        score = beliefs.var(1).sum(1)
    else:
        apart = np.sum((beliefs[:, :, None] - beliefs[:, None]) ** 2, 3)
        score = logsumexp(apart / (2 * 0.7**2), axis=2).sum(1)
    evaluate = jax.jit(lambda t, memory: active.evaluate(x, t, *LEVEL[1:], None, memory))
    _, memory = evaluate(0.5, active.memory)
    np.testing.assert_array_equal(memory["order"][:, 0], score.argmax(1))
    np.testing.assert_array_equal(memory["mask"], groups == score.argmax(1)[:, None])
    # t = 0.5 is before the second acquisition; at 0.05 the other column is left.
    _, same = evaluate(0.5, memory)
    np.testing.assert_array_equal(same["mask"], memory["mask"])
    _, both = evaluate(0.05, memory)
    np.testing.assert_array_equal(
        both["order"], np.stack([score.argmax(1), 1 - score.argmax(1)], 1)
    )
    assert np.all(both["mask"] == 1) and both["taken"] == 2


def test_a_candidate_measured_in_part_is_taken_once():
    """Of two columns, the upper half of each measured: two acquisitions take both, in some order."""
    groups, mask = np.array([0, 1, 0, 1]), np.array([1.0, 1.0, 0.0, 0.0])
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4))), np.ones((2, 4))
    active = active_dps(
        mixture(), inpainting(np.ones(4)), y, 3, [0.9, 0.8], groups=groups, mask=mask
    )
    memory = active.memory
    for _ in range(2):
        _, memory = active.evaluate(x, *LEVEL, None, memory)
    assert np.sort(memory["order"], axis=1).tolist() == [[0, 1], [0, 1]]
    assert np.all(memory["mask"] == 1)
    full = np.array([1.0, 0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="2 acquisitions, but 1 candidates"):
        active_dps(
            mixture(), inpainting(np.ones(4)), y, 3, [0.9, 0.8], groups=groups, mask=full
        )


def test_with_everything_measured_it_is_dps(x64):
    """And it sees of y what the mask has: another y elsewhere changes nothing."""
    net, mask = mixture(), np.array([1.0, 0.0, 1.0, 0.0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
    y = np.random.default_rng(1).normal(size=(1, 4))
    other = np.where(mask > 0, y, 9.0)
    known = measure(inpainting(mask), jnp.repeat(jnp.asarray(y), 6, 0), 0.0)
    want = jax.jit(lambda: dps_step(net, known, 0.6)(x, *LEVEL))()
    for shown in (y, other):
        active = active_dps(net, inpainting(np.ones(4)), shown, 6, [0.1], 0.6, mask=mask)
        got = jax.jit(lambda active=active: active(x, *LEVEL))()
        np.testing.assert_allclose(got[1], want[1], rtol=1e-10)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-10)


def test_digits_from_ten_chosen_pixels():
    """Works when (ADS): MAE >= 15% below random masks and below the data-variance mask.

    16 particles, 10 of 64 pixels of 16 held-out digits, exact empirical denoiser of 300 images. One
    program: the fixed masks are masks from the start, with nothing left to acquire. DPS of 60 steps is
    blind at the end of the published window (0.8 of the steps): it is 0.4 here.
    """
    problems, particles, count = 16, 16, 10
    train, truth = jd.data.digits("train").x[:300], jd.data.digits("test").x[:problems]
    net = exact_digits.denoiser(train, np.zeros(300, int))
    levels = np.linspace(PROCESS.t_max, 0.02, 60)
    grid = jd.grids.from_times(PROCESS, levels, end="zero")
    tableau = corrected(jd.solvers.ddim(grid))
    times = acquisition_times(grid, count, (0.0, 0.4))
    shape = truth.shape[1:]
    active = active_dps(net, inpainting(np.ones(shape)), truth, particles, times, bandwidth=1.0)
    x_T = PROCESS.prior(jax.random.key(1), (problems * particles, *shape))

    def error(x):
        return float(np.abs(np.mean(x, 1) - truth).mean())

    found = active_sample(active, tableau, x_T)
    order = np.sort(np.asarray(found.order), axis=1)
    assert np.all(np.diff(order, axis=1) > 0) and order.min() >= 0
    np.testing.assert_array_equal(np.asarray(found.mask).sum((1, 2, 3)), count)
    assert len({tuple(o) for o in order}) > problems / 2  # each image its own

    def fixed(masks):
        done = jnp.asarray(count, jnp.int32)
        memory = {**active.memory, "mask": jnp.asarray(masks), "taken": done}
        known = dataclasses.replace(active, memory=memory)
        return error(active_sample(known, tableau, x_T).x)

    rng = np.random.default_rng(0)
    random = np.zeros((problems, 64), np.float32)
    for row in random:
        row[rng.choice(64, count, replace=False)] = 1.0
    spread = np.argsort(-train.reshape(300, 64).var(0))[:count]
    widest = np.zeros((problems, 64), np.float32)
    widest[:, spread] = 1.0
    ours = error(found.x)
    others = [fixed(mask.reshape(problems, *shape)) for mask in (random, widest)]
    assert ours < 0.85 * others[0] and ours < others[1], (ours, others)


def test_lines_of_frequencies_under_vmap():
    """Columns of k-space, vmapped over the step: other strengths compile nothing and stay apart."""
    operator = fourier(np.ones((4, 4)))
    o = oracles.WIDE
    net = jd.gaussian_mixture(o.means, o.std, o.weights)
    image = np.random.default_rng(0).normal(size=(1, 4, 4))
    columns = np.broadcast_to(np.arange(4), (4, 4))

    def flat(x, t, *levels):
        return net(x.reshape(-1, 16), t, *levels).reshape(x.shape)

    images = jd.Denoiser(lambda x, level: flat(x, *level), "x0", time=jd.denoisers.level)
    grid = jd.grids.half_log_snr(PROCESS, 6, end="zero")
    tableau, x_T = corrected(jd.solvers.ddim(grid)), PROCESS.prior(KEY, (4, 4, 4))
    y = operator(jnp.asarray(image, jnp.float32))

    def run(zeta):
        net = active_dps(images, operator, y, 4, acquisition_times(grid, 2), zeta, groups=columns)
        return active_sample(net, tableau, x_T)

    found = jax.jit(jax.vmap(run))(jnp.array([0.0, 2.0]))
    assert np.asarray(found.mask).sum((2, 3)).tolist() == [[8.0], [8.0]]
    assert all(len(set(order[0])) == 2 for order in np.asarray(found.order))
    left = np.abs(
        found.mask[:, :, None] * (y - operator(found.x.reshape(-1, 4, 4)).reshape(2, 1, 4, 4, 4))
    )
    assert left[1].mean() < 0.7 * left[0].mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 1}, "particles must be an integer of at least 2, got 1"),
        ({"times": [0.1, 0.2]}, "times must be a falling vector"),
        ({"times": np.linspace(0.9, 0.1, 5)}, "5 acquisitions, but 4 candidates"),
        ({"criterion": "random"}, "criterion must be one of .* got 'random'"),
        ({"groups": [0, 2, 0, 2]}, "groups must be 0, 1, ..."),
        ({"bandwidth": 0.0}, "bandwidth must be positive"),
        ({"y": np.ones(4)}, r"y must be \[problems, .*got shape \(4,\)"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    arguments = {"y": np.ones((2, 4)), "particles": 3, "times": [0.5], **options}
    with pytest.raises(ValueError, match=message):
        active_dps(mixture(), inpainting(np.ones(4)), **arguments)


def test_wrong_calls_are_named():
    grid = jd.grids.half_log_snr(PROCESS, 4)
    tableau = corrected(jd.solvers.ddim(grid))
    with pytest.raises(TypeError, match="active_sample takes a denoiser of active_dps"):
        active_sample(mixture(), tableau, jnp.zeros((2, 4)))
    active = active_dps(mixture(), matrix(np.eye(4)), np.ones((2, 4)), 3, [0.5])
    with pytest.raises(ValueError, match="2 problems of 3 particles take 6"):
        active_sample(active, tableau, jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="3 of the grid's 4 steps for 4 acquisitions"):
        acquisition_times(grid, 4)
