# SPDX-License-Identifier: Apache-2.0
"""A weighted mixture of sources."""

import math
from dataclasses import dataclass

import numpy as np

from particlejax.core.typing import UserError
from particlejax.data.sources.records import Record, Source, labels


@dataclass(frozen=True)
class MixtureSource:
    """Concatenated sources; training samples each by its weight. Classes are merged by name."""

    classes: tuple[str, ...]
    parts: tuple[Source, ...]
    spans: tuple[tuple[int, int, float], ...]  # (first clip, number of clips, weight) per part

    def __len__(self) -> int:
        return sum(count for _, count, _ in self.spans)

    def __getitem__(self, i: int) -> Record:
        for part, (first, count, _) in zip(self.parts, self.spans, strict=True):
            if first <= i < first + count:
                return part[i - first]
        raise IndexError(i)

    def clip_labels(self) -> np.ndarray:
        """Labels int [N], -1 if unlabeled."""
        return np.concatenate([labels(part) for part in self.parts])

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the log, of all parts."""
        return tuple(note for part in self.parts for note in getattr(part, "notes", ()))


def parts_of(source: Source) -> tuple[tuple[int, int, float], ...]:
    """Returns (first clip, number of clips, weight) per part; other sources are one part."""
    return source.spans if isinstance(source, MixtureSource) else ((0, len(source), 1.0),)


def parse(source: str) -> list[tuple[float, str]]:
    """Parses 'mix:0.7*folder:A,0.3*toybox' into (weight, source) pairs. Raises UserError if
    malformed.
    """
    parts = []
    for part in source.partition(":")[2].split(","):
        weight, star, name = part.strip().rpartition("*")
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = 0.0
        if not 0 < value < math.inf or not name:
            raise UserError(
                f"data source {source!r}: {part!r} is not WEIGHT*SOURCE with a weight above 0: "
                "write it like 'mix:0.7*folder:A,0.3*folder:B'."
            )
        parts.append((value, name))
    return parts
