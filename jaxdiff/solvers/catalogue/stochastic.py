"""Entries: samplers that draw noise in every step."""

from jaxdiff.solvers.catalogue.entry import Entry, Setting
from jaxdiff.solvers.first_order import ddpm

ENTRIES = (
    Entry(
        "ddpm", ddpm,
        {
            "ddpm": Setting({}, 1, False),
            "ddpm_large": Setting({"variance": "fixed_large"}, 1, False),
        },
        1, "x0", (True, True), "ddpm", "ancestral",
    ),
)  # fmt: skip
