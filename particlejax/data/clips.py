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
from particlejax.config.data import DataSpec, ParticleSpec
from particlejax.data import augment
from particlejax.data.frame_cache import FrameCache, Frames
from particlejax.data.modalities import audio, feature_reader, timeseries, tokenizer
from particlejax.data.sources import Record
from particlejax.data.video import timeout
from particlejax.data.video.frame_ops import Region
from particlejax.particles import cuboids, policies
from particlejax.particles.normalize import PixelScale
from particlejax.particles.types import Particles

VISION, AUDIO, TEXT = modalities.VISION, modalities.AUDIO, modalities.TEXT
TIMESERIES = modalities.TIMESERIES
FEATURE_MODALITIES = modalities.FEATURES  # of frozen networks

_ASPECT = 4 / 3  # maximum aspect ratio of random crops
_BILINEAR, _FLIP = Image.Resampling.BILINEAR, Image.Transpose.FLIP_LEFT_RIGHT
_MAX_BATCHED_RESIZE = 64  # maximum side in pixels of frames that are resized together
_MAX_CROP_TRIES = 10  # attempts for a random crop inside the frame, before the center crop


class View(NamedTuple):
    """An evaluation view: index in 0..count-1 of the temporal clip and of the spatial crop."""

    time_index: int
    num_times: int
    crop_index: int
    num_crops: int


CENTER_VIEW = View(0, 1, 0, 1)
ViewOrRng = View | np.random.Generator  # training samples, evaluation uses fixed views


@dataclass(frozen=True)
class Clip:
    """The decoded data of a record: frames uint8 [T, size, size, 3].

    All times count from the start of the sampled span; each frame covers a T-th of it
    (`frame_starts`). sound: samples float32 [N] from the start, or None. token_ids: token ids int32
    [n]. channels: float32 [n, C] from the start, or None. seconds: length of the span. features:
    precomputed feature particles by modality. T is 0 if only features and text are loaded; then no
    frame is decoded.
    """

    frames: np.ndarray
    seconds: float
    sound: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    channels: np.ndarray | None = None
    features: Mapping[str, Particles] = field(default_factory=dict)

    @property
    def frame_starts(self) -> np.ndarray:
        """Start of each frame within the span in seconds, float32 [T]."""
        count = len(self.frames)
        return (np.arange(count) * (self.seconds / max(count, 1))).astype(np.float32)


def load(
    record: Record,
    spec: DataSpec,
    view_or_rng: ViewOrRng,
    may_flip: bool = True,
    cache: FrameCache | None = None,
) -> Clip:
    """Decodes the data of the spec's modalities. Raises decode.Unreadable, also on a timeout.

    cache: keeps decoded frames and sound for later calls, within `spec.ram_cache_gib`.
    """
    slow_reasons: list[str] = []
    return timeout.run_with_timeout(
        spec.decode_timeout_seconds,
        partial(_load, record, spec, view_or_rng, may_flip, cache or FrameCache(), slow_reasons),
        record.video,
        slow_reasons,
    )


def needs_decoding(spec: DataSpec) -> bool:
    """Whether frames are decoded: not for precomputed features, alone or with text."""
    return not set(FEATURE_MODALITIES) & set(spec.modalities) or bool(
        {VISION, AUDIO, TIMESERIES} & set(spec.modalities)
    )


