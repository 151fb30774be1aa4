# SPDX-License-Identifier: Apache-2.0
"""Loads records as clips (frames, audio, text, ...) and cuts clips into particles. Deterministic
given the generator.

Legend: T frames, H rows, W columns, N samples, F spectrogram frames, M mel bands, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from particlejax.config import modalities
from particlejax.config.experiment import DataSpec, ParticleSpec
from particlejax.data import augment, frame_cache
from particlejax.data.modalities import audio, feature_reader, timeseries, tokenizer
from particlejax.data.sources import Record
from particlejax.data.video import timeout
from particlejax.data.video.frame_ops import Part
from particlejax.particles import cuboids, policies
from particlejax.particles.normalize import PixelScale
from particlejax.particles.types import Particles

VISION, AUDIO, TEXT = modalities.VISION, modalities.AUDIO, modalities.TEXT
TIMESERIES = modalities.TIMESERIES
FEATURE_MODALITIES = modalities.FEATURES  # of frozen networks

_ASPECT = 4 / 3  # maximum aspect ratio of random crops
_BILINEAR, _MIRROR = Image.Resampling.BILINEAR, Image.Transpose.FLIP_LEFT_RIGHT
_SMALL = 64  # maximum side in pixels of frames that are resized together
_TRIES = 10  # attempts for a random crop inside the frame, before the center crop


class View(NamedTuple):
    """An evaluation view: index in 0..count-1 of the temporal clip and of the spatial crop."""

    time: int
    times: int
    crop: int
    crops: int


CENTRE = View(0, 1, 0, 1)
Look = View | np.random.Generator  # training samples, evaluation uses fixed views


@dataclass(frozen=True)
class Clip:
    """The decoded data of a record: frames uint8 [T, size, size, 3].

    All times count from the start of the sampled span; each frame covers a T-th of it (`starts`).
    sound: samples float32 [N] from the start, or None. words: token ids int32 [n]. channels:
    float32 [n, C] from the start, or None. seconds: length of the span. kept: precomputed feature
    particles by modality. T is 0 if only features and text are loaded; then no frame is decoded.
    """

    frames: np.ndarray
    seconds: float
    sound: np.ndarray | None = None
    words: np.ndarray | None = None
    channels: np.ndarray | None = None
    kept: Mapping[str, Particles] = field(default_factory=dict)

    @property
    def starts(self) -> np.ndarray:
        """Start of each frame within the span in seconds, float32 [T]."""
        count = len(self.frames)
        return (np.arange(count) * (self.seconds / max(count, 1))).astype(np.float32)


def load(record: Record, spec: DataSpec, look: Look, may_flip: bool = True) -> Clip:
    """Decodes the data of the spec's modalities. Raises decode.Unreadable, also on a timeout."""
    return timeout.within(
        spec.decode_timeout_seconds, partial(_load, record, spec, look, may_flip), record.video
    )


def decodes(spec: DataSpec) -> bool:
    """Whether frames are decoded: not for precomputed features, alone or with text."""
    return not set(FEATURE_MODALITIES) & set(spec.modalities) or bool(
        {VISION, AUDIO, TIMESERIES} & set(spec.modalities)
    )


def _load(record: Record, spec: DataSpec, look: Look, may_flip: bool) -> Clip:
    if not decodes(spec):
        return _unseen(record, spec, look)
    side = spec.decode_short_side or spec.image_size
    with frame_cache.opened(record.video, side, spec.ram_cache_gib, record.whole_frames) as video:
        length = max(record.until(video.duration) - record.start, 1 / video.fps)
        offset, times, span = moments(length, 1 / video.fps, spec, look)
        # beyond its end, a clip repeats its last frame
        held = np.minimum(offset + times, length - 0.5 / video.fps)
        frames = _see(video, record.start + held, spec, look, may_flip)
        origin, whole = video.origin, video.duration
    start, left = record.start + offset, min(span, length - offset)
    clip = Clip(frames, span)
    if AUDIO in spec.modalities:
        clip = replace(clip, sound=_hear(record, spec, look, (origin, start, left, whole)))
    if TEXT in spec.modalities and record.caption:
        clip = replace(clip, words=tokenizer.encode(record.caption, spec.text))
    if TIMESERIES in spec.modalities and record.series:
        left = min(left, longest(spec, spec.timeseries.max_seconds))
        clip = replace(clip, channels=timeseries.read(record.series, start, left, spec.timeseries))
    return replace(clip, kept=_kept(_read(record, spec), offset, span, spec))


