"""The loss curve of the digits run on 1 device and on 8 simulated ones, 50 steps.

    python benchmarks/devices.py          # about 2 minutes; writes results/devices.json
"""

import json
import os
import subprocess
import sys

import machine
import numpy as np

STEPS = 50


def curve():
    """Losses of the first steps, on all devices of this process."""
    import jax

    from jaxdiff.config import complete, load, override
    from jaxdiff.settings import SECTIONS
    from jaxdiff.training.loop import train
    from jaxdiff.training.run import LOSSES, prepare

    config = override(
        load("configs/digits.py", SECTIONS),
        [f"--config.train.steps={STEPS}", "--config.train.log_every=1"],
    )
    workdir = sys.argv[2]
    train(prepare(complete(config, SECTIONS)), workdir, progress=False)
    lines = open(f"{workdir}/{LOSSES}").read().splitlines()
    return {"devices": jax.device_count(), "losses": [json.loads(line)["loss"] for line in lines]}


def run(devices, folder):
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, "curve", f"{folder}/{devices}"]
    out = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, check=True, capture_output=True, text=True
    )
    found = json.loads(out.stdout.splitlines()[-1])
    assert (found["devices"], len(found["losses"])) == (devices, STEPS)
    return np.array(found["losses"])


def main():
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        one, eight = run(1, folder), run(8, folder)
    gap = np.abs(eight - one) / one
    return {
        "steps": STEPS,
        "loss on 1 device, first and last": [round(float(one[i]), 6) for i in (0, -1)],
        "loss on 8 devices, first and last": [round(float(eight[i]), 6) for i in (0, -1)],
        "relative difference, step 1": float(gap[0]),
        "relative difference, largest": float(gap.max()),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["curve"]:
        print(json.dumps(curve()))
    else:
        machine.write("devices", main())
