# SPDX-License-Identifier: Apache-2.0
"""What a source holds: every file decoded once, each clip's size, rate, length and sound noted,
look-alikes found.

Legend: N clips, B bytes of a fingerprint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from particlejax.data.sources.records import Record
from particlejax.data.video.decode import Unreadable, Video, open_file

_SHORT = 64  # pixels of the short side that frames are decoded at
_MOMENTS = 4  # frames of a fingerprint
_SIDE = 8  # its rows and columns of differences
# share of bits that two prints of one scene may differ in; unrelated ones differ in about half
_ALIKE = 0.08
# a print with fewer set or unset bits than this shows next to nothing, and would be like any other
# such
_FLAT = 0.1


@dataclass(frozen=True)
class Seen:
    """One clip: width and height in pixels, seconds, frames per second, frames of it that decode, a
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


Found = Seen | tuple[str, str]  # or the clip's name and the reason for which it cannot be read


def seconds(file: str | bytes) -> float:
    """How long a file is, without decoding more than its first frame. Raises Unreadable."""
    with Video(file) as video:
        return video.duration


def look(records: Sequence[Record]) -> list[Found]:
    """Decodes a file once for all these clips of it, holding a frame at a time. Raises
    Unreadable.
    """
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
    """Where a clip ends, in seconds, or the reason for which there is none of it."""
    try:
        return float(record.until(duration))
    except Unreadable as error:
        return error.reason


def _between(times: np.ndarray, record: Record) -> int:
    """How many frames begin within a clip."""
    last = len(times) if record.end is None else np.searchsorted(times, record.end)
    return int(last - np.searchsorted(times, record.start))


def _shown_at(video: Video, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The frames on display at moments (seconds, ascending), small and grey, and the times of all
    frames.
    """
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
    """Signs of brightness differences between neighbours in small grey pictures (dHash), packed."""
    return np.packbits(np.diff(small, axis=-1) > 0)


def look_alikes(prints: np.ndarray, split: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of clips of different splits whose prints [N, B] nearly agree: the same scene on both
    sides of a split.
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
