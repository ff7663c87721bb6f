"""Error against evaluations for every deterministic solver: the fitted orders, and a picture.

    python benchmarks/order.py          # under a minute; writes results/order.json, results/order.png

The protocol of tests/solvers/test_order.py: float64, a mixture of broad components, exact end
points, the median error of 64 samples, 80 to 640 steps, on the whole span from t = 1 to 0.01 and on
the inner one from 0.6 to 0.05, where a low-order start shows.
"""

import sys
from pathlib import Path

import machine
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "solvers")]

import test_order as protocol  # noqa: E402
from oracles import fitted_order  # noqa: E402


def measure():
    keys = [(name, span) for name in protocol.SETTINGS for span in protocol.SPANS]
    cases = [
        (span, protocol.SETTINGS[n][0].build(protocol.grid(span, s), **protocol.SETTINGS[n][1].options))
        for n, span in keys
        for s in protocol.STEPS
    ]
    errors = np.reshape(protocol.errors(cases), (len(keys), len(protocol.STEPS)))
    nfe = np.reshape([tableau.nfe for _, tableau in cases], errors.shape)
    return keys, nfe, errors


def draw(keys, nfe, errors, path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    styles = {}
    for (name, span), x, y in zip(keys, nfe, errors):
        axis = axes[list(protocol.SPANS).index(span)]
        style = styles.setdefault(name, {"color": f"C{len(styles) % 10}",
                                         "ls": ("-", "--", ":")[len(styles) // 10]})  # fmt: skip
        axis.loglog(x, y, marker="o", ms=2.5, label=name, **style)
    for axis, (span, (t_max, t_min)) in zip(axes, protocol.SPANS.items()):
        axis.set(title=f"{span} span: t = {t_max:g} to {t_min:g}", xlabel="evaluations (NFE)")
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
        entry = table.setdefault(name, {"stated": protocol.SETTINGS[name][1].order})
        entry[span] = round(fitted_order(protocol.STEPS, row), 2)
    machine.write("order", {"steps": protocol.STEPS, "orders": table})