def _unseen(record: Record, spec: DataSpec, look: Look) -> Clip:
    kept = _read(record, spec)
    length = max(each.length for each in kept.values())
    # the frame duration does not affect the span
    offset, _, span = moments(length, length, spec, look)
    text = (
        tokenizer.encode(record.caption, spec.text)
        if TEXT in spec.modalities and record.caption
        else None
    )
    frames = np.zeros((0, spec.image_size, spec.image_size, 3), np.uint8)
    return Clip(frames, span, words=text, kept=_kept(kept, offset, span, spec))


def _read(record: Record, spec: DataSpec) -> dict[str, feature_reader.Kept]:
    return {
        name: feature_reader.read(record, getattr(spec, name), name)
        for name in FEATURE_MODALITIES
        if name in spec.modalities
    }


def _kept(
    kept: Mapping[str, feature_reader.Kept], offset: float, span: float, spec: DataSpec
) -> dict[str, Particles]:
    return {
        name: each.during(offset, min(span, longest(spec, getattr(spec, name).max_seconds) or span))
        for name, each in kept.items()
    }


def _see(
    video: frame_cache.Frames, times: np.ndarray, spec: DataSpec, look: Look, may_flip: bool
) -> np.ndarray:
    drawn = isinstance(look, np.random.Generator)
    height, width = video.size
    left, top, right, bottom = box = _crop((height, width), spec, look)
    mirrored = bool(
        drawn and spec.augment.hflip_prob and look.random() < spec.augment.hflip_prob and may_flip
    )
    part = Part(
        (left / width, top / height, right / width, bottom / height), spec.image_size, mirrored
    )
    frames = video.parts_at(times, part)
    if frames is None:
        frames = crop_resize(video.frames_at(times), box, spec.image_size, mirrored)
    return augment.pictures(frames, spec.augment, look) if drawn else frames


def _hear(
    record: Record, spec: DataSpec, look: Look, when: tuple[float, float, float, float]
) -> np.ndarray | None:
    origin, start, seconds, whole = when
    drawn = isinstance(look, np.random.Generator)
    if drawn and spec.augment.audio_shift_seconds:
        start = max(0.0, start + look.uniform(-1, 1) * spec.augment.audio_shift_seconds)
    seconds = min(seconds, longest(spec, spec.audio.max_seconds))
    sound = frame_cache.sound(
        record.video, origin, start, seconds, spec.audio.sample_rate, spec.ram_cache_gib, whole
    )
    if sound is not None and drawn and spec.augment.audio_gain_db:
        sound = augment.loudness(sound, spec.augment, look)
    return sound


def longest(spec: DataSpec, own: float) -> float:
    """Maximum seconds of audio, series or features in a row: the modality's max_seconds, else
    clip_seconds.
    """
    return own or spec.clip_seconds


def particles_of(
    clip: Clip, data: DataSpec, spec: ParticleSpec, rng: np.random.Generator
) -> dict[str, Particles]:
    """Returns the clip's particles by modality; missing modalities have no entry. Vision is uint8,
    see `pixel_scale`.

    Audio, text and series use the time axis of the frames. If the policy does not use the budget
    itself, a random subset of vision particles is kept.
    """
    made = {VISION: _vision(clip, spec, rng)} if VISION in data.modalities else {}
    if clip.sound is not None:
        made[AUDIO] = _audio(clip.sound, data, rng)
    if clip.words is not None and len(clip.words):
        made[TEXT] = _text(clip.words, clip.seconds)
    if clip.channels is not None and len(clip.channels) >= data.timeseries.patch_length:
        made[TIMESERIES] = _series(clip.channels, data)
    made |= clip.kept
    return {name: particles for name, particles in made.items() if len(particles.segment)}


def _vision(clip: Clip, spec: ParticleSpec, rng: np.random.Generator) -> Particles:
    return policies.cut_clip(clip.frames, clip.starts, spec, rng)


def pixel_scale(data: DataSpec, spec: ParticleSpec) -> PixelScale:
    """Returns the normalization of vision payloads."""
    return PixelScale(data.image_mean, data.image_std, data.temporal_mean_scale, spec.patch_size[0])


def _audio(sound: np.ndarray, data: DataSpec, rng: np.random.Generator) -> Particles:
    spec = data.audio
    mel = (audio.log_mel(sound, spec) - spec.mean) / spec.std
    if data.augment.specaugment_num_masks:
        mel = augment.empty_bands(mel, data.augment, rng, 0.0)
    times = (np.arange(len(mel)) * spec.hop_seconds).astype(np.float32)
    base = (spec.patch_size[0], spec.patch_size[1], 1)
    if len(mel) < base[0]:  # shorter than a patch: pad with silence
        quiet = (np.log(1e-6) - spec.mean) / spec.std
        mel = np.pad(mel, ((0, base[0] - len(mel)), (0, 0)), constant_values=quiet).astype(
            np.float32
        )
        times = (np.arange(len(mel)) * spec.hop_seconds).astype(np.float32)
    return cuboids.cut(mel[:, :, None, None], times, cuboids.Tube(base, base), base)


