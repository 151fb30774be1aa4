# SPDX-License-Identifier: Apache-2.0
"""Which part of a row reads which: a row's tokens stand in parts, one a modality, and a fusion is a
table of who reads whom.

Legend: B rows, L slots, S clips of a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

CLASS, LATENTS = "class", "latents"  # parts that are no modality


class Parts(NamedTuple):
    """Parts of a row in their order: names, slots of each, the fusion, its first block, whether
    parts have own parameters.

    The class tokens read everything and nobody reads them, so nothing crosses by them.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    fusion: str
    fuse_from: int
    separate: bool

    def spans(self) -> list[slice]:
        """Where each part stands."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def reads(self, fused: bool) -> tuple[tuple[int, ...], ...]:
        """For each part the numbers of those it attends to, before (fused False) and from
        `fuse_from` on.
        """
        return tuple(
            tuple(j for j, key in enumerate(self.names) if self._may(name, key, fused))
            for name in self.names
        )

    def others(self) -> tuple[tuple[int, ...], ...] | None:
        """For each part those it cross-attends to, in the fusion 'cross'; None in any other, or
        where there is one modality.
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
            return fused  # before, latents wait as they were learned (MBT, arXiv:2107.00135)
        return self.fusion == "early"


def hide(key: Array, segments: list[Array], clips: int, share: float) -> list[Array]:
    """Segments [B, L] of each modality, 0 for a clip's modality that is hidden: each with
    probability `share`, never all.
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
