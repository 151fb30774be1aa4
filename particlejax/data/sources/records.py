# SPDX-License-Identifier: Apache-2.0
"""Records of clips before decoding, and the interface of sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from particlejax.core import text
from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import UserError
from particlejax.data.video.decode import Unreadable


@dataclass(frozen=True)
class Record:
    """One clip before decoding."""

    # Name in logs and predictions: the path in its folder (with @start-end if a file has several
    # clips), or the example's name, else 'split/00012'.
    name: str
    video: str | bytes  # a path, or the bytes of the encoded file
    label: int = -1  # index into Source.classes; -1: unlabeled
    caption: str = ""
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None: to the end of the file
    series: str | bytes = ""  # a CSV of numeric channels, as a path or its bytes; '': none
    group: str = ""  # clips of a group (one source video, one person) are always in one split

    # decode full RGB frames before cropping, like frames in memory
    whole_frames: bool = False

    def until(self, duration: float) -> float:
        """Returns the clip's end in seconds, for a file of `duration`. Raises Unreadable if it
        starts after the end.
        """
        if self.start >= duration:
            raise Unreadable(f"starts at {self.start:g} s but lasts {duration:g} s")
        return duration if self.end is None else min(duration, self.end)


class Source(Protocol):
    """Random access to the records of one split; picklable for Grain's workers."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record: ...


@dataclass(frozen=True)
class ListSource:
    """A source from a list of records."""

    classes: tuple[str, ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()  # sentences for the log: what was made or left out

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Record:
        return self.records[i]

    def clip_labels(self) -> np.ndarray:
        """Labels int [N], -1 if unlabeled."""
        return np.array([record.label for record in self.records], int)


def labels(source: Source) -> np.ndarray:
    """Returns the label of every record, int [N], -1 if unlabeled; no video is decoded.

    A source with a method `clip_labels` is not read record by record.
    """
    if hasattr(source, "clip_labels"):
        return source.clip_labels()
    return np.array([source[i].label for i in range(len(source))], int)


def match_classes(labels: Sequence[str], classes: tuple[str, ...], source: str) -> tuple[int, ...]:
    """Returns the index of each label in `classes`, compared in NFC. Raises UserError for an
    unknown label.
    """
    index = {name: i for i, name in reversed(list(enumerate(map(text.nfc, classes))))}
    for label in map(text.nfc, labels):
        if label not in index:
            raise UserError(
                f"label {label!r} of {source} is not a class of the trained run: "
                f"{did_you_mean(label, classes, max_matches=3)} Rename it, or leave these clips "
                "out."
            )
    return tuple(index[text.nfc(label)] for label in labels)
