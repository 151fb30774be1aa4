# SPDX-License-Identifier: Apache-2.0
"""Fusion of modalities: a row has one part per modality; a fusion defines which parts attend to
which.

Legend: B rows, L slots, S clips of a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

CLASS, BOTTLENECKS = "class", "latents"  # parts that are not modalities


class Parts(NamedTuple):
    """Parts of a row in order: names, lengths, fusion type, first fused block, whether each part
    has its own parameters.

    Class tokens attend to everything, nothing attends to them: they mix no modalities.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    fusion: str
    fuse_from: int
    separate_encoders: bool

    def spans(self) -> list[slice]:
        """The slice of each part."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def attended_parts(self, fused: bool) -> tuple[tuple[int, ...], ...]:
        """For each part, the indices of the parts it attends to, before (fused=False) and from
        `fuse_from` on.
        """
        return tuple(
            tuple(j for j, key in enumerate(self.names) if self._can_attend(name, key, fused))
            for name in self.names
        )

    def cross_attended_parts(self) -> tuple[tuple[int, ...], ...] | None:
        """For each part those it cross-attends to under fusion 'cross'; None otherwise, or with one
        modality.
        """
        modality_indices = [
            i for i, name in enumerate(self.names) if name not in (CLASS, BOTTLENECKS)
        ]
        if self.fusion != "cross" or len(modality_indices) < 2:
            return None
        return tuple(
            tuple(j for j in modality_indices if j != i) if i in modality_indices else ()
            for i in range(len(self.names))
        )

    def _can_attend(self, query: str, key: str, fused: bool) -> bool:
        if query == key:
            return True
        if key == CLASS:
            return False
        if query == CLASS:
            return True
        if BOTTLENECKS in (query, key):
            return fused  # before it, bottleneck tokens stay unchanged (MBT, arXiv:2107.00135)
        return self.fusion == "early"


def drop_modalities(
    key: Array, segments: list[Array], num_clips: int, drop_rate: float
) -> list[Array]:
    """Modality dropout: segments [B, L] with each modality of a clip set to 0 with probability
    `drop_rate`, never all.
    """
    clip_numbers = jnp.arange(1, num_clips + 1)
    # [M, B, S]
    present = jnp.stack(
        [(segment[:, :, None] == clip_numbers[None, None]).any(axis=1) for segment in segments]
    )
    draws = jnp.where(present, jax.random.uniform(key, present.shape), -1.0)
    kept = (draws >= drop_rate) | (draws == draws.max(axis=0, keepdims=True))
    # segment 0, an empty slot, stays empty
    padded = jnp.concatenate([jnp.zeros_like(kept[..., :1]), kept], axis=-1)
    return [
        jnp.where(jnp.take_along_axis(kept_clips, segment, axis=1), segment, 0)
        for kept_clips, segment in zip(padded, segments, strict=True)
    ]
