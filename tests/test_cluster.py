# SPDX-License-Identifier: Apache-2.0
"""Several processes: how they find each other, and that they train as one, stop as one and end as
one.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import DEADLINE, spawn

from particlejax import main as entry
from particlejax.config.experiment import DistributedSpec
from particlejax.core.typing import UserError
from particlejax.distributed import cluster, sharding

ROOT = Path(__file__).parents[1]
STAGE = "--config.stages.finetune"
EXPLICIT = {
    "coordinator_address": "a:1",
    "num_processes": 4,
    "process_id": 2,
    "cluster_detection_method": "deactivate",
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}


@pytest.mark.parametrize(
    ("spec", "environ", "found"),
    [
        ({}, {}, {}),
        (
            {},
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            {},
        ),  # a batch script that did not call srun
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, {}),
        ({}, SLURM, {"cluster_detection_method": "slurm"}),
        ({"start": "off"}, SLURM, {}),
        (
            {},
            {**OMPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"},
            {"cluster_detection_method": "ompi"},
        ),
        ({"coordinator_address": "a:1"}, OMPI, EXPLICIT),
        ({}, {**SLURM, "JAX_COORDINATOR_ADDRESS": "a:1"}, EXPLICIT),
        ({"coordinator_address": "a:1", "num_processes": 4, "process_id": "2"}, {}, EXPLICIT),
        (
            {"num_processes": 4},
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JOB_COMPLETION_INDEX": "2"},
            EXPLICIT,
        ),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"},
            EXPLICIT,
        ),
        ({"coordinator_address": "a:1", "num_processes": 1, "process_id": "0"}, {}, {}),
        (
            {},
            OMPI,
            "this Open MPI does not give the address of its first process: set JAX_COORDINATOR_",
        ),
        (
            {"num_processes": 4},
            {},
            "not the address of the first one: set config.distributed.coordinator_address",
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 4},
            {},
            "of 4 processes, and this is process unknown: set",
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 4, "process_id": "4"},
            {},
            "of 4 processes, and this is process 4: set",
        ),
    ],
)
def test_where_the_others_are(spec: dict, environ: dict, found: dict | str) -> None:
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            cluster.arguments(DistributedSpec(**spec), environ)
    else:
        assert cluster.arguments(DistributedSpec(**spec), environ) == found


class _Device:
    def __init__(self, process: int) -> None:
        self.process_index = process


class _Mesh:
    """A mesh's shape and which process has which device, for processes that are not here."""

    def __init__(self, *shape: int, processes: list[int]) -> None:
        self.shape = dict(zip(sharding.AXES, shape, strict=True))
        self.devices = np.array([_Device(p) for p in processes], object).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "processes", "parts"),
    [
        ((8, 1, 1, 1), [0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),
        (
            (2, 4, 1, 1),
            [0, 1, 0, 1, 2, 3, 2, 3],
            [(0, 4), (1, 4), (2, 4), (3, 4)],
        ),  # rows of a host need not be neighbours
        (
            (1, 2, 4, 1),
            [0, 0, 1, 1, 2, 2, 3, 3],
            [(0, 2), (0, 2), (1, 2), (1, 2)],
        ),  # tensor reaches over two hosts
        ((1, 1, 1, 4), [0, 0, 1, 1], [(0, 1), (0, 1)]),
    ],
)
def test_each_process_reads_the_rows_that_its_devices_hold(
    shape: tuple, processes: list, parts: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    for process, part in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.process_slice(_Mesh(*shape, processes=processes)) == part


def test_rows_that_are_half_shared_are_refused() -> None:
    with pytest.raises(UserError, match="makes processes share only some rows: make tensor"):
        sharding.process_slice(_Mesh(3, 1, 2, 1, processes=[0, 0, 0, 1, 1, 1]))


def several(number: int, command: list[str], log: Path) -> list[subprocess.Popen]:
    """Processes with a device each; what each says is in LOG.0, LOG.1, ..."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    }
    started = []
    for process in range(number):
        with open(f"{log}.{process}", "a") as to:
            me = {**environment, "JAX_NUM_PROCESSES": str(number), "JAX_PROCESS_ID": str(process)}
            started.append(spawn(command, cwd=ROOT, env=me, stdout=to, stderr=to))
    return started


def said(log: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*")))


LOOP = """
import jax, numpy as np
from particlejax.distributed import cluster, sharding
from particlejax.config.experiment import DistributedSpec, MeshSpec
cluster.initialize(DistributedSpec(heartbeat_timeout_seconds=5))
mesh = sharding.make_mesh(MeshSpec())
i, n = sharding.process_slice(mesh)
print(cluster.gather_json({"who": "me" * (jax.process_index() + 1), "part": (i, n)}), flush=True)
try:
    while True:
        rows = sharding.shard_batch(np.full((3, 2), i, np.float32), mesh)
        print(rows.shape, float(jax.jit(lambda x: x.sum())(rows)), flush=True)
except Exception as error:
    cluster.exit_process(cluster.report_failure(error))
"""


@pytest.mark.parametrize(
    ("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)  # dead, or silent
def test_one_is_lost_and_the_other_ends_with_a_sentence(
    victim: int, how: signal.Signals, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    two = several(2, [sys.executable, "-c", LOOP], log)
    until = time.monotonic() + DEADLINE
    while said(log).count("(6, 2) 6.0") < 4 and time.monotonic() < until:
        assert two[0].poll() is None and two[1].poll() is None, said(log)
        time.sleep(0.02)
    two[victim].send_signal(how)
    code = two[1 - victim].wait(timeout=DEADLINE)
    two[victim].kill()
    assert two[victim].wait() == -signal.SIGKILL
    assert code == cluster.EXIT_RESTART or code < 0, "something that whoever started it sees"
    until = time.monotonic() + DEADLINE
    # the witnesses speak after the end
    while said(log).count(" of 2 ") < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert re.search(
        f"particlejax: process {1 - victim} of 2 (lost a peer|was terminated)", said(log)
    ), said(log)
    assert f"process {victim} of 2 was terminated" in said(log), "also of the one that was killed"
    assert said(log).count("[{'who': 'me', 'part': [0, 2]}, {'who': 'meme', 'part': [1, 2]}]") == 2


def wait_for(workdir: Path, step: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + DEADLINE
    while process.poll() is None and time.monotonic() < until:
        if len(lines(workdir)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("it has ended")


def lines(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    found = (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )
    return [line for line in found if line["split"] == "train"]


def command(workdir: Path, cache_dir: str) -> list[str]:
    return [
        "particlejax.main",
        "--config",
        "experiments/finetune.py:tiny",
        "--workdir",
        str(workdir),
        "--config.log.every_steps=1",
        f"--config.data.cache_dir={cache_dir}",
        f"{STAGE}.val_split=",
        f"{STAGE}.num_steps=60",
        "--config.checkpoint.save_interval_steps=100",
        "--config.model.depth=1",
        "--config.eval.splits=()",
    ]


def test_four_processes_train_and_stop_as_one(cache_dir: str, tmp_path: Path) -> None:
    workdir, log = tmp_path / "run", tmp_path / "log"
    four = several(4, [sys.executable, "-m", *command(workdir, cache_dir)], log)
    wait_for(workdir, 4, four[0])
    four[2].send_signal(signal.SIGTERM)  # to one of them
    assert [each.wait(timeout=DEADLINE) for each in four] == [0] * 4, said(log)
    stopped = int(re.search(r"SIGTERM: finetune is saved at step (\d+)", said(log))[1])
    assert said(log).count("is saved at step") == 1, "one of them speaks"
    before = lines(workdir)
    assert len(before) == stopped < 60

    assert entry.main(command(workdir, cache_dir)) == 0  # this process with its eight devices
    after = lines(workdir)
    assert after[:stopped] == before and [line["step"] for line in after] == list(range(1, 61))
    shutil.rmtree(workdir)
    # and from the start: the clips and their order are the same
    assert entry.main(command(workdir, cache_dir)) == 0
    np.testing.assert_allclose(
        [line["loss"] for line in lines(workdir)], [line["loss"] for line in after], rtol=1e-4
    )
