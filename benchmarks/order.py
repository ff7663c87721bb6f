"""Error against evaluations: the fitted order of every deterministic setting, and a picture of some.

    python benchmarks/order.py          # minutes; writes results/order.json, results/order.png

The protocol of tests/solvers/test_order.py in two dimensions on its first grid: float64, a mixture of
broad components, exact end points, the median error of 64 samples, 80 to 640 steps, on the whole span
from t = 1 to 0.01 and on the inner one from 0.6 to 0.05, where a low-order start shows.
"""

import sys
from pathlib import Path

import machine
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "solvers")]

import test_order as protocol  # noqa: E402
from listed import DETERMINISTIC, SETTINGS, build  # noqa: E402
from oracles import fitted_order  # noqa: E402

SPACING = "half_log_snr"
STEPS = (80, 160, 320, 640)
DRAWN = (
    "ddim", "heun", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "dpm_solver_pp_3m_singlestep",
    "dpm_solver_pp_3m_published", "unipc_2", "unipc_2_vary_coeff_published", "f_pndm", "deis_tab3",
    "deis_tab3_runge_kutta", "adams_pc_3_5_singlestep", "adams_eps_t_5_runge_kutta", "rk4",
)  # fmt: skip


def measure():
    keys = [(name, span) for name in DETERMINISTIC for span in protocol.SPANS]
    cases = [
        (span, build(name, protocol.grid(SPACING, span, steps)))
        for name, span in keys
        for steps in STEPS
    ]
    errors = np.reshape(protocol.errors(2, cases), (len(keys), len(STEPS)))
    nfe = np.reshape([tableau.nfe for _, tableau in cases], errors.shape)
    return keys, nfe, errors


def draw(keys, nfe, errors, path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    for (name, span), x, y in zip(keys, nfe, errors):
        if name in DRAWN:
            k = DRAWN.index(name)
            axis = axes[list(protocol.SPANS).index(span)]
            axis.loglog(x, y, "o", ls=("-", "--")[k // 10], color=f"C{k % 10}", ms=2.5, label=name)
    for axis, (span, (t_max, t_min)) in zip(axes, protocol.SPANS.items()):
        axis.set(title=f"{span} span: t = {t_max:g} to {t_min:g}", xlabel="evaluations (NFE)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("median error of the end point")
    axes[1].legend(fontsize=7, ncol=1, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    keys, nfe, errors = measure()
    machine.RESULTS.mkdir(exist_ok=True)
    draw(keys, nfe, errors, machine.RESULTS / "order.png")
    table = {}
    for (name, span), row in zip(keys, errors):
        entry = table.setdefault(name, {"stated": SETTINGS[name][1].order})
        entry[span] = round(fitted_order(STEPS, row), 2)
    machine.write("order", {"steps": STEPS, "orders": table})
