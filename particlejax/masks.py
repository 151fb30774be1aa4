# SPDX-License-Identifier: Apache-2.0
"""Which particles an objective hides: scores per particle, and a split by rank that gives every
clip its share.

Legend: B rows, L slots, K visible, Q asked for.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

_GRID_SIZE = 64  # per axis of the frame; particles whose centres share a cell share a tube


def random_scores(key: PRNGKeyArray, place: Float[Array, "B L 3"]) -> Float[Array, "B L"]:
    """Independent scores in [0, 1)."""
    return jax.random.uniform(key, place.shape[:2])


def tube_scores(key: PRNGKeyArray, place: Float[Array, "B L 3"]) -> Float[Array, "B L"]:
    """One score for all times of a place in the frame, so that what is hidden is hidden throughout
    (arXiv:2203.12602).
    """
    cell = jnp.clip((place[..., 1:] * _GRID_SIZE).astype(jnp.int32), 0, _GRID_SIZE - 1)
    table = jax.random.uniform(key, (place.shape[0], _GRID_SIZE**2))
    return jnp.take_along_axis(table, cell[..., 0] * _GRID_SIZE + cell[..., 1], axis=1)


def ranked_scores(
    key: PRNGKeyArray, value: Float[Array, "B L"], segment: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """Higher, and so hidden more often, the higher its value is among those of its clip.

    Half of a score is its rank, half is drawn.
    """
    return (rank_fraction(value, segment) + jax.random.uniform(key, value.shape)) / 2


def rank_fraction(scores: Float[Array, "B L"], segment: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """Each particle's rank among those of its clip as a share in (0, 1); 2 for an empty slot."""
    return jax.vmap(_rank_fraction)(scores, segment)


def _rank_fraction(scores: Array, segment: Array) -> Array:
    order = jnp.lexsort((scores, segment))
    sorted_segment = segment[order]
    first = jnp.searchsorted(sorted_segment, sorted_segment, side="left")
    last = jnp.searchsorted(sorted_segment, sorted_segment, side="right")
    fraction = (jnp.arange(len(segment)) - first + 0.5) / (last - first)
    fraction = jnp.where(sorted_segment > 0, fraction, 2.0)
    return jnp.zeros_like(fraction).at[order].set(fraction)


def visible_ratio(mask_ratio: float) -> float:
    """1 - mask_ratio, rounded: 0.4 of 0.6, so that counts are those of the decimal number."""
    return round(1 - mask_ratio, 12)


def split(
    scores: Float[Array, "B L"], segment: Int[Array, "B L"], keep_ratio: float, target_ratio: float
) -> tuple[Int[Array, "B K"], Int[Array, "B Q"], Int[Array, "B K"]]:
    """Slots that stay visible, slots that are asked for, and the visible ones' segments.

    Every clip shows its `keep_ratio` share with the lowest scores and is asked for the
    `target_ratio` share that follows. Shapes depend on L alone: in rows that are not full, surplus
    visible slots get segment
    0.
    """
    fraction = rank_fraction(scores, segment)
    order = jnp.argsort(fraction, axis=1)
    length = segment.shape[1]
    num_visible = round(length * keep_ratio)
    visible, query_slots = (
        order[:, :num_visible],
        order[:, num_visible : num_visible + max(1, round(length * target_ratio))],
    )
    is_visible = jnp.take_along_axis(fraction, visible, axis=1) < keep_ratio
    return (
        visible,
        query_slots,
        jnp.where(is_visible, jnp.take_along_axis(segment, visible, axis=1), 0),
    )
