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

    mass: float32 [B, L], particles merged into a token, None if one each. kind: int32 [B, L], the
    index of a token's modality, None if the fusion does not distinguish them. whole: [B, S, D], the
    class token of each clip, None if there is none.
    """

    x: Array
    place: Array
    segment: Array
    mass: Array | None = None
    kind: Array | None = None
    whole: Array | None = None


class Reduction(NamedTuple):
    """Token reduction: method `how` of the table below, after which blocks, and the fraction kept
    each time.
    """

    how: str
    after: tuple[int, ...]
    keep: float

    def __call__(self, tokens: Tokens) -> Tokens:
        return TABLE[self.how](tokens, self.keep)


def prune(tokens: Tokens, keep: float) -> Tokens:
    """Keeps the tokens farthest from their clip's mean (norms are no guide: a final norm hides
    them).
    """
    member = (tokens.segment[:, :, None] == tokens.segment[:, None, :]).astype(jnp.float32)
    x = tokens.x.astype(jnp.float32)
    mean = jnp.einsum("blm,bmd->bld", member, x) / member.sum(-1, keepdims=True)
    visible, _, segment = masks.split(-jnp.square(x - mean).sum(-1), tokens.segment, keep, 0.0)
    x, place, mass = (_take(each, visible) for each in (tokens.x, tokens.place, tokens.mass))
    return Tokens(x, place, segment, mass)


def merge(tokens: Tokens, keep: float) -> Tokens:
    """Merges similar tokens by averaging (bipartite soft matching, ToMe, arXiv:2210.09461); `keep`
    must be at least 0.5.

    Every other token of a clip is matched to its most similar of the rest; the most similar pairs
    merge.
    """
    segment, x = tokens.segment, tokens.x.astype(jnp.float32)
    length = segment.shape[1]
    mass = jnp.where(segment > 0, 1.0, 0.0) if tokens.mass is None else tokens.mass
    same = segment[:, :, None] == segment[:, None, :]
    # within the clip
    index = jnp.sum(
        same & (jnp.arange(length)[None, None] < jnp.arange(length)[None, :, None]), axis=-1
    )
    unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    may = (
        same & (index % 2 == 0)[:, :, None] & (index % 2 == 1)[:, None] & (segment > 0)[:, :, None]
    )
    alike = jnp.where(may, jnp.einsum("bld,bmd->blm", unit, unit), -jnp.inf)
    best, partner = alike.max(axis=-1), alike.argmax(axis=-1)
    number = same.sum(axis=-1)
    rank = jnp.sum(
        same
        & (
            (best[:, None] > best[:, :, None])
            | ((best[:, None] == best[:, :, None]) & (index[:, None] < index[:, :, None]))
        ),
        axis=-1,
    )
    goes = (
        rank < number - jnp.floor(number.astype(jnp.float32) * jnp.float32(keep))
    ) & jnp.isfinite(best)
    target = jnp.where(goes, partner, jnp.arange(length)[None])
    # [B, L, L]: weight of slot l in slot m
    into = jax.nn.one_hot(target, length) * mass[..., None]
    total = into.sum(axis=1)
    x, place = (
        jnp.einsum("blm,blk->bmk", into, each) / jnp.maximum(total, 1e-6)[..., None]
        for each in (x, tokens.place)
    )
    stays = (segment > 0) & ~goes
    kept = int(np.floor(np.float32(length) * np.float32(keep)))  # bit-identical to above
    order = jnp.argsort(~stays, axis=1, stable=True)[:, :kept]
    segment = jnp.where(
        jnp.take_along_axis(stays, order, axis=1), jnp.take_along_axis(segment, order, axis=1), 0
    )
    return Tokens(
        _take(x.astype(tokens.x.dtype), order), _take(place, order), segment, _take(total, order)
    )


def _take(x: Array | None, order: Array) -> Array | None:
    if x is None:
        return None
    return jnp.take_along_axis(x, order if x.ndim == 2 else order[..., None], axis=1)


TABLE: dict[str, Callable[[Tokens, float], Tokens]] = {"prune": prune, "merge": merge}