def _load(
    record: Record,
    spec: DataSpec,
    view_or_rng: ViewOrRng,
    may_flip: bool,
    cache: FrameCache,
    slow_reasons: list[str],
) -> Clip:
    if not needs_decoding(spec):
        return _load_without_frames(record, spec, view_or_rng)
    side = spec.decode_short_side or spec.image_size
    with cache.open_frames(
        record.video, side, spec.ram_cache_gib, record.whole_frames, slow_reasons
    ) as video:
        length = max(record.until(video.duration) - record.start, 1 / video.fps)
        offset, times, span = sample_times(length, 1 / video.fps, spec, view_or_rng)
        # beyond its end, a clip repeats its last frame
        clamped_times = np.minimum(offset + times, length - 0.5 / video.fps)
        frames = _read_frames(video, record.start + clamped_times, spec, view_or_rng, may_flip)
        origin, duration = video.origin, video.duration
    start, remaining = record.start + offset, min(span, length - offset)
    clip = Clip(frames, span)
    if AUDIO in spec.modalities:
        timing = (origin, start, remaining, duration)
        clip = replace(clip, sound=_read_sound(record, spec, view_or_rng, timing, cache))
    if TEXT in spec.modalities and record.caption:
        clip = replace(clip, token_ids=tokenizer.encode(record.caption, spec.text))
    if TIMESERIES in spec.modalities and record.series:
        remaining = min(remaining, max_seconds(spec, spec.timeseries.max_seconds))
        clip = replace(
            clip, channels=timeseries.read(record.series, start, remaining, spec.timeseries)
        )
    return replace(clip, features=_slice_features(_read_features(record, spec), offset, span, spec))


def _load_without_frames(record: Record, spec: DataSpec, view_or_rng: ViewOrRng) -> Clip:
    features = _read_features(record, spec)
    length = max(clip_features.length for clip_features in features.values())
    # the frame duration does not affect the span
    offset, _, span = sample_times(length, length, spec, view_or_rng)
    token_ids = (
        tokenizer.encode(record.caption, spec.text)
        if TEXT in spec.modalities and record.caption
        else None
    )
    frames = np.zeros((0, spec.image_size, spec.image_size, 3), np.uint8)
    return Clip(
        frames, span, token_ids=token_ids, features=_slice_features(features, offset, span, spec)
    )


def _read_features(record: Record, spec: DataSpec) -> dict[str, feature_reader.ClipFeatures]:
    return {
        name: feature_reader.read(record, getattr(spec, name), name)
        for name in FEATURE_MODALITIES
        if name in spec.modalities
    }


def _slice_features(
    features: Mapping[str, feature_reader.ClipFeatures], offset: float, span: float, spec: DataSpec
) -> dict[str, Particles]:
    return {
        name: clip_features.slice_time(
            offset, min(span, max_seconds(spec, getattr(spec, name).max_seconds) or span)
        )
        for name, clip_features in features.items()
    }


def _read_frames(
    video: Frames, times: np.ndarray, spec: DataSpec, view_or_rng: ViewOrRng, may_flip: bool
) -> np.ndarray:
    is_random = isinstance(view_or_rng, np.random.Generator)
    height, width = video.size
    left, top, right, bottom = box = _crop((height, width), spec, view_or_rng)
    flip = bool(
        is_random
        and spec.augment.hflip_prob
        and view_or_rng.random() < spec.augment.hflip_prob
        and may_flip
    )
    region = Region(
        (left / width, top / height, right / width, bottom / height), spec.image_size, flip
    )
    frames = video.regions_at(times, region)
    if frames is None:
        frames = crop_resize(video.frames_at(times), box, spec.image_size, flip)
    return augment.augment_frames(frames, spec.augment, view_or_rng) if is_random else frames


def _read_sound(
    record: Record,
    spec: DataSpec,
    view_or_rng: ViewOrRng,
    timing: tuple[float, float, float, float],
    cache: FrameCache,
) -> np.ndarray | None:
    origin, start, seconds, duration = timing
    is_random = isinstance(view_or_rng, np.random.Generator)
    if is_random and spec.augment.audio_shift_seconds:
        start = max(0.0, start + view_or_rng.uniform(-1, 1) * spec.augment.audio_shift_seconds)
    seconds = min(seconds, max_seconds(spec, spec.audio.max_seconds))
    sound = cache.read_sound(
        record.video, origin, start, seconds, spec.audio.sample_rate, spec.ram_cache_gib, duration
    )
    if sound is not None and is_random and spec.augment.audio_gain_db:
        sound = augment.random_gain(sound, spec.augment, view_or_rng)
    return sound


