# SPDX-License-Identifier: Apache-2.0
"""What a source holds: every clip decoded once, its size, rate, length and sound noted, look-alikes found.

Legend: N clips, B bytes of a fingerprint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from particlejax.data.decode import Video, open_file
from particlejax.data.sources import Record

_MOMENTS = 4  # frames of a fingerprint
_SIDE = 8  # its rows and columns of differences
_ALIKE = 0.08  # share of bits that two prints of one scene may differ in; unrelated ones differ in about half
_FLAT = 0.1  # a print with fewer set or unset bits than this shows next to nothing, and would be like any other such


@dataclass(frozen=True)
class Seen:
    """One clip: width and height in pixels, seconds, frames per second, frames that decode, and a fingerprint [B]."""

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


def look(record: Record) -> Seen:
    """Decodes all of a clip. Raises Unreadable."""
    with Video(record.video) as video:
        frames, _ = video.read_all(64)
        start, end = record.start, record.until(video.duration)
        moments = start + (np.arange(_MOMENTS) + 0.5) / _MOMENTS * (end - start)
        pictures = frames[np.clip((moments * video.fps).astype(int), 0, len(frames) - 1)]
        return Seen(record.name, record.label, video.width, video.height, end - start, video.fps, len(frames),
                    _has_sound(record.video), bool(record.caption), _fingerprint(pictures))


def _has_sound(file: str | bytes) -> bool:
    with open_file(file) as container:
        return any(stream.codec_context is not None for stream in container.streams.audio)


def _fingerprint(pictures: np.ndarray) -> np.ndarray:
    """Signs of brightness differences between neighbours in small grey pictures (dHash), packed."""
    small = [np.asarray(Image.fromarray(p).convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), int) for p in pictures]
    return np.packbits(np.diff(np.stack(small), axis=-1) > 0)


def look_alikes(prints: np.ndarray, split: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of clips of different splits whose prints [N, B] nearly agree: the same scene on both sides of a split."""
    prints, split = np.asarray(prints), np.asarray(split)
    share = np.unpackbits(prints, axis=1).mean(axis=1)
    telling = (share > _FLAT) & (share < 1 - _FLAT)
    pairs = []
    for i in range(len(prints) - 1):
        if telling[i]:
            differing = np.bitwise_count(prints[i + 1 :] ^ prints[i]).sum(axis=1) / (8 * prints.shape[1])
            near = np.flatnonzero((differing <= _ALIKE) & (split[i + 1 :] != split[i]) & telling[i + 1 :])
            pairs += [(i, i + 1 + int(j)) for j in near]
    return pairs
