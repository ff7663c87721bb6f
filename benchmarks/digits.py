"""Quality on digits: few steps against many, and guided samples against their labels.

    jaxdiff train --config configs/digits.py --workdir runs/digits
    python benchmarks/digits.py runs/digits          # about 6 minutes; writes results/digits.json

For each of three seeds, 5,000 samples from one x_T by every sampler: the Frechet distance of
digit-classifier features to all 1,797 real digits. Beside it the distance that 5,000 fresh real
digits would have.
"""

import argparse

import machine
import numpy as np

import jaxdiff as jd
from jaxdiff.experiment import make_tableau
from jaxdiff.generation import balanced_labels, generate
from jaxdiff.training.run import read_experiment, restore

SAMPLERS = {
    "ddim, 200 steps": {"solver": "ddim", "steps": 200},
    "ddim, 10 steps": {"solver": "ddim", "steps": 10},
    "dpm_solver_pp_2m, 10 steps": {"solver": "dpm_solver_pp_2m", "steps": 10},
    "dpm_solver_pp_3m, 10 steps": {"solver": "dpm_solver_pp_3m", "steps": 10},
    "unipc_2, 10 steps": {"solver": "unipc_2", "steps": 10},
    "unipc_3, 10 steps": {"solver": "unipc_3", "steps": 10},
    "heun, 5 steps": {"solver": "heun", "steps": 5},
}
SEEDS, COUNT = (0, 1, 2), 5000


def main(workdir):
    experiment = read_experiment(workdir)
    variables = restore(experiment, workdir).ema
    classifier = jd.metrics.digit_classifier()
    real = classifier.features(jd.data.digits("all").x)
    labels = balanced_labels(experiment, COUNT)

    def samples(sampler, seed, guidance=1.0):
        tableau = make_tableau(experiment.process, grid="half_log_snr", **sampler)
        x = generate(experiment, variables, tableau, labels, COUNT, seed, guidance, 500)
        return np.clip(x, -1, 1), tableau.nfe

    rows = {}
    for name, sampler in SAMPLERS.items():
        distances, accuracies = [], []
        for seed in SEEDS:
            x, nfe = samples(sampler, seed)
            distances.append(jd.metrics.frechet_distance(classifier.features(x), real))
            accuracies.append(jd.metrics.conditional_accuracy(classifier, x, labels))
        rows[name] = {
            "evaluations": nfe,
            "frechet distance, each seed": [round(d, 4) for d in distances],
            "median": round(float(np.median(distances)), 4),
            "accuracy, median": round(float(np.median(accuracies)), 4),
        }
    reference = rows["ddim, 200 steps"]["median"]
    for row in rows.values():
        row["over ddim with 200 steps"] = round(row["median"] / reference, 4)
    guided = {}
    for scale in (1.5, 2.0, 3.0):
        found = [
            jd.metrics.conditional_accuracy(
                classifier, samples(SAMPLERS["unipc_2, 10 steps"], seed, scale)[0], labels
            )
            for seed in SEEDS
        ]
        guided[f"s = {scale:g}"] = [round(a, 4) for a in found]
    return {
        "samples": COUNT,
        "seeds": SEEDS,
        "frechet floor (fresh real digits)": round(
            jd.metrics.real_floor(classifier, COUNT, len(real)), 4
        ),
        "samplers, guidance 1": rows,
        "classified as asked, unipc_2 with 10 steps, guidance s": guided,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", help="the folder of a digits run")
    machine.write("digits", main(parser.parse_args().workdir))