def max_seconds(spec: DataSpec, modality_seconds: float) -> float:
    """Maximum seconds of audio, series or features in a row: the modality's max_seconds, else
    clip_seconds.
    """
    return modality_seconds or spec.clip_seconds


def make_particles(
    clip: Clip, data: DataSpec, spec: ParticleSpec, rng: np.random.Generator
) -> dict[str, Particles]:
    """Returns the clip's particles by modality; missing modalities have no entry. Vision is uint8,
    see `pixel_scale`.

    Audio, text and series use the time axis of the frames. If the policy does not use the budget
    itself, a random subset of vision particles is kept.
    """
    particles = {VISION: _vision_particles(clip, spec, rng)} if VISION in data.modalities else {}
    if clip.sound is not None:
        particles[AUDIO] = _audio_particles(clip.sound, data, rng)
    if clip.token_ids is not None and len(clip.token_ids):
        particles[TEXT] = _text_particles(clip.token_ids, clip.seconds)
    if clip.channels is not None and len(clip.channels) >= data.timeseries.patch_length:
        particles[TIMESERIES] = _series_particles(clip.channels, data)
    particles |= clip.features
    return {
        name: modality_particles
        for name, modality_particles in particles.items()
        if len(modality_particles.segment)
    }


def _vision_particles(clip: Clip, spec: ParticleSpec, rng: np.random.Generator) -> Particles:
    return policies.cut_clip(clip.frames, clip.frame_starts, spec, rng)


def pixel_scale(data: DataSpec, spec: ParticleSpec) -> PixelScale:
    """Returns the normalization of vision payloads."""
    return PixelScale(data.image_mean, data.image_std, data.temporal_mean_scale, spec.patch_size[0])


def _audio_particles(sound: np.ndarray, data: DataSpec, rng: np.random.Generator) -> Particles:
    spec = data.audio
    mel = (audio.log_mel(sound, spec) - spec.mean) / spec.std
    if data.augment.specaugment_num_masks:
        mel = augment.mask_bands(mel, data.augment, rng, 0.0)
    times = (np.arange(len(mel)) * spec.hop_seconds).astype(np.float32)
    patch_size = (spec.patch_size[0], spec.patch_size[1], 1)
    if len(mel) < patch_size[0]:  # shorter than a patch: pad with silence
        silence = (np.log(1e-6) - spec.mean) / spec.std
        mel = np.pad(mel, ((0, patch_size[0] - len(mel)), (0, 0)), constant_values=silence).astype(
            np.float32
        )
        times = (np.arange(len(mel)) * spec.hop_seconds).astype(np.float32)
    return cuboids.cut_cuboids(
        mel[:, :, None, None], times, cuboids.Tube(patch_size, patch_size), patch_size
    )


def _series_particles(channels: np.ndarray, data: DataSpec) -> Particles:
    patch_size = (data.timeseries.patch_length, 1, 1)
    times = (np.arange(len(channels)) / data.timeseries.sample_rate).astype(np.float32)
    particles = cuboids.cut_cuboids(
        channels[:, None, None, :], times, cuboids.Tube(patch_size, patch_size), patch_size
    )
    whole = np.isfinite(particles.payload).all(axis=-1)  # NaN: values are missing
    return particles if whole.all() else particles.take(np.flatnonzero(whole))


def _text_particles(ids: np.ndarray, seconds: float) -> Particles:
    """Returns tokens that cover the whole clip in time, with their index on the row axis."""
    n = len(ids)
    row = (np.arange(n) + 0.5) / n
    place = np.stack([np.full(n, seconds / 2), row, np.full(n, 0.5)], axis=-1).astype(np.float32)
    extent = np.broadcast_to(np.array([seconds, 1 / n, 1.0], np.float32), (n, 3))
    return Particles(ids[:, None].astype(np.int32), place, extent, np.ones(n, np.int32))


