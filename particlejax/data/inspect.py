# SPDX-License-Identifier: Apache-2.0
"""Summarizes a source: decodes every file once, records size, frame rate, length and audio, what
does not fit, and what makes equal and like clips findable.

Legend: N frames.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np

from particlejax.data.fingerprint import (
    NUM_MOMENTS,
    Averages,
    Fingerprint,
    fingerprint,
    small_frame,
)
from particlejax.data.sources.records import Record
from particlejax.data.video.decode import Unreadable, Video, open_file

_SHORT_SIDE = 64  # short side of decoded frames, in pixels
_CHUNK_BYTES = 2**20  # of a file that is hashed
_MAX_STEP_CHANGE = 0.5  # relative change of the time between frames that is no jitter
_MAX_UNEVEN = 0.05  # fraction of such changes at a constant frame rate
_MAX_DURATION_ERROR = 0.05  # relative, and more than two frames
_MAX_RATE_ERROR = 0.1  # relative, and more than two frames
_MIN_GAP = 1.0  # seconds without a frame that are a gap, if longer than five frames


class Problem(NamedTuple):
    """Something in a file that is readable but does not fit. kind: clock, duration, gap, rate,
    size, sound or span.
    """

    kind: str
    text: str


@dataclass(frozen=True, eq=False)
class FileInfo:
    """A file that holds one or more clips. digest: SHA-256 of its bytes. seconds: as announced by
    the container.
    """

    digest: str
    seconds: float
    fingerprint: Fingerprint
    problems: tuple[Problem, ...]


@dataclass(frozen=True, eq=False)
class ClipInfo:
    """One clip: width and height in pixels, start and seconds (its length), frames per second,
    number of decoded frames.

    digest: SHA-256 of the decoded small frames; clips with equal frames have equal digests,
    whatever their container.
    """

    name: str
    label: int
    group: str
    width: int
    height: int
    start: float
    seconds: float
    fps: float
    frames: int
    audio: bool
    captioned: bool
    digest: bytes
    fingerprint: Fingerprint
    file: FileInfo
    problems: tuple[Problem, ...] = ()


InspectionResult = ClipInfo | tuple[str, str]  # or the clip's name and why it is unreadable


def duration(file: str | bytes) -> float:
    """Returns the duration of a file by decoding at most its first frame. Raises Unreadable."""
    with Video(file) as video:
        return video.duration


def inspect_file(records: Sequence[Record]) -> list[InspectionResult]:
    """Decodes a file once for all these clips of it, one frame at a time. Raises Unreadable."""
    file = records[0].video
    sound = _inspect_sound(file)
    with Video(file) as video:
        ends = [_end(record, video.duration) for record in records]
        spans = [
            (record.start, end)
            for record, end in zip(records, ends, strict=True)
            if isinstance(end, float)
        ]
        frames = _decode(video, [*spans, (0.0, video.duration)])
        info = FileInfo(
            digest(file),
            video.duration,
            frames.fingerprint(0.0, video.duration),
            (*_timing(frames.times, video.duration, video.fps), *frames.size_changes, *sound[1]),
        )
        return [
            (record.name, end)
            if isinstance(end, str)
            else _inspect_clip(record, end, video, frames, info, sound[0])
            for record, end in zip(records, ends, strict=True)
        ]


def digest(file: str | bytes) -> str:
    """Returns the SHA-256 of a file's bytes, reading a path in chunks. Raises Unreadable."""
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    sha256 = hashlib.sha256()
    try:
        with open(file, "rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                sha256.update(chunk)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    return sha256.hexdigest()


def _end(record: Record, duration: float) -> float | str:
    """Returns the end of a clip in seconds, or the reason why it is empty."""
    try:
        return float(record.until(duration))
    except Unreadable as error:
        return error.reason


def _inspect_clip(
    record: Record, end: float, video: Video, frames: "_Frames", info: FileInfo, audio: bool
) -> ClipInfo:
    first = int(np.searchsorted(frames.times, record.start))
    last = len(frames.times)
    if record.end is not None:
        last = int(np.searchsorted(frames.times, record.end))
    # a span between two frames shows the one before
    shown = frames.digests[first:last] or frames.digests[max(first - 1, 0) : first]
    is_whole = record.start == 0 and end == video.duration
    return ClipInfo(
        record.name,
        record.label,
        record.group,
        video.width,
        video.height,
        record.start,
        end - record.start,
        video.fps,
        last - first,
        audio,
        bool(record.caption),
        hashlib.sha256(b"".join(shown)).digest(),
        info.fingerprint if is_whole else frames.fingerprint(record.start, end),
        info,
        tuple(_span_problems(record, video, last - first)),
    )


def _span_problems(record: Record, video: Video, num_frames: int) -> Iterator[Problem]:
    if record.end is not None and record.end > video.duration + 1.5 / video.fps:
        yield Problem(
            "span", f"ends at {record.end:g} s, but the file lasts {video.duration:.2f} s"
        )
    if not num_frames:
        yield Problem("span", f"no frame starts after {record.start:g} s and before its end")


# -- frames


class _Frames(NamedTuple):
    """All frames of a file: times float [N] in seconds, a digest of each small frame."""

    times: np.ndarray
    digests: list[bytes]
    averages: Averages
    size_changes: tuple[Problem, ...]

    def fingerprint(self, start: float, end: float) -> Fingerprint:
        moments = _moments(start, end)
        return fingerprint(self.averages.between(moments[:-1], moments[1:]))


def _moments(start: float, end: float) -> np.ndarray:
    return np.linspace(start, end, NUM_MOMENTS + 1)


def _decode(video: Video, spans: Sequence[tuple[float, float]]) -> _Frames:
    """Decodes all frames; fingerprints can be had of the given spans."""
    averages = Averages(np.unique([_moments(start, end) for start, end in spans]))
    times: list[float] = []
    digests: list[bytes] = []
    changes = _Changes("size", "the size changes")
    for frame, time in video.iter_frames(_SHORT_SIDE):
        averages.add(small_frame(frame), time)
        times.append(time)
        digests.append(hashlib.blake2b(frame.tobytes(), digest_size=16).digest())
        # Video scales all frames to one size, and hides that of the stored frame
        stored = video._current.frame
        changes.add(f"{stored.width}x{stored.height}", f" at {time:.2f} s")
    return _Frames(np.asarray(times), digests, averages, changes.problems())


class _Changes:
    """Changes of a stream's format midway."""

    def __init__(self, kind: str, text: str) -> None:
        self._kind, self._text, self._last = kind, text, ""
        self._found: list[str] = []

    def add(self, value: str, place: str = "") -> None:
        if self._last and value != self._last:
            self._found.append(f"from {self._last} to {value}{place}")
        self._last = value

    def problems(self) -> tuple[Problem, ...]:
        if not self._found:
            return ()
        more = f"; {len(self._found)} changes in all" if len(self._found) > 1 else ""
        return (Problem(self._kind, f"{self._text} {self._found[0]}{more}"),)


def _timing(times: np.ndarray, seconds: float, fps: float) -> Iterator[Problem]:
    """Yields what does not fit among the times of all frames [N] in seconds, the announced duration
    and the nominal frame rate.
    """
    steps = np.diff(times)
    repeated = int((steps <= 0).sum())
    if repeated:  # which also makes the frame rate uneven
        yield Problem(
            "clock",
            f"{repeated} frames have no time of their own: its time stamps repeat or restart",
        )
    starts, steps = times[:-1][steps > 0], steps[steps > 0]
    step = float(np.median(steps)) if len(steps) else 1 / fps
    end = float(times[-1]) + step
    if abs(seconds - end) > max(2 * step, 2 / fps, _MAX_DURATION_ERROR * seconds):
        yield Problem("duration", f"announces {seconds:.2f} s, but its frames end at {end:.2f} s")
    if len(steps) and steps.max() > max(_MIN_GAP, 5 * step):
        start = float(starts[steps.argmax()])
        yield Problem("gap", f"no frame between {start:.2f} and {start + steps.max():.2f} s")
    if repeated:
        return
    if len(steps) and (np.abs(steps - step) > _MAX_STEP_CHANGE * step).mean() > _MAX_UNEVEN:
        yield Problem(
            "rate",
            f"variable frame rate: {1000 * steps.min():.0f} to {1000 * steps.max():.0f} ms between "
            "frames",
        )
    elif abs(len(times) - end * fps) > max(2, _MAX_RATE_ERROR * end * fps):
        yield Problem(
            "rate",
            f"{len(times)} frames in {end:.2f} s are {len(times) / end:.3g} frames/s, but it "
            f"announces {fps:.3g}",
        )


# -- sound


def _inspect_sound(file: str | bytes) -> tuple[bool, tuple[Problem, ...]]:
    """Returns whether a file has sound that can be decoded, and changes of its format."""
    with open_file(file) as container:
        streams = [s for s in container.streams.audio if s.codec_context is not None]
        if not streams:
            return False, ()
        best = container.streams.best("audio")
        stream = best if best in streams else streams[0]
        changes = _Changes("sound", "the sound changes")
        for packet in _packets(container, stream):
            for _ in _frames(packet.decode):
                # Not the frame's rate, which is that before a change; and never its layout, because
                # PyAV shares the memory of unusual ones.
                decoder = stream.codec_context
                changes.add(f"{decoder.sample_rate} Hz, {decoder.channels} channels")
        return True, changes.problems()


def _packets(
    container: av.container.InputContainer, stream: av.audio.stream.AudioStream
) -> Iterator[av.Packet]:
    # a truncated file: keep the packets before the error
    try:
        yield from container.demux(stream)
    except av.FFmpegError:
        pass


def _frames(decode: Callable[[], list[av.AudioFrame]]) -> list[av.AudioFrame]:
    try:
        return decode()
    except (av.FFmpegError, ValueError):
        return []
