"""What `sample` refuses, and that it says so on the host, with the value and what is accepted."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd

VP = jd.processes.vp_linear()
FLOW = jd.processes.flow()
GRID = jd.grids.half_log_snr(VP, 3)
DDIM, DDPM = jd.solvers.ddim(GRID), jd.solvers.ddpm(GRID)
X = jnp.zeros((4, 2))
KEY = jax.random.key(0)


def identity(x, t):
    return x


EPS = jd.Denoiser(identity)


def never(x, t):
    raise AssertionError("the network was called: the error came after tracing began")


UNTRACED = jd.Denoiser(never)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((never, DDIM, X), TypeError, "expected a jaxdiff.Denoiser, got function"),
        ((UNTRACED, GRID, X), TypeError, "expected a Tableau of jaxdiff.solvers, got Grid"),
        ((UNTRACED, "ddim", X), TypeError, "got str"),
        ((UNTRACED, jd.solvers.stack([DDIM, DDIM]), X), ValueError, "stacked .* jax.vmap"),
        ((UNTRACED, DDIM, None), ValueError, "give x_T, or state="),
        ((UNTRACED, DDIM, jnp.zeros((4, 2), int)), ValueError, r"floating-point .* int32 of shape"),
        ((UNTRACED, DDIM, np.zeros((4, 2), bool)), ValueError, "floating-point .* got bool"),
        ((UNTRACED, DDIM, np.zeros((4, 2), complex)), ValueError, "floating-point .* complex64"),
        ((UNTRACED, DDIM, jnp.asarray(1.0)), ValueError, r"float32 of shape \(\)"),
        ((UNTRACED, DDIM, "noise"), ValueError, "got 'noise'"),
        (
            (UNTRACED, DDIM, {"a": X, "b": X[:3]}),
            ValueError, r"differ in batch: .*\(4, 2\), \(3, 2\)",
        ),
        ((UNTRACED, DDPM, X), ValueError, "stochastic: pass key= or noise="),
        ((UNTRACED, DDPM, X, 0), TypeError, "expected a PRNG key .* got 0"),
        ((UNTRACED, DDIM, X, "key"), TypeError, "got 'key'"),
        ((UNTRACED, DDPM, X, jax.random.split(KEY, 3)), ValueError, "3 keys for 4 samples"),
        (
            (UNTRACED, jd.solvers.ddim(jd.grids.uniform(FLOW, 3)), X),
            ValueError, "alpha = 0 .* a 'eps' network .* predicts v, x0 or flow",
        ),
        (
            (jd.clip_x0(UNTRACED, keep_eps=True), DDIM, X),
            ValueError, r"predicts .'x0', 'eps'., the tableau takes 1 output.*outputs=2",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_before_tracing(arguments, error, message):
    with pytest.raises(error, match=message):
        jd.sample(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(save="last"), "unknown save 'last'; choose from .*'final'.*'state'"),
        (dict(save=None), "unknown save None"),
        (dict(adjoint=diffrax.BacksolveAdjoint()), "BacksolveAdjoint .* discrete.*jaxdiff.ode"),
        (dict(adjoint=diffrax.ImplicitAdjoint()), "ImplicitAdjoint"),
        (dict(noise=np.zeros((2, 4, 2))), r"shape \(3, 4, 2\), got \(2, 4, 2\)"),
        (dict(noise=np.zeros((3, 4, 3))), r"got \(3, 4, 3\)"),
        (dict(noise=[np.zeros((3, 4, 2))]), "structure of the state"),
        (dict(noise=jd.BrownianPath(VP, "eps", KEY)), "belongs to x0, the path is 'eps'"),
        (dict(state=jd.State((X,), ())), "give x_T, or state="),
    ],
)
def test_bad_options_are_named_before_tracing(options, message):
    with pytest.raises(ValueError, match=message):
        jd.sample(UNTRACED, DDPM, X, **options)


def test_a_state_must_fit_the_tableau():
    state = jd.sample(EPS, jd.solvers.unipc(GRID), X, save="state")
    with pytest.raises(ValueError, match="2 registers and .* integrands, the tableau .1, 1."):
        jd.sample(UNTRACED, DDIM, None, state=state)


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda x, t: x[:2], r"denoiser's output has shape \(2, 2\), the state \(4, 2\)"),
        (lambda x, t: x.sum(-1), r"has shape \(4,\), the state \(4, 2\)"),
        (lambda x, t: x[..., None], r"has shape \(4, 2, 1\)"),
        (lambda x, t: (x, x), "denoiser's output has structure"),
        (lambda x, t: {"eps": x}, "denoiser's output has structure"),
        (lambda x, t: None, "denoiser's output has structure"),
    ],
)
def test_a_networks_output_must_have_the_states_shape(fn, message):
    """Broadcasting would hide it. Known on the first trace."""
    with pytest.raises(ValueError, match=message):
        jd.sample(jd.Denoiser(fn), DDIM, X)


def test_a_control_must_keep_the_states_shape():
    class Grows(jd.Control):
        def before(self, aux, row, x, key):
            return jnp.concatenate([x, x]), aux

    with pytest.raises(ValueError, match=r"control.before has shape \(8, 2\), the state \(4, 2\)"):
        jd.sample(EPS, DDIM, X, control=Grows())


@pytest.mark.parametrize("prediction", ["eps", "score"])
def test_pure_noise_needs_another_prediction(prediction):
    """At alpha = 0 they say nothing of x_0; the others are finite there."""
    tableau = jd.solvers.ddim(jd.grids.uniform(FLOW, 2))
    with pytest.raises(ValueError, match=f"alpha = 0.* '{prediction}' network"):
        jd.sample(jd.Denoiser(never, prediction), tableau, X)
    rescaled = jd.processes.zero_terminal_snr(jd.processes.ddpm())
    tableau = jd.solvers.ddpm(jd.grids.trailing(rescaled, 2))
    with pytest.raises(ValueError, match="alpha = 0"):
        jd.sample(jd.Denoiser(never, prediction), tableau, X, KEY)


# --- labels, seen through whatever is wrapped around the network -----------------------------------


def labelled(network, **options):
    """A denoiser of a small network with 10 classes, without parameters: it is never called."""
    return jd.models.from_linen(network(num_classes=10, **options), {"params": {}}, prediction="x0")


NETWORKS = {
    "mlp": (lambda **o: jd.models.MLP(width=8, depth=1, **o), (4, 2)),
    "dit": (
        lambda **o: jd.models.DiT(patch_size=2, width=8, depth=1, num_heads=2, **o), (4, 4, 4, 1)
    ),
    "unet": (lambda **o: jd.models.UNet(width=8, **o), (4, 8, 8, 1)),
}  # fmt: skip
WRAPPERS = {
    "bare": lambda d: d,
    "guided": lambda d: jd.guidance.classifier_free(d, 2.0, np.int32(10)),
    "clipped": jd.clip_x0,
    "guided and clipped": lambda d: jd.clip_x0(
        jd.guidance.classifier_free(jd.dynamic_threshold(d), 2.0, np.int32(10))
    ),
    "preconditioned": lambda d: jd.precondition(d.fn, 0.5, d.params),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_labels_are_checked_before_tracing(name, wrapper):
    network, shape = NETWORKS[name]
    denoiser, x = WRAPPERS[wrapper](labelled(network)), jnp.zeros(shape)
    for cond, message in (
        (jnp.asarray([0, 1, 2, 11]), r"0 to 10 \(10 is the null label\), got 11"),
        (np.asarray([0, 1, 2, -1]), "got -1"),
        (jnp.zeros(4), "must be integers, got float32"),
        (np.zeros(3, int), r"shape \(4,\), got \(3,\)"),
        ({"lable": np.zeros(4, int)}, r"\['lable'\]; this network takes \['label'"),
    ):
        with pytest.raises(ValueError, match=message):
            jd.sample(denoiser, DDIM, x, cond=cond)
        if wrapper == "bare":
            mesh = jd.parallel.mesh()
            with pytest.raises(ValueError, match=message):
                jd.parallel.sharded(jd.sample, mesh)(denoiser, DDIM, x, cond=cond)


def test_the_null_label_must_exist():
    network, shape = NETWORKS["mlp"]
    denoiser = labelled(network, label_dropout=0.0)
    guided = jd.guidance.classifier_free(denoiser, 2.0, np.int32(10))
    with pytest.raises(ValueError, match="must lie in 0 to 9, got 10"):
        jd.sample(guided, DDIM, jnp.zeros(shape), cond=np.zeros(4, int))
    with pytest.raises(ValueError, match="labels are needed: this network has 10 classes"):
        jd.sample(denoiser, DDIM, jnp.zeros(shape))


def test_preconditioning_from_pure_noise_is_refused():
    """c_noise is infinite there; another clock is not."""
    table = jd.solvers.ddim(jd.grids.uniform(FLOW, 3))
    preconditioned = jd.precondition(lambda x, t: 0 * x + t, 0.5)
    with pytest.raises(ValueError, match="c_noise .* infinite at alpha = 0"):
        jd.sample(jd.clip_x0(preconditioned), table, X)
    other = jd.precondition(lambda x, t: 0 * x + t, 0.5, time=lambda t, alpha, sigma: t)
    assert np.all(np.isfinite(jd.sample(other, table, X)))
