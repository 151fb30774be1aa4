# SPDX-License-Identifier: Apache-2.0
"""Opens video files: selects the video stream, reads its frame rate and duration, and names the
reason if there is none.
"""

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, ParamSpec, TypeVar

import av
import numpy as np
from av.stream import Disposition

from particlejax.data.video import continuous_clock, diagnose
from particlejax.data.video.continuous_clock import ContinuousClock

MP4 = "mov,mp4,m4a,3gp,3g2,mj2"  # FFmpeg's name of the demuxer
# maximum reordering of packets; H.264 and HEVC reorder by at most 16
REORDER = 32
NO_RATE = 25.0  # default frames per second
_TAIL_SECONDS = 10.0  # seconds before the end to search for the last packet
# Where a long file is searched for restarts of its clock, as fractions of its bytes: evenly, and
# closer to the start, because a short recording may stand before a long one.
_SAMPLED_PLACES = np.union1d(np.linspace(0, 0.97, 17), 0.5 ** np.arange(5, 13))
_MAX_GAP_RATIO = 4.0  # a gap this many times longer than usual between samples may be a jump
# no network access, for example by a playlist with a video's file name
_IO = {"protocol_whitelist": "file"}
_IMAGE_DEMUXERS = ("_pipe", "image2")  # suffixes of demuxers for still images
_MAX_TIMELINES = 4096  # that are kept
_timelines: dict[object, "Timeline"] = {}  # of the latest files, per process
P, T = ParamSpec("P"), TypeVar("T")


class Unreadable(Exception):
    """A clip that cannot be decoded. `reason` is a short description.

    missing, empty file, a folder, not a media file, only a picture, no video stream, no frames,
    encrypted, truncated: ..., damaged: ... Still images and audio with cover art are 'only a
    picture', although FFmpeg can decode them.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def open_file(source: str | bytes) -> av.container.InputContainer:
    """Opens the container of a path or of a file's bytes. Raises Unreadable with the reason."""
    try:
        if not (len(source) if isinstance(source, bytes) else os.stat(source).st_size):
            raise Unreadable("empty file")
        # An absolute path, because FFmpeg reads a prefix before a colon as a protocol.
        return av.open(
            io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source),
            options=_IO,
        )
    except FileNotFoundError:
        raise Unreadable("missing") from None
    except PermissionError:
        raise Unreadable("no permission to read it") from None
    except IsADirectoryError:
        raise Unreadable("a folder, not a file") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Unreadable(diagnose.open_failure_reason(source, error)) from None


def video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """Returns the video stream, ready for decoding, ignoring cover art. Raises Unreadable."""
    streams = container.streams.video
    films = [s for s in streams if not s.disposition & Disposition.attached_pic]  # cover art
    if streams and not films or container.format.name.endswith(_IMAGE_DEMUXERS):
        raise Unreadable("only a picture")
    if not films:
        raise Unreadable("no video stream")
    best = container.streams.best("video")
    stream = best if best in films else films[0]
    if stream.codec_context is None:
        raise Unreadable("no decoder for its codec")
    # the pipeline runs a decoder per core already
    stream.thread_count, stream.thread_type = (1, "NONE")
    return stream


def empty_reason(stream: av.video.stream.VideoStream) -> str:
    """Returns the reason why a stream has no packets, from the container's metadata."""
    container = stream.container
    if not (
        stream.frames or stream.duration or (len(container.streams) == 1 and container.duration)
    ):
        return "no frames"
    if container.format.name == MP4 and not len(stream.index_entries):
        return "damaged: its index names no frame"
    return "truncated: it ends before its first frame"


def frame_rate(stream: av.video.stream.VideoStream) -> float:
    """Returns nominal frames per second."""
    return float(stream.average_rate or stream.guessed_rate or stream.base_rate or NO_RATE)


def stated_duration(stream: av.video.stream.VideoStream) -> float | None:
    """Returns seconds from the start of the first frame to the end of the last; None for containers
    that do not state it.
    """
    # In these containers, the muxer writes the duration of each stream; elsewhere FFmpeg estimates
    # it from the bit rate, or it is the audio's.
    if stream.duration and stream.container.format.name in (MP4, "avi", "gif"):
        frame = 1 / frame_rate(stream)
        return max(stream.duration * float(stream.time_base), index_length(stream) + frame)
    return None


