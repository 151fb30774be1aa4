# SPDX-License-Identifier: Apache-2.0
"""From a record to frames: which moments, which part of the picture, and the particles of it. Pure in the generator.

Legend: T frames, H rows, W columns.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from particlejax.data import memory
from particlejax.data.sources import Record
from particlejax.particles import policies
from particlejax.particles.types import Particles
from particlejax.spec import DataSpec, ParticleSpec

_ASPECT = 4 / 3  # a random crop's sides differ by at most this factor
_TRIES = 10  # random crops that may fall outside the picture before its largest square is taken


class View(NamedTuple):
    """Which of several looks at a clip, when evaluating: number in 0..of-1 along time and across the picture."""

    time: int
    times: int
    crop: int
    crops: int


def load(record: Record, spec: DataSpec, look: View | np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [T, size, size, 3] and their times in seconds from the first, float32 [T].

    look: a generator draws a start, a crop and a flip (training); a View names them (evaluation). A clip shorter than
    `spec.seconds` shows its last frame until the span is over. Raises decode.Unreadable.
    """
    with memory.opened(record.video, spec.decode_side or spec.size, spec.memory_gib) as video:
        end = min(video.duration, record.end) if record.end is not None else video.duration
        times = _moments(max(end - record.start, 1 / video.fps), spec, look)
        frames = video.frames_at(record.start + times)
    box = _crop(frames.shape[1:3], spec, look)
    frames = np.stack([_resize(frame, box, spec.size) for frame in frames])
    if isinstance(look, np.random.Generator) and spec.flip and look.random() < 0.5:
        frames = frames[:, :, ::-1]
    return frames, (times - times[0]).astype(np.float32)


def particles_of(frames: np.ndarray, times: np.ndarray, data: DataSpec, spec: ParticleSpec, rng: np.random.Generator
                 ) -> Particles:
    """The clip's particles with payloads as the model reads them; a budget keeps a random part of them."""
    video = (frames.astype(np.float32) / 255 - data.mean) / data.std
    particles = policies.cut_clip(video, times, spec)
    if spec.budget:
        particles = policies.thin(particles, rng.random(len(particles.segment)), spec.budget)
    return replace(particles, payload=_scale_still(particles.payload, data.still, spec.base[0]))


def pixels_of(payload: np.ndarray, data: DataSpec, spec: ParticleSpec) -> np.ndarray:
    """Payloads [N, P] of `particles_of` as pixels again, float32 in [0, 1] where they were."""
    return _scale_still(payload, 1 / data.still, spec.base[0]) * data.std + data.mean


def _scale_still(payload: np.ndarray, still: float, frames: int) -> np.ndarray:
    """Each payload [N, frames * rest] with its mean over the cuboid's frames multiplied by `still`."""
    if still == 1:
        return payload
    cuboid = payload.reshape(len(payload), frames, -1)
    return (cuboid + (still - 1) * cuboid.mean(axis=1, keepdims=True)).reshape(payload.shape)


def _moments(duration: float, spec: DataSpec, look: View | np.random.Generator) -> np.ndarray:
    span = spec.seconds or duration
    slack = max(duration - span, 0.0)
    step = span / spec.frames
    if isinstance(look, np.random.Generator):
        start, phase = look.uniform(0, slack), look.uniform(0.1, 0.9)
    else:
        start, phase = slack * (look.time + 0.5) / look.times, 0.5
    return start + (np.arange(spec.frames) + phase) * step


def _crop(size: tuple[int, int], spec: DataSpec, look: View | np.random.Generator) -> tuple[float, ...]:
    """The part that is looked at: left, top, right, bottom in pixels."""
    height, width = size
    if isinstance(look, View):
        side, place = min(size), look.crop / (look.crops - 1) if look.crops > 1 else 0.5
        left, top = (width - side) * place, (height - side) * place
        return left, top, left + side, top + side
    for _ in range(_TRIES):
        area = look.uniform(*spec.crop) * min(size) ** 2
        aspect = np.exp(look.uniform(-1, 1) * np.log(_ASPECT)) if spec.crop[0] < 1 else 1.0
        w, h = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        left, top = look.uniform(0, max(width - w, 0)), look.uniform(0, max(height - h, 0))
        if w <= width and h <= height:
            return left, top, left + w, top + h
    return _crop(size, spec, View(0, 1, 0, 1))


def _resize(frame: np.ndarray, box: tuple[float, ...], size: int) -> np.ndarray:
    if box == (0, 0, size, size) and frame.shape[:2] == (size, size):
        return frame
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
