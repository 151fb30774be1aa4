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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import particlejax
from particlejax.config.experiment import Experiment, as_dict
from particlejax.core import io, tree
from particlejax.distributed import checkpoint
from particlejax.jobs.train import train
from particlejax.reports.markdown import table
from particlejax.train import stage
from particlejax.train.log import say
from particlejax.train.run_dir import enter

_PATIENCE = 300.0  # seconds; timeout of a process
_PAUSE = 0.25  # seconds; a kill comes at a random time up to this after a step
_DISK = 64  # MiB of the small disk
# bytes left on it: enough for metrics, too few for a checkpoint
_LEFT = 64 * 1024
_TOLERANCE = 1e-4  # relative, of losses summed in another order on other device counts
_EXPERIMENT = """import json, pathlib
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""


@dataclass
class Row:
    """A kind of fault: how often it was injected, what was lost, what the user saw."""

    what: str
    times: int = 0
    lost: int = 0  # steps, files or metrics that differ from the run without faults
    saw: str = ""
    exit_codes: list[int] = field(default_factory=list)
    more: str = ""


@dataclass
class Bench:
    """Trains the victim, the experiment itself, in child processes; this process may resume it."""

    experiment: Experiment
    folder: Path
    rng: random.Random

    def __post_init__(self) -> None:
        self.experiment = replace(self.experiment, job="train")
        self.stage = next(iter(self.experiment.stages))
        (self.folder / "victim.py").write_text(_EXPERIMENT, encoding="utf-8")
        io.write_json(self.folder / "victim.json", as_dict(self.experiment))

    def start(
        self, workdir: Path, *more: str, environment: dict[str, str] | None = None, limit: int = 0
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
        limited = (
            (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
        )
        with open(_log(workdir), "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [*command, *more], env=environment, stdout=log, stderr=log, preexec_fn=limited
            )

    def finish(self, workdir: Path) -> None:
        """Trains or resumes to the end."""
        train(self.experiment, enter(workdir, self.experiment), workdir.name)

    def alone(self) -> Path:
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

    def lost(self, workdir: Path, tolerance: float = 0.0) -> int:
        """Lines of metrics that differ from the undisturbed run; tolerance 0: in any byte."""
        if not tolerance:
            mine, theirs = (
                (each / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                for each in (workdir, self.alone())
            )
            return sum(a != b for a, b in zip(mine, theirs, strict=False)) + abs(
                len(mine) - len(theirs)
            )
        mine, theirs = self.losses(workdir), self.losses(self.alone())
        return sum(
            not math.isclose(mine.get(step, math.nan), loss, rel_tol=tolerance)
            for step, loss in theirs.items()
        )

    def after_step(self, workdir: Path, process: subprocess.Popen, new: int = 1) -> bool:
        """Waits until the process has written `new` more steps; False if it ended before."""
        there = len(self.losses(workdir))
        return _until(lambda: len(self.losses(workdir)) >= there + new, process)

    def saving(self, workdir: Path) -> list[Path]:
        """Unfinished checkpoint files."""
        folder = stage.checkpoint_folder(workdir, self.stage)
        begun = list(folder.glob("*-tmp*")) if folder.is_dir() else []
        return begun or [p for p in _steps(folder) if not (p / "manifest.json").exists()]


def bench(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'bench_fault_tolerance': writes report.md and results.json. Raises RuntimeError if
    anything was lost.
    """
    del name
    it = Bench(experiment, workdir, random.Random(experiment.seed))
    say("faults: the undisturbed run")
    it.alone()
    rows = []
    for kind in experiment.bench.faults:
        say(f"faults: {kind}")
        rows += KINDS[kind](it)
        stage.add_results(
            workdir, "bench_fault_tolerance", {row.what: vars(row) for row in rows}, {}
        )
        io.write_text(workdir / "report.md", "\n".join(_report(it, rows)))
    print("\n".join(_report(it, rows)))
    if any(row.lost for row in rows):
        raise RuntimeError(f"a fault lost data: see {workdir / 'report.md'}")


# -- the faults