def sample_times(
    length: float, frame_seconds: float, spec: DataSpec, view_or_rng: ViewOrRng
) -> tuple[float, np.ndarray, float]:
    """Returns start of the span, frame times from there, and length of the span, in seconds;
    `frame_seconds` is the duration of a frame of the file.
    """
    is_random = isinstance(view_or_rng, np.random.Generator)
    if spec.frame_sampling == "dense":
        low, high = spec.frame_stride
        stride = (
            int(view_or_rng.integers(low, high + 1)) if is_random else round((low * high) ** 0.5)
        )
        span = spec.num_frames * stride * frame_seconds
    else:
        span = spec.clip_seconds or length
    if is_random and spec.augment.speed_range != (1.0, 1.0):
        span *= float(np.exp(view_or_rng.uniform(*np.log(spec.augment.speed_range))))
    slack = max(length - span, 0.0)
    start = (
        view_or_rng.uniform(0, slack)
        if is_random
        else slack * (view_or_rng.time_index + 0.5) / view_or_rng.num_times
    )
    phase: float | np.ndarray = 0.5
    if is_random and spec.frame_sampling != "dense":
        phase = view_or_rng.uniform(
            0.1, 0.9, spec.num_frames if spec.frame_sampling == "segment" else None
        )
    return start, (np.arange(spec.num_frames) + phase) * (span / spec.num_frames), span


def _crop(size: tuple[int, int], spec: DataSpec, view_or_rng: ViewOrRng) -> tuple[float, ...]:
    """Returns the crop box: left, top, right, bottom in pixels."""
    height, width = size
    if isinstance(view_or_rng, View):
        side, position = (
            min(size),
            view_or_rng.crop_index / (view_or_rng.num_crops - 1)
            if view_or_rng.num_crops > 1
            else 0.5,
        )
        left, top = (width - side) * position, (height - side) * position
        return left, top, left + side, top + side
    crop_scale = spec.augment.crop_scale
    for _ in range(_MAX_CROP_TRIES):
        area = view_or_rng.uniform(*crop_scale) * min(size) ** 2
        aspect = np.exp(view_or_rng.uniform(-1, 1) * np.log(_ASPECT)) if crop_scale[0] < 1 else 1.0
        crop_width, crop_height = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        left, top = (
            view_or_rng.uniform(0, max(width - crop_width, 0)),
            view_or_rng.uniform(0, max(height - crop_height, 0)),
        )
        if crop_width <= width and crop_height <= height:
            return left, top, left + crop_width, top + crop_height
    return _crop(size, spec, CENTER_VIEW)


def crop_resize(
    frames: np.ndarray, box: tuple[float, ...], size: int, flip: bool = False
) -> np.ndarray:
    """Crops `box` (left, top, right, bottom in pixels) from frames uint8 [T, H, W, 3] and resizes
    it to [T, size, size, 3].

    Identical to Pillow's antialiased bilinear resize. Small frames are resized together, one axis
    after the other, because the cost is per call.
    """
    if box == (0, 0, size, size) and frames.shape[1:3] == (size, size):
        return frames[:, :, ::-1] if flip else frames
    if size > _MAX_BATCHED_RESIZE:
        images = (
            Image.fromarray(np.ascontiguousarray(frame)).resize((size, size), _BILINEAR, box=box)
            for frame in frames
        )
        return np.stack([np.asarray(image.transpose(_FLIP) if flip else image) for image in images])
    left, top, right, bottom = box
    resized = _resize_columns(frames, left, right, size, flip)
    return _resize_columns(resized.swapaxes(1, 2), top, bottom, size).swapaxes(1, 2)


def _resize_columns(
    frames: np.ndarray, start: float, stop: float, size: int, flip: bool = False
) -> np.ndarray:
    """Resizes columns start..stop of frames [T, H, W, 3] to `size` columns."""
    count, height, width, _ = frames.shape
    stacked = Image.fromarray(np.ascontiguousarray(frames).reshape(count * height, width, 3))
    resized = stacked.resize(
        (size, count * height), _BILINEAR, box=(start, 0, stop, count * height)
    )
    return np.asarray(resized.transpose(_FLIP) if flip else resized).reshape(count, height, size, 3)
