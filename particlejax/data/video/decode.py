# SPDX-License-Identifier: Apache-2.0
"""Exact frames of a video file by presentation time: seek if it saves work, decode forward, convert
the selected frames.

Frames are uint8 [T, H, W, 3] (RGB), times are seconds from the presentation of the first frame.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import dropwhile
from typing import NamedTuple, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from particlejax.data.video import container as opening
from particlejax.data.video import continuous_clock
from particlejax.data.video.container import Unreadable, named_errors, open_file
from particlejax.data.video.continuous_clock import ContinuousClock
from particlejax.data.video.frame_ops import (
    Region,
    RegionExtractor,
    display_matrix,
    pixels,
    resized_size,
    square_pixel_size,
    upright,
)
from particlejax.data.video.packet_lookahead import PacketLookahead

# Verified against decoding from the start. AVI and MPEG program streams lack presentation times, so
# frames after a seek may be off by one: these and all other containers are read from the start.
_SEEKABLE = frozenset({opening.MP4, "matroska,webm", "mpegts"})
_SEEK_GAIN = 0.5  # seconds of decoding that a seek must save: it resets the decoder
_UNINDEXED_SEEK_GAIN = 4.0  # the same if keyframes are unknown: longer than most GOPs
# seconds to seek before the requested time; in MPEG-TS a seek may land after it
_SEEK_RETRIES = (0.0, 2.0, 8.0)
# Codecs whose decoders skip non-reference frames exactly; others decode every frame.
_FRAME_DROPPING_CODECS = frozenset({"h264", "hevc"})


class _TimedFrame(NamedTuple):
    time: float  # seconds on the container's clock
    frame: av.VideoFrame | None


_NOT_DECODED = _TimedFrame(0.0, None)  # placeholder of a frame that is not decoded yet


class Video:
    """An open video: `with Video(path_or_bytes) as video: frames, times = video.frames_at([0.0,
    1.5], 224)`.

    fps: nominal frames per second. width, height: of the displayed frame, upright and with square
    pixels. Only MP4, Matroska and MPEG-TS support seeking; other containers (AVI, FLV, MPEG, ...)
    are decoded from the start to the last requested frame, and so are files whose clock restarts.
    slow_reasons: a list to which explanations of slow decoding are added, for another thread that
    waits. Raises Unreadable if no frame can be decoded.
    """

    @named_errors
    def __init__(self, source: str | bytes, slow_reasons: list[str] | None = None) -> None:
        self._source = source
        self._slow_reasons = [] if slow_reasons is None else slow_reasons
        self._container: av.container.InputContainer | None = None
        self._error_reason = ""
        self._wanted_times: np.ndarray | None = (
            None  # ascending, on the container's clock; other frames may be skipped
        )
        self._interlaced = False  # interlaced frames may be two packets, so none is skipped
        self._scaler = VideoReformatter()
        self._restarts = False  # whether the container's clock does, so that no time can be sought
        self._rewind()
        first = self._current
        self._interlaced = first.frame.interlaced_frame
        self._can_drop &= not self._interlaced
        self._start = first.time
        self._display_matrix = display_matrix(first.frame)
        aspect = float(self._stream.sample_aspect_ratio or 1) or 1.0
        self._size = square_pixel_size(first.frame.width, first.frame.height, aspect)
        self.fps = opening.frame_rate(self._stream)
        is_transposed = abs(self._display_matrix[0, 1]) > abs(self._display_matrix[0, 0])
        self.width, self.height = self._size[::-1] if is_transposed else self._size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; the object cannot be used afterwards."""
        if self._container is not None:
            self._container.close()
            self._container = None

    @property
    def origin(self) -> float:
        """Presentation time of the first frame on the container's clock, in seconds; other tracks
        share it.
        """
        return self._start

    @cached_property
    @named_errors
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last, as stated by the
        container or its packets.
        """
        stated = opening.stated_duration(self._stream)
        return stated or max(self._timeline.end - self._start, 1 / self.fps)

    @cached_property
    def _timeline(self) -> opening.Timeline:
        return opening.timeline(self._source)

    @property
    def tolerance(self) -> float:
        """Seconds by which a requested time may precede its frame (see `frames_at`)."""
        return min(self._tick / 2, 5e-4)

    @named_errors
    def frames_at(
        self, times: Sequence[float], short_side: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the frames on display at `times` (seconds, any order), uint8 [T, H, W, 3], and
        their own times, float32 [T].

        A frame is on display from its presentation time until the next one's. Earlier times get the
        first frame, later times the last. `short_side`: pixels of the shorter side; the longer side
        keeps the aspect ratio and is even; None: native size. A requested time may precede its
        frame by half a tick of the container's clock (at most 0.5 ms), so k / fps selects frame k
        although Matroska rounds timestamps.
        """
        size = resized_size(self._size, short_side)
        frames, timestamps = self._frames_at(times, lambda frame: self._convert(frame, size))
        return self._stack(frames, size), timestamps

    @named_errors
    def regions_at(self, times: Sequence[float], region: Region) -> tuple[np.ndarray, np.ndarray]:
        """Returns a crop of each frame of `frames_at`, uint8 [T, size, size, 3], and their own
        times, float32 [T].

        Cropping, scaling and conversion to RGB are one pass over the crop. Its edges are rounded to
        even pixels.
        """
        frames, timestamps = self._frames_at(times, RegionExtractor(region, self._display_matrix))
        return np.stack(frames), timestamps

    def _frames_at(
        self, times: Sequence[float], convert: Callable[[av.VideoFrame], np.ndarray]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        times = np.asarray(times, np.float64)
        frames: list[np.ndarray] = [None] * len(times)
        timestamps = np.zeros(len(times), np.float32)
        previous = converted = None
        if self._wanted_times is not None:  # frames of this call may have been skipped
            self._wanted_times = None
            self._rewind()
        clock = self._clock(times)
        self._set_wanted(np.sort(clock))
        for i in np.argsort(times, kind="stable"):
            self._seek_to(float(clock[i]))
            if self._current is not previous:
                previous, converted = self._current, convert(self._current.frame)
            frames[i], timestamps[i] = converted, previous.time - self._start
        return frames, timestamps

    def iter_frames(self, short_side: int | None = None) -> Iterator[tuple[np.ndarray, float]]:
        """Yields every frame, uint8 [H, W, 3], and its time in seconds, one at a time."""
        frames = self._iter_frames(short_side)
        next_frame = named_errors(lambda: next(frames, None))
        while (frame_and_time := next_frame()) is not None:
            yield frame_and_time

    def _iter_frames(self, short_side: int | None) -> Iterator[tuple[np.ndarray, float]]:
        self._wanted_times = None
        self._rewind()
        size = resized_size(self._size, short_side)
        while True:
            yield self._convert(self._current.frame, size), self._current.time - self._start
            if not self._advance():
                return

    def read_all(self, short_side: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns all frames: uint8 [T, H, W, 3] and times in seconds, float32 [T]."""
        frames, timestamps = zip(*self.iter_frames(short_side), strict=True)
        return np.stack(frames), np.asarray(timestamps, np.float32)

    def _rewind(self) -> None:
        # Reopening is the only way back to the first frame that works for all containers.
        self.close()
        self._container = open_file(self._source)
        self._stream = opening.video_stream(self._container)
        self._restarts = continuous_clock.may_restart(self._container) and self._timeline.restarts
        self._can_seek = self._container.format.name in _SEEKABLE and not self._restarts
        self._tick = float(self._stream.time_base)
        self._can_drop = (
            self._container.format.name in _SEEKABLE
            and self._stream.codec_context.name in _FRAME_DROPPING_CODECS
        )
        self._can_drop &= not self._interlaced
        self._frames = self._decode()
        first = next(self._frames, None)
        if first is None:
            raise Unreadable(self._error_reason or opening.empty_reason(self._stream))
        self._current, self._next = first, _NOT_DECODED

    def _peek(self) -> _TimedFrame | None:
        """Returns the frame after the displayed one, decoded on demand; None at the end."""
        if self._next is _NOT_DECODED:
            self._next = next(self._frames, None)
        return self._next

    def _advance(self) -> bool:
        if self._peek() is None:
            return False
        self._current, self._next = self._next, _NOT_DECODED
        return True

    def _set_wanted(self, clock: np.ndarray | None) -> None:
        self._wanted_times = clock
        self._lookahead.wanted = clock if self._can_drop else None

    def _decode(self) -> Iterator[_TimedFrame]:
        """Yields frames in presentation order; packets that fail to decode are skipped."""
        tick, step = self._tick, 1 / opening.frame_rate(self._stream)
        decoder, last, skipping, locked = self._stream.codec_context, None, None, False
        self._lookahead = PacketLookahead(
            self._packets(), tick, self._wanted_times if self._can_drop else None
        )
        for packet, is_shown in self._lookahead:
            # keyframes only: the query is as slow as converting a small frame
            if packet is not None and packet.is_keyframe:
                locked = packet.has_sidedata("encryption_info")
            if locked:  # a decoder may return garbage
                self._error_reason = self._error_reason or "encrypted"
                continue
            try:
                if self._can_drop and skipping is not (not is_shown):
                    skipping = not is_shown
                    decoder.skip_frame = "NONREF" if skipping else "DEFAULT"
                frames = decoder.decode(packet)
            except av.FFmpegError as error:
                self._error_reason = self._error_reason or f"damaged: {error.strerror}"
                continue
            for frame in frames:
                timestamp = frame.pts if frame.pts is not None else frame.dts
                if timestamp is not None:
                    time = timestamp * tick
                else:
                    time = 0.0 if last is None else last + step
                # keep times monotonic if the clock jumps back
                last = time if last is None else max(time, last)
                yield _TimedFrame(last, frame)

    def _clock(self, times: np.ndarray) -> np.ndarray:
        """Converts times from the first frame to the container's clock, with the tolerance of
        `frames_at`.
        """
        return self._start + np.maximum(times, 0.0) + self.tolerance

    def _packets(self) -> Iterator[av.Packet | None]:
        # None flushes the decoder
        try:
            if self._restarts:
                yield from ContinuousClock().packets(self._container, self._stream)
            else:
                yield from self._container.demux(self._stream)
        except av.FFmpegError as error:  # a truncated file: keep the frames before the error
            self._error_reason = self._error_reason or f"damaged: {error.strerror}"
            yield None

    def _seek_to(self, wanted_time: float) -> None:
        if self._start < self._current.time > wanted_time:
            self._rewind()
        if wanted_time - self._current.time > _UNINDEXED_SEEK_GAIN and not self._can_seek:
            self._note_slow_container()
        if self._seek_saves(wanted_time) and not any(
            self._try_seek(wanted_time, retry) for retry in _SEEK_RETRIES
        ):
            self._rewind()
        while (next_frame := self._peek()) is not None and next_frame.time <= wanted_time:
            self._advance()

    def _note_slow_container(self) -> None:
        kind = f"{self._container.format.name} files"
        self._slow_reasons.append(
            f"{f'{kind} whose clock restarts' if self._restarts else kind} can only be read from "
            "their start, so convert it to mp4 or raise config.data.decode_timeout_seconds"
        )

    def _seek_saves(self, wanted_time: float) -> bool:
        distance = wanted_time - self._current.time
        if distance < _SEEK_GAIN or not self._can_seek:
            return False
        index, target = self._stream.index_entries, int(wanted_time / self._tick)
        if len(index) == 0 or index[len(index) - 1].timestamp < target:
            return distance > _UNINDEXED_SEEK_GAIN
        keyframe = index.search_timestamp(target)
        saved_seconds = (
            index[keyframe].timestamp * self._tick - self._current.time if keyframe >= 0 else 0.0
        )
        return saved_seconds > _SEEK_GAIN

    def _try_seek(self, wanted_time: float, retry: float) -> bool:
        """Seeks to `retry` seconds before `wanted_time`. Returns whether it found an intact frame
        no later than `wanted_time`.
        """
        target = int((wanted_time - retry) / self._tick)
        try:
            self._container.seek(target, stream=self._stream)
        except av.FFmpegError:
            return False
        # Frames before the first keyframe depend on frames that were not decoded.
        frames = dropwhile(
            lambda timed_frame: not timed_frame.frame.key_frame or timed_frame.frame.is_corrupt,
            self._decode(),
        )
        first = next(frames, None)
        if first is None or first.frame.pts is None or first.time > wanted_time:
            return False
        self._frames, self._current, self._next = frames, first, _NOT_DECODED
        return True

    def _convert(self, frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
        width, height = size
        interpolation = Interpolation.AREA if width < frame.width else Interpolation.BILINEAR
        scaled = self._scaler.reformat(
            frame,
            width,
            height,
            "rgb24",
            interpolation=interpolation,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        return upright(pixels(scaled), self._display_matrix)

    def _stack(self, frames: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
        if frames:
            return np.stack(frames)
        return np.zeros(
            (0, *upright(np.zeros((size[1], size[0], 3), np.uint8), self._display_matrix).shape),
            np.uint8,
        )


def raw_file(frames: np.ndarray, fps: float = opening.NO_RATE) -> bytes:
    """Encodes frames, uint8 [T, H, W, 3], as an uncompressed file that `Video` decodes losslessly,
    at `fps`.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="nut") as container:
        stream = container.add_stream("rawvideo", rate=Fraction(fps).limit_denominator(1001))
        (stream.height, stream.width), stream.pix_fmt = frames.shape[1:3], "rgb24"
        for image in frames:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                )
            )
        container.mux(stream.encode(None))
    return file.getvalue()
