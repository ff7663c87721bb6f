"""Several processes, one a host or a device, that run one program together."""

import glob
import importlib.util
import os
import sys
import warnings
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

MODES = ("auto", "on", "off")
_VARIABLES = {
    "coordinator": "JAXDIFF_COORDINATOR",
    "processes": "JAXDIFF_PROCESSES",
    "process_id": "JAXDIFF_PROCESS_ID",
}
_HEARTBEAT = "JAXDIFF_HEARTBEAT"


def initialize(
    mode: str = "auto", coordinator: str | None = None, processes: int | None = None,
    process_id: int | None = None, heartbeat: int | None = None,
) -> bool:  # fmt: skip
    """Join the processes of a run, before anything else uses JAX; True if there are several.

    All three of `coordinator` ("host:port" of process 0), `processes` and `process_id`, or the
    environment's JAXDIFF_COORDINATOR, JAXDIFF_PROCESSES and JAXDIFF_PROCESS_ID, say it outright.
    Without them

        "auto"  asks JAX where the environment shows a TPU, or Slurm or Open MPI with several tasks,
                and does nothing on a plain host;
        "on"    always asks JAX, and fails if it finds no cluster;
        "off"   does nothing.

    A process that was not heard of for `heartbeat` seconds (the environment's JAXDIFF_HEARTBEAT,
    else JAX's 100) counts as dead: JAX then ends all others, which would wait for it forever, with
    a message that says so. The end of process 0 they notice at once.

    A second call changes nothing. Raises ValueError for another mode, for a part of the three
    only, for numbers that are none or do not fit, and for three given with "off".
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    chosen = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    explicit = any(value is not None for value in chosen.values())
    if explicit and mode == "off":
        raise ValueError("mode 'off' takes no coordinator, processes or process_id")
    for name, variable in _VARIABLES.items():
        if chosen[name] is None and os.environ.get(variable) and mode != "off":
            chosen[name] = os.environ[variable]
    absent = [name for name, value in chosen.items() if value is None]
    if mode == "off" or jax.distributed.is_initialized():
        return jax.distributed.is_initialized() and jax.process_count() > 1
    options = _heartbeat(heartbeat)
    if not absent:
        return _join(**chosen, **options)
    if len(absent) < len(chosen):
        variables = ", ".join(_VARIABLES[name] for name in absent)
        raise ValueError(
            f"several processes need a coordinator, processes and a process id: {absent} missing "
            f"(the environment's {variables})"
        )
    if mode == "on" or _several_tasks():
        jax.distributed.initialize(**options)
    elif _has_tpu():
        # Also a host of its own may have a TPU: JAX tells by the cloud's metadata, or fails.
        try:
            jax.distributed.initialize(**options)
        except ValueError as error:
            warnings.warn(f"a TPU, but no pod around it ({error}): one process", stacklevel=2)
            return False
    else:
        return False
    return jax.process_count() > 1


def _heartbeat(given: Any) -> dict[str, int]:
    """What `jax.distributed.initialize` is told of it."""
    given = os.environ.get(_HEARTBEAT) if given is None else given
    if given in (None, ""):
        return {}
    seconds = _integer("heartbeat", given)
    if seconds < 1:
        raise ValueError(f"heartbeat must be at least 1 second, got {seconds}")
    return {"heartbeat_timeout_seconds": seconds}


def _join(coordinator: str, processes: Any, process_id: Any, **options: int) -> bool:
    count, number = (
        _integer(name, value)
        for name, value in (("processes", processes), ("process_id", process_id))
    )
    if count < 1 or not 0 <= number < count:
        raise ValueError(
            f"process_id must be from 0 to processes - 1, got process_id {number} of {count}"
        )
    if not coordinator.rpartition(":")[2].isdigit() or coordinator.startswith(":"):
        raise ValueError(f"coordinator must be HOST:PORT of process 0, got {coordinator!r}")
    jax.distributed.initialize(
        coordinator, count, number, cluster_detection_method="deactivate", **options
    )
    return count > 1


def _integer(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _several_tasks() -> bool:
    """Whether Slurm or Open MPI started several of us."""
    counts = {"SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}
    return any(
        os.environ.get(count, "").isdigit() and int(os.environ[count]) > 1 and step in os.environ
        for count, step in counts.items()
    )


def _has_tpu() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "")
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    installed = importlib.util.find_spec("libtpu") is not None
    return installed and bool(chips) and (not wanted or "tpu" in wanted)


def is_main() -> bool:
    """Whether this process writes files and prints: the first one."""
    return jax.process_index() == 0


def abandon(code: int, words: str = "") -> None:
    """End this process, if it is one of several, without a farewell; `words` go to stderr.

    An ordinary end waits minutes for the others, who wait for this one in the middle of a step. This
    way they notice, and end as well.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        print(words, end="", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)


def barrier(name: str) -> None:
    """Wait for every process; each `name` is used in the same order by all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(value: int) -> int:
    """Process 0's value, on every process: they may see a shared disk at different moments."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def everywhere(condition: bool) -> bool:
    """Whether it holds in every process; all get the same answer."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.int32(condition)).all())


def same(what: str, text: str) -> None:
    """Raise ValueError, in every process, unless all of them give the same text."""
    if jax.process_count() == 1:
        return
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    if (sums != sums[0]).any():
        raise ValueError(f"the processes differ in {what}; this one has {text[:200]}")


def gather(array: jax.Array) -> np.ndarray:
    """The whole of an array on the host, in every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)
