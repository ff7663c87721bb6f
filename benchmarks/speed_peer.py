"""diffusers' side of benchmarks/speed.py, for a Python of its own with torch and diffusers.

Reads a file of weights, answers every line of its input with the seconds that the named thing took
("bare": the network alone, as often; "sample": the scheduler's loop), "save" with the sample.
"""

import sys
import time

import diffusers
import numpy as np
import torch


def network(weights, x, t):
    """The residual network of speed.py, in torch."""
    angles = t * weights["frequencies"]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)])
    h = x @ weights["enter"]
    for i in range(int(weights["depth"])):
        shift = embedding @ weights[f"time_{i}"]
        h = h + torch.nn.functional.silu(h @ weights[f"up_{i}"] + shift) @ weights[f"down_{i}"]
    return h @ weights["leave"]


@torch.no_grad()
def main(path, steps):
    weights = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
    x_T = weights.pop("x_T")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_schedule="linear", timestep_spacing="linspace",
        lower_order_final=False, final_sigmas_type="zero",
    )  # fmt: skip

    def sample():
        scheduler.set_timesteps(steps)
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(network(weights, x, t / 1000.0), t, x).prev_sample
        return x

    def bare():
        x = x_T
        for _ in range(steps):
            x = network(weights, x, torch.tensor(0.5))
        return x

    calls = {"sample": sample, "bare": bare}
    sample()
    print("ready", torch.__version__, diffusers.__version__, flush=True)
    for line in sys.stdin:
        asked = line.split()
        if asked[0] == "save":
            np.save(asked[1], sample().numpy())
            print("saved", flush=True)
            continue
        begin = time.perf_counter()
        calls[asked[0]]()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
