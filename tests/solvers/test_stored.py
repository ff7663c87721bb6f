"""Tableaux as files: bit for bit, and what is refused."""

import json

import jax
import numpy as np
import pytest
from listed import SETTINGS, build

import jaxdiff as jd
from jaxdiff.experiment import make_tableau

VP = jd.processes.vp_linear()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_table_reads_back(name, tmp_path):
    tableau = build(name, jd.grids.half_log_snr(VP, 6))
    jd.solvers.save(tableau, tmp_path / "t.json")
    read = jd.solvers.load(tmp_path / "t.json")
    assert jax.tree.structure(read) == jax.tree.structure(tableau)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(tableau)):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.asarray(b).dtype


def test_a_file_is_a_solver(tmp_path):
    path = str(tmp_path / "mine.json")
    tableau = jd.solvers.unipc(jd.grids.karras(VP, 4), order=2)
    jd.solvers.save(tableau, path)
    found = make_tableau(VP, path, 10, "half_log_snr")
    np.testing.assert_array_equal(found.B, tableau.B)
    with pytest.raises(ValueError, match="made for another process: at t = 1 it has alpha"):
        make_tableau(jd.processes.edm(), path, 10, "half_log_snr")
    mixture = jd.gaussian_mixture(np.zeros((1, 2)), [1.0], [1.0], VP)
    sweep = jd.ablation.product(solver=path, nfe=4)
    options = {"count": 2, "progress": False, "metrics": {"first": lambda x, facts: x[0, 0]}}
    table = jd.ablation.run(sweep, mixture, VP, (2,), **options)
    other = jd.ablation.product(solver="unipc_2", grid="karras", nfe=4)
    np.testing.assert_allclose(
        table["first"], jd.ablation.run(other, mixture, VP, (2,), **options)["first"], rtol=1e-6
    )
    for axes, message in (({"nfe": 5}, "has nfe = 4, got 5"), ({"nfe": 4, "eta": 1.0}, "own eta")):
        with pytest.raises(ValueError, match=message):
            jd.ablation.run(jd.ablation.product(solver=path, **axes), mixture, VP, (2,), **options)


def test_what_is_no_solver_file(tmp_path):
    path = tmp_path / "t.json"
    with pytest.raises(FileNotFoundError, match="no such solver file"):
        jd.solvers.load(path)
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(VP, 3))
    jd.solvers.save(tableau, path)
    whole = json.loads(path.read_text())
    for broken, message in (
        ("{", "is not a solver file"),
        (json.dumps({**whole, "format": "x"}), "its format is not"),
        (json.dumps({k: v for k, v in whole.items() if k != "B"}), "missing field 'B'"),
        (json.dumps({**whole, "A": [[[1.0]]]}), "A must have the shape .3, 1, 1., got .1, 1, 1."),
        (json.dumps({**whole, "A": [[[np.nan]]] * 3}), "A has entries that are not finite"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message):
            jd.solvers.load(path)
    with pytest.raises(ValueError, match="a stacked tableau holds several"):
        jd.solvers.save(jd.solvers.stack([tableau, tableau]), path)
    with pytest.raises(TypeError, match="expected a Tableau, got int"):
        jd.solvers.save(3, path)
