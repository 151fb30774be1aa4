# SPDX-License-Identifier: Apache-2.0
"""In-memory cache of decoded clips, for data sets of short clips that are read over many epochs."""

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

    size: height and width of frames. parts_at: a crop in one pass, for large clips that are not
    cached; None for others.
    """

    duration: float
    fps: float
    origin: float
    size: tuple[int, int]

    def frames_at(self, times: np.ndarray) -> np.ndarray: ...

    def parts_at(self, times: np.ndarray, part: frame_ops.Part) -> np.ndarray | None: ...


@dataclass(frozen=True)
class _Decoding:
    video: Video
    side: int
    # whether the cache is on; cached and uncached clips must have identical pixels
    whole: bool

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
        return frame_ops.resized((self.video.height, self.video.width), self.side)

    def frames_at(self, times: np.ndarray) -> np.ndarray:
        return self.video.frames_at(times, self.side)[0]

    def parts_at(self, times: np.ndarray, part: frame_ops.Part) -> np.ndarray | None:
        if self.whole or not frame_ops.is_fine(self.video.width, self.video.height):
            return None
        return self.video.parts_at(times, part)[0]


@dataclass(frozen=True)
class _Kept:
    frames: np.ndarray
    times: np.ndarray  # float64, so that `frames_at` selects the decoder's frames
    tolerance: float
    duration: float
    fps: float
    origin: float

    @property
    def size(self) -> tuple[int, int]:
        return self.frames.shape[1:3]

    def parts_at(self, times: np.ndarray, part: frame_ops.Part) -> None:
        del times, part

    def frames_at(self, times: np.ndarray) -> np.ndarray:
        shown = np.searchsorted(self.times, np.asarray(times) + self.tolerance, side="right") - 1
        return self.frames[np.clip(shown, 0, len(self.times) - 1)]


# per process; the first clips that fit stay
_kept: dict[tuple[str | bytes, int], _Kept] = {}
_heard: dict[tuple[str | bytes, int], np.ndarray | None] = {}  # whole audio tracks
_used = 0


@contextmanager
def opened(
    source: str | bytes, side: int, gib: float, whole_frames: bool = False
) -> Iterator[Frames]:
    """Opens a clip with short side `side` pixels; cached in memory if `gib` leaves room for it.

    whole_frames: full-size RGB frames, without cropping or scaling by the decoder. Raises
    decode.Unreadable.
    """
    if gib > 0 and (source, side) in _kept:
        yield _kept[source, side]
        return
    with Video(source) as video:
        if whole_frames:
            yield _Decoding(video, min(video.width, video.height), True)
        elif _room(video, side, gib):
            yield _keep(source, side, video)
        else:
            yield _Decoding(video, side, gib > 0)


def _room(video: Video, side: int, gib: float) -> bool:
    aspect = max(video.width, video.height) / max(min(video.width, video.height), 1)
    return _used + video.duration * video.fps * side * side * aspect * 3 < gib * _GIB


def _keep(source: str | bytes, side: int, video: Video) -> _Kept:
    global _used
    pictures, times = zip(*video.each(side), strict=True)
    frames = np.stack(pictures)
    kept = _Kept(frames, np.array(times), video.tolerance, video.duration, video.fps, video.origin)
    _kept[source, side] = kept
    _used += frames.nbytes
    return kept


def sound(
    source: str | bytes,
    origin: float,
    start: float,
    seconds: float,
    rate: int,
    gib: float,
    whole: float,
) -> np.ndarray | None:
    """`audio.read` with a cache, if `gib` leaves room for the whole track of `whole` seconds."""
    global _used
    key = (source, rate)
    if key not in _heard:
        if _used + whole * rate * 4 >= gib * _GIB:
            return audio.read(source, origin, start, seconds, rate)
        track = _heard[key] = audio.read(source, origin, 0.0, whole, rate)
        _used += 0 if track is None else track.nbytes
    track = _heard[key]
    if track is None:
        return None
    first = max(0, round(start * rate))
    part = track[first : first + audio.samples(seconds, rate)]
    return part if len(part) else None