def kills(it: Bench) -> Iterator[Row]:
    """SIGKILL, alternately inside a save and at a random moment, to one resumed run."""
    workdir = it.folder / "killed"
    inside, between = Row("SIGKILL inside a save"), Row("SIGKILL at a random moment")
    for i in range(it.experiment.bench.repetitions):
        row = between if i % 2 else inside
        process = it.start(workdir)
        # partial writes of earlier kills are removed by then
        alive = it.after_step(workdir, process)
        if i % 2:
            time.sleep(it.rng.uniform(0, _PAUSE))
        else:
            alive = _until(lambda: bool(it.saving(workdir)), process, 0.0005)
        process.kill()
        row.exit_codes.append(process.wait())
        row.times += alive
    ended = it.start(workdir).wait()
    aside = re.findall(
        r"checkpoint \S+/(\d+) failed verification \(([^)]*)\)", _read(_log(workdir))
    )
    for row in (inside, between):
        row.lost = it.lost(workdir) + (ended != 0)
        row.saw = _said(workdir, "continuing at step")
    reasons = ", ".join(sorted({reason for _, reason in aside})) or "none"
    inside.more = f"{len(aside)} checkpoints skipped: {reasons}"
    yield from (row for row in (inside, between) if row.times)


def terms(it: Bench) -> Iterator[Row]:
    """SIGTERM at a random step."""
    workdir, row = it.folder / "terminated", Row("SIGTERM")
    process = it.start(workdir)
    row.times += it.after_step(workdir, process, it.rng.randint(2, 5))
    process.terminate()
    row.exit_codes.append(process.wait())
    done, saved = len(it.losses(workdir)), _steps(stage.checkpoint_folder(workdir, it.stage))
    row.saw = _said(workdir, "SIGTERM: ")
    row.more = f"saved at step {saved[-1].name} of {done} done"
    it.finish(workdir)
    row.lost = it.lost(workdir) + abs(done - int(saved[-1].name))
    yield row


def damage(it: Bench) -> Iterator[Row]:
    """Flips a bit in, truncates or removes every file of the newest checkpoint: the older one must
    be used, with a message.
    """
    folder = stage.checkpoint_folder(it.alone(), it.stage)
    newest, older = _steps(folder)[-1], _steps(folder)[-2]
    copy = it.folder / "damaged"
    expected = _arrays_of(folder, older.name, copy)
    files = sorted(p.relative_to(folder) for p in newest.rglob("*") if p.is_file())
    for what, harm in {"a bit flipped": _flip, "cut short": _cut, "removed": os.remove}.items():
        row = Row(f"each file of a checkpoint {what}")
        for name in files:
            _copied(folder, copy)
            harm(copy / name)
            said: list[str] = []
            checkpoint.Checkpoints(copy, 2, said.append).close()
            found = tree.flatten(checkpoint.load_arrays(copy))
            right = found.keys() == expected.keys() and all(
                np.array_equal(found[key], expected[key]) for key in expected
            )
            row.times += 1
            row.lost += not (
                right and len(said) == 1 and f"/{newest.name} failed verification" in said[0]
            )
            row.saw = said[0].replace(str(copy), "FOLDER") if said else ""
        yield row
    shutil.rmtree(copy)
    yield _continued(it, newest.name)


def _continued(it: Bench, step: str) -> Row:
    """Resumes a run whose newest checkpoint has a flipped bit."""
    workdir, row = it.folder / "flipped", Row("a bit flipped, then the run continued", times=1)
    shutil.copytree(it.alone(), workdir)
    (workdir / stage.RESULTS).unlink()
    largest = max(
        (stage.checkpoint_folder(workdir, it.stage) / step).rglob("*"),
        key=lambda p: p.stat().st_size * p.is_file(),
    )
    _flip(largest)
    row.exit_codes.append(it.start(workdir).wait())
    aside = stage.checkpoint_folder(workdir, it.stage) / "damaged" / step
    row.lost = it.lost(workdir) + (not aside.is_dir())
    row.saw = _said(workdir, "failed verification").replace(str(aside.parents[1]), "FOLDER")
    return row


def disk(it: Bench) -> Iterator[Row]:
    """Fills the disk during a run: a small mounted one if possible, else a file size limit."""
    with _small_disk(it.folder / "disk") as real:
        workdir = it.folder / "disk" / "run"
        row = Row(
            "disk full" if real else "file size limit (as a full disk: this user cannot mount one)"
        )
        process = it.start(workdir)
        it.after_step(workdir, process, it.experiment.checkpoint.save_interval_steps + 1)
        process.terminate()
        process.wait()
        before = [p.name for p in _steps(stage.checkpoint_folder(workdir, it.stage))]
        filler = workdir.parent / "filler"
        if real:
            room = shutil.disk_usage(workdir).free - _LEFT
            filler.write_bytes(b"\1" * max(room, 0))
        row.exit_codes.append(it.start(workdir, limit=0 if real else _LEFT).wait(_PATIENCE))
        row.times, row.saw = 1, _said(workdir, "particlejax: ").replace(str(workdir), "WORKDIR")
        kept = [
            p.name
            for p in _steps(stage.checkpoint_folder(workdir, it.stage))
            if not checkpoint.fault(p)
        ]
        filler.unlink(missing_ok=True)
        it.finish(workdir)
        row.more = f"steps saved before: {', '.join(before)}; valid after: {', '.join(kept)}"
        row.lost = (
            it.lost(workdir)
            + (before[-1] not in kept)
            + (row.exit_codes != [2])
            + ("free disk space" not in row.saw)
        )
        yield row


