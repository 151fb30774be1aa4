# SPDX-License-Identifier: Apache-2.0
"""The lock of a run folder: one process, or one group of processes, writes into it at a time.

`lock.json` names the process. It is a plain file, created atomically, because locks of the kernel
(fcntl, flock) do not hold on every network file system. A thread renews its modification time: this
heartbeat tells other hosts that the process lives. On the same host the process itself is checked,
with its start time, because process ids are used again.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from particlejax.core import io
from particlejax.core.typing import UserError
from particlejax.distributed import cluster
from particlejax.train.log import log_info

LOCK = "lock.json"
HEARTBEAT_SECONDS = 10.0
# seconds without a heartbeat after which a process of another host counts as gone
TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.5  # between looks at the heartbeat of another host
_MAX_TRIES = 10  # attempts to create the file while other processes create and delete it
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that a lock names.

    since: when it took the lock, as text. started: start time of the process in ticks since boot,
    '' where the system does not give it. boot, namespace: identify the kernel and the space of
    process ids in which `pid` is meant. token: differs for each lock.
    """

    host: str = ""
    pid: int = 0
    since: str = ""
    started: str = ""
    boot: str = ""
    namespace: str = ""
    token: str = ""

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        return f"process {self.pid} on host {self.host} since {self.since}"

    def is_visible(self) -> bool:
        """Whether this process can see that process: the same host, kernel and process ids."""
        own = this_process()
        return bool(self.pid) and (self.host, self.boot, self.namespace) == (
            own.host,
            own.boot,
            own.namespace,
        )

    def is_running(self) -> bool:
        """Whether a visible process still runs, and its id is not that of a later process."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # of another user
        return _start_time(self.pid) == self.started


def this_process() -> Holder:
    """This process, with a new token."""
    pid = os.getpid()
    return Holder(
        socket.gethostname(),
        pid,
        datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        _start_time(pid),
        _text_of("/proc/sys/kernel/random/boot_id").strip(),
        os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else "",
        uuid.uuid4().hex,
    )


def _start_time(pid: int) -> str:
    """Start time of a process as Linux gives it; '' elsewhere, and 'ended' for a zombie."""
    fields = _text_of(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if not fields:
        return ""
    return "ended" if fields[0] in ("Z", "X") else fields[19]


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is created; the first of several processes holds it for
    all.

    Raises UserError in all of them if another process holds it. The file is deleted at the end,
    also after SIGTERM.
    """
    lock, refusal = None, ""
    if cluster.is_primary():
        try:
            lock = _Lock(workdir / LOCK)
        except UserError as error:
            refusal = str(error)
    refusal = cluster.gather_json(refusal)[0]
    if refusal:
        raise UserError(refusal)
    if lock is None:
        yield
        return
    with _release_on_signals():
        try:
            yield
        finally:
            lock.release()


_held: list["_Lock"] = []


class _Lock:
    """A lock that this process holds until `release`, renewed by a thread."""

    def __init__(self, path: Path) -> None:
        """Takes the lock. Raises UserError if another process holds it, or if it cannot be
        written.
        """
        self.path, self.holder = path, this_process()
        self._text = json.dumps(dataclasses.asdict(self.holder), indent=1)
        self._ended = threading.Event()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _take(path, self._text)
        except OSError as error:
            raise UserError(
                f"workdir {path.parent} cannot be written ({error.strerror}): give another "
                "--workdir."
            ) from error
        _held.append(self)
        self._thread = threading.Thread(target=self._renew_repeatedly, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Deletes the file if it is still this lock's. A process that was forked does nothing."""
        if os.getpid() != self.holder.pid or self not in _held:
            return
        self._ended.set()
        _held.remove(self)
        with contextlib.suppress(OSError):
            if read(self.path) == self.holder:
                self.path.unlink()

    def _renew_repeatedly(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # such as a network that is down for a while
                self.renew()

    def renew(self) -> None:
        """Renews the heartbeat. Ends this process if another one has taken the lock, as its files
        are no longer this one's to write.
        """
        holder = read(self.path)
        if holder is None and not self._ended.is_set():  # deleted by hand
            io.create_text(self.path, self._text)
        elif holder == self.holder:
            os.utime(self.path)
        elif holder is not None and holder.token and not self._ended.is_set():
            print(
                f"particlejax: {self.path.parent} is now in use by {holder}, because this process "
                f"gave no sign of life for {TIMEOUT_SECONDS:g} s; it ends here. Checkpoints are "
                "intact.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(cluster.EXIT_RESTART)


def read(path: Path) -> Holder | None:
    """The process that a lock names; None without a lock, an empty one if it is unreadable."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Holder()


def _take(path: Path, text: str) -> None:
    """Creates the lock, or takes it over if its process is gone. Raises UserError if not."""
    for _ in range(_MAX_TRIES):
        if io.create_text(path, text):
            return
        holder = read(path)
        if holder is None:
            continue
        if not _is_gone(path, holder):
            holder = read(path)
            if holder is None:  # it has ended meanwhile
                continue
            kill = f" (kill {holder.pid})" if holder.is_visible() else ""
            raise UserError(
                f"{path.parent} is in use by {holder}: wait for it or stop it{kill}, or give "
                "another --workdir."
            )
        if _delete(path, holder):
            log_info(f"{path.parent}: the lock of {holder} is taken over: the process is gone")
    raise UserError(
        f"{path} cannot be created, because other processes create and delete it: give another "
        "--workdir."
    )


def _is_gone(path: Path, holder: Holder) -> bool:
    """Whether the process of a lock has ended. For a process of another host, waits for its
    heartbeat.
    """
    if holder.is_visible():
        return not holder.is_running()
    first, waited = _heartbeat(path), _age(path)
    if waited < TIMEOUT_SECONDS:
        log_info(
            f"{path.parent} is locked by {holder}: waiting up to "
            f"{TIMEOUT_SECONDS - waited:.0f} s for a sign of life"
        )
    deadline = time.monotonic() + TIMEOUT_SECONDS - waited
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if _heartbeat(path) != first:
            return False
    return True


def _heartbeat(path: Path) -> float:
    """Modification time of the lock, 0 without one. Opening the file makes a network file system
    ask its server.
    """
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _age(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - _heartbeat(path))
    finally:
        probe.unlink(missing_ok=True)


def _delete(path: Path, holder: Holder) -> bool:
    """Deletes the lock of a process that is gone. Returns False if another process was faster; its
    lock stays.
    """
    moved = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        os.rename(path, moved)
    except FileNotFoundError:
        return False
    try:
        if read(moved) == holder:
            return True
        with contextlib.suppress(OSError):  # a lock made since stays; its process sees it
            os.link(moved, path)
        return False
    finally:
        moved.unlink(missing_ok=True)


@contextlib.contextmanager
def _release_on_signals() -> Iterator[None]:
    """Deletes the locks of this process before a signal ends it, where nothing else handles it.

    JAX handles SIGTERM of several processes, and the training loop while it trains.
    """

    def release_and_end(number: int, frame: FrameType | None) -> None:
        del frame
        for lock in [*_held]:
            lock.release()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    is_main = threading.current_thread() is threading.main_thread()
    numbers = [
        number
        for number in _SIGNALS
        if is_main and not cluster.is_multiprocess() and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, release_and_end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
