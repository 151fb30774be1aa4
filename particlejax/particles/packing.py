# SPDX-License-Identifier: Apache-2.0
"""Packing: several clips share a row of fixed length; `segment` assigns particles to clips.

Legend: B rows, S clips of a row, L slots of a row. NumPy only: it runs in the data workers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from particlejax.particles.types import Batch, Particles


class Clip(NamedTuple):
    """One clip before packing: particles [n, ...] of the modalities it has, and its labels."""

    particles: Mapping[str, Particles]
    label: int
    number: int  # index in the source
    share: float = 1.0  # weight of its label after MixUp or CutMix
    other: int = -1  # label of the mixed-in clip


class Slots(NamedTuple):
    """The slots of a row for one modality: their number, payload size and dtype."""

    length: int
    size: int
    dtype: str = "float32"


def pack(
    clips: Sequence[Clip],
    chosen: Sequence[int],
    slots: Mapping[str, Slots],
    rows: int,
    clips_per_row: int,
) -> Batch:
    """Packs each clip into its chosen row; unused slots have segment 0, clip -1 and label -1.

    Raises ValueError if a row's clips do not fit.
    """
    label = np.full((rows, clips_per_row), -1, np.int32)
    number, other = label.copy(), label.copy()
    share = np.ones((rows, clips_per_row), np.float32)
    packed = {m: _blank(rows, each) for m, each in slots.items()}
    used = {m: [0] * rows for m in slots}
    held = [0] * rows
    for clip, row in zip(clips, chosen, strict=True):
        at = row, held[row]
        if held[row] == clips_per_row:
            raise ValueError(f"row {row} has more than {clips_per_row} clips")
        label[at], number[at], share[at], other[at] = (
            clip.label,
            clip.number,
            clip.share,
            clip.other,
        )
        held[row] += 1
        for modality, particles in clip.particles.items():
            start = used[modality][row]
            used[modality][row] = stop = start + len(particles.segment)
            if stop > slots[modality].length:
                raise ValueError(
                    f"row {row} has {slots[modality].length} {modality} slots, but its clips have "
                    f"{stop} particles"
                )
            _write(packed[modality], (row, slice(start, stop)), particles, held[row])
    return Batch(
        {m: Particles(**fields) for m, fields in packed.items()}, label, number, share, other
    )


def _blank(rows: int, slots: Slots) -> dict[str, np.ndarray]:
    shape = (rows, slots.length)
    return dict(
        payload=np.zeros((*shape, slots.size), slots.dtype),
        place=np.zeros((*shape, 3), np.float32),
        extent=np.zeros((*shape, 3), np.float32),
        segment=np.zeros(shape, np.int32),
    )


def _write(fields: dict[str, np.ndarray], where: tuple, particles: Particles, segment: int) -> None:
    for name in ("payload", "place", "extent"):
        fields[name][where] = getattr(particles, name)
    fields["segment"][where] = segment
