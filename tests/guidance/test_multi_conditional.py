"""Guidance by several conditions: the published formulas, and SpaText's two regions on digits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import guidance
from jaxdiff.denoisers import level

PROCESS = jd.processes.vp_cosine()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3))
LEVELS = 0.4, 0.6, 0.8


def toy(x, t, cond):
    """Not additive in its conditions."""
    return jnp.tanh(x * cond["image"][:, None] + cond["text"][:, None]) + cond["more"][:, None]


COND = {"image": RNG.normal(size=4), "text": RNG.normal(size=4), "more": RNG.normal(size=4)}
NONE = {"image": 0.0, "text": 0.5, "more": 0.0}


def explicit(**given):
    cond = {name: np.broadcast_to(given.get(name, NONE[name]), 4) for name in NONE}
    cond["more"] = COND["more"]
    return np.asarray(toy(jnp.asarray(X), 0.4, jax.tree.map(jnp.asarray, cond)))


def guided(scales, form, fn=toy):
    denoiser = guidance.multi_conditional(jd.Denoiser(fn), scales, NONE, form)
    return denoiser(jnp.asarray(X), *LEVELS, jax.tree.map(jnp.asarray, COND))


def test_nested_guidance_is_instruct_pix2pix(x64):
    """Brooks et al., equation 3; a condition without scale is always given."""
    none, image = explicit(), explicit(image=COND["image"])
    both = explicit(image=COND["image"], text=COND["text"])
    expected = none + 1.5 * (image - none) + 7.5 * (both - image)
    got = guided({"image": 1.5, "text": 7.5}, "nested")
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(guided({"image": 1.0, "text": 1.0}, "nested"), both, rtol=1e-12)


def test_each_condition_alone_is_spatexts_sum(x64):
    none = explicit()
    parts = [explicit(image=COND["image"]) - none, explicit(text=COND["text"]) - none]
    expected = none + 1.5 * parts[0] + 7.5 * parts[1]
    np.testing.assert_allclose(guided({"image": 1.5, "text": 7.5}, "each"), expected, rtol=1e-12)


def test_all_passes_are_one_evaluation():
    sizes = []

    def fn(x, t, cond):
        sizes.append(x.shape[0])
        return toy(x, t, cond)

    guided({"image": 1.5, "text": 7.5}, "each", fn)
    assert sizes == [12]
    denoiser = guidance.multi_conditional(jd.Denoiser(toy), {"image": 1.0, "text": 2.0}, NONE)
    assert denoiser.cost == 3


def test_bad_conditions_are_named():
    net, table = jd.Denoiser(toy), jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 2))
    with pytest.raises(ValueError, match="form must be one of"):
        guidance.multi_conditional(net, {"image": 1.0}, NONE, "sum")
    for scales in ({}, {"sound": 1.0}):
        with pytest.raises(ValueError, match="scales must be of some of the conditions"):
            guidance.multi_conditional(net, scales, NONE)
    with pytest.raises(ValueError, match=r"a dict of \['image', 'more', 'text'\], got \['text'\]"):
        denoiser = guidance.multi_conditional(net, {"image": 1.0}, NONE)
        jd.sample(denoiser, table, jnp.asarray(X), cond={"text": jnp.zeros(4)})
    with pytest.raises(ValueError, match="needs a conditional model"):
        guidance.multi_conditional(jd.Denoiser(lambda x, t: x), {"image": 1.0}, NONE)


# --- SpaText (row 97) -----------------------------------------------------------------------------

WIDTH = 0.1
ANY_SUM = 19


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two independent digits side by side: the exact denoiser of a canvas [n, 8, 16, 1].

    cond: "text", what the two digits add up to (19 for no text), and "map" [n, 8, 16, 10], the
    spatio-textual map: a region's embedding (here its class) at its pixels, 0 where nothing is said.
    """

    images: jax.Array
    classes: jax.Array  # one-hot

    def halves(self, x, alpha, sigma):
        """log-density by class and E[x_0] by class of halves [n, 64]."""
        variance = (alpha * WIDTH) ** 2 + sigma**2
        apart = jnp.sum((x[:, None] - alpha * self.images) ** 2, -1)
        logits = -0.5 * apart / variance
        top = jnp.max(logits, 1, keepdims=True)
        weights = jnp.exp(logits - top)
        mass = weights @ self.classes + 1e-30
        mean = jnp.einsum("ni,ic,id->ncd", weights, self.classes, self.images) / mass[..., None]
        x0 = mean + alpha * WIDTH**2 / variance * (x[:, None] - alpha * mean)
        return jnp.log(mass) + top, x0


