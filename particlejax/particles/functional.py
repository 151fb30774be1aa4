# SPDX-License-Identifier: Apache-2.0
"""Standalone particles in NumPy: cut a clip, pack clips into a row, paint particles as a video.

    particles = pj.particles.patchify(video, fps=25, policy="adaptive", budget=128)
    video_again = pj.particles.paint(particles, video.shape, fps=25)

Legend: T frames, H rows, W columns, C channels, N particles, P values of a payload.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from particlejax.config.data import ParticleSpec
from particlejax.core.typing import UserError
from particlejax.particles import painting, policies
from particlejax.particles.types import Particles

_PATCH = (2, 16, 16)  # frames, rows, columns


def patchify(
    video: np.ndarray,
    fps: int | float,
    policy: str = "grid",
    budget: int = 0,
    patch_size: tuple[int, int, int] = _PATCH,
    seed: int = 0,
    **settings: Any,
) -> Particles:
    """Returns the particles of one clip, with leading axis N.

    video: uint8 or float [T, H, W, C]. fps: frames per second. policy: 'grid', 'tubes', 'pyramid',
    'adaptive', 'run_length' or a registered one. budget: maximum number of particles; 0: all.
    patch_size: frames, rows and columns of the smallest cuboid. seed: for the random subset of
    policies that do not use the budget themselves. settings: other fields of config.particles.
    Payloads [N, P] have the video's dtype, in the order (t, h, w, c); places are in seconds and
    fractions of the frame. Raises UserError for settings that do not fit the clip.
    """
    if video.ndim != 4:
        raise UserError(f"the video has shape {list(video.shape)}: pass [T, H, W, C].")
    spec = ParticleSpec(policy=policy, budget=budget, patch_size=patch_size, **settings)
    try:
        policies.check(video.shape[:3], spec)
    except ValueError as error:
        raise UserError(str(error)) from error
    times = (np.arange(len(video)) / fps).astype(np.float32)
    return policies.cut_clip(video, times, spec, np.random.default_rng(seed))


def pack(clips: Sequence[Particles], length: int = 0) -> Particles:
    """Packs the particles of several clips into one row of fixed length, leading axes [1, length].

    `segment` numbers the clips from 1; 0 is an empty slot. length: 0: the number of particles.
    Raises UserError if they do not fit.
    """
    counts = [len(clip.segment) for clip in clips]
    length = length or sum(counts)
    if sum(counts) > length:
        raise UserError(f"{sum(counts)} particles do not fit into a row of {length}: raise length.")
    fields = {}
    for name in ("payload", "place", "extent"):
        joined = np.concatenate([getattr(clip, name) for clip in clips])
        empty = np.zeros((length - len(joined), *joined.shape[1:]), joined.dtype)
        fields[name] = np.concatenate([joined, empty])[None]
    numbers = np.repeat(np.arange(1, len(clips) + 1), counts)
    segment = np.concatenate([numbers, np.zeros(length - len(numbers), int)])
    return Particles(**fields, segment=segment.astype(np.int32)[None])


def paint(
    particles: Particles,
    shape: tuple[int, ...],
    fps: int | float,
    patch_size: tuple[int, int, int] = _PATCH,
    canvas: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the video [T, H, W, 3] of `shape` that a clip's particles represent, in their dtype.

    Coarse particles are drawn with larger pixels. canvas: background without particles; None:
    zeros. particles: from `patchify`, leading axis N, RGB.
    """
    occupied = np.asarray(particles.segment) > 0
    payload = np.asarray(particles.payload)[occupied]
    if canvas is None:
        canvas = np.zeros((*shape[:3], 3), payload.dtype)
    times = (np.arange(shape[0]) / fps).astype(np.float32)
    place, extent = np.asarray(particles.place)[occupied], np.asarray(particles.extent)[occupied]
    return painting.paint(payload, place, extent, times, shape[1:3], patch_size, canvas)
