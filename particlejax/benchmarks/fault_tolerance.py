# SPDX-License-Identifier: Apache-2.0
"""Injects faults into a run: kills, corrupt checkpoints, a full disk, a lost process.

An undisturbed run is the reference. After each fault the same command resumes, and must end with
the same metrics.
"""

import json
import math
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import particlejax
from particlejax.config.experiment import Experiment
from particlejax.config.fields import as_dict
from particlejax.config.job_specs import BenchJob
from particlejax.core import io, tree
from particlejax.distributed import checkpoint
from particlejax.jobs.train import train
from particlejax.reports.markdown import table
from particlejax.train import stage
from particlejax.train.log import log_info
from particlejax.train.run_dir import enter

_TIMEOUT = 300.0  # seconds; timeout of a process
_MAX_PAUSE = 0.25  # seconds; a kill comes at a random time up to this after a step
_DISK_MIB = 64  # MiB of the small disk
# bytes left on it: enough for metrics, too few for a checkpoint
_BYTES_LEFT = 64 * 1024
_TOLERANCE = 1e-4  # relative, of losses summed in another order on other device counts
_EXPERIMENT = """import json, pathlib
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""


@dataclass
class FaultResult:
    """A kind of fault: how often it was injected, what was lost, what the user saw."""

    what: str
    times: int = 0
    lost: int = 0  # steps, files or metrics that differ from the run without faults
    saw: str = ""
    exit_codes: list[int] = field(default_factory=list)
    more: str = ""


@dataclass
class Bench:
    """Trains the victim, the experiment as a training run, in child processes. This process may
    resume it.
    """

    experiment: BenchJob
    folder: Path
    rng: random.Random

    def __post_init__(self) -> None:
        self.stage = next(iter(self.experiment.stages))
        (self.folder / "victim.py").write_text(_EXPERIMENT, encoding="utf-8")
        victim = as_dict(self.experiment) | {"job": "train"}
        del victim["bench"]
        self.victim = Experiment.of(victim)
        io.write_json(self.folder / "victim.json", victim)

    def start_process(
        self,
        workdir: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        limit: int = 0,
    ) -> subprocess.Popen:
        """Starts the command in a child process that logs to WORKDIR.log. limit: maximum file size
        in bytes, 0: none.
        """
        home = str(Path(particlejax.__file__).parents[1])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((home, os.environ.get("PYTHONPATH", ""))),
            **(environment or {}),
        }
        command = [
            sys.executable,
            "-m",
            "particlejax.main",
            "--config",
            str(self.folder / "victim.py"),
            "--workdir",
            str(workdir),
        ]
        set_limit = (
            (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
        )
        with open(_log(workdir), "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [*command, *arguments],
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=set_limit,
            )

    def finish(self, workdir: Path) -> None:
        """Trains or resumes to the end."""
        train(self.victim, enter(workdir, self.victim), workdir.name)

    def reference_run(self) -> Path:
        """The undisturbed run."""
        if not (self.folder / "alone" / stage.RESULTS).exists():
            self.finish(self.folder / "alone")
        return self.folder / "alone"

    def losses(self, workdir: Path) -> dict[int, float]:
        """The training loss by step."""
        return {
            line["step"]: float(line["loss"])
            for line in _lines(workdir)
            if line["split"] == "train"
        }

    def count_differences(self, workdir: Path, tolerance: float = 0.0) -> int:
        """Lines of metrics that differ from the undisturbed run; tolerance 0: in any byte."""
        if not tolerance:
            observed, expected = (
                (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                for run in (workdir, self.reference_run())
            )
            return sum(a != b for a, b in zip(observed, expected, strict=False)) + abs(
                len(observed) - len(expected)
            )
        observed, expected = self.losses(workdir), self.losses(self.reference_run())
        return sum(
            not math.isclose(observed.get(step, math.nan), loss, rel_tol=tolerance)
            for step, loss in expected.items()
        )

    def wait_for_steps(self, workdir: Path, process: subprocess.Popen, new: int = 1) -> bool:
        """Waits until the process has written `new` more steps; False if it ended before."""
        num_before = len(self.losses(workdir))
        return _wait_until(lambda: len(self.losses(workdir)) >= num_before + new, process)

    def unfinished_save(self, workdir: Path) -> list[Path]:
        """Unfinished checkpoint files."""
        folder = stage.checkpoint_folder(workdir, self.stage)
        partial = list(folder.glob("*-tmp*")) if folder.is_dir() else []
        return partial or [p for p in _steps(folder) if not (p / "manifest.json").exists()]


def bench(experiment: BenchJob, workdir: Path, name: str) -> None:
    """Job 'bench_fault_tolerance': writes report.md and results.json. Raises RuntimeError if
    anything was lost.
    """
    del name
    bench_run = Bench(experiment, workdir, random.Random(experiment.seed))
    log_info("faults: the undisturbed run")
    bench_run.reference_run()
    rows = []
    for kind in experiment.bench.faults:
        log_info(f"faults: {kind}")
        rows += KINDS[kind](bench_run)
        stage.add_results(
            workdir, "bench_fault_tolerance", {row.what: vars(row) for row in rows}, {}
        )
        io.write_text(workdir / "report.md", "\n".join(_report(bench_run, rows)))
    print("\n".join(_report(bench_run, rows)))
    if any(row.lost for row in rows):
        raise RuntimeError(f"a fault lost data: see {workdir / 'report.md'}")


# -- the faults


def sigkill(bench_run: Bench) -> Iterator[FaultResult]:
    """SIGKILL, alternately inside a save and at a random moment, to one resumed run."""
    workdir = bench_run.folder / "killed"
    inside_save, random_moment = (
        FaultResult("SIGKILL inside a save"),
        FaultResult("SIGKILL at a random moment"),
    )
    for i in range(bench_run.experiment.bench.repetitions):
        row = random_moment if i % 2 else inside_save
        process = bench_run.start_process(workdir)
        # partial writes of earlier kills are removed by then
        was_alive = bench_run.wait_for_steps(workdir, process)
        if i % 2:
            time.sleep(bench_run.rng.uniform(0, _MAX_PAUSE))
        else:
            was_alive = _wait_until(
                lambda: bool(bench_run.unfinished_save(workdir)), process, 0.0005
            )
        process.kill()
        row.exit_codes.append(process.wait())
        row.times += was_alive
    exit_code = bench_run.start_process(workdir).wait()
    damaged = re.findall(
        r"checkpoint \S+/(\d+) failed verification \(([^)]*)\)", _read(_log(workdir))
    )
    for row in (inside_save, random_moment):
        row.lost = bench_run.count_differences(workdir) + (exit_code != 0)
        row.saw = _last_line(workdir, "continuing at step")
    reasons = ", ".join(sorted({reason for _, reason in damaged})) or "none"
    inside_save.more = f"{len(damaged)} checkpoints skipped: {reasons}"
    yield from (row for row in (inside_save, random_moment) if row.times)


def sigterm(bench_run: Bench) -> Iterator[FaultResult]:
    """SIGTERM at a random step."""
    workdir, row = bench_run.folder / "terminated", FaultResult("SIGTERM")
    process = bench_run.start_process(workdir)
    row.times += bench_run.wait_for_steps(workdir, process, bench_run.rng.randint(2, 5))
    process.terminate()
    row.exit_codes.append(process.wait())
    num_done, saved = (
        len(bench_run.losses(workdir)),
        _steps(stage.checkpoint_folder(workdir, bench_run.stage)),
    )
    row.saw = _last_line(workdir, "SIGTERM: ")
    row.more = f"saved at step {saved[-1].name} of {num_done} done"
    bench_run.finish(workdir)
    row.lost = bench_run.count_differences(workdir) + abs(num_done - int(saved[-1].name))
    yield row


def corrupt_checkpoint(bench_run: Bench) -> Iterator[FaultResult]:
    """Flips a bit in, truncates or removes every file of the newest checkpoint: the older one must
    be used, with a message.
    """
    folder = stage.checkpoint_folder(bench_run.reference_run(), bench_run.stage)
    newest, older = _steps(folder)[-1], _steps(folder)[-2]
    copy = bench_run.folder / "damaged"
    expected = _load_step(folder, older.name, copy)
    files = sorted(p.relative_to(folder) for p in newest.rglob("*") if p.is_file())
    for kind, corrupt in {
        "a bit flipped": _flip,
        "cut short": _truncate,
        "removed": os.remove,
    }.items():
        row = FaultResult(f"each file of a checkpoint {kind}")
        for name in files:
            _copy_folder(folder, copy)
            corrupt(copy / name)
            messages: list[str] = []
            checkpoint.Checkpoints(copy, 2, messages.append).close()
            restored = tree.flatten(checkpoint.load_arrays(copy))
            is_correct = restored.keys() == expected.keys() and all(
                np.array_equal(restored[key], expected[key]) for key in expected
            )
            row.times += 1
            row.lost += not (
                is_correct
                and len(messages) == 1
                and f"/{newest.name} failed verification" in messages[0]
            )
            row.saw = messages[0].replace(str(copy), "FOLDER") if messages else ""
        yield row
    shutil.rmtree(copy)
    yield _continue_corrupted(bench_run, newest.name)


def _continue_corrupted(bench_run: Bench, step: str) -> FaultResult:
    """Resumes a run whose newest checkpoint has a flipped bit."""
    workdir, row = (
        bench_run.folder / "flipped",
        FaultResult("a bit flipped, then the run continued", times=1),
    )
    shutil.copytree(bench_run.reference_run(), workdir)
    (workdir / stage.RESULTS).unlink()
    largest = max(
        (stage.checkpoint_folder(workdir, bench_run.stage) / step).rglob("*"),
        key=lambda p: p.stat().st_size * p.is_file(),
    )
    _flip(largest)
    row.exit_codes.append(bench_run.start_process(workdir).wait())
    moved = stage.checkpoint_folder(workdir, bench_run.stage) / "damaged" / step
    row.lost = bench_run.count_differences(workdir) + (not moved.is_dir())
    row.saw = _last_line(workdir, "failed verification").replace(str(moved.parents[1]), "FOLDER")
    return row


def disk_full(bench_run: Bench) -> Iterator[FaultResult]:
    """Fills the disk during a run: a small mounted one if possible, else a file size limit."""
    with _small_disk(bench_run.folder / "disk") as is_mounted:
        workdir = bench_run.folder / "disk" / "run"
        row = FaultResult(
            "disk full"
            if is_mounted
            else "file size limit (as a full disk: this user cannot mount one)"
        )
        process = bench_run.start_process(workdir)
        bench_run.wait_for_steps(
            workdir, process, bench_run.experiment.checkpoint.save_interval_steps + 1
        )
        process.terminate()
        process.wait()
        steps_before = [p.name for p in _steps(stage.checkpoint_folder(workdir, bench_run.stage))]
        filler = workdir.parent / "filler"
        if is_mounted:
            free_bytes = shutil.disk_usage(workdir).free - _BYTES_LEFT
            filler.write_bytes(b"\1" * max(free_bytes, 0))
        row.exit_codes.append(
            bench_run.start_process(workdir, limit=0 if is_mounted else _BYTES_LEFT).wait(_TIMEOUT)
        )
        row.times, row.saw = (
            1,
            _last_line(workdir, "particlejax: ").replace(str(workdir), "WORKDIR"),
        )
        valid_steps = [
            p.name
            for p in _steps(stage.checkpoint_folder(workdir, bench_run.stage))
            if not checkpoint.integrity_error(p)
        ]
        filler.unlink(missing_ok=True)
        bench_run.finish(workdir)
        row.more = (
            f"steps saved before: {', '.join(steps_before)}; valid after: {', '.join(valid_steps)}"
        )
        row.lost = (
            bench_run.count_differences(workdir)
            + (steps_before[-1] not in valid_steps)
            + (row.exit_codes != [2])
            + ("free disk space" not in row.saw)
        )
        yield row


def lost_process(bench_run: Bench) -> Iterator[FaultResult]:
    """Kills one of two processes: the other must end; two new processes resume and finish."""
    yield _pair_terminated(bench_run)
    for victim, ordinal in enumerate(("first", "second")):
        workdir, row = (
            bench_run.folder / f"pair_{ordinal}",
            FaultResult(f"the {ordinal} of two processes killed"),
        )
        processes = _start_pair(bench_run, workdir)
        row.times += bench_run.wait_for_steps(
            workdir, processes[0], bench_run.experiment.checkpoint.save_interval_steps + 1
        )
        processes[victim].kill()
        start = time.monotonic()
        row.exit_codes.append(processes[1 - victim].wait())
        seconds = time.monotonic() - start
        processes[victim].wait()
        row.saw = _last_line(workdir, f"process {1 - victim} of 2")
        exit_codes = [process.wait() for process in _start_pair(bench_run, workdir)]
        row.more = (
            f"the other ended after {seconds:.1f} s; exit codes after a restart: {exit_codes}"
        )
        row.lost = (
            bench_run.count_differences(workdir, _TOLERANCE)
            + any(exit_codes)
            + (row.exit_codes == [0])
            + (not row.saw)
        )
        row.lost += seconds > 1.5 * bench_run.experiment.distributed.heartbeat_timeout_seconds
        yield row


def _pair_terminated(bench_run: Bench) -> FaultResult:
    workdir, row = (
        bench_run.folder / "pair_terminated",
        FaultResult("SIGTERM to one of two processes"),
    )
    processes = _start_pair(bench_run, workdir)
    row.times += bench_run.wait_for_steps(workdir, processes[0], 3)
    processes[1].terminate()
    row.exit_codes += [process.wait() for process in processes]
    row.saw = _last_line(workdir, "SIGTERM: ")
    num_done = len(bench_run.losses(workdir))
    bench_run.finish(workdir)  # a single process
    row.more = f"stopped at the same step {num_done}; continued by one process"
    row.lost = (
        bench_run.count_differences(workdir, _TOLERANCE)
        + any(row.exit_codes)
        + (f"at step {num_done} of" not in row.saw)
    )
    return row


KINDS: dict[str, Callable[[Bench], Iterator[FaultResult]]] = {
    "sigkill": sigkill,
    "sigterm": sigterm,
    "corrupt_checkpoint": corrupt_checkpoint,
    "disk_full": disk_full,
    "lost_process": lost_process,
}


# -- what they are made of


def _start_pair(bench_run: Bench, workdir: Path) -> list[subprocess.Popen]:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{probe_socket.getsockname()[1]}",
            "JAX_NUM_PROCESSES": "2",
        }
    return [
        bench_run.start_process(workdir, environment={**environment, "JAX_PROCESS_ID": str(i)})
        for i in range(2)
    ]


@contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """A folder on a small mounted disk, and whether mounting succeeded."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(folder)]
    is_mounted = (
        shutil.which("mount") is not None
        and subprocess.run(command, capture_output=True).returncode == 0
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if not content:
        return _write(path, b"\1")
    content[len(content) // 2] ^= 1
    return _write(path, bytes(content))


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    _write(path, content[:-1] if content else b"\1")  # an empty file cannot be truncated


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _copy_folder(folder: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)


def _load_step(folder: Path, step: str, copy: Path) -> dict[str, np.ndarray]:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / step, copy / step)
    return tree.flatten(checkpoint.load_arrays(copy))


def _wait_until(
    condition: Callable[[], bool], process: subprocess.Popen, interval: float = 0.01
) -> bool:
    deadline = time.monotonic() + _TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(interval)  # progress is only visible in files
    return False


def _steps(folder: Path) -> list[Path]:
    return (
        sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
        if folder.is_dir()
        else []
    )


def _lines(workdir: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in _read(workdir / "metrics.jsonl").split("\n")
        if line.endswith("}")
    ]


def _log(workdir: Path) -> Path:
    return Path(f"{workdir}.log")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _last_line(workdir: Path, text: str) -> str:
    return next((line for line in reversed(_read(_log(workdir)).splitlines()) if text in line), "")


def _report(bench_run: Bench, rows: list[FaultResult]) -> Iterator[str]:
    yield from (
        "# Fault tolerance",
        "",
        f"{len(bench_run.losses(bench_run.reference_run()))} steps, a checkpoint every "
        f"{bench_run.experiment.checkpoint.save_interval_steps}, heartbeat "
        f"{bench_run.experiment.distributed.heartbeat_timeout_seconds} s. Lost: lines of metrics "
        "that differ in any byte from the undisturbed run (with two processes: losses that differ "
        f"by more than {_TOLERANCE:g}), and failed checks.",
        "",
    )
    yield from table(
        ["injected", "times", "lost", "exit codes", "what was seen", ""],
        [
            [
                row.what,
                row.times,
                row.lost,
                ", ".join(map(str, sorted(set(row.exit_codes)))),
                row.saw,
                row.more,
            ]
            for row in rows
        ],
    )
    yield ""
