# SPDX-License-Identifier: Apache-2.0
"""Packing: several clips share a row of fixed length; `segment` says whose particle is whose.

Legend: B rows, S clips of a row, L slots of a row. Everything here is numpy: it runs in the data workers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from particlejax.particles.types import Batch, Particles


class Clip(NamedTuple):
    """One clip before packing: its particles by modality ([n, ...], none where the modality lacks) and its labels."""

    particles: Mapping[str, Particles]
    label: int
    number: int  # in its source
    share: float = 1.0  # of its label, where another clip was mixed into it
    other: int = -1  # that clip's label


class Slots(NamedTuple):
    """What a row has for one modality: how many slots, of how many numbers each, of which type."""

    length: int
    size: int
    dtype: str = "float32"


class Full(ValueError):
    """The clips do not fit into the rows."""


def assign(sizes: Sequence[Mapping[str, int]], lengths: Mapping[str, int], rows: int, clips: int) -> list[int]:
    """The row of each clip, first fit in the order given: a row has `lengths` slots a modality and `clips` clips.

    Raises Full when a clip finds no row.
    """
    free = [dict(lengths) for _ in range(rows)]
    places = [clips] * rows
    chosen = []
    for size in sizes:
        fits = (r for r in range(rows) if places[r] and all(free[r][m] >= n for m, n in size.items()))
        row = next(fits, None)
        if row is None:
            raise Full(f"a clip of {dict(size)} particles does not fit into {rows} rows of {dict(lengths)} slots and "
                       f"{clips} clips")
        places[row] -= 1
        for modality, n in size.items():
            free[row][modality] -= n
        chosen.append(row)
    return chosen


def pack(clips: Sequence[Clip], slots: Mapping[str, Slots], rows: int, clips_per_row: int) -> Batch:
    """Rows filled with clips, first fit in the order given; what stays free is segment 0, clip -1 and label -1.

    Raises Full when the clips do not fit.
    """
    sizes = [{m: len(p.segment) for m, p in clip.particles.items()} for clip in clips]
    chosen = assign(sizes, {m: each.length for m, each in slots.items()}, rows, clips_per_row)
    label = np.full((rows, clips_per_row), -1, np.int32)
    number, other = label.copy(), label.copy()
    share = np.ones((rows, clips_per_row), np.float32)
    packed = {m: _blank(rows, each) for m, each in slots.items()}
    used = {m: [0] * rows for m in slots}
    held = [0] * rows
    for clip, row in zip(clips, chosen, strict=True):
        at = row, held[row]
        label[at], number[at], share[at], other[at] = clip.label, clip.number, clip.share, clip.other
        held[row] += 1
        for modality, particles in clip.particles.items():
            start = used[modality][row]
            used[modality][row] = stop = start + len(particles.segment)
            _write(packed[modality], (row, slice(start, stop)), particles, held[row])
    return Batch({m: Particles(**fields) for m, fields in packed.items()}, label, number, share, other)


def _blank(rows: int, slots: Slots) -> dict[str, np.ndarray]:
    shape = (rows, slots.length)
    return dict(payload=np.zeros((*shape, slots.size), slots.dtype), place=np.zeros((*shape, 3), np.float32),
                extent=np.zeros((*shape, 3), np.float32), segment=np.zeros(shape, np.int32))


def _write(fields: dict[str, np.ndarray], where: tuple, particles: Particles, segment: int) -> None:
    for name in ("payload", "place", "extent"):
        fields[name][where] = getattr(particles, name)
    fields["segment"][where] = segment
