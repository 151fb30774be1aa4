# SPDX-License-Identifier: Apache-2.0
"""Summarizes a source: decodes every file once, records size, frame rate, length and audio, and
finds near-duplicates.

Legend: N clips, B bytes of a fingerprint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from particlejax.data.sources.records import Record
from particlejax.data.video.decode import Unreadable, Video, open_file

_SHORT_SIDE = 64  # short side of decoded frames, in pixels
_NUM_FRAMES = 4  # frames per fingerprint
_FINGERPRINT_SIDE = 8  # rows and columns of a frame's differences
# maximum fraction of different bits between near-duplicates; unrelated clips differ in about half
_MAX_BIT_DISTANCE = 0.08
# fingerprints with a smaller fraction of set or unset bits are nearly uniform and not compared
_MIN_SET_FRACTION = 0.1


@dataclass(frozen=True)
class ClipInfo:
    """One clip: width and height in pixels, seconds, frames per second, number of decoded frames,
    fingerprint [B].
    """

    name: str
    label: int
    width: int
    height: int
    seconds: float
    fps: float
    frames: int
    audio: bool
    captioned: bool
    fingerprint: np.ndarray


InspectionResult = ClipInfo | tuple[str, str]  # or the clip's name and why it is unreadable


def duration(file: str | bytes) -> float:
    """Returns the duration of a file by decoding at most its first frame. Raises Unreadable."""
    with Video(file) as video:
        return video.duration


def inspect_file(records: Sequence[Record]) -> list[InspectionResult]:
    """Decodes a file once for all these clips of it, one frame at a time. Raises Unreadable."""
    file = records[0].video
    sound = _has_sound(file)
    with Video(file) as video:
        ends = [_end(record, video.duration) for record in records]
        spans = [
            (record.start, end)
            for record, end in zip(records, ends, strict=True)
            if isinstance(end, float)
        ]
        spans = np.array(spans).reshape(-1, 2)
        frame_times = spans[:, :1] + (np.arange(_NUM_FRAMES) + 0.5) / _NUM_FRAMES * (
            spans[:, 1:] - spans[:, :1]
        )
        order = np.argsort(frame_times, axis=None, kind="stable")
        frames, times = _frames_at(video, frame_times.reshape(-1)[order])
        fingerprints = iter(
            frames[np.argsort(order)].reshape(
                -1, _NUM_FRAMES, _FINGERPRINT_SIDE, _FINGERPRINT_SIDE + 1
            )
        )
        return [
            (record.name, end)
            if isinstance(end, str)
            else ClipInfo(
                record.name,
                record.label,
                video.width,
                video.height,
                end - record.start,
                video.fps,
                _count_frames(times, record),
                sound,
                bool(record.caption),
                _fingerprint(next(fingerprints)),
            )
            for record, end in zip(records, ends, strict=True)
        ]


def _end(record: Record, duration: float) -> float | str:
    """Returns the end of a clip in seconds, or the reason why it is empty."""
    try:
        return float(record.until(duration))
    except Unreadable as error:
        return error.reason


def _count_frames(times: np.ndarray, record: Record) -> int:
    """Returns the number of frames that start within a clip."""
    last = len(times) if record.end is None else np.searchsorted(times, record.end)
    return int(last - np.searchsorted(times, record.start))


def _frames_at(video: Video, frame_times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns small gray frames at ascending moments (seconds), and the times of all frames."""
    frames: list[np.ndarray] = []
    times: list[float] = []
    previous = None
    for frame, time in video.iter_frames(_SHORT_SIDE):
        while len(frames) < len(frame_times) and frame_times[len(frames)] < time:
            frames.append(_small_gray(previous))
        previous = frame
        times.append(time)
    return np.array(
        frames + [_small_gray(previous)] * (len(frame_times) - len(frames))
    ), np.asarray(times)


def _has_sound(file: str | bytes) -> bool:
    with open_file(file) as container:
        return any(stream.codec_context is not None for stream in container.streams.audio)


def _small_gray(frame: np.ndarray) -> np.ndarray:
    gray = Image.fromarray(frame).convert("L")
    return np.asarray(
        gray.resize((_FINGERPRINT_SIDE + 1, _FINGERPRINT_SIDE), Image.Resampling.BOX), int
    )


def _fingerprint(small: np.ndarray) -> np.ndarray:
    """Packs the signs of brightness differences between neighbors in small gray frames (dHash)."""
    return np.packbits(np.diff(small, axis=-1) > 0)


def near_duplicates(fingerprints: np.ndarray, split: Sequence[str]) -> list[tuple[int, int]]:
    """Returns pairs of clips in different splits whose fingerprints [N, B] nearly agree:
    near-duplicates.
    """
    fingerprints, split = np.asarray(fingerprints), np.asarray(split)
    set_fraction = np.unpackbits(fingerprints, axis=1).mean(axis=1)
    informative = (set_fraction > _MIN_SET_FRACTION) & (set_fraction < 1 - _MIN_SET_FRACTION)
    pairs = []
    for i in range(len(fingerprints) - 1):
        if informative[i]:
            bit_distance = np.bitwise_count(fingerprints[i + 1 :] ^ fingerprints[i]).sum(axis=1) / (
                8 * fingerprints.shape[1]
            )
            matches = np.flatnonzero(
                (bit_distance <= _MAX_BIT_DISTANCE)
                & (split[i + 1 :] != split[i])
                & informative[i + 1 :]
            )
            pairs += [(i, i + 1 + int(j)) for j in matches]
    return pairs
