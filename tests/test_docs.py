"""The README says what the code does."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_solver_table_is_the_catalogue():
    table = README.split("<!-- solvers -->\n")[1].split("\n<!-- /solvers -->")[0]
    assert table == jd.solvers.markdown_table()


def test_the_table_of_settings_is_the_catalogue():
    page = (ROOT / "docs" / "solvers.md").read_text()
    table = page.split("<!-- settings -->\n")[1].split("\n<!-- /settings -->")[0]
    assert table == jd.solvers.settings_table()


def test_settings_that_the_pages_name_exist():
    known = set(jd.solvers.names())
    page = (ROOT / "docs" / "references.md").read_text()
    for row in page.splitlines():
        cells = row.split("|")
        if len(cells) > 5:
            for name in re.findall(r"`([a-z0-9_]+)`", cells[4] + cells[5]):
                assert name in known, name


def test_links_lead_to_files():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_notebook_example_runs():
    names = {}
    exec(python_blocks()[0], names)
    assert names["x_0s"].shape == (4, 1000, 2)
    # Two components at +-2: half of the samples each, and none astray.
    sides = np.asarray(names["x_0"][:, 0])
    assert abs(np.mean(sides > 0) - 0.5) < 0.06
    assert np.mean(np.abs(np.abs(sides) - 2) < 1.2) > 0.99


def test_the_example_of_a_new_sampler_is_ddim():
    names = {}
    exec(python_blocks()[1], names)
    grid = jd.grids.half_log_snr(jd.processes.vp_linear(), 5)
    mine, ours = names["my_ddim"](grid), jd.solvers.ddim(grid)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(ours)):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_the_example_of_guidance_runs():
    denoiser = jd.Denoiser(lambda x, t, c: x * (1.0 + 0.0 * t) - c[:, None], "x0")
    names = {
        "jd": jd, "denoiser": denoiser, "labels": jnp.array([1, 2]), "x_T": jnp.zeros((2, 2)),
        "tableau": jd.solvers.ddim(jd.grids.half_log_snr(jd.processes.vp_linear(), 1)),
    }  # fmt: skip
    exec(python_blocks()[-3], names)
    assert names["x_0"].shape == (2, 2)


def test_the_example_without_retraining_runs():
    """The product of N(+-1, 0.5^2) is N(0, 0.5^2 / 2); the mean of both coordinates is measured."""
    process = jd.processes.vp_linear()
    one, other = (
        jd.gaussian_mixture([[m, m]], [0.5], [1.0], process) for m in (1.0, -1.0)
    )  # fmt: skip
    grid = jd.grids.half_log_snr(process, 200, t_max=0.9)
    names = {
        "jd": jd, "denoiser": one, "other": other, "process": process, "grid": grid,
        "key": jax.random.key(0), "x_T": process.prior(jax.random.key(1), (2048, 2)),
        "tableau": jd.solvers.ddpm(grid),
    }  # fmt: skip
    exec(python_blocks()[-2], names)
    x, log_weights = np.asarray(names["x_0"]), np.asarray(names["log_weights"]).reshape(-1, 64)
    weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
    weights = (weights / weights.sum(1, keepdims=True)).reshape(-1, 1)
    spread = np.sqrt(np.sum(weights * x**2) / weights.sum() / 2)
    assert abs(spread - 0.5 / np.sqrt(2)) < 0.03  # 0.30 without the weights
    gain = 0.125 / (0.125 + 0.01)
    expected = 1.0 + gain * (0.3 - 1.0)
    along = np.asarray(names["restored"]).mean(1)
    assert abs(along.mean() - expected) < 0.02
    assert abs(along.std() - np.sqrt(0.125 * (1 - gain))) < 0.02


def test_the_example_of_both_directions_runs():
    process = jd.processes.vp_linear()
    mixture = jd.gaussian_mixture([[1.0, 0.0], [-1.0, 0.0]], [0.5, 0.5], [0.5, 0.5], process)
    x_T = process.prior(jax.random.key(0), (8, 2))
    names = {
        "jd": jd, "jax": jax, "jnp": jnp, "denoiser": mixture, "process": process, "x_T": x_T,
        "grid": jd.grids.uniform(process, 8),
    }  # fmt: skip
    names["x_0"] = jd.sample(mixture, jd.solvers.bdia(names["grid"]), x_T)
    exec(python_blocks()[-1], names)
    np.testing.assert_allclose(names["before"].registers[0], x_T, atol=1e-5)
    level = process.alpha(process.t_min), process.sigma(process.t_min)
    exact = mixture.params.log_density(names["x_0"], *level)
    np.testing.assert_allclose(names["log_p"], exact, atol=1e-2)
    step = 1e-3 * jax.random.normal(jax.random.key(1), x_T.shape)
    change = names["loss"](x_T + step) - names["loss"](x_T - step)
    np.testing.assert_allclose(2 * jnp.sum(names["gradient"] * step), change, rtol=0.05)
