"""Eight simulated devices and a persistent compilation cache for the whole suite."""

import gc
import os
from pathlib import Path

# Small programs: compiling them costs more than running them.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
os.environ.setdefault("MPLBACKEND", "Agg")
if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # every program, in processes that tests start too
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

# Linux gives a process some 65,000 memory maps, a compiled program takes several, and XLA crashes
# when there are none left.
_MAPS, _MOST_MAPS = Path("/proc/self/maps"), 30_000


def pytest_collection_finish():
    """Tracing makes many objects and few cycles: a twelfth of the time would go to looking for them."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drop compiled programs (the cache on disk keeps them) before a process runs out of maps."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