def index_length(stream: av.video.stream.VideoStream) -> float:
    """Returns seconds from the first to the last index entry; some muxers omit the last frame's
    duration.

    Entries are in decoding order, so the first and last frames shown are near the ends; an hour has
    100,000 entries.
    """
    count = len(stream.index_entries)
    head, tail = (
        _first_timestamps(stream, range(count)),
        _first_timestamps(stream, range(count - 1, -1, -1)),
    )
    return (max(tail) - min(head)) * float(stream.time_base) if head else 0.0


def _first_timestamps(stream: av.video.stream.VideoStream, order: Sequence[int]) -> list[int]:
    """Returns the timestamps of the first entries in this order that belong to a frame."""
    entries = map(stream.index_entries.__getitem__, order)
    return list(islice((entry.timestamp for entry in entries if not entry.is_discard), 2 * REORDER))


class Timeline(NamedTuple):
    """end: of the last frame in seconds, on the container's clock made continuous. restarts:
    whether that clock restarts or jumps.
    """

    end: float
    restarts: bool


def timeline(source: str | bytes) -> Timeline:
    """Returns the timeline of a file's video stream, from packets alone. Raises Unreadable."""
    if isinstance(source, bytes):
        key = hash(source)  # Python keeps it with the bytes
    else:
        status = os.stat(source)
        key = (os.path.abspath(source), status.st_size, status.st_mtime_ns)
    found = _timelines.get(key)
    if found is None:
        if len(_timelines) >= _MAX_TIMELINES:
            _timelines.clear()
        found = _timelines[key] = _read_timeline(source)
    return found


def _read_timeline(source: str | bytes) -> Timeline:
    with open_file(source) as container:
        stream, length = video_stream(container), (container.duration or 0) / av.time_base
        if length <= 2 * _TAIL_SECONDS:
            return _whole_timeline(container, stream)
        may_restart = continuous_clock.may_restart(container)
        if not (may_restart and _seems_to_restart(container, stream, source)):
            end = _packets_end(_last_packets(container, stream, length), stream)
            if end is not None:
                return Timeline(end, False)
    with open_file(source) as container:
        return _whole_timeline(container, video_stream(container))


def _whole_timeline(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> Timeline:
    clock, packets = ContinuousClock(), container.demux(stream)
    if continuous_clock.may_restart(container):
        packets = clock.packets(container, stream)
    end = _packets_end(packets, stream) or 0.0
    return Timeline(end, clock.num_jumps > 0)


def _seems_to_restart(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, source: str | bytes
) -> bool:
    """Whether timestamps, sampled over the file, decrease or jump."""
    size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
    places, times = [], []
    for place in _SAMPLED_PLACES:
        try:
            container.seek(int(place * size), unsupported_byte_offset=True)
            stamps = (packet.dts for packet in container.demux(stream) if packet.dts is not None)
            stamp = next(stamps, None)
        except av.FFmpegError:
            continue
        if stamp is not None:
            places.append(place)
            times.append(stamp * float(stream.time_base))
    gaps = np.diff(times)
    if len(gaps) < 2:
        return False
    usual = np.median(gaps / np.diff(places)) * np.diff(places)
    limit = _MAX_GAP_RATIO * usual + continuous_clock.MAX_FORWARD
    return bool((gaps < 0).any() or (gaps > limit).any())


def _last_packets(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, length: float
) -> Iterator[av.Packet]:
    container.seek(int((length - _TAIL_SECONDS) * av.time_base) + (container.start_time or 0))
    yield from container.demux(stream)


def _packets_end(packets: Iterator[av.Packet], stream: av.video.stream.VideoStream) -> float | None:
    end, tick, frame = None, float(stream.time_base), 1 / frame_rate(stream)
    # a truncated file: keep the packets before the error
    try:
        for packet in packets:
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None:
                end = max(
                    end or 0.0,
                    stamp * tick + (packet.duration * tick if packet.duration else frame),
                )
    except av.FFmpegError:
        pass
    return end


def named_errors(fn: Callable[P, T]) -> Callable[P, T]:
    """Decorator: whatever a decoder raises becomes Unreadable, because one file must not end a run.

    PyAV raises ValueError, IndexError, MemoryError and others beside av.FFmpegError.
    """

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return fn(*args, **kwargs)
        except Unreadable:
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise Unreadable(f"damaged: {type(error).__name__}: {reason}") from error

    return call
