"""The ablation lab: many samplers in few compiled programs.

    sweep = jd.ablation.product(solver=["ddim", "unipc_3"], nfe=[5, 10], seed=range(4))
    table = jd.ablation.run(sweep, denoiser, process, (2,), reference={"steps": 1000})
    table.best("error", "nfe")

A sampler is a table of coefficients, so a thousand of them are one array with one more axis, and one
program under `vmap` runs them all: a program is compiled for each number of evaluations, not for
each sampler.
"""

from jaxdiff.ablation.report import error_against_nfe as error_against_nfe
from jaxdiff.ablation.report import heat_map as heat_map
from jaxdiff.ablation.report import pareto_front as pareto_front
from jaxdiff.ablation.report import report as report
from jaxdiff.ablation.run import run as run
from jaxdiff.ablation.sweep import Sweep as Sweep
from jaxdiff.ablation.sweep import product as product
from jaxdiff.ablation.table import Table as Table
