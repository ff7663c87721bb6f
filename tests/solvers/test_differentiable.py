"""Every builder under a trace: values equal the host's, derivatives by the grid are finite and true."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import SETTINGS, build

import jaxdiff as jd

PROCESS = jd.processes.vp_linear()
TIMES = np.array([0.9, 0.66, 0.41, 0.2])
DIRECTION = np.array([0.3, -1.0, 0.8, 0.5])
# Built from nodes that only the host knows: which of them churn raises, where a restart goes back.
HOST_ONLY = [
    name
    for name, (entry, setting) in SETTINGS.items()
    if "s_churn" in setting.options or entry.name == "restart"
]


def coefficients(name, end):
    def of(t):
        table = build(name, jd.grids.from_times(PROCESS, t, end=end))
        return {
            field.name: getattr(table, field.name)
            for field in dataclasses.fields(table)
            if field.name in ("A", "B", "C", "d", "t", "alpha", "sigma", "clock")
        } | {"S": table.start.S, "start noise": table.start.C}

    return of


TRACED = [name for name in SETTINGS if name not in HOST_ONLY]
# At sigma = 0 an entry's settings share their limits: the first and the last of each.
FIRST = {SETTINGS[name][0].name: name for name in reversed(TRACED)}
LAST = {SETTINGS[name][0].name: name for name in TRACED}
CASES = [("t_min", name) for name in TRACED]
CASES += [("zero", name) for name in TRACED if name in (*FIRST.values(), *LAST.values())]


@pytest.mark.parametrize(("end", "name"), CASES)
def test_traced_nodes_give_the_same_table_and_its_derivative(x64, name, end):
    of = coefficients(name, end)
    values, slopes = jax.jvp(of, (jnp.asarray(TIMES),), (jnp.asarray(DIRECTION),))
    h = 1e-5
    ahead, behind = of(TIMES + h * DIRECTION), of(TIMES - h * DIRECTION)
    for key, value in of(TIMES).items():
        if value is None:
            assert values[key] is None
            continue
        size = 1.0 + np.abs(value).max()
        np.testing.assert_allclose(values[key], value, rtol=0, atol=1e-9 * size, err_msg=key)
        slope = (np.asarray(ahead[key]) - np.asarray(behind[key])) / (2 * h)
        assert np.all(np.isfinite(slopes[key])), key
        scale = 1.0 + np.abs(slope).max()
        np.testing.assert_allclose(slopes[key], slope, rtol=0, atol=2e-5 * scale, err_msg=key)
