# SPDX-License-Identifier: Apache-2.0
"""Time utilities: start and end of particles, time span of clips, masking of particles.

Legend: B rows, L and M slots, S clips of a row.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.particles.types import Particles

TIME_EPS = 1e-3  # seconds; float32 tolerance for equal times
_PLACE_EPS = 1e-4  # tolerance for equal positions, as a fraction of the frame


def start(particles: Particles) -> Array:
    """Start time of each particle, [B, L]."""
    return particles.place[..., 0] - particles.extent[..., 0] / 2


def end(particles: Particles) -> Array:
    """End time of each particle, [B, L]."""
    return particles.place[..., 0] + particles.extent[..., 0] / 2


def clip_membership(particles: Particles, num_clips: int) -> Array:
    """Whether a slot belongs to a clip, bool [B, L, S]."""
    return losses.membership(particles.segment, num_clips) > 0


def present(particles: Particles, num_clips: int) -> Array:
    """Which clips have a particle of this modality, bool [B, S]."""
    return clip_membership(particles, num_clips).any(axis=1)


def span(particles: Particles, num_clips: int) -> tuple[Array, Array]:
    """Start and end time of each clip, [B, S]; 0 without particles."""
    in_clip = clip_membership(particles, num_clips)
    first = jnp.where(in_clip, start(particles)[..., None], jnp.inf).min(axis=1)
    last = jnp.where(in_clip, end(particles)[..., None], -jnp.inf).max(axis=1)
    has_particles = in_clip.any(axis=1)
    return jnp.where(has_particles, first, 0.0), jnp.where(has_particles, last, 0.0)


def longest_duration(particles: Particles, limit: Array) -> Array:
    """Duration of each clip's longest particle not longer than `limit` [B, S]; 0 if there is none.

    Coarse and fine particles of a clip are aligned at its multiples.
    """
    in_clip = clip_membership(particles, limit.shape[1])
    duration = particles.extent[..., 0][..., None]
    return jnp.where(in_clip & (duration <= limit[:, None] + TIME_EPS), duration, 0.0).max(axis=1)


def gather_clip_value(values_BS: Array, particles: Particles) -> Array:
    """Gathers a per-clip value for each slot, [B, L]; zero for empty slots."""
    padded = jnp.concatenate([jnp.zeros_like(values_BS[:, :1]), values_BS], axis=1)
    return jnp.take_along_axis(padded, particles.segment, axis=1)


def same_location(first: Particles, second: Particles) -> Array:
    """Which particles of a clip have the same spatial position and size, at any time, bool [B, L,
    M].
    """
    distance = jnp.abs(first.place[:, :, None, 1:] - second.place[:, None, :, 1:])
    extent_difference = jnp.abs(first.extent[:, :, None, 1:] - second.extent[:, None, :, 1:])
    same_clip = (first.segment[:, :, None] == second.segment[:, None]) & (first.segment > 0)[
        :, :, None
    ]
    return same_clip & (jnp.maximum(distance, extent_difference).max(axis=-1) < _PLACE_EPS)


def drop_where_not(particles: Particles, kept: Array) -> Particles:
    """Empties the slots where `kept` is False."""
    return replace(particles, segment=jnp.where(kept, particles.segment, 0))


def with_time(particles: Particles, time: Array) -> Particles:
    """The particles with centers at the given times [B, L]."""
    return replace(
        particles, place=jnp.concatenate([time[..., None], particles.place[..., 1:]], axis=-1)
    )
