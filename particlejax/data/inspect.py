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

_SHORT = 64  # short side of decoded frames, in pixels
_MOMENTS = 4  # frames per fingerprint
_SIDE = 8  # rows and columns of a frame's differences
# maximum fraction of different bits between near-duplicates; unrelated clips differ in about half
_ALIKE = 0.08
# fingerprints with a smaller fraction of set or unset bits are nearly uniform and not compared
_FLAT = 0.1


@dataclass(frozen=True)
class Seen:
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
    print: np.ndarray


Found = Seen | tuple[str, str]  # or the clip's name and why it is unreadable


def seconds(file: str | bytes) -> float:
    """Returns the duration of a file by decoding at most its first frame. Raises Unreadable."""
    with Video(file) as video:
        return video.duration


def look(records: Sequence[Record]) -> list[Found]:
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
        moments = spans[:, :1] + (np.arange(_MOMENTS) + 0.5) / _MOMENTS * (
            spans[:, 1:] - spans[:, :1]
        )
        order = np.argsort(moments, axis=None, kind="stable")
        shown, times = _shown_at(video, moments.reshape(-1)[order])
        prints = iter(shown[np.argsort(order)].reshape(-1, _MOMENTS, _SIDE, _SIDE + 1))
        return [
            (record.name, end)
            if isinstance(end, str)
            else Seen(
                record.name,
                record.label,
                video.width,
                video.height,
                end - record.start,
                video.fps,
                _between(times, record),
                sound,
                bool(record.caption),
                _fingerprint(next(prints)),
            )
            for record, end in zip(records, ends, strict=True)
        ]


def _end(record: Record, duration: float) -> float | str:
    """Returns the end of a clip in seconds, or the reason why it is empty."""
    try:
        return float(record.until(duration))
    except Unreadable as error:
        return error.reason


def _between(times: np.ndarray, record: Record) -> int:
    """Returns the number of frames that start within a clip."""
    last = len(times) if record.end is None else np.searchsorted(times, record.end)
    return int(last - np.searchsorted(times, record.start))


def _shown_at(video: Video, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns small gray frames at ascending moments (seconds), and the times of all frames."""
    found: list[np.ndarray] = []
    times: list[float] = []
    before = None
    for picture, time in video.each(_SHORT):
        while len(found) < len(moments) and moments[len(found)] < time:
            found.append(_small(before))
        before = picture
        times.append(time)
    return np.array(found + [_small(before)] * (len(moments) - len(found))), np.asarray(times)


def _has_sound(file: str | bytes) -> bool:
    with open_file(file) as container:
        return any(stream.codec_context is not None for stream in container.streams.audio)


def _small(picture: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(picture).convert("L")
    return np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), int)


def _fingerprint(small: np.ndarray) -> np.ndarray:
    """Packs the signs of brightness differences between neighbors in small gray frames (dHash)."""
    return np.packbits(np.diff(small, axis=-1) > 0)


def look_alikes(prints: np.ndarray, split: Sequence[str]) -> list[tuple[int, int]]:
    """Returns pairs of clips in different splits whose fingerprints [N, B] nearly agree:
    near-duplicates.
    """
    prints, split = np.asarray(prints), np.asarray(split)
    share = np.unpackbits(prints, axis=1).mean(axis=1)
    telling = (share > _FLAT) & (share < 1 - _FLAT)
    pairs = []
    for i in range(len(prints) - 1):
        if telling[i]:
            differing = np.bitwise_count(prints[i + 1 :] ^ prints[i]).sum(axis=1) / (
                8 * prints.shape[1]
            )
            near = np.flatnonzero(
                (differing <= _ALIKE) & (split[i + 1 :] != split[i]) & telling[i + 1 :]
            )
            pairs += [(i, i + 1 + int(j)) for j in near]
    return pairs