def _series(channels: np.ndarray, data: DataSpec) -> Particles:
    base = (data.timeseries.patch_length, 1, 1)
    times = (np.arange(len(channels)) / data.timeseries.sample_rate).astype(np.float32)
    return cuboids.cut(channels[:, None, None, :], times, cuboids.Tube(base, base), base)


def _text(ids: np.ndarray, seconds: float) -> Particles:
    """Returns tokens that cover the whole clip in time, with their index on the row axis."""
    n = len(ids)
    row = (np.arange(n) + 0.5) / n
    place = np.stack([np.full(n, seconds / 2), row, np.full(n, 0.5)], axis=-1).astype(np.float32)
    extent = np.broadcast_to(np.array([seconds, 1 / n, 1.0], np.float32), (n, 3))
    return Particles(ids[:, None].astype(np.int32), place, extent, np.ones(n, np.int32))


def moments(
    length: float, frame: float, spec: DataSpec, look: Look
) -> tuple[float, np.ndarray, float]:
    """Returns start of the span, frame times from there, and length of the span, in seconds;
    `frame` is the duration of a frame of the file.
    """
    drawn = isinstance(look, np.random.Generator)
    if spec.frame_sampling == "dense":
        low, high = spec.frame_stride
        stride = int(look.integers(low, high + 1)) if drawn else round((low * high) ** 0.5)
        span = spec.num_frames * stride * frame
    else:
        span = spec.clip_seconds or length
    if drawn and spec.augment.speed_range != (1.0, 1.0):
        span *= float(np.exp(look.uniform(*np.log(spec.augment.speed_range))))
    slack = max(length - span, 0.0)
    start = look.uniform(0, slack) if drawn else slack * (look.time + 0.5) / look.times
    phase: float | np.ndarray = 0.5
    if drawn and spec.frame_sampling != "dense":
        phase = look.uniform(
            0.1, 0.9, spec.num_frames if spec.frame_sampling == "segment" else None
        )
    return start, (np.arange(spec.num_frames) + phase) * (span / spec.num_frames), span


def _crop(size: tuple[int, int], spec: DataSpec, look: Look) -> tuple[float, ...]:
    """Returns the crop box: left, top, right, bottom in pixels."""
    height, width = size
    if isinstance(look, View):
        side, place = min(size), look.crop / (look.crops - 1) if look.crops > 1 else 0.5
        left, top = (width - side) * place, (height - side) * place
        return left, top, left + side, top + side
    share = spec.augment.crop_scale
    for _ in range(_TRIES):
        area = look.uniform(*share) * min(size) ** 2
        aspect = np.exp(look.uniform(-1, 1) * np.log(_ASPECT)) if share[0] < 1 else 1.0
        w, h = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        left, top = look.uniform(0, max(width - w, 0)), look.uniform(0, max(height - h, 0))
        if w <= width and h <= height:
            return left, top, left + w, top + h
    return _crop(size, spec, CENTRE)


def crop_resize(
    frames: np.ndarray, box: tuple[float, ...], size: int, mirrored: bool = False
) -> np.ndarray:
    """Crops `box` (left, top, right, bottom in pixels) from frames uint8 [T, H, W, 3] and resizes
    it to [T, size, size, 3].

    Identical to Pillow's antialiased bilinear resize. Small frames are resized together, one axis
    after the other, because the cost is per call.
    """
    if box == (0, 0, size, size) and frames.shape[1:3] == (size, size):
        return frames[:, :, ::-1] if mirrored else frames
    if size > _SMALL:
        images = (
            Image.fromarray(np.ascontiguousarray(frame)).resize((size, size), _BILINEAR, box=box)
            for frame in frames
        )
        return np.stack(
            [np.asarray(image.transpose(_MIRROR) if mirrored else image) for image in images]
        )
    left, top, right, bottom = box
    wide = _stretch(frames, left, right, size, mirrored)
    return _stretch(wide.swapaxes(1, 2), top, bottom, size).swapaxes(1, 2)


def _stretch(
    frames: np.ndarray, start: float, stop: float, size: int, mirrored: bool = False
) -> np.ndarray:
    """Resizes columns start..stop of frames [T, H, W, 3] to `size` columns."""
    count, height, width, _ = frames.shape
    tall = Image.fromarray(np.ascontiguousarray(frames).reshape(count * height, width, 3))
    found = tall.resize((size, count * height), _BILINEAR, box=(start, 0, stop, count * height))
    return np.asarray(found.transpose(_MIRROR) if mirrored else found).reshape(
        count, height, size, 3
    )
