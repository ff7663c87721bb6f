import json
from pathlib import Path

import pytest
from tiny_run import tiny_config, write_config

from jaxdiff import config as configuration
from jaxdiff.settings import SECTIONS

MINIMAL = {
    "data": {"name": "digits"},
    "process": {"name": "vp_linear"},
    "model": {"name": "dit"},
    "train": {"steps": 5},
}


def test_defaults_are_those_of_the_functions():
    config = configuration.complete(MINIMAL, SECTIONS)
    assert config.process.to_dict() == {
        "name": "vp_linear", "beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-3, "t_max": 1.0
    }  # fmt: skip
    assert config.model.patch_size == 2 and config.model.qk_norm is None
    assert config.optimizer.b2 == 0.999 and config.sample.options.to_dict() == {}
    assert config.is_locked


def test_overrides_take_the_type_of_what_they_replace():
    config = configuration.complete(MINIMAL, SECTIONS)
    arguments = [
        "--config.train.steps=7", "--config.process.beta_max=10", "--config.train.flip=true",
        "--config.model.qk_norm=rms", "--config.evaluate.guidance=(1.0,2.0)",
        "--config.sample.options={'order': 3}", "--config.seed", "4",
    ]  # fmt: skip
    new = configuration.complete(configuration.override(config, arguments), SECTIONS)
    assert new.train.steps == 7 and new.seed == 4 and new.train.flip is True
    assert new.process.beta_max == 10.0 and isinstance(new.process.beta_max, float)
    assert new.model.qk_norm == "rms" and new.evaluate.guidance == (1.0, 2.0)
    assert new.sample.options.order == 3
    assert config.train.steps == 5  # the original is untouched


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.train.stesp=1", ["config.train.stesp", "did you mean steps"]),
        ("--config.trian.steps=1", ["config.trian", "did you mean train"]),
        ("--config.train.steps=abc", ["config.train.steps", "int", "'abc'"]),
        ("--config.train.steps=1.5", ["config.train.steps", "int", "'1.5'"]),
        ("--config.train.steps.x=1", ["config.train.steps", "'x'"]),
        ("--config.train=3", ["config.train", "section", "'3'"]),
        ("--seed=3", ["--seed=3", "--config.KEY=VALUE"]),
        ("steps=3", ["steps=3", "--config.KEY=VALUE"]),
    ],
)
def test_a_bad_override_names_the_key_and_what_is_accepted(argument, words):
    config = configuration.complete(MINIMAL, SECTIONS)
    with pytest.raises(ValueError) as error:
        configuration.override(config, [argument])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("section", "value", "error", "words"),
    [
        ("train", {"steps": 5, "batchsize": 3}, ValueError, ["batchsize", "did you mean batch_size"]),
        ("train", {}, ValueError, ["config.train.steps", "missing"]),
        ("train", {"steps": "5"}, TypeError, ["config.train.steps", "int", "'5'"]),
        ("train", {"steps": True}, TypeError, ["config.train.steps", "int", "True"]),
        ("train", 3, TypeError, ["config.train", "section", "3"]),
        ("process", {"name": "vp_linaer"}, ValueError, ["vp_linaer", "did you mean vp_linear"]),
        ("process", {"name": "edm", "beta_max": 1.0}, ValueError, ["beta_max", "'edm'"]),
        ("process", {}, ValueError, ["config.process.name", "vp_cosine"]),
        ("model", {"name": "dit", "qk_norm": 3}, TypeError, ["qk_norm", "str", "3"]),
        ("model", {"name": "dit", "width": 0}, ValueError, ["model.width", "at least 1", "0"]),
        ("model", {"name": "mlp", "depth": -1}, ValueError, ["model.depth", "at least 1", "-1"]),
        ("model", {"name": "mlp", "time_scale": float("inf")}, ValueError, ["time_scale", "inf"]),
        ("model", {"name": "unet", "multipliers": (1, 0)}, ValueError, ["positive", "(1, 0)"]),
        ("model", {"name": "unet", "multipliers": (1, "2")}, TypeError, ["int", "(1, '2')"]),
        ("data", {"name": "photo_patches", "stride": 0}, ValueError, ["data.stride", "0"]),
        ("denoiser", {"sigma_data": 0.0}, ValueError, ["sigma_data", "positive", "0.0"]),
        ("evaluate", {"guidance": ("a",)}, TypeError, ["evaluate.guidance", "float", "('a',)"]),
        ("evaluate", {"guidance": (1.0, float("nan"))}, ValueError, ["guidance", "finite"]),
        ("modle", {}, ValueError, ["config.modle", "did you mean model"]),
    ],
)
def test_a_bad_section_names_the_key_and_what_is_accepted(section, value, error, words):
    with pytest.raises(error) as found:
        configuration.complete({**MINIMAL, section: value}, SECTIONS)
    for word in words:
        assert word in str(found.value)


