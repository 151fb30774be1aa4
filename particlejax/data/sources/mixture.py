# SPDX-License-Identifier: Apache-2.0
"""Several sources as one, drawn from by weight."""

import math
from dataclasses import dataclass

from particlejax.core.typing import UserError
from particlejax.data.sources.records import Record, Source


@dataclass(frozen=True)
class Mixed:
    """Several sources one after the other; training draws from each by its weight. Their classes
    are joined by name.
    """

    classes: tuple[str, ...]
    parts: tuple[Source, ...]
    spans: tuple[tuple[int, int, float], ...]  # (first clip, clips, weight) of each

    def __len__(self) -> int:
        return sum(count for _, count, _ in self.spans)

    def __getitem__(self, i: int) -> Record:
        for part, (first, count, _) in zip(self.parts, self.spans, strict=True):
            if first <= i < first + count:
                return part[i - first]
        raise IndexError(i)


def parts_of(source: Source) -> tuple[tuple[int, int, float], ...]:
    """(first clip, clips, weight) of each part of a mixture; a source that is none is one part."""
    return source.spans if isinstance(source, Mixed) else ((0, len(source), 1.0),)


def parse(source: str) -> list[tuple[float, str]]:
    """(weight, source) of 'mix:0.7*folder:A,0.3*toybox'."""
    found = []
    for part in source.partition(":")[2].split(","):
        weight, star, name = part.strip().rpartition("*")
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = 0.0
        if not 0 < value < math.inf or not name:
            raise UserError(
                f"data source {source!r}: {part!r} is not WEIGHT*SOURCE with a weight above 0, so "
                "write it like "
                "'mix:0.7*folder:A,0.3*folder:B'."
            )
        found.append((value, name))
    return found
