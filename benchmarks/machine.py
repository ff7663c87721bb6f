"""What a committed figure was measured on."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "diffrax", "equinox", "optax", "orbax-checkpoint", "numpy", "scipy")
RESULTS = Path(__file__).parent / "results"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "unknown")


def describe() -> dict:
    """Processor, cores, Python and package versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def write(name: str, figures: dict) -> None:
    """Write benchmarks/results/<name>.json with the machine beside the figures, and print it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": describe(), **figures}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