def test_a_stored_configuration_reads_back_equal(tmp_path):
    config = tiny_config(tmp_path, "--config.evaluate.guidance=(1.0,3.0)")
    configuration.write(tmp_path / "config.json", config)
    stored = configuration.read(tmp_path / "config.json", SECTIONS)
    assert configuration.difference(config, stored) == []
    assert stored.evaluate.guidance == (1.0, 3.0)


def test_difference_lists_exactly_what_changed(tmp_path):
    old = tiny_config(tmp_path)
    new = tiny_config(tmp_path, "--config.train.steps=13", "--config.sample.options={'eta': 1.0}")
    assert configuration.difference(old, new) == [
        "config.sample.options: {} -> (absent)",
        "config.sample.options.eta: (absent) -> 1.0",
        "config.train.steps: 12 -> 13",
    ]


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ("def get_config(:", ValueError, "not a Python file"),
        ("x = 1", ValueError, "no function get_config()"),
        ("def get_config(): return 3", TypeError, "int"),
        ("x = 1\nimport math, maths", ValueError, "line 2: ModuleNotFoundError"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, error, word):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(error, match="bad.py") as found:
        configuration.load(file, SECTIONS)
    assert word in str(found.value)
    with pytest.raises(FileNotFoundError, match="absent.py"):
        configuration.load(tmp_path / "absent.py", SECTIONS)


def test_a_damaged_store_is_named(tmp_path):
    configuration.write(tmp_path / "config.json", tiny_config(tmp_path))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="config.json.*damaged"):
        configuration.read(tmp_path / "config.json", SECTIONS)
    changed = json.loads(text) | {"process": {"name": "nothing"}}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="nothing"):
        configuration.read(tmp_path / "config.json", SECTIONS)


def test_every_shipped_configuration_is_complete():
    files = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.py"))
    assert files
    for file in files:
        assert configuration.load(file, SECTIONS).train.steps >= 1
        assert f"--config configs/{file.name}" in file.read_text()


def test_a_file_takes_an_argument(tmp_path):
    body = f"    return {MINIMAL} | {{'seed': {{'one': 1}}.get(name, 0)}}\n"
    (tmp_path / "file.py").write_text(f"def get_config(name=''):\n{body}")
    assert configuration.load(tmp_path / "file.py", SECTIONS).seed == 0
    assert configuration.load(f"{tmp_path}/file.py:one", SECTIONS).seed == 1
    (tmp_path / "file.py").write_text(f"name = ''\ndef get_config():\n{body}")
    with pytest.raises(ValueError, match=r"file\.py'.*takes no argument, got 'one'"):
        configuration.load(f"{tmp_path}/file.py:one", SECTIONS)
    with pytest.raises(FileNotFoundError, match=r"no such configuration file: .*other\.py'"):
        configuration.load(f"{tmp_path}/other.py:one", SECTIONS)


def test_the_tiny_file_loads_from_its_path(tmp_path):
    assert configuration.load(write_config(tmp_path), SECTIONS).train.batch_size == 16
