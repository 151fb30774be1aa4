# SPDX-License-Identifier: Apache-2.0
"""A limit on how long a decoder may take: some damaged files keep one busy for ever."""

import hashlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from particlejax.data.video import decode
from particlejax.data.video.decode import Unreadable

T = TypeVar("T")


# of this process: what took too long once, and the reason that was given
_hung: dict[str | bytes, str] = {}
# each waiting thread has one that works for it, because to start one for every clip costs
_mine = threading.local()


class _Worker:
    """A thread that does one thing after another; it ends with the last mention of this object."""

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
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the caller
            answers.put((None, error))
        del work, task  # and with it what it read


def within(seconds: float, work: Callable[[], T], of: str | bytes) -> T:
    """`work()`, or Unreadable when it is not done after so many seconds (0: however long it takes).

    of: the file that is worked on, as a path or as it is. One that took too long is not tried
    again: that would cost the same wait, and leave another thread behind that nothing can stop from
    outside. It ends with the process.
    """
    if not seconds:
        return work()
    # a file's bytes are looked through only where there is something to find
    if _hung and _key(of) in _hung:
        raise Unreadable(_hung[_key(of)])
    worker, excuses = _worker(), []
    worker.tasks.put((work, excuses))
    try:
        value, error = worker.answers.get(timeout=seconds)
    except BaseException as late:
        _mine.worker = None  # it is busy for ever, or with what nobody waits for any more
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
