"""Entries: Adams methods in any clock, pseudo-numerical methods."""

from jaxdiff.solvers.catalogue.entry import Entry, Exactness, Setting
from jaxdiff.solvers.pndm import ipndm, pndm

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "pndm", pndm,
        {
            "f_pndm": Setting({}, 2, extra=9, exact=Exactness("rho", 0)),
            "f_pndm_variable": Setting(
                {"coefficients": "variable"}, 4, extra=9, exact=Exactness("rho", 3)
            ),
            "s_pndm": Setting(
                {"order": 2, "start": "heun"}, 2, extra=1, exact=Exactness("rho", 0)
            ),
            "plms": Setting({"start": "heun"}, 2, extra=1, exact=Exactness("rho", 0)),
        },
        1, "eps", (False, True), "pndm", "pseudo-numerical",
    ),
    Entry(
        "ipndm", ipndm,
        {
            "ipndm_4": Setting({}, 2, exact=Exactness("rho", 0)),
            "ipndm_3": Setting({"order": 3}, 2, exact=Exactness("rho", 0)),
            "ipndm_2": Setting({"order": 2}, 2, exact=Exactness("rho", 0)),
            "ipndm_v": Setting({"coefficients": "variable"}, 2, exact=Exactness("rho", 3)),
            "ipndm_v_published": Setting({"coefficients": "published"}, 1.5),
        },
        1, "eps", (False, True), "deis", "pseudo-numerical",
    ),
)  # fmt: skip
