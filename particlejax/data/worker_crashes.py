# SPDX-License-Identifier: Apache-2.0
"""Finds the clip that ended a data worker: some damaged files crash a native decoder, and with it
its process.

Each worker notes in a file which clips it reads; the file outlives it. After a crash the notes name
the suspects, and each of them is read once more in a process of its own.
"""

import gc
import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import absl.flags
import grain
import numpy as np

_NUM_NOTES = 64  # clips that a worker's file holds: those being read and the latest before
_NUM_SUSPECTS = 16  # clips that are read once more; damaged memory may fail some clips later
_NUM_REPETITIONS = 3  # a process with damaged memory does not die at once
_NOTE = np.dtype(
    [
        ("number", np.int64),  # of the clip in this worker, from 1
        ("batch", np.int64),
        ("position", np.int64),  # within the batch
        ("in_work", np.bool_),
    ]
)
_EXIT_CODE = re.compile(r"terminated unexpectedly with exit code (-?\d+)")
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)  # by the system or by a person, not by itself


class Suspect(NamedTuple):
    """A clip that a worker has read: batch number, position in the batch, and whether it was still
    being read at the crash.
    """

    batch: int
    position: int
    in_work: bool


class Notes:
    """The clips that workers read, one file per process in a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._table: np.ndarray | None = None  # opened by the first clip of a process
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # threads share the table

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Notes, (str(self._folder),)

    @contextmanager
    def reading(self, batch: int, position: int) -> Iterator[None]:
        """Notes that a clip is read, until the end of the context."""
        with self._lock:
            if self._table is None:
                path = self._folder / str(os.getpid())
                self._table = np.memmap(path, _NOTE, "w+", shape=(_NUM_NOTES,))
            slot = np.lexsort((self._table["number"], self._table["in_work"]))[0]
            self._table[slot] = (next(self._numbers), batch, position, True)
        try:
            yield
        finally:
            self._table["in_work"][slot] = False

    def suspects(self) -> list[Suspect]:
        """Returns the clips that were being read, then those read before, the latest first."""
        tables = [np.fromfile(path, _NOTE) for path in sorted(self._folder.iterdir())]
        notes = np.concatenate([np.zeros(0, _NOTE), *tables])
        notes = notes[notes["number"] > 0]
        notes = notes[np.lexsort((-notes["number"], ~notes["in_work"]))]
        return [
            Suspect(int(note["batch"]), int(note["position"]), bool(note["in_work"]))
            for note in notes[:_NUM_SUSPECTS]
        ]


def death(error: Exception) -> int | None:
    """Returns the exit code of the worker whose end `error` reports; None for another error."""
    found = _EXIT_CODE.search(str(error))
    return int(found[1]) if found else None


def was_killed(exit_code: int) -> bool:
    """Whether a worker was ended from outside, such as for lack of memory."""
    return exit_code in _KILLED


def reason(exit_code: int) -> str:
    """Returns why a clip is unreadable whose process ended with `exit_code`."""
    try:
        how = f"with {signal.Signals(-exit_code).name}"
    except ValueError:
        how = f"with exit code {exit_code}"
    return f"its decoder ended the process {how}"


def find_crashing(
    read: Callable[[int, int], object], suspects: Sequence[Suspect]
) -> tuple[Suspect, int] | None:
    """Returns the first suspect that ends a process of its own, and the exit code; None if none
    does.

    read: loads the clip of a batch and position.
    """
    for suspect in suspects:
        exit_code = _exit_code(read, suspect)
        if exit_code is not None:
            return suspect, exit_code
    return None


def _exit_code(read: Callable[[int, int], object], suspect: Suspect) -> int | None:
    """Returns the exit code of a process that dies reading this clip; None if it lives."""
    iterator = iter(processes(grain.MapDataset.source(_Rereading(read, suspect)), 1))
    try:
        next(iterator)
    except RuntimeError as error:
        return death(error)
    finally:
        iterator.close()
    return None


@dataclass(frozen=True)
class _Rereading:
    read: Callable[[int, int], object]
    suspect: Suspect

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> int:
        for _ in range(_NUM_REPETITIONS):
            self.read(self.suspect.batch, self.suspect.position)
            gc.collect()
        return i


def processes(
    dataset: grain.MapDataset, num_workers: int, options: grain.ReadOptions | None = None
) -> grain.IterDataset:
    """Returns the dataset, read by `num_workers` processes."""
    if not absl.flags.FLAGS.is_parsed():
        # Grain's processes read a flag, but a notebook parses none
        absl.flags.FLAGS.mark_as_parsed()
    return dataset.to_iter_dataset(options or grain.ReadOptions(1, 1)).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
    )
