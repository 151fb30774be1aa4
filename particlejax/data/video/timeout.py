# SPDX-License-Identifier: Apache-2.0
"""Decoding timeout: some damaged files keep a decoder busy forever."""

import hashlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from particlejax.data.video import decode
from particlejax.data.video.decode import Unreadable

T = TypeVar("T")


# per process: files that timed out, with the reason
_hung: dict[str | bytes, str] = {}
# one worker per waiting thread, because a thread per clip is slow
_mine = threading.local()


class _Worker:
    """A thread that runs tasks in sequence; it ends when this object is deleted."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue = SimpleQueue()
        self.answers: SimpleQueue = SimpleQueue()
        threading.Thread(target=_work, args=(self.tasks, self.answers), daemon=True).start()

    def __del__(self) -> None:
        self.tasks.put(None)


def _work(tasks: SimpleQueue, answers: SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        work, excuses = task
        decode.excuses.set(excuses)
        try:
            answers.put((work(), None))
        except BaseException as error:  # noqa: BLE001 - passed to the caller
            answers.put((None, error))
        del work, task  # frees the decoded data


def within(seconds: float, work: Callable[[], T], of: str | bytes) -> T:
    """Returns `work()`, or raises Unreadable if it takes longer than `seconds` (0: no limit).

    of: the file being read, as a path or bytes. A file that timed out is not tried again, because
    each try waits as long and leaves another thread running until the process ends.
    """
    if not seconds:
        return work()
    # hash a file's bytes only if some file timed out
    if _hung and _key(of) in _hung:
        raise Unreadable(_hung[_key(of)])
    worker, excuses = _worker(), []
    worker.tasks.put((work, excuses))
    try:
        value, error = worker.answers.get(timeout=seconds)
    except BaseException as late:
        _mine.worker = None  # it may be busy forever
        if not isinstance(late, Empty):
            raise
        reason = _hung[_key(of)] = ": ".join([f"not decoded after {seconds:g} s", *excuses[:1]])
        raise Unreadable(reason) from None
    if error is not None:
        raise error
    return value


def _worker() -> Any:
    if getattr(_mine, "worker", None) is None:
        _mine.worker = _Worker()
    return _mine.worker


def _key(file: str | bytes) -> str | bytes:
    return hashlib.sha256(file).digest() if isinstance(file, bytes) else file
