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
    index: int  # index in the source
    label_weight: float = 1.0  # weight of its label after MixUp or CutMix
    second_label: int = -1  # label of the mixed-in clip


class SlotSpec(NamedTuple):
    """The slots of a row for one modality: their number, payload size and dtype."""

    length: int
    payload_size: int
    dtype: str = "float32"


def pack(
    clips: Sequence[Clip],
    assigned_rows: Sequence[int],
    slots: Mapping[str, SlotSpec],
    num_rows: int,
    clips_per_row: int,
) -> Batch:
    """Packs each clip into its chosen row; unused slots have segment 0, clip -1 and label -1.

    Raises ValueError if a row's clips do not fit.
    """
    label = np.full((num_rows, clips_per_row), -1, np.int32)
    index, second_label = label.copy(), label.copy()
    label_weight = np.ones((num_rows, clips_per_row), np.float32)
    packed = {modality: _empty_fields(num_rows, slot_spec) for modality, slot_spec in slots.items()}
    used_slots = {modality: [0] * num_rows for modality in slots}
    clips_in_row = [0] * num_rows
    for clip, row in zip(clips, assigned_rows, strict=True):
        position = row, clips_in_row[row]
        if clips_in_row[row] == clips_per_row:
            raise ValueError(f"row {row} has more than {clips_per_row} clips")
        label[position], index[position], label_weight[position], second_label[position] = (
            clip.label,
            clip.index,
            clip.label_weight,
            clip.second_label,
        )
        clips_in_row[row] += 1
        for modality, particles in clip.particles.items():
            start = used_slots[modality][row]
            used_slots[modality][row] = stop = start + len(particles.segment)
            if stop > slots[modality].length:
                raise ValueError(
                    f"row {row} has {slots[modality].length} {modality} slots, but its clips have "
                    f"{stop} particles"
                )
            _write(packed[modality], (row, slice(start, stop)), particles, clips_in_row[row])
    return Batch(
        {modality: Particles(**fields) for modality, fields in packed.items()},
        label,
        index,
        label_weight,
        second_label,
    )


def _empty_fields(num_rows: int, slots: SlotSpec) -> dict[str, np.ndarray]:
    shape = (num_rows, slots.length)
    return dict(
        payload=np.zeros((*shape, slots.payload_size), slots.dtype),
        place=np.zeros((*shape, 3), np.float32),
        extent=np.zeros((*shape, 3), np.float32),
        segment=np.zeros(shape, np.int32),
    )


def _write(fields: dict[str, np.ndarray], index: tuple, particles: Particles, segment: int) -> None:
    for name in ("payload", "place", "extent"):
        fields[name][index] = getattr(particles, name)
    fields["segment"][index] = segment
