"""Entries: samplers that draw noise in every step."""

from jaxdiff.solvers.catalogue.entry import Entry, Setting
from jaxdiff.solvers.consistency import consistency, tcd
from jaxdiff.solvers.first_order import ddim, ddpm
from jaxdiff.solvers.langevin import annealed_langevin, predictor_corrector
from jaxdiff.solvers.restart import Interval, restart

ENTRIES = (
    Entry(
        "ddpm", ddpm,
        {
            "ddpm": Setting({}, 1, False, strong=1),
            "ddpm_large": Setting({"variance": "fixed_large"}, 1, False, strong=1),
        },
        1, "x0", (True, True), "ddpm", "ancestral",
    ),
    Entry(
        "restart", restart,
        {
            "restart": Setting({}, 2, False, extra=16),
            "restart_two_intervals": Setting(
                {"intervals": (Interval(1.0, 10.0, 2), Interval(0.06, 0.3, 2))}, 2, False, extra=36
            ),
            "restart_fixed_steps": Setting(
                {"intervals": (Interval(0.06, 0.3, 2, 2),)}, 0, False, extra=8
            ),
        },
        2, "eps", (False, True), "restart", "restart",
    ),
    Entry(
        "predictor_corrector", predictor_corrector,
        {
            "ddpm_langevin": Setting({}, 0, False),
            "ddim_langevin": Setting({"predictor": ddim}, 0, False),
            "ddim_langevin_sde": Setting({"predictor": ddim, "rule": "step", "snr": 1.0}, 1, False),
            "ddpm_langevin_2": Setting({"steps": 2}, 0, False, nfe_per_step=3),
        },
        2, "x0", (True, True), "score_sde", "Langevin",
    ),
    Entry(
        "annealed_langevin", annealed_langevin,
        {"annealed_langevin": Setting({}, 0, False)},
        10, "x0", (False, True), "ncsn", "Langevin",
    ),
    # With the mean of the posterior in place of a consistency model these lose variance: order 0.
    Entry(
        "consistency", consistency, {"consistency": Setting({}, 0, False)},
        1, "x0", (True, True), "consistency", "consistency",
    ),
    Entry(
        "tcd", tcd,
        {
            "tcd": Setting({}, 0, False),
            "tcd_rho": Setting({"variable": "rho"}, 0, False),
        },
        1, "x0", (True, True), "tcd", "consistency",
    ),
)  # fmt: skip
