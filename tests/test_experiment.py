import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_config

from jaxdiff import config as configuration
from jaxdiff import evaluation, processes
from jaxdiff import experiment as experiments
from jaxdiff.data import arrays
from jaxdiff.experiment import Experiment, make_experiment, make_source, make_tableau, sampler
from jaxdiff.generation import generate
from jaxdiff.noise import sample_keys
from jaxdiff.settings import GRIDS, SECTIONS


def image_config(**sections):
    base = {
        "data": {"name": "digits"}, "process": {"name": "vp_linear"}, "train": {"steps": 1},
        "model": {"name": "dit", "width": 8, "depth": 1, "num_heads": 2},
    }  # fmt: skip
    return configuration.complete(base | sections, SECTIONS)


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A flow network whose output is 0 (as initialised): samples are where they start."""
    config = tiny_config(tmp_path_factory.mktemp("still"))
    experiment = make_experiment(config, (2,), 3)
    return experiment, jax.jit(experiment.init)(jax.random.key(0))


def test_samples_start_from_their_own_keys(still):
    experiment, variables = still
    tableau = make_tableau(experiment.process, "ddim", 4, "uniform")
    samples = generate(experiment, variables, tableau, np.array([0, 1, 2, 0, 1]), 5, seed=3,
                       batch_size=2)  # fmt: skip
    start, _ = jax.random.split(jax.random.key(3))
    expected = [jax.random.normal(key, (2,)) for key in sample_keys(start, np.arange(5))]
    np.testing.assert_allclose(samples, np.stack(expected), rtol=1e-5, atol=1e-6)


def test_preconditioning_is_edms():
    """Around a network that is 0 the denoiser is c_skip x, c_skip = s^2 / (s^2 + sigma^2)."""
    config = image_config(
        process={"name": "edm"}, model={"name": "mlp", "width": 8, "depth": 1},
        denoiser={"prediction": "x0", "precondition": True, "sigma_data": 0.7},
    )  # fmt: skip
    experiment = make_experiment(config, (3,), 10)
    variables = jax.jit(experiment.init)(jax.random.key(0))
    x = np.linspace(-3, 3, 6, dtype=np.float32).reshape(2, 3)
    sigma, ones = np.array([0.3, 5.0], np.float32), np.ones(2, np.float32)
    denoise = jax.jit(lambda variables, *args: experiment.denoiser(variables)(*args))
    x0 = denoise(variables, x, sigma, ones, sigma, np.array([1, 2]))
    np.testing.assert_allclose(x0, (0.49 / (0.49 + sigma**2))[:, None] * x, rtol=1e-5)


@pytest.mark.parametrize(
    ("process", "built", "sample"),
    [
        ({"name": "vp_linear"}, processes.vp_linear(), {}),
        ({"name": "vp_cosine"}, processes.vp_cosine(), {"solver": "dpmpp_3m"}),
        (
            {"name": "shifted_cosine", "resolution": 8}, processes.shifted_cosine(8),
            {"solver": "unipc"},
        ),
        ({"name": "sub_vp"}, processes.sub_vp(), {"grid": "quadratic"}),
        ({"name": "ddpm"}, processes.ddpm(), {"grid": "trailing", "solver": "ddpm"}),
        ({"name": "ve"}, processes.ve(), {"grid": "karras", "solver": "heun"}),
        ({"name": "edm"}, processes.edm(), {"grid": "karras", "grid_options": {"rho": 5.0}}),
        ({"name": "flow", "shift": 3.0}, processes.flow(3.0), {"grid": "uniform"}),
    ],
)  # fmt: skip
def test_every_process_builds(process, built, sample):
    model = {"name": "mlp", "width": 8, "depth": 1}
    experiment = make_experiment(image_config(process=process, model=model, sample=sample), (2,), 4)
    t = np.linspace(built.t_min, built.t_max, 7)
    assert type(experiment.process) is type(built)
    np.testing.assert_array_equal(experiment.process.alpha(t), built.alpha(t))
    np.testing.assert_array_equal(experiment.process.sigma(t), built.sigma(t))
    assert experiment.num_classes == 4 and experiment.module.num_classes == 4


def test_a_unet_builds():
    model = {"name": "unet", "width": 8, "multipliers": [1, 2], "attention_resolutions": [4]}
    experiment = make_experiment(image_config(model=model), (8, 8, 1), 10)
    assert experiment.module.multipliers == (1, 2) and experiment.module.num_classes == 10


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"process": {"name": "flow"}}, "for the process 'ddpm'.* got config.process.name 'flow'"),
        (
            {"process": {"name": "ddpm"}, "model": {"name": "mlp", "width": 8, "depth": 1}},
            "a network for images, got config.model.name 'mlp'",
        ),
    ],
)
def test_a_variance_that_cannot_be_learned_is_refused(sections, message):
    config = image_config(denoiser={"prediction": "eps", "learn_sigma": True}, **sections)
    with pytest.raises(ValueError, match=f"config.denoiser.learn_sigma .*{message}"):
        make_experiment(config, (8, 8, 1), 10)


def test_settings_reach_the_objects():
    config = image_config(
        process={"name": "edm", "sigma_max": 20.0}, sample={"grid": "karras"},
        denoiser={"dtype": "bfloat16", "conditional": False}, data={"name": "digits", "size": 16},
    )  # fmt: skip
    source = make_source(config)
    experiment = make_experiment(config, source.shape, source.num_classes)
    assert experiment.process == processes.edm(sigma_max=20.0)
    assert experiment.module.dtype == jnp.bfloat16 and experiment.module.num_classes is None
    assert experiment.shape == (16, 16, 1)


def test_a_tableau_by_names_is_the_builders():
    from jaxdiff import grids, solvers

    process = processes.flow()
    found = make_tableau(process, "unipc", 6, "uniform", {"order": 3}, {"t_min": 0.01})
    expected = solvers.unipc(grids.uniform(process, 6, t_min=0.01), order=3)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert set(GRIDS) >= {"half_log_snr", "uniform", "karras", "trailing"}


def test_truncated_and_shifted_grids_are_chosen_by_the_configuration():
    from jaxdiff import grids, solvers

    options = {"nodes": 8, "rho": 5.0, "stop": 6, "shift": 2.0}
    config = image_config(
        process={"name": "edm"}, model={"name": "mlp", "width": 8, "depth": 1},
        sample={"solver": "ddim", "steps": 5, "grid": "truncated_karras", "grid_options": options},
    )  # fmt: skip
    experiment = make_experiment(config, (3,), 10)
    found = make_tableau(experiment.process, **sampler(config))
    plain = grids.truncated_karras(processes.edm(), 5, nodes=8, rho=5.0, stop=6)
    expected = solvers.ddim(grids.shifted(plain, 2.0))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("grid", "options", "error", "message"),
    [
        ("uniform", {"shift": "abc"}, TypeError, "shift must be a number, got 'abc'"),
        ("uniform", {"shift": True}, TypeError, "shift must be a number, got True"),
        ("uniform", {"shift": -1}, ValueError, "a finite shift > 0, got -1"),
        ("karras", {"shfit": 2.0}, ValueError, "no option 'shfit'; did you mean shift"),
        ("truncated_karras", {"stop": 2.0}, ValueError, "whole numbers, got stop=2.0, nodes=12"),
    ],
)
def test_bad_grid_options_are_named(grid, options, error, message):
    with pytest.raises(error, match=message):
        make_tableau(processes.edm(), "ddim", 4, grid, {}, options)


def test_preconditioning_is_refused_where_its_time_is_infinite():
    denoiser = {"prediction": "x0", "precondition": True}
    model = {"name": "mlp", "width": 8, "depth": 1}
    whole = image_config(process={"name": "flow"}, model=model, denoiser=denoiser)
    with pytest.raises(ValueError, match=r"alpha = 0.*t_max = 1.*config.process.t_max below 1"):
        make_experiment(whole, (2,), 3)
    short = image_config(
        process={"name": "flow", "t_max": 0.99}, model=model, denoiser=denoiser,
        sample={"grid": "uniform"},
    )  # fmt: skip
    experiment = make_experiment(short, (2,), 3)
    variables = jax.jit(experiment.init)(jax.random.key(0))
    tableau = make_tableau(experiment.process, "ddim", 2, "uniform")
    whole_grid = make_tableau(experiment.process, "ddim", 2, "uniform", {}, {"t_max": 1.0})
    with pytest.raises(ValueError, match="alpha = 0, where this grid starts"):
        experiment.check_sampler(whole_grid, 1.0)
    # Around a network that is 0 (as initialised) all is finite, which `generate` checks.
    assert generate(experiment, variables, tableau, np.array([0]), 1, seed=0).shape == (1, 2)


def test_digit_features_need_the_digits():
    evaluate = {"features": "digits"}
    config = image_config(data={"name": "photo_patches", "size": 8}, evaluate=evaluate)
    experiment = make_experiment(config, (8, 8, 1), 10)
    with pytest.raises(ValueError, match="config.data.name 'digits', got 'photo_patches'"):
        evaluation.check_evaluation(experiment)
    evaluation.check_evaluation(make_experiment(image_config(evaluate=evaluate), (8, 8, 1), 10))


class Wrong(nn.Module):
    """Returns one channel too many."""

    @nn.compact
    def __call__(self, x, t, cond=None, *, train=False):
        return nn.Dense(3)(x)


def test_a_network_of_another_shape_is_refused(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    monkeypatch.setitem(SECTIONS["model"].choices, "mlp", lambda **options: Wrong())
    with pytest.raises(ValueError, match=r"\(2, 2\) to \(2, 3\)"):
        make_experiment(config, (2,), 3)


def test_a_network_that_does_not_fit_the_data_is_refused():
    config = image_config(model={"name": "dit", "patch_size": 3, "width": 8, "num_heads": 2})
    with pytest.raises(ValueError, match="patch_size 3 does not divide"):
        make_experiment(config, (8, 8, 1), 10)
    with pytest.raises(ValueError, match="have no labels"):
        make_experiment(image_config(), (8, 8, 1), None)
    with pytest.raises(ValueError, match="float64"):
        make_experiment(image_config(denoiser={"dtype": "float64"}), (8, 8, 1), 10)


def test_augmentation_needs_images_and_a_network_for_them():
    augment = {"probability": 0.12}
    experiment = make_experiment(image_config(augment=augment), (8, 8, 1), 10)
    assert experiment.module.augment_dim == experiment.augmentation.label_dim == 9
    assert make_experiment(image_config(), (8, 8, 1), 10).module.augment_dim == 0
    with pytest.raises(ValueError, match=r"at least 2 x 2 pixels, got \[3\]"):
        make_experiment(image_config(augment=augment), (3,), 10)
    model = {"name": "mlp", "width": 8, "depth": 1}
    with pytest.raises(ValueError, match="a network that is told of it, got config.model.name 'mlp'"):
        make_experiment(image_config(augment=augment, model=model), (8, 8, 1), 10)
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 2.0"):
        make_experiment(image_config(augment={"probability": 2.0}), (8, 8, 1), 10)


def test_flash_attention_is_that_of_gpus(monkeypatch):
    def module(**denoiser):
        config = image_config(denoiser={"dtype": "bfloat16", "attention": "cudnn"} | denoiser)
        return make_experiment(config, (8, 8, 1), 10).module

    with pytest.warns(UserWarning, match="XLA's attention is used on 'cpu'"):
        assert module().attention is jax.nn.dot_product_attention
    monkeypatch.setattr(experiments.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(experiments, "_check_output", lambda experiment: None)
    monkeypatch.setattr(Experiment, "check_sampler", lambda *arguments: None)
    assert module().attention.keywords == {"implementation": "cudnn"}
    assert module(attention="xla").attention is jax.nn.dot_product_attention
    with pytest.raises(ValueError, match="attention must be 'xla' or 'cudnn', got 'flash'"):
        module(attention="flash")
    with pytest.raises(ValueError, match="'bfloat16' or 'float16', got a DiT in float32"):
        module(dtype="float32")


@pytest.mark.parametrize("model", [{"label_dropout": 0.0}, {}])
def test_guidance_needs_a_null_label(model):
    sections = {"model": {"name": "dit", "width": 8, "num_heads": 2, **model}}
    sections["denoiser"] = {"conditional": bool(model)}
    experiment = make_experiment(image_config(**sections), (8, 8, 1), 10)
    experiment.check_guidance(1.0)
    with pytest.raises(ValueError, match="guidance 2 needs"):
        experiment.check_guidance(2.0)
    with pytest.raises(ValueError, match="guidance 3 needs"):
        make_experiment(image_config(**sections, sample={"guidance": 3.0}), (8, 8, 1), 10)


def test_labels_are_checked(still):
    experiment, variables = still
    tableau = make_tableau(experiment.process, "ddim", 1, "uniform")
    with pytest.raises(ValueError, match="label 3 is out of range: labels are 0 to 2"):
        generate(experiment, variables, tableau, np.array([3]), 1, seed=0)
    with pytest.raises(ValueError, match="label 4294967297 is out of range"):
        experiment.check_labels([2**32 + 1])
    with pytest.raises(ValueError, match=f"label {-(10**30)} is out of range"):
        experiment.check_labels([0, -(10**30)])
    for labels in (np.array([1.5]), [True], ["1"]):
        with pytest.raises(ValueError, match="labels must be integers, got"):
            experiment.check_labels(labels)
    assert experiment.check_labels(np.array([0, 2], np.uint64)).dtype == np.int32
    with pytest.raises(ValueError, match="seed must be from 0 to 4294967295, got 4294967296"):
        generate(experiment, variables, tableau, np.array([1]), 1, seed=2**32)
    with pytest.raises(ValueError, match="a label for each sample"):
        generate(experiment, variables, tableau, None, 1, seed=0)
    unlabelled = Experiment(experiment.config, experiment.process, experiment.module, (2,), None)
    with pytest.raises(ValueError, match="no labels"):
        generate(unlabelled, variables, tableau, np.array([0]), 1, seed=0)


def test_samples_that_are_not_finite_are_an_error(still):
    experiment, variables = still
    broken = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    tableau = make_tableau(experiment.process, "ddim", 4, "uniform")
    with pytest.raises(FloatingPointError, match="2 of 2 samples are not finite"):
        generate(experiment, broken, tableau, np.array([0, 1]), 2, seed=0)


def test_the_data_themselves_have_distance_zero(still, monkeypatch):
    experiment, variables = still
    x = np.random.default_rng(0).uniform(-1, 1, (40, 2)).astype(np.float32)
    source = arrays({"x": x, "label": np.arange(40) % 3})
    tableau = make_tableau(experiment.process, "ddim", 2, "uniform")
    monkeypatch.setattr(evaluation, "generate", lambda *args: x[::-1])
    found = evaluation.evaluate(experiment, variables, source, tableau, 1.0, 40, seed=0)
    assert found["energy_distance"] < 1e-6 and found["sliced_wasserstein"] < 1e-6
    assert found["mmd"] < 0  # unbiased: without the pairs of a point with itself
    assert found["count"] == 40 and found["nfe"] == 2
    # Values beyond the data's are clipped: they would be when saved.
    monkeypatch.setattr(evaluation, "generate", lambda *args: np.full((40, 2), 9.0))
    clipped = evaluation.evaluate(experiment, variables, source, tableau, 1.0, 40, seed=0)
    assert clipped["sliced_wasserstein"] < 3.0
