"""configs/: the papers' networks at full size, traced without memory, and their laptop sizes."""

import ast
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_edm import info
from oracles import bound_by_the_book

from jaxdiff import config as configuration
from jaxdiff import experiment as experiments
from jaxdiff.data import loader
from jaxdiff.experiment import make_experiment, make_source, make_tableau, sampler
from jaxdiff.losses import sample_times
from jaxdiff.noise import normal, sample_keys
from jaxdiff.settings import SECTIONS
from jaxdiff.training.state import init_state, make_optimizer
from jaxdiff.training.step import make_step

FOLDER = Path(__file__).parents[1] / "configs"
# The data's shape and classes, and what says how many parameters there are.
FULL = {
    "cifar10_ddpm": ((32, 32, 3), 10, "35.7M"),  # the comment in its repository
    "cifar10_edm": ((32, 32, 3), 10, "ddpm_pp_classes"),
    "cifar10_rectified_flow": ((32, 32, 3), 10, "ddpm_pp_song"),
    "imagenet64_adm": ((64, 64, 3), 1000, "adm"),
    # The authors' count, less their fixed positions.
    "imagenet256_dit_xl2": ((32, 32, 4), 1000, 675_129_632 - 256 * 1152),
}
every_config = pytest.mark.parametrize("name", FULL)


def load(name, size="", changes=None):
    config = configuration.load(f"{FOLDER / name}.py{size}", SECTIONS)
    arguments = [f"--config.{key}={value}" for key, value in (changes or {}).items()]
    return configuration.complete(configuration.override(config, arguments), SECTIONS)


def test_every_config_of_a_paper_is_here():
    own = {"digits"}
    assert {file.stem for file in FOLDER.glob("*.py")} == set(FULL) | own


@every_config
def test_the_full_size_traces_and_is_the_papers(name, monkeypatch):
    shape, classes, expected = FULL[name]
    config = load(name)
    # They trace the network again; the laptop sizes go through them.
    monkeypatch.setattr(experiments, "_check_output", lambda experiment: None)
    monkeypatch.setattr(experiments.Experiment, "check_sampler", lambda *args: None)
    experiment = make_experiment(config, shape, classes)
    tableau = make_tableau(experiment.process, **sampler(config))
    calls = {"imagenet64_adm": 511, "cifar10_edm": 35}.get(name, config.sample.steps)  # the papers'
    assert int(tableau.nfe) == calls
    state = jax.eval_shape(functools.partial(init_state, experiment, make_optimizer(config)))
    leaves = jax.tree.leaves(state.params)
    total = sum(a.size for a in leaves)
    if expected == "35.7M":
        assert round(total / 1e6, 1) == 35.7
    else:
        assert total == info()["parameters"].get(expected, expected)
    # float32 weights, average and Adam's two moments, and the counters.
    assert {a.dtype for a in leaves} == {np.dtype("float32")}
    everything = jax.tree.leaves((state.params, state.ema, state.opt_state))
    assert 4 * total <= sum(a.size for a in everything) < 4 * total + 10


@every_config
def test_the_header_says_the_command_and_whose_the_figure_is(name, tmp_path, monkeypatch):
    header = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert f"jaxdiff train --config configs/{name}.py --workdir runs/{name}\n" in header
    assert f"configs/{name}.py:laptop" in header
    assert "(not measured here)" in " ".join(header.split())
    # Without the data, what to do is said: where to download, or how to store what was.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="download|write_array_record"):
        make_source(load(name))
    with pytest.raises(ValueError, match=rf"{name}\.py', line \d+.*'full' or 'laptop', got 'tiny'"):
        load(name, ":tiny")


def filled(state, key):
    """A state of that structure: random weights, but a zero last layer, so that its output is 0."""

    def leaf(path, a):
        rng = np.random.default_rng(len(path) + a.size)
        last = path[1].key.startswith("out")
        return jnp.zeros(a.shape) if last else jnp.asarray(rng.normal(0, 0.1, a.shape), a.dtype)

    params = jax.tree_util.tree_map_with_path(leaf, state.params)
    rest = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), dataclasses.replace(state, key=None))
    return dataclasses.replace(rest, params=params, ema=params, key=key)


@pytest.mark.parametrize("name", ["cifar10_ddpm", "cifar10_rectified_flow", "imagenet64_adm"])
def test_the_laptop_size_is_a_small_network_on_data_that_are_here(name):
    config = load(name, ":laptop")
    source = make_source(config)
    experiment = make_experiment(config, source.shape, source.num_classes)  # traces a sampler's run
    small = jax.eval_shape(experiment.init, jax.random.key(0))
    assert 1e5 < sum(a.size for a in jax.tree.leaves(small)) < 1e6
    assert len(source) > 10 * config.train.batch_size


# One level of a UNet, and of few channels: compiling two takes half a minute.
ONE_LEVEL = {"model.multipliers": "(1,)", "model.width": 8, "model.attention_resolutions": "()"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cifar10_edm", ONE_LEVEL | {"train.batch_size": 8, "train.accumulate": 2}),
        ("imagenet256_dit_xl2", {"model.depth": 1}),
    ],
)
def test_the_laptop_size_trains(name, changes):
    """Two steps; the first loss, of a network that is 0, is known: every draw is made by hand."""
    config = load(name, ":laptop", changes)
    source = make_source(config)
    experiment = make_experiment(config, source.shape, source.num_classes)
    optimizer, count = make_optimizer(config), config.train.batch_size
    key = jax.random.key(7)
    state = start = filled(
        jax.eval_shape(functools.partial(init_state, experiment, optimizer)), key
    )
    stream = loader(source, count, 0, flip=config.train.flip)
    step, batch = jax.jit(make_step(experiment, optimizer)), next(stream)
    state, first = step(state, batch)

    key, numbers, x0 = jax.random.fold_in(key, 0), np.arange(count), batch["x"]
    noise_key, time_key = jax.random.split(key, 4)[:2]
    noise = normal(sample_keys(noise_key, numbers), x0)
    if config.denoiser.prediction == "x0":
        keys = sample_keys(jax.random.fold_in(key, 4), numbers)
        x0, _ = jax.jit(experiment.augmentation.__call__)(keys, x0)
        assert np.any(np.abs(x0 - batch["x"]) > 0.1)
        sigma = sample_times("log_normal_sigma", time_key, count, experiment.process)
        variance = sigma**2 + 0.25
        skip, weight = 0.25 / variance, variance / (0.5 * sigma) ** 2
        skip, weight = skip[:, None, None, None], weight[:, None, None, None]
        expected = weight * (skip * (x0 + sigma[:, None, None, None] * noise) - x0) ** 2
    else:  # and the bound, of a variance that is half-way between the two
        t = np.asarray(sample_times("integers", time_key, count, experiment.process)).astype(int)
        betas = np.linspace(1e-4, 0.02, 1000)
        x = experiment.process.perturb(x0, noise, t)
        bits = [bound_by_the_book(betas, *row, 0.0, 0.0) for row in zip(t, x0, x, strict=True)]
        expected = (noise**2).mean() + np.asarray(bits)
    np.testing.assert_allclose(first["loss"], expected.mean(), rtol=1e-4)

    state, second = step(state, next(stream))
    assert np.isfinite(second["loss"]) and int(state.step) == 2
    # The first step can only move the zero layer, if it is not a warm-up's; the second all layers.
    changed = jax.tree.map(lambda a, b: np.any(a != b), state.params, start.params)["params"]
    assert any(changed["out" if "out" in changed else "out_0"].values())
