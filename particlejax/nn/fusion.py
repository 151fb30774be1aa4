# SPDX-License-Identifier: Apache-2.0
"""Fusion of modalities: a row has one part per modality; a fusion defines which parts attend to
which.

Legend: B rows, L slots, S clips of a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

CLASS, LATENTS = "class", "latents"  # parts that are not modalities


class Parts(NamedTuple):
    """Parts of a row in order: names, lengths, fusion type, first fused block, whether each part
    has its own parameters.

    Class tokens attend to everything, nothing attends to them: they mix no modalities.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    fusion: str
    fuse_from: int
    separate: bool

    def spans(self) -> list[slice]:
        """The slice of each part."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def reads(self, fused: bool) -> tuple[tuple[int, ...], ...]:
        """For each part, the indices of the parts it attends to, before (fused=False) and from
        `fuse_from` on.
        """
        return tuple(
            tuple(j for j, key in enumerate(self.names) if self._may(name, key, fused))
            for name in self.names
        )

    def others(self) -> tuple[tuple[int, ...], ...] | None:
        """For each part those it cross-attends to under fusion 'cross'; None otherwise, or with one
        modality.
        """
        known = [i for i, name in enumerate(self.names) if name not in (CLASS, LATENTS)]
        if self.fusion != "cross" or len(known) < 2:
            return None
        return tuple(
            tuple(j for j in known if j != i) if i in known else () for i in range(len(self.names))
        )

    def _may(self, query: str, key: str, fused: bool) -> bool:
        if query == key:
            return True
        if key == CLASS:
            return False
        if query == CLASS:
            return True
        if LATENTS in (query, key):
            return fused  # before it, bottleneck tokens stay unchanged (MBT, arXiv:2107.00135)
        return self.fusion == "early"


def hide(key: Array, segments: list[Array], clips: int, share: float) -> list[Array]:
    """Modality dropout: segments [B, L] with each modality of a clip set to 0 with probability
    `share`, never all.
    """
    numbers = jnp.arange(1, clips + 1)
    # [M, B, S]
    there = jnp.stack(
        [(segment[:, :, None] == numbers[None, None]).any(axis=1) for segment in segments]
    )
    drawn = jnp.where(there, jax.random.uniform(key, there.shape), -1.0)
    stays = (drawn >= share) | (drawn == drawn.max(axis=0, keepdims=True))
    # segment 0, an empty slot, stays empty
    padded = jnp.concatenate([jnp.zeros_like(stays[..., :1]), stays], axis=-1)
    return [
        jnp.where(jnp.take_along_axis(each, segment, axis=1), segment, 0)
        for each, segment in zip(padded, segments, strict=True)
    ]
