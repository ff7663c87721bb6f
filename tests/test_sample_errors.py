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
