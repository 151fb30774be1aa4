# SPDX-License-Identifier: Apache-2.0
"""Exact frames of a video file by presentation time: seek if it saves work, decode forward, convert
the selected frames.

Frames are uint8 [T, H, W, 3] (RGB), times are seconds from the presentation of the first frame.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from fractions import Fraction
from functools import cached_property
from itertools import dropwhile
from typing import NamedTuple, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from particlejax.data.video import container as opening
from particlejax.data.video.container import Unreadable, open_file
from particlejax.data.video.frame_ops import (
    Cutter,
    Part,
    display_matrix,
    pixels,
    resized,
    square,
    upright,
)
from particlejax.data.video.packet_lookahead import Ahead

# Verified against decoding from the start. AVI and MPEG program streams lack presentation times, so
# frames after a seek may be off by one: these and all other containers are read from the start.
_SEEKABLE = frozenset({opening.MP4, "matroska,webm", "mpegts"})
_SEEK_GAIN = 0.5  # seconds of decoding that a seek must save: it resets the decoder
_BLIND_GAIN = 4.0  # the same if keyframes are unknown: longer than most GOPs
# seconds to seek before the requested time; in MPEG-TS a seek may land after it
_RETRIES = (0.0, 2.0, 8.0)
# Codecs whose decoders skip non-reference frames exactly; others decode every frame.
_DROPPING = frozenset({"h264", "hevc"})
# A list for explanations of slow decoding, set by the thread that waits.
excuses: ContextVar[list[str] | None] = ContextVar("excuses", default=None)


class _Timed(NamedTuple):
    time: float  # seconds on the container's clock
    frame: av.VideoFrame | None


_LATER = _Timed(0.0, None)  # placeholder of a frame that is not decoded yet


class Video:
    """An open video: `with Video(path_or_bytes) as video: frames, times = video.frames_at([0.0,
    1.5], 224)`.

    fps: nominal frames per second. width, height: of the displayed frame, upright and with square
    pixels. Only MP4, Matroska and MPEG-TS support seeking; other containers (AVI, FLV, MPEG, ...)
    are decoded from the start to the last requested frame. Raises Unreadable if no frame can be
    decoded.
    """

    def __init__(self, source: str | bytes) -> None:
        self._source = source
        self._container: av.container.InputContainer | None = None
        self._damage = ""
        self._wanted: np.ndarray | None = (
            None  # ascending, on the container's clock; other frames may be skipped
        )
        self._interlaced = False  # interlaced frames may be two packets, so none is skipped
        self._scaler = VideoReformatter()
        self._rewind()
        first = self._shown
        self._interlaced = first.frame.interlaced_frame
        self._drops &= not self._interlaced
        self._start = first.time
        self._turn = display_matrix(first.frame)
        aspect = float(self._stream.sample_aspect_ratio or 1) or 1.0
        self._size = square(first.frame.width, first.frame.height, aspect)
        self.fps = opening.rate(self._stream)
        turned = abs(self._turn[0, 1]) > abs(self._turn[0, 0])
        self.width, self.height = self._size[::-1] if turned else self._size

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
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last, as announced by the
        container.
        """
        return opening.length(self._stream, self._source, self._start)

    @property
    def tolerance(self) -> float:
        """Seconds by which a requested time may precede its frame (see `frames_at`)."""
        return min(self._tick / 2, 5e-4)

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
        size = resized(self._size, short_side)
        pictures, stamps = self._at(times, lambda frame: self._convert(frame, size))
        return self._stack(pictures, size), stamps

    def parts_at(self, times: Sequence[float], part: Part) -> tuple[np.ndarray, np.ndarray]:
        """Returns a crop of each frame of `frames_at`, uint8 [T, size, size, 3], and their own
        times, float32 [T].

        Cropping, scaling and conversion to RGB are one pass over the crop. Its edges are rounded to
        even pixels.
        """
        pictures, stamps = self._at(times, Cutter(part, self._turn))
        return np.stack(pictures), stamps

    def _at(
        self, times: Sequence[float], convert: Callable[[av.VideoFrame], np.ndarray]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        times = np.asarray(times, np.float64)
        pictures: list[np.ndarray] = [None] * len(times)
        stamps = np.zeros(len(times), np.float32)
        before = picture = None
        if self._wanted is not None:  # frames of this call may have been skipped
            self._wanted = None
            self._rewind()
        clock = self._clock(times)
        self._want(np.sort(clock))
        for i in np.argsort(times, kind="stable"):
            self._show(float(clock[i]))
            if self._shown is not before:
                before, picture = self._shown, convert(self._shown.frame)
            pictures[i], stamps[i] = picture, before.time - self._start
        return pictures, stamps

    def each(self, short_side: int | None = None) -> Iterator[tuple[np.ndarray, float]]:
        """Yields every frame, uint8 [H, W, 3], and its time in seconds, one at a time."""
        self._wanted = None
        self._rewind()
        size = resized(self._size, short_side)
        while True:
            yield self._convert(self._shown.frame, size), self._shown.time - self._start
            if not self._advance():
                return

    def read_all(self, short_side: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns all frames: uint8 [T, H, W, 3] and times in seconds, float32 [T]."""
        pictures, stamps = zip(*self.each(short_side), strict=True)
        return np.stack(pictures), np.asarray(stamps, np.float32)

    def _rewind(self) -> None:
        # Reopening is the only way back to the first frame that works for all containers.
        self.close()
        self._container = open_file(self._source)
        self._stream = opening.video_stream(self._container)
        self._tick = float(self._stream.time_base)
        self._drops = (
            self._container.format.name in _SEEKABLE
            and self._stream.codec_context.name in _DROPPING
        )
        self._drops &= not self._interlaced
        self._frames = self._decode()
        first = next(self._frames, None)
        if first is None:
            raise Unreadable(self._damage or opening.emptiness(self._stream))
        self._shown, self._next = first, _LATER

    def _coming(self) -> _Timed | None:
        """Returns the frame after the displayed one, decoded on demand; None at the end."""
        if self._next is _LATER:
            self._next = next(self._frames, None)
        return self._next

    def _advance(self) -> bool:
        if self._coming() is None:
            return False
        self._shown, self._next = self._next, _LATER
        return True

    def _want(self, clock: np.ndarray | None) -> None:
        self._wanted = clock
        self._ahead.wanted = clock if self._drops else None

    def _decode(self) -> Iterator[_Timed]:
        """Yields frames in presentation order; packets that fail to decode are skipped."""
        tick, step = self._tick, 1 / opening.rate(self._stream)
        decoder, last, skipping, locked = self._stream.codec_context, None, None, False
        self._ahead = Ahead(self._packets(), tick, self._wanted if self._drops else None)
        for packet, shown in self._ahead:
            # keyframes only: the query is as slow as converting a small frame
            if packet is not None and packet.is_keyframe:
                locked = packet.has_sidedata("encryption_info")
            if locked:  # a decoder may return garbage
                self._damage = self._damage or "encrypted"
                continue
            try:
                if self._drops and skipping is not (not shown):
                    skipping = not shown
                    decoder.skip_frame = "NONREF" if skipping else "DEFAULT"
                frames = decoder.decode(packet)
            except av.FFmpegError as error:
                self._damage = self._damage or f"damaged: {error.strerror}"
                continue
            for frame in frames:
                stamp = frame.pts if frame.pts is not None else frame.dts
                if stamp is not None:
                    time = stamp * tick
                else:
                    time = 0.0 if last is None else last + step
                # keep times monotonic if the clock jumps back
                last = time if last is None else max(time, last)
                yield _Timed(last, frame)

    def _clock(self, times: np.ndarray) -> np.ndarray:
        """Converts times from the first frame to the container's clock, with the tolerance of
        `frames_at`.
        """
        return self._start + np.maximum(times, 0.0) + self.tolerance

    def _packets(self) -> Iterator[av.Packet | None]:
        # None flushes the decoder
        try:
            yield from self._container.demux(self._stream)
        except av.FFmpegError as error:  # a truncated file: keep the frames before the error
            self._damage = self._damage or f"damaged: {error.strerror}"
            yield None

    def _show(self, wanted: float) -> None:
        if self._start < self._shown.time > wanted:
            self._rewind()
        if wanted - self._shown.time > _BLIND_GAIN and self._container.format.name not in _SEEKABLE:
            self._excuse()
        if self._seek_saves(wanted) and not any(self._land(wanted, back) for back in _RETRIES):
            self._rewind()
        while (coming := self._coming()) is not None and coming.time <= wanted:
            self._advance()

    def _excuse(self) -> None:
        said = excuses.get()
        if said is not None:
            said.append(
                f"{self._container.format.name} files can only be read from their start, so "
                "convert it to mp4 or raise config.data.decode_timeout_seconds"
            )

    def _seek_saves(self, wanted: float) -> bool:
        ahead = wanted - self._shown.time
        if ahead < _SEEK_GAIN or self._container.format.name not in _SEEKABLE:
            return False
        index, goal = self._stream.index_entries, int(wanted / self._tick)
        if len(index) == 0 or index[len(index) - 1].timestamp < goal:
            return ahead > _BLIND_GAIN
        key = index.search_timestamp(goal)
        saved = index[key].timestamp * self._tick - self._shown.time if key >= 0 else 0.0
        return saved > _SEEK_GAIN

    def _land(self, wanted: float, back: float) -> bool:
        """Seeks to `back` seconds before `wanted`. Returns whether it found an intact frame no
        later than `wanted`.
        """
        goal = int((wanted - back) / self._tick)
        try:
            self._container.seek(goal, stream=self._stream)
        except av.FFmpegError:
            return False
        # Frames before the first keyframe depend on frames that were not decoded.
        frames = dropwhile(
            lambda timed: not timed.frame.key_frame or timed.frame.is_corrupt, self._decode()
        )
        first = next(frames, None)
        if first is None or first.frame.pts is None or first.time > wanted:
            return False
        self._frames, self._shown, self._next = frames, first, _LATER
        return True

    def _convert(self, frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
        width, height = size
        how = Interpolation.AREA if width < frame.width else Interpolation.BILINEAR
        small = self._scaler.reformat(
            frame,
            width,
            height,
            "rgb24",
            interpolation=how,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        return upright(pixels(small), self._turn)

    def _stack(self, pictures: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
        if pictures:
            return np.stack(pictures)
        return np.zeros(
            (0, *upright(np.zeros((size[1], size[0], 3), np.uint8), self._turn).shape), np.uint8
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
