# SPDX-License-Identifier: Apache-2.0
"""A clip that is not decoded yet, and what a source of such clips is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import UserError
from particlejax.data.video.decode import Unreadable

SPLIT_NAMES = {"valid": "val", "validation": "val"}  # other words for the same split


@dataclass(frozen=True)
class Record:
    """One clip, not yet decoded."""

    # How logs and predictions name it: the path in its folder (with @start-end where several clips
    # are of one file), or the example's name, else 'split/00012'.
    name: str
    video: str | bytes  # a path, or the encoded file itself
    label: int = -1  # index into Source.classes, -1: unlabelled
    caption: str = ""
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None: to the end of the file
    series: str | bytes = ""  # a CSV of numeric channels, as a path or as it is; '': none
    group: str = ""  # clips of one group (one source video, one person) never stand in two splits

    # frames are decoded to whole RGB pictures before anything is cut out, like frames in memory
    whole_frames: bool = False

    def until(self, duration: float) -> float:
        """Where the clip ends, in seconds, in a file that lasts so long. Raises Unreadable where it
        begins past its end.
        """
        if self.start >= duration:
            raise Unreadable(f"starts at {self.start:g} s but lasts {duration:g} s")
        return duration if self.end is None else min(duration, self.end)


class Source(Protocol):
    """Random access to the records of one split; picklable, as Grain's workers need it."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record: ...


@dataclass(frozen=True)
class Listed:
    """A source whose records are all known beforehand."""

    classes: tuple[str, ...]
    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Record:
        return self.records[i]


def match_classes(labels: Sequence[str], classes: tuple[str, ...], source: str) -> tuple[int, ...]:
    """For each label its index in `classes`; a label that is not among them is a UserError."""
    index = {name: i for i, name in enumerate(classes)}
    for label in labels:
        if label not in index:
            raise UserError(
                f"label {label!r} of {source} is not a class of the trained run: "
                f"{did_you_mean(label, classes, many=3)} Rename it, or leave these clips out."
            )
    return tuple(index[label] for label in labels)
