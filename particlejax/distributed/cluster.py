# SPDX-License-Identifier: Apache-2.0
"""Multi-process runs: initialization from the environment, barriers, and exit on failure.

All processes run the same command. Process 0 alone writes logs and results; all write checkpoints,
to a shared folder.
"""

import glob
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from particlejax.config.training import DistributedSpec
from particlejax.core.typing import UserError

# exit code (EX_TEMPFAIL) of a run that its supervisor should restart; 2 is a user's mistake
EXIT_RESTART = 75
_RANK_VARIABLES = (
    "JAX_PROCESS_ID",
    "JOB_COMPLETION_INDEX",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "SLURM_PROCID",
)
_SIZE_VARIABLES = ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_ORTE = "OMPI_MCA_orte_hnp_uri"  # of Open MPI up to 4: its launcher's address
_PEER_LOSS_TEXTS = (
    "Gloo",
    "closed by peer",
    "Connection reset",
    "oordination service",
    "eartbeat",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "Barrier",
    "Shutdown barrier",
)
# Prints the last message of a terminated process: XLA ends a process that lost a peer without
# returning to Python.
_WATCHDOG_CODE = (
    "import os, sys; done = sys.stdin.buffer.read(); done or os.write(2, sys.argv[1].encode())"
)
_watchdogs: list[subprocess.Popen] = []


def arguments(spec: DistributedSpec, environ: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of jax.distributed.initialize, {} for a single process. Raises UserError if they
    are incomplete.

    Sources in order: `config.distributed` and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
    JAX_PROCESS_ID (the last also as a Kubernetes Job index, or an MPI or SLURM rank); SLURM; Open
    MPI; a TPU pod.
    """
    coordinator = spec.coordinator_address or environ.get("JAX_COORDINATOR_ADDRESS", "")
    if spec.start == "off":
        return {}
    if coordinator:
        return _explicit_arguments(spec, coordinator, environ)
    if _int_variable(environ, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environ:
        return {"cluster_detection_method": "slurm"}
    if _int_variable(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        if _ORTE not in environ:
            raise UserError(
                "this Open MPI does not give the address of its first process: set "
                "JAX_COORDINATOR_ADDRESS=HOST:PORT, or config.distributed.coordinator_address."
            )
        return {"cluster_detection_method": "ompi"}
    if spec.num_processes > 1 or _int_variable(environ, "JAX_NUM_PROCESSES") > 1:
        raise UserError(
            "several processes are configured, but not the address of the first one: set "
            "config.distributed.coordinator_address=HOST:PORT, or JAX_COORDINATOR_ADDRESS."
        )
    return {"cluster_detection_method": None} if _on_tpu(environ) else {}


def initialize(spec: DistributedSpec) -> None:
    """Joins the other processes, before any device is used. Raises UserError if they do not
    connect.
    """
    kwargs = arguments(spec, os.environ)
    if not kwargs or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            **kwargs,
            heartbeat_timeout_seconds=spec.heartbeat_timeout_seconds,
            initialization_timeout=spec.initialization_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            "the processes of this run did not find each other "
            f"({' '.join(str(error).split())[:200]}): check that all are started, and that "
            "config.distributed, or the environment, gives all the same coordinator."
        ) from error
    if jax.process_count() > 1:
        process_name = f"process {jax.process_index()} of {jax.process_count()}"
        message = (
            f"particlejax: {process_name} was terminated (a peer was lost, or the system killed "
            f"it). {_REMEDY}\n"
        )
        _watchdogs.append(
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WATCHDOG_CODE, message],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        )


def is_multiprocess() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_primary() -> bool:
    """Whether this process writes the results; queries no device in a single process."""
    return not is_multiprocess() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes."""
    if is_multiprocess():
        multihost_utils.sync_global_devices(name)


def gather_json(value: Any) -> list[Any]:
    """The JSON values of all processes, in process order; all processes must call it."""
    if not is_multiprocess():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size))).reshape(-1)
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def report_failure(error: Exception) -> int:
    """Reports the error that ended this process of several; returns the exit code."""
    if any(text in str(error) for text in _PEER_LOSS_TEXTS):
        process_name = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"particlejax: {process_name} lost a peer. {_REMEDY}", file=sys.stderr)
        return EXIT_RESTART
    traceback.print_exception(error)
    return 1


def exit_process(code: int) -> NoReturn:
    """Ends this process; after a failure it does not wait for the others, which then end too."""
    for watchdog in _watchdogs:
        watchdog.communicate(b"done")
    if code and is_multiprocess():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


_REMEDY = (
    "Checkpoints are intact: run the same command again in all processes; it resumes from the "
    "last checkpoint, also with another number of processes."
)


def _explicit_arguments(
    spec: DistributedSpec, coordinator: str, environ: Mapping[str, str]
) -> dict[str, Any]:
    num_processes = spec.num_processes or next(
        (size for size in (_int_variable(environ, name) for name in _SIZE_VARIABLES) if size), 0
    )
    process_id = spec.process_id or next(
        (environ[name] for name in _RANK_VARIABLES if name in environ), ""
    )
    if not num_processes or not process_id.isdigit() or int(process_id) >= num_processes:
        raise UserError(
            f"the coordinator is {coordinator}, of {num_processes or 'an unknown number of'} "
            f"processes, and this is process {process_id or 'unknown'}: set "
            "config.distributed.num_processes and config.distributed.process_id (0 for the "
            "first), or JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        )
    if num_processes == 1:
        return {}
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": int(process_id),
        "cluster_detection_method": "deactivate",
    }


def _int_variable(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdigit() else 0


def _on_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU host, where JAX gets the other hosts from the platform (one host
    is a pod of one).
    """
    if (
        "tpu" not in environ.get("JAX_PLATFORMS", "tpu")
        or importlib.util.find_spec("libtpu") is None
    ):
        return False
    return bool(
        glob.glob("/dev/accel[0-9]*")
        or glob.glob("/dev/vfio/[0-9]*")
        or "TPU_WORKER_HOSTNAMES" in environ
    )
