# SPDX-License-Identifier: Apache-2.0
"""Token reduction: drops the least informative tokens or merges similar ones after some blocks.

Each clip of a row keeps its own share, so packing changes nothing, and shapes depend on L alone.
Legend: B rows, L slots, K kept slots, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax import masks


class Tokens(NamedTuple):
    """Tokens [B, L, D] with positions [B, L, 3] and segments [B, L]; one modality after the other.

    size: float32 [B, L], particles merged into a token, None if one each. modality_id: int32 [B,
    L], the index of a token's modality, None if the fusion does not distinguish them. cls: [B, S,
    D], the class token of each clip, None if there is none.
    """

    x: Array
    place: Array
    segment: Array
    size: Array | None = None
    modality_id: Array | None = None
    cls: Array | None = None


class TokenReduction(NamedTuple):
    """Token reduction: method `method` of the table below, after which blocks, and the fraction
    kept each time.
    """

    method: str
    after_blocks: tuple[int, ...]
    keep_rate: float

    def __call__(self, tokens: Tokens) -> Tokens:
        return METHODS[self.method](tokens, self.keep_rate)


def prune(tokens: Tokens, keep_rate: float) -> Tokens:
    """Keeps the tokens farthest from their clip's mean (norms are no guide: a final norm hides
    them).
    """
    same_clip = (tokens.segment[:, :, None] == tokens.segment[:, None, :]).astype(jnp.float32)
    x = tokens.x.astype(jnp.float32)
    mean = jnp.einsum("blm,bmd->bld", same_clip, x) / same_clip.sum(-1, keepdims=True)
    visible, _, segment = masks.split(-jnp.square(x - mean).sum(-1), tokens.segment, keep_rate, 0.0)
    x, place, size = (_gather(values, visible) for values in (tokens.x, tokens.place, tokens.size))
    return Tokens(x, place, segment, size)


def merge(tokens: Tokens, keep_rate: float) -> Tokens:
    """Merges similar tokens by averaging (bipartite soft matching, ToMe, arXiv:2210.09461);
    `keep_rate` must be at least 0.5.

    Every other token of a clip is matched to its most similar of the rest; the most similar pairs
    merge.
    """
    segment, x = tokens.segment, tokens.x.astype(jnp.float32)
    length = segment.shape[1]
    size = jnp.where(segment > 0, 1.0, 0.0) if tokens.size is None else tokens.size
    same_clip = segment[:, :, None] == segment[:, None, :]
    # within the clip
    index_in_clip = jnp.sum(
        same_clip & (jnp.arange(length)[None, None] < jnp.arange(length)[None, :, None]), axis=-1
    )
    normalized = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    can_merge = (
        same_clip
        & (index_in_clip % 2 == 0)[:, :, None]
        & (index_in_clip % 2 == 1)[:, None]
        & (segment > 0)[:, :, None]
    )
    similarity = jnp.where(can_merge, jnp.einsum("bld,bmd->blm", normalized, normalized), -jnp.inf)
    best, partner = similarity.max(axis=-1), similarity.argmax(axis=-1)
    clip_length = same_clip.sum(axis=-1)
    rank = jnp.sum(
        same_clip
        & (
            (best[:, None] > best[:, :, None])
            | (
                (best[:, None] == best[:, :, None])
                & (index_in_clip[:, None] < index_in_clip[:, :, None])
            )
        ),
        axis=-1,
    )
    merged = (
        rank < clip_length - jnp.floor(clip_length.astype(jnp.float32) * jnp.float32(keep_rate))
    ) & jnp.isfinite(best)
    destination = jnp.where(merged, partner, jnp.arange(length)[None])
    # [B, L, L]: weight of slot l in slot m
    merge_weights = jax.nn.one_hot(destination, length) * size[..., None]
    merged_size = merge_weights.sum(axis=1)
    x, place = (
        jnp.einsum("blm,blk->bmk", merge_weights, values)
        / jnp.maximum(merged_size, 1e-6)[..., None]
        for values in (x, tokens.place)
    )
    kept = (segment > 0) & ~merged
    num_kept = int(np.floor(np.float32(length) * np.float32(keep_rate)))  # bit-identical to above
    order = jnp.argsort(~kept, axis=1, stable=True)[:, :num_kept]
    segment = jnp.where(
        jnp.take_along_axis(kept, order, axis=1), jnp.take_along_axis(segment, order, axis=1), 0
    )
    return Tokens(
        _gather(x.astype(tokens.x.dtype), order),
        _gather(place, order),
        segment,
        _gather(merged_size, order),
    )


def _gather(x: Array | None, order: Array) -> Array | None:
    if x is None:
        return None
    return jnp.take_along_axis(x, order if x.ndim == 2 else order[..., None], axis=1)


METHODS: dict[str, Callable[[Tokens, float], Tokens]] = {"prune": prune, "merge": merge}