def pairs(it: Bench) -> Iterator[Row]:
    """Kills one of two processes: the other must end; two new processes resume and finish."""
    yield _pair_terminated(it)
    for victim, which in enumerate(("first", "second")):
        workdir, row = it.folder / f"pair_{which}", Row(f"the {which} of two processes killed")
        two = _pair(it, workdir)
        row.times += it.after_step(
            workdir, two[0], it.experiment.checkpoint.save_interval_steps + 1
        )
        two[victim].kill()
        begun = time.monotonic()
        row.exit_codes.append(two[1 - victim].wait())
        seconds = time.monotonic() - begun
        two[victim].wait()
        row.saw = _said(workdir, f"process {1 - victim} of 2")
        ended = [each.wait() for each in _pair(it, workdir)]
        row.more = f"the other ended after {seconds:.1f} s; exit codes after a restart: {ended}"
        row.lost = (
            it.lost(workdir, _TOLERANCE) + any(ended) + (row.exit_codes == [0]) + (not row.saw)
        )
        row.lost += seconds > 1.5 * it.experiment.distributed.heartbeat_timeout_seconds
        yield row


def _pair_terminated(it: Bench) -> Row:
    workdir, row = it.folder / "pair_terminated", Row("SIGTERM to one of two processes")
    two = _pair(it, workdir)
    row.times += it.after_step(workdir, two[0], 3)
    two[1].terminate()
    row.exit_codes += [each.wait() for each in two]
    row.saw = _said(workdir, "SIGTERM: ")
    done = len(it.losses(workdir))
    it.finish(workdir)  # a single process
    row.more = f"stopped at the same step {done}; continued by one process"
    row.lost = (
        it.lost(workdir, _TOLERANCE) + any(row.exit_codes) + (f"at step {done} of" not in row.saw)
    )
    return row


KINDS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "sigkill": kills,
    "sigterm": terms,
    "corrupt_checkpoint": damage,
    "disk_full": disk,
    "lost_process": pairs,
}


# -- what they are made of


def _pair(it: Bench, workdir: Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}",
            "JAX_NUM_PROCESSES": "2",
        }
    return [it.start(workdir, environment={**place, "JAX_PROCESS_ID": str(i)}) for i in range(2)]


@contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """A folder on a small mounted disk, and whether mounting succeeded."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}m", "tmpfs", str(folder)]
    real = (
        shutil.which("mount") is not None
        and subprocess.run(command, capture_output=True).returncode == 0
    )
    try:
        yield real
    finally:
        if real:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if not content:
        return _write(path, b"\1")
    content[len(content) // 2] ^= 1
    return _write(path, bytes(content))


def _cut(path: Path) -> None:
    content = path.read_bytes()
    _write(path, content[:-1] if content else b"\1")  # an empty file cannot be truncated


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _copied(folder: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)


def _arrays_of(folder: Path, step: str, copy: Path) -> dict[str, np.ndarray]:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / step, copy / step)
    return tree.flatten(checkpoint.load_arrays(copy))


def _until(true: Callable[[], bool], process: subprocess.Popen, every: float = 0.01) -> bool:
    limit = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < limit:
        if true():
            return True
        time.sleep(every)  # progress is only visible in files
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


def _said(workdir: Path, words: str) -> str:
    return next((line for line in reversed(_read(_log(workdir)).splitlines()) if words in line), "")


def _report(it: Bench, rows: list[Row]) -> Iterator[str]:
    yield from (
        "# Fault tolerance",
        "",
        f"{len(it.losses(it.alone()))} steps, a checkpoint every "
        f"{it.experiment.checkpoint.save_interval_steps}, heartbeat "
        f"{it.experiment.distributed.heartbeat_timeout_seconds} s. Lost: lines of metrics that "
        "differ in any byte from the undisturbed run (with two processes: losses that differ by "
        f"more than {_TOLERANCE:g}), and failed checks.",
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
