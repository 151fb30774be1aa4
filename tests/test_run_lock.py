# SPDX-License-Identifier: Apache-2.0
"""One process at a time writes into a run folder; a lock whose process is gone stops nobody."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import spawn

from particlejax import main as entry
from particlejax.core import io
from particlejax.core.typing import UserError
from particlejax.train import run_lock

ROOT = Path(__file__).parents[1]


def start(workdir: Path, cache_dir: str) -> subprocess.Popen:
    """A run that does not end; it has its folder when this returns."""
    command = [sys.executable, "-m", "particlejax.main", "--config=finetune:tiny"]
    settings = [
        f"--config.data.cache_dir={cache_dir}",
        "--config.stages.finetune.num_steps=1000000",
        f"--workdir={workdir}",
    ]
    process = spawn([*command, *settings], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert any(line.startswith("workdir: ") for line in process.stderr)
    return process


def quick_job(workdir: Path) -> int:
    return entry.main(["main", "--config=import_weights:tiny", f"--workdir={workdir}"])


def test_the_second_of_two_processes_is_refused_until_the_first_has_ended(
    cache_dir: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    workdir = tmp_path / "run"
    with start(workdir, cache_dir) as first:
        before = (workdir / "config.json").read_bytes()
        assert quick_job(workdir) == 2
        holder = run_lock.read(workdir / run_lock.LOCK)
        assert holder.pid == first.pid
        assert capfd.readouterr().err == (
            f"particlejax: {workdir} is in use by process {first.pid} on host {holder.host} since "
            f"{holder.since}: wait for it or stop it (kill {first.pid}), or give another "
            "--workdir.\n"
        )
        assert (workdir / "config.json").read_bytes() == before
        first.kill()
        # its parent has not asked for its exit code: a zombie, which writes nothing
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        assert quick_job(workdir) == 0
    said = capfd.readouterr().err
    assert said.count(f"the lock of {holder} is taken over") == 1
    assert not list(workdir.glob("*lock*")) and not list(workdir.glob(".*"))


def test_sigterm_deletes_the_lock_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of the training loop, which handles it, as test_resume.py shows."""
    kills: list[tuple[int, int]] = []
    with run_lock.hold(tmp_path), run_lock.hold(tmp_path / "run"):
        assert len(list(tmp_path.rglob(run_lock.LOCK))) == 2
        monkeypatch.setattr(os, "kill", lambda *args: kills.append(args))
        signal.raise_signal(signal.SIGTERM)
        assert not list(tmp_path.rglob(run_lock.LOCK))
    assert kills == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def write_lock(workdir: Path, seconds_ago: float = 0.0, **changes: object) -> Path:
    """A lock like one of this process but for `changes`, with a heartbeat of some time ago."""
    path = workdir / run_lock.LOCK
    holder = dataclasses.replace(run_lock.this_process(), **changes)
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    now = path.stat().st_mtime
    os.utime(path, (now - seconds_ago, now - seconds_ago))
    return path


LONG_AGO = 3 * run_lock.TIMEOUT_SECONDS


@pytest.mark.parametrize(
    ("changes", "is_free"),
    [
        ({"pid": os.getppid(), "started": run_lock._start_time(os.getppid())}, False),
        ({"pid": os.getppid(), "started": "1"}, True),  # the id of a later process
        ({"seconds_ago": LONG_AGO}, False),  # on this host the process counts
        ({"host": "other", "seconds_ago": LONG_AGO}, True),
        ({"host": "other"}, True),  # it gives no sign of life
        ({"namespace": "pid:[1]", "pid": 1, "seconds_ago": LONG_AGO}, True),  # another container
    ],
)
def test_a_lock_counts_while_its_process_lives(
    changes: dict, is_free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lock(tmp_path, **changes)
    monkeypatch.setattr(run_lock, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.01)
    if not is_free:
        with pytest.raises(UserError, match="is in use by process"), run_lock.hold(tmp_path):
            pass
        return
    with run_lock.hold(tmp_path):
        assert run_lock.read(tmp_path / run_lock.LOCK).pid == os.getpid()
    assert not list(tmp_path.iterdir())


def test_another_host_that_gives_a_sign_of_life_keeps_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lock(tmp_path, host="other")
    beats = itertools.count(4 * int(path.stat().st_mtime))
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(run_lock, "_heartbeat", lambda path: next(beats) // 4)
    with pytest.raises(UserError, match="on host other since .* stop it, or give"):
        run_lock._Lock(path)
    assert run_lock.read(path).host == "other"


def test_a_process_that_lost_its_lock_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with run_lock.hold(tmp_path):
        lock = run_lock._held[-1]
        lock.path.unlink()
        lock.renew()
        assert run_lock.read(lock.path) == lock.holder, "deleted by hand, it is written again"
        os.utime(lock.path, (0, 0))
        lock.renew()
        assert lock.path.stat().st_mtime > 1e9 and not codes
        write_lock(tmp_path, host="other")
        lock.renew()
    assert codes == [75] and "is now in use by process" in capfd.readouterr().err
    assert run_lock.read(tmp_path / run_lock.LOCK).host == "other", "which is not deleted"


def test_a_file_is_created_once_also_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError("no hard links here")

    for name in ("with", "without"):
        assert io.create_text(tmp_path / name, "a") and not io.create_text(tmp_path / name, "b")
        monkeypatch.setattr(os, "link", refuse)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "with": "a",
        "without": "a",
    }
