# SPDX-License-Identifier: Apache-2.0
"""Inspects all clips of a source, in order and with bounded memory; no file ends it."""

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import groupby
from typing import Self

from particlejax.config.data import DataSpec
from particlejax.data import inspect
from particlejax.data.inspect import InspectionResult
from particlejax.data.sources.records import Record, Source
from particlejax.data.video import timeout
from particlejax.data.video.decode import Unreadable


def inspect_clips(source: Source, data: DataSpec) -> Iterator[InspectionResult]:
    """Yields the findings of each clip in order; consecutive clips of one file are decoded
    together.

    `data.num_threads` threads of this process inspect, or `data.num_workers` processes if it is
    set: a file that ends such a process is unreadable.
    """
    pending: deque[tuple[list[Record], Future[list[InspectionResult]]]] = deque()
    with _Pool(data) as pool:
        for _, clips in groupby(
            map(source.__getitem__, range(len(source))), lambda record: record.video
        ):
            pending.append(pool.submit(list(clips)))
            if len(pending) > 2 * pool.size:  # bounds memory: records may hold whole files
                yield from pool.result(*pending.popleft())
        for clips, future in pending:
            yield from pool.result(clips, future)


class _Pool:
    """Threads of this process, or other processes."""

    def __init__(self, data: DataSpec) -> None:
        self.size = data.num_workers or data.num_threads
        self._limit = data.decode_timeout_seconds
        self._are_processes = data.num_workers > 0
        self._pool = self._start(self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def _start(self, size: int) -> Executor:
        if self._are_processes:
            return ProcessPoolExecutor(size, multiprocessing.get_context("spawn"))
        return ThreadPoolExecutor(size)

    def submit(self, clips: list[Record]) -> tuple[list[Record], Future[list[InspectionResult]]]:
        """Starts the inspection of the clips of one file; `result` takes the value."""
        try:
            return clips, self._pool.submit(_inspect_clips_of_file, clips, self._limit)
        except BrokenProcessPool:
            self._pool = self._start(self.size)
            return self.submit(clips)

    def result(
        self, clips: list[Record], future: Future[list[InspectionResult]]
    ) -> list[InspectionResult]:
        """Returns the findings. Files of a process that was ended are inspected again, one by one:
        the one that ends another process is unreadable.
        """
        try:
            return future.result()
        except BrokenProcessPool:
            pass
        with self._start(1) as alone:
            try:
                return alone.submit(_inspect_clips_of_file, clips, self._limit).result()
            except BrokenProcessPool:
                return [(clip.name, "its decoder ended the process") for clip in clips]


def _inspect_clips_of_file(clips: Sequence[Record], limit: float) -> list[InspectionResult]:
    """Findings of the clips of one file; its time limit is `limit` seconds per minute of video."""
    file = clips[0].video
    try:
        minutes = timeout.run_with_timeout(limit, partial(inspect.duration, file), file) / 60
        return timeout.run_with_timeout(
            limit * max(1.0, minutes), partial(inspect.inspect_file, clips), file
        )
    except Unreadable as error:
        reason = error.reason
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises, the check goes on
        reason = f"{type(error).__name__}: {error}"
    return [(clip.name, reason) for clip in clips]
