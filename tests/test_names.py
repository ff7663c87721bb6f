import pytest

from jaxdiff.names import check_options, unknown


def builder(grid, order: int = 2, rho: float | None = None, kind: str = "a", path: str | int = 3):
    pass


def test_an_unknown_name_gets_the_nearest_ones():
    assert unknown("unknown solver", "dimm", ["ddim", "heun"]) == (
        "unknown solver 'dimm'; did you mean ddim? choose from ddim, heun"
    )
    assert unknown("unknown key", 3, ["steps"], "accepted:") == "unknown key 3; accepted: steps"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grid": 3}, ValueError, r"no option 'grid'; it takes \['order', 'rho', 'kind', 'path', "),
        ({"ordre": 3}, ValueError, "no option 'ordre'; did you mean order"),
        ({"order": "3x"}, TypeError, "solver 'b': order must be a value such as 2.*'3x'"),
        ({"rho": "7x"}, TypeError, "solver 'b': rho must be a value, not text, got '7x'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        check_options("solver 'b'", builder, options, 1, ["more"])


def test_options_that_fit_pass():
    options = {"order": 3, "rho": 1.0, "kind": "b", "path": "c", "more": "d"}
    assert check_options("solver 'b'", builder, options, 1, ["more"]) is None
    assert check_options("time law 'u'", lambda u, process: u, {}, 2) is None
