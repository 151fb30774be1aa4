# SPDX-License-Identifier: Apache-2.0
"""Opens video files: selects the video stream, reads its frame rate and duration, and names the
reason if there is none.
"""

import io
import os
from collections.abc import Sequence
from itertools import islice

import av
from av.stream import Disposition

from particlejax.data.video import diagnose

MP4 = "mov,mp4,m4a,3gp,3g2,mj2"  # FFmpeg's name of the demuxer
# maximum reordering of packets; H.264 and HEVC reorder by at most 16
REORDER = 32
NO_RATE = 25.0  # default frames per second
_TAIL_SECONDS = 10.0  # seconds before the end to search for the last packet
# no network access, for example by a playlist with a video's file name
_IO = {"protocol_whitelist": "file"}
_IMAGE_DEMUXERS = ("_pipe", "image2")  # suffixes of demuxers for still images


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


def duration(stream: av.video.stream.VideoStream, source: str | bytes, start: float) -> float:
    """Returns seconds from the start of the first frame, at `start` on the container's clock, to
    the end of the last.
    """
    frame = 1 / frame_rate(stream)
    # In these containers, the muxer writes the duration of each stream; elsewhere FFmpeg estimates
    # it from the bit rate, or it is the audio's.
    if stream.duration and stream.container.format.name in (MP4, "avi", "gif"):
        return max(stream.duration * float(stream.time_base), index_length(stream) + frame)
    return max(_last_end(source, stream.index, 1 / frame) - start, frame)


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


def _last_end(source: str | bytes, index: int, fps: float) -> float:
    """Returns the end of the last frame on the container's clock in seconds, from packets alone."""
    with open_file(source) as container:
        stream = container.streams[index]
        length = (container.duration or 0) / av.time_base
        if length > 2 * _TAIL_SECONDS:
            container.seek(
                int((length - _TAIL_SECONDS) * av.time_base) + (container.start_time or 0)
            )
        end = _packets_end(container, stream, fps)
    if end is not None or length <= 2 * _TAIL_SECONDS:
        return end or 0.0
    with open_file(source) as container:  # no packet of this stream near the end
        return _packets_end(container, container.streams[index], fps) or 0.0


def _packets_end(
    container: av.container.InputContainer, stream: av.stream.Stream, fps: float
) -> float | None:
    end, tick = None, float(stream.time_base)
    # a truncated file: keep the packets before the error
    try:
        for packet in container.demux(stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None:
                end = max(
                    end or 0.0,
                    stamp * tick + (packet.duration * tick if packet.duration else 1 / fps),
                )
    except av.FFmpegError:
        pass
    return end
