# SPDX-License-Identifier: Apache-2.0
"""Time utilities: start and end of particles, time span of clips, masking of particles.

Legend: B rows, L and M slots, S clips of a row.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.particles.types import Particles

SLACK = 1e-3  # seconds; float32 tolerance for equal times
_SPOT = 1e-4  # tolerance for equal positions, as a fraction of the frame


def start(particles: Particles) -> Array:
    """Start time of each particle, [B, L]."""
    return particles.place[..., 0] - particles.extent[..., 0] / 2


def end(particles: Particles) -> Array:
    """End time of each particle, [B, L]."""
    return particles.place[..., 0] + particles.extent[..., 0] / 2


def member(particles: Particles, clips: int) -> Array:
    """Whether a slot belongs to a clip, bool [B, L, S]."""
    return losses.membership(particles.segment, clips) > 0


def present(particles: Particles, clips: int) -> Array:
    """Which clips have a particle of this modality, bool [B, S]."""
    return member(particles, clips).any(axis=1)


def span(particles: Particles, clips: int) -> tuple[Array, Array]:
    """Start and end time of each clip, [B, S]; 0 without particles."""
    own = member(particles, clips)
    first = jnp.where(own, start(particles)[..., None], jnp.inf).min(axis=1)
    last = jnp.where(own, end(particles)[..., None], -jnp.inf).max(axis=1)
    there = own.any(axis=1)
    return jnp.where(there, first, 0.0), jnp.where(there, last, 0.0)


def longest(particles: Particles, limit: Array) -> Array:
    """Duration of each clip's longest particle not longer than `limit` [B, S]; 0 if there is none.

    Coarse and fine particles of a clip are aligned at its multiples.
    """
    own = member(particles, limit.shape[1])
    duration = particles.extent[..., 0][..., None]
    return jnp.where(own & (duration <= limit[:, None] + SLACK), duration, 0.0).max(axis=1)


def of_particle(values_BS: Array, particles: Particles) -> Array:
    """Gathers a per-clip value for each slot, [B, L]; zero for empty slots."""
    padded = jnp.concatenate([jnp.zeros_like(values_BS[:, :1]), values_BS], axis=1)
    return jnp.take_along_axis(padded, particles.segment, axis=1)


def same_spot(one: Particles, other: Particles) -> Array:
    """Which particles of a clip have the same spatial position and size, at any time, bool [B, L,
    M].
    """
    apart = jnp.abs(one.place[:, :, None, 1:] - other.place[:, None, :, 1:])
    wider = jnp.abs(one.extent[:, :, None, 1:] - other.extent[:, None, :, 1:])
    own = (one.segment[:, :, None] == other.segment[:, None]) & (one.segment > 0)[:, :, None]
    return own & (jnp.maximum(apart, wider).max(axis=-1) < _SPOT)


def keep(particles: Particles, stays: Array) -> Particles:
    """Empties the slots where `stays` is False."""
    return replace(particles, segment=jnp.where(stays, particles.segment, 0))


def moved(particles: Particles, time: Array) -> Particles:
    """The particles with centers at the given times [B, L]."""
    return replace(
        particles, place=jnp.concatenate([time[..., None], particles.place[..., 1:]], axis=-1)
    )
