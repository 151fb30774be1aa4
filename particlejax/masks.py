# SPDX-License-Identifier: Apache-2.0
"""Which particles an objective hides: scores per particle, and a split by rank that gives every
clip its share.

Legend: B rows, L slots, K visible, Q asked for.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

_CELLS = 64  # per axis of the frame; particles whose centres share a cell share a tube


def random_scores(key: PRNGKeyArray, place: Float[Array, "B L 3"]) -> Float[Array, "B L"]:
    """Independent scores in [0, 1)."""
    return jax.random.uniform(key, place.shape[:2])


def tube_scores(key: PRNGKeyArray, place: Float[Array, "B L 3"]) -> Float[Array, "B L"]:
    """One score for all times of a place in the frame, so that what is hidden is hidden throughout
    (arXiv:2203.12602).
    """
    cell = jnp.clip((place[..., 1:] * _CELLS).astype(jnp.int32), 0, _CELLS - 1)
    table = jax.random.uniform(key, (place.shape[0], _CELLS**2))
    return jnp.take_along_axis(table, cell[..., 0] * _CELLS + cell[..., 1], axis=1)


def ranked_scores(
    key: PRNGKeyArray, value: Float[Array, "B L"], segment: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """Higher, and so hidden more often, the higher its value is among those of its clip.

    Half of a score is its rank, half is drawn.
    """
    return (share_rank(value, segment) + jax.random.uniform(key, value.shape)) / 2


def share_rank(scores: Float[Array, "B L"], segment: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """Each particle's rank among those of its clip as a share in (0, 1); 2 for an empty slot."""
    return jax.vmap(_share_rank)(scores, segment)


def _share_rank(scores: Array, segment: Array) -> Array:
    order = jnp.lexsort((scores, segment))
    sorted_segment = segment[order]
    first = jnp.searchsorted(sorted_segment, sorted_segment, side="left")
    last = jnp.searchsorted(sorted_segment, sorted_segment, side="right")
    share = (jnp.arange(len(segment)) - first + 0.5) / (last - first)
    share = jnp.where(sorted_segment > 0, share, 2.0)
    return jnp.zeros_like(share).at[order].set(share)


def visible_ratio(mask_ratio: float) -> float:
    """1 - mask_ratio, rounded: 0.4 of 0.6, so that counts are those of the decimal number."""
    return round(1 - mask_ratio, 12)


def split(
    scores: Float[Array, "B L"], segment: Int[Array, "B L"], keep: float, ask: float
) -> tuple[Int[Array, "B K"], Int[Array, "B Q"], Int[Array, "B K"]]:
    """Slots that stay visible, slots that are asked for, and the visible ones' segments.

    Every clip shows its `keep` share with the lowest scores and is asked for the `ask` share that
    follows. Shapes depend on L alone: in rows that are not full, surplus visible slots get segment
    0.
    """
    share = share_rank(scores, segment)
    order = jnp.argsort(share, axis=1)
    length = segment.shape[1]
    kept = round(length * keep)
    visible, asked = order[:, :kept], order[:, kept : kept + max(1, round(length * ask))]
    shown = jnp.take_along_axis(share, visible, axis=1) < keep
    return visible, asked, jnp.where(shown, jnp.take_along_axis(segment, visible, axis=1), 0)
