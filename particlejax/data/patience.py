# SPDX-License-Identifier: Apache-2.0
"""A limit on how long a decoder may take: some damaged files keep one busy for ever."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from particlejax.data.decode import Unreadable

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T]) -> T:
    """`work()`, or Unreadable when it is not done after so many seconds (0: however long it takes).

    The thread that did not end is left behind: nothing can stop a decoder from outside. It ends with the process.
    """
    if not seconds:
        return work()
    answer: list[Any] = []

    def run() -> None:
        try:
            answer.append((work(), None))
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the caller
            answer.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise Unreadable(f"not decoded after {seconds:g} s")
    value, error = answer[0]
    if error is not None:
        raise error
    return value
