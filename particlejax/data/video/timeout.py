# SPDX-License-Identifier: Apache-2.0
"""Decoding timeout: some damaged files keep a decoder busy forever."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from particlejax.data.video.container import Unreadable

T = TypeVar("T")


# per process: files that timed out, with the reason
_timed_out: dict[str | bytes, str] = {}
# one worker per waiting thread, because a thread per clip is slow
_thread_state = threading.local()


class _Worker:
    """A thread that runs tasks in sequence; it ends when this object is deleted."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue = SimpleQueue()
        self.results: SimpleQueue = SimpleQueue()
        threading.Thread(target=_work, args=(self.tasks, self.results), daemon=True).start()

    def __del__(self) -> None:
        self.tasks.put(None)


def _work(tasks: SimpleQueue, results: SimpleQueue) -> None:
    while (fn := tasks.get()) is not None:
        try:
            results.put((fn(), None))
        except BaseException as error:  # noqa: BLE001 - passed to the caller
            results.put((None, error))
        del fn  # frees the decoded data


def run_with_timeout(
    seconds: float, fn: Callable[[], T], file: str | bytes, slow_reasons: Sequence[str] = ()
) -> T:
    """Returns `fn()`, or raises Unreadable if it takes longer than `seconds` (0: no limit).

    file: the file being read, as a path or bytes. A file that timed out is not tried again, because
    each try waits as long and leaves another thread running until the process ends. slow_reasons:
    explanations that `fn` adds while it runs (see `Video`); the first one completes the reason.
    """
    if not seconds:
        return fn()
    # hash a file's bytes only if some file timed out
    if _timed_out and _key(file) in _timed_out:
        raise Unreadable(_timed_out[_key(file)])
    worker = _worker()
    worker.tasks.put(fn)
    try:
        value, error = worker.results.get(timeout=seconds)
    except BaseException as interruption:
        _thread_state.worker = None  # it may be busy forever
        if not isinstance(interruption, Empty):
            raise
        reason = _timed_out[_key(file)] = ": ".join(
            [f"not decoded after {seconds:g} s", *slow_reasons[:1]]
        )
        raise Unreadable(reason) from None
    if error is not None:
        raise error
    return value


def _worker() -> Any:
    if getattr(_thread_state, "worker", None) is None:
        _thread_state.worker = _Worker()
    return _thread_state.worker


def _key(file: str | bytes) -> str | bytes:
    return hashlib.sha256(file).digest() if isinstance(file, bytes) else file