def pairs_fn(pairs, x, levels, cond):
    _, alpha, sigma = levels
    halves = [pairs.halves(a.reshape(len(x), 64), alpha, sigma) for a in jnp.split(x, 2, 2)]
    (left, x_left), (right, x_right) = halves
    joint = left[:, :, None] + right[:, None, :]
    total = jnp.add.outer(jnp.arange(10), jnp.arange(10))
    allowed = (total == cond["text"][:, None, None]) | (cond["text"] == ANY_SUM)[:, None, None]
    for axis, region in ((2, 0), (1, 1)):
        said = jnp.mean(jnp.split(cond["map"], 2, 2)[region], (1, 2))
        silent = jnp.sum(said, 1, keepdims=True) == 0
        allowed &= jnp.expand_dims((said > 0) | silent, axis)
    share = jax.nn.softmax(jnp.where(allowed, joint, -jnp.inf).reshape(len(x), 100), 1)
    share = share.reshape(len(x), 10, 10)
    parts = jnp.einsum("nab,nad->nd", share, x_left), jnp.einsum("nab,nbd->nd", share, x_right)
    return jnp.concatenate([p.reshape(-1, 8, 8, 1) for p in parts], 2)


@pytest.fixture(scope="module")
def canvas():
    data = jd.data.digits("train")
    pairs = Pairs(jnp.asarray(data.x.reshape(-1, 64)[:600]), jax.nn.one_hot(data.label[:600], 10))
    return jd.Denoiser(pairs_fn, "x0", pairs, level)


def accuracy(samples, digits):
    """Of both regions, by the digit classifier."""
    classifier = jd.metrics.digit_classifier()
    found = [classifier.predict(np.clip(a, -1, 1)) for a in np.split(np.asarray(samples), 2, 2)]
    return np.mean(np.stack(found, 1) == digits)


def test_spatext_places_digits_in_regions(canvas):
    """Avrahami et al.: each region has the digit it was asked for (row 97: at least 85%), by the joint
    form within 5 points of the multi-pass form, for 2 evaluations in place of 3."""
    n, rng = 60, np.random.default_rng(1)
    digits = rng.integers(0, 10, (n, 2))
    regions = np.zeros((n, 8, 16, 10), np.float32)
    for i, (a, b) in enumerate(digits):
        regions[i, :, :8, a] = regions[i, :, 8:, b] = 1.0
    cond = {"text": jnp.asarray(digits.sum(1)), "map": jnp.asarray(regions)}
    null = {"text": ANY_SUM, "map": 0.0}
    x_T = jnp.asarray(rng.normal(size=(n, 8, 16, 1)), jnp.float32)
    table = jd.solvers.dpm_solver_pp_multistep(jd.grids.half_log_snr(PROCESS, 10))
    several = guidance.multi_conditional(canvas, {"text": 1.0, "map": 2.0}, null)
    joint = guidance.classifier_free(canvas, 2.0, null)
    assert (several.cost, joint.cost) == (3, 2)
    multi, once = (accuracy(jd.sample(d, table, x_T, cond=cond), digits) for d in (several, joint))
    assert multi >= 0.85 and abs(multi - once) <= 0.05
