# SPDX-License-Identifier: Apache-2.0
"""In-memory cache of decoded clips, for data sets of short clips that are read over many epochs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from particlejax.data.modalities import audio
from particlejax.data.video import frame_ops
from particlejax.data.video.decode import Video

_GIB = 2**30


class Frames(Protocol):
    """A clip that returns the frames on display at any times (seconds), uint8 [T, H, W, 3].

    size: height and width of frames. regions_at: a crop in one pass, for large clips that are not
    cached; None for others.
    """

    duration: float
    fps: float
    origin: float
    size: tuple[int, int]

    def frames_at(self, times: np.ndarray) -> np.ndarray: ...

    def regions_at(self, times: np.ndarray, region: frame_ops.Region) -> np.ndarray | None: ...


@dataclass(frozen=True)
class _DecodedOnDemand:
    video: Video
    side: int
    # whether the cache is on; cached and uncached clips must have identical pixels
    cache_enabled: bool

    @property
    def duration(self) -> float:
        return self.video.duration

    @property
    def fps(self) -> float:
        return self.video.fps

    @property
    def origin(self) -> float:
        return self.video.origin

    @property
    def size(self) -> tuple[int, int]:
        return frame_ops.resized_size((self.video.height, self.video.width), self.side)

    def frames_at(self, times: np.ndarray) -> np.ndarray:
        return self.video.frames_at(times, self.side)[0]

    def regions_at(self, times: np.ndarray, region: frame_ops.Region) -> np.ndarray | None:
        if self.cache_enabled or not frame_ops.is_fine(self.video.width, self.video.height):
            return None
        return self.video.regions_at(times, region)[0]


@dataclass(frozen=True)
class _CachedFrames:
    frames: np.ndarray
    times: np.ndarray  # float64, so that `frames_at` selects the decoder's frames
    tolerance: float
    duration: float
    fps: float
    origin: float

    @property
    def size(self) -> tuple[int, int]:
        return self.frames.shape[1:3]

    def regions_at(self, times: np.ndarray, region: frame_ops.Region) -> None:
        del times, region

    def frames_at(self, times: np.ndarray) -> np.ndarray:
        index = np.searchsorted(self.times, np.asarray(times) + self.tolerance, side="right") - 1
        return self.frames[np.clip(index, 0, len(self.times) - 1)]


class FrameCache:
    """Decoded frames and audio tracks of the first clips that fit in memory.

    Whoever reads batches owns one. A pickled one is empty, so each worker process fills its own.
    """

    def __init__(self) -> None:
        self._frames: dict[tuple[str | bytes, int], _CachedFrames] = {}
        self._sounds: dict[tuple[str | bytes, int], np.ndarray | None] = {}  # whole tracks
        self._used_bytes = 0
        self._lock = threading.Lock()  # threads share it

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return FrameCache, ()

    def __contains__(self, source_and_side: tuple[str | bytes, int]) -> bool:
        return source_and_side in self._frames

    @contextmanager
    def open_frames(
        self,
        source: str | bytes,
        side: int,
        gib: float,
        whole_frames: bool = False,
        slow_reasons: list[str] | None = None,
    ) -> Iterator[Frames]:
        """Opens a clip with short side `side` pixels; cached in memory if `gib` leaves room for it.

        whole_frames: full-size RGB frames, without cropping or scaling by the decoder.
        slow_reasons: see `Video`. Raises decode.Unreadable.
        """
        if gib > 0 and (source, side) in self._frames:
            yield self._frames[source, side]
            return
        with Video(source, slow_reasons) as video:
            if whole_frames:
                yield _DecodedOnDemand(video, min(video.width, video.height), True)
            elif self._fits(video, side, gib):
                yield self._decode_into_cache(source, side, video)
            else:
                yield _DecodedOnDemand(video, side, gib > 0)

    def _fits(self, video: Video, side: int, gib: float) -> bool:
        aspect = max(video.width, video.height) / max(min(video.width, video.height), 1)
        num_bytes = video.duration * video.fps * side * side * aspect * 3
        return self._used_bytes + num_bytes < gib * _GIB

    def _decode_into_cache(self, source: str | bytes, side: int, video: Video) -> _CachedFrames:
        decoded, times = zip(*video.iter_frames(side), strict=True)
        frames = np.stack(decoded)
        cached = _CachedFrames(
            frames, np.array(times), video.tolerance, video.duration, video.fps, video.origin
        )
        with self._lock:
            self._used_bytes += 0 if (source, side) in self._frames else frames.nbytes
            self._frames[source, side] = cached
        return cached

    def read_sound(
        self,
        source: str | bytes,
        origin: float,
        start: float,
        seconds: float,
        rate: int,
        gib: float,
        track_seconds: float,
    ) -> np.ndarray | None:
        """`audio.read` with a cache, if `gib` leaves room for the whole track of `track_seconds`
        seconds.
        """
        key = (source, rate)
        if key not in self._sounds:
            if self._used_bytes + track_seconds * rate * 4 >= gib * _GIB:
                return audio.read(source, origin, start, seconds, rate)
            track = audio.read(source, origin, 0.0, track_seconds, rate)
            with self._lock:
                self._used_bytes += 0 if track is None or key in self._sounds else track.nbytes
                self._sounds[key] = track
        track = self._sounds[key]
        if track is None:
            return None
        first = max(0, round(start * rate))
        samples = track[first : first + audio.num_samples(seconds, rate)]
        return samples if len(samples) else None
