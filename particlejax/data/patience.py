# SPDX-License-Identifier: Apache-2.0
"""A limit on how long a decoder may take: some damaged files keep one busy for ever."""

import hashlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from particlejax.data import decode
from particlejax.data.decode import Unreadable

T = TypeVar("T")


_hung: dict[str | bytes, str] = {}  # of this process: what took too long once, and the reason that was given


def within(seconds: float, work: Callable[[], T], of: str | bytes) -> T:
    """`work()`, or Unreadable when it is not done after so many seconds (0: however long it takes).

    of: the file that is worked on, as a path or as it is. One that took too long is not tried again: that would cost the
    same wait, and leave another thread behind that nothing can stop from outside. It ends with the process.
    """
    if not seconds:
        return work()
    if _hung and _key(of) in _hung:  # a file's bytes are looked through only where there is something to find
        raise Unreadable(_hung[_key(of)])
    answer: list[Any] = []
    excuses: list[str] = []

    def run() -> None:
        decode.excuses.set(excuses)
        try:
            answer.append((work(), None))
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the caller
            answer.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        reason = _hung[_key(of)] = ": ".join([f"not decoded after {seconds:g} s", *excuses[:1]])
        raise Unreadable(reason)
    value, error = answer[0]
    if error is not None:
        raise error
    return value


def _key(file: str | bytes) -> str | bytes:
    return hashlib.sha256(file).digest() if isinstance(file, bytes) else file
