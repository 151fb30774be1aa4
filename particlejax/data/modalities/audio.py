# SPDX-License-Identifier: Apache-2.0
"""Audio of a file as mono samples on the time axis of its frames, and as log-mel spectrograms.

Legend: N samples, F spectrogram frames, M mel bands.
"""

import ctypes
import functools
import itertools
import math
from collections.abc import Iterator

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.stream import Disposition

from particlejax.config.data import AudioSpec
from particlejax.data.video import container as opening
from particlejax.data.video import continuous_clock
from particlejax.data.video.container import Unreadable, named_errors, open_file
from particlejax.data.video.continuous_clock import ContinuousClock

_MIN_SEEK_SECONDS = 2.0  # start in seconds above which seeking is faster
# seconds to seek before the start: a decoder needs some packets to settle, and some seeks land late
_SEEK_MARGINS = (0.5, 8.0)
_MAX_GAP = 0.05  # seconds between a frame's time and the samples before it that are no gap
_MAX_AMPLITUDE = 1e6  # of full scale 1; the power of louder samples leaves float32
_POWER_FLOOR = 1e-6  # added to the power before the logarithm
_MAX_FFMPEG_CHANNELS = 2  # FFmpeg mixes mono and stereo to mono, with the power of stereo kept
# whether PyAV copies channel orders of its own instead of sharing their memory
_HOLDS_ANY_LAYOUT = tuple(int(n) for n in av.__version__.split(".")[:3]) >= (19, 0, 2)
# Weights of channels in a mono mix of more than two, those of ITU-R BS.775; their sum is scaled to
# 1, so that loudness does not depend on the number of channels.
_CHANNEL_WEIGHTS = {"FL": 0.5**0.5, "FR": 0.5**0.5, "FC": 1.0, "LFE": 0.0, "LFE2": 0.0}
_SURROUND_WEIGHT = 0.5
_AMBISONIC = "AMBI"  # names of ambisonic channels; the first of them is the mono signal


@named_errors
def read(
    source: str | bytes, origin: float, start: float, seconds: float, rate: int
) -> np.ndarray | None:
    """Reads samples float32 [N] of `seconds` from `start` at `rate` per second; fewer if the track
    ends.

    start: seconds from the video's first frame, which is at `origin` on the container's clock. Gaps
    in the track are silent. The track is the default one. Returns None without audio: no track, no
    decodable one, or it ends before `start`. Raises Unreadable for a track that no decoder reads
    safely.
    """
    first = origin + start
    frames: Iterator[av.AudioFrame] | None
    for margin in (*_SEEK_MARGINS, None) if start > _MIN_SEEK_SECONDS else (None,):
        try:
            container = open_file(source)
        except Unreadable:
            return None
        with container:
            track = _Track.open(container, source)
            if track is None:
                return None
            frames = track.frames() if margin is None else track.frames_from(first - margin, first)
            if frames is not None:
                return _collect(frames, first, seconds, rate)
    raise AssertionError("the last attempt reads from the start")


class _Track:
    """The audio track that a player would take."""

    def __init__(
        self, container: av.container.InputContainer, stream: av.audio.stream.AudioStream
    ) -> None:
        self._container, self._stream = container, stream
        self._restarts = False

    @classmethod
    def open(cls, container: av.container.InputContainer, source: str | bytes) -> "_Track | None":
        """Returns the default track, else the first one; None if none can be decoded. Raises
        Unreadable for one that no decoder reads safely.
        """
        decodable = [s for s in container.streams.audio if s.codec_context is not None]
        if not decodable:
            return None
        defaults = (s for s in decodable if s.disposition & Disposition.default)
        track = cls(container, next(defaults, decodable[0]))
        _refuse_unsafe_layout(track._stream)
        if continuous_clock.may_restart(container) and container.streams.video:
            track._restarts = opening.timeline(source).restarts
        return track

    def frames_from(self, seek_time: float, time: float) -> Iterator[av.AudioFrame] | None:
        """Returns the frames after a seek to `seek_time`; None if the seek went past `time` or if
        seeking is impossible.
        """
        if self._restarts:
            return None
        try:
            tick = float(self._stream.time_base)
            self._container.seek(int(seek_time / tick), stream=self._stream)
        except av.FFmpegError:
            return None
        frames = self.frames()
        frame = next(frames, None)
        if frame is not None and frame.time is not None and frame.time > time:
            return None
        return iter(()) if frame is None else itertools.chain((frame,), frames)

    def frames(self) -> Iterator[av.AudioFrame]:
        """Yields the decoded frames; packets that fail to decode are skipped."""
        decoder = self._stream.codec_context
        for packet in self._packets():
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError:
                continue
            yield from frames

    def _packets(self) -> Iterator[av.Packet | None]:
        try:
            if self._restarts:
                yield from ContinuousClock().packets(self._container, self._stream)
            else:
                yield from self._container.demux(self._stream)
        except av.FFmpegError:  # a truncated track: keep the samples before the error
            yield None


def _refuse_unsafe_layout(stream: av.audio.stream.AudioStream) -> None:
    """Raises Unreadable for a channel order that PyAV cannot hold: each of its copies frees the
    same memory, which ends the process.
    """
    if _HOLDS_ANY_LAYOUT:
        return
    layout = stream.codec_context.layout
    if layout.name in ("mono", "stereo"):
        return
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))  # this copy must not free it, either
    if "(" in layout.name and "channels" in layout.name:
        raise Unreadable(
            f"its sound has {layout.name}, an order of channels that PyAV {av.__version__} cannot "
            "decode safely: convert its sound to stereo, or install av 19.0.2 or newer"
        )


class _MonoMixer:
    """Resamples audio frames to mono. Their format may change midway."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._format: tuple[str, str, int] | None = None
        self._resampler: AudioResampler | None = None
        self._weights: np.ndarray | None = None  # of channels; None: FFmpeg mixes them

    def end_format(self, frame: av.AudioFrame) -> Iterator[np.ndarray]:
        """Yields the samples [N] that the resampler still holds if `frame` has another format."""
        frame_format = (frame.format.name, frame.layout.name, frame.sample_rate)
        if frame_format != self._format:
            if self._resampler is not None:
                yield from self._resample(None)
            self._format = frame_format
            if frame.layout.nb_channels <= _MAX_FFMPEG_CHANNELS:
                self._weights = None
                self._resampler = AudioResampler(format="flt", layout="mono", rate=self._rate)
            else:
                self._weights = _mix_weights([c.name for c in frame.layout.channels])
                self._resampler = AudioResampler(format="flt", rate=self._rate)

    def mix(self, frame: av.AudioFrame) -> Iterator[np.ndarray]:
        """Yields samples [N] of a frame of the present format."""
        yield from self._resample(frame)

    def _resample(self, frame: av.AudioFrame | None) -> Iterator[np.ndarray]:
        for resampled in self._resampler.resample(frame):
            samples = resampled.to_ndarray().reshape(-1)
            if self._weights is not None:
                samples = samples.reshape(-1, len(self._weights)) @ self._weights
            yield samples


def _mix_weights(channels: list[str]) -> np.ndarray:
    """Returns the weights of channels in the mono mix, float32 [C], by their names; sum 1."""
    if channels[0].startswith(_AMBISONIC):
        weights = np.eye(1, len(channels))[0]
    else:
        weights = np.array([_CHANNEL_WEIGHTS.get(name, _SURROUND_WEIGHT) for name in channels])
    if not weights.any():
        weights = np.ones(len(channels))
    return (weights / weights.sum()).astype(np.float32)


def _collect(
    frames: Iterator[av.AudioFrame], start_time: float, seconds: float, rate: int
) -> np.ndarray | None:
    mixer = _MonoMixer(rate)
    sound = np.zeros(num_samples(seconds, rate), np.float32)
    end = 0  # end of the written samples
    clock: float | None = None

    def write(chunks: Iterator[np.ndarray]) -> None:
        nonlocal clock, end
        for chunk in chunks:
            end = max(end, _write_samples(sound, chunk, round((clock - start_time) * rate)))
            clock += len(chunk) / rate

    for frame in frames:
        write(mixer.end_format(frame))
        # at the start or after a gap, take the frame's own time
        if clock is None or (frame.time is not None and abs(frame.time - clock) > _MAX_GAP):
            clock = frame.time if frame.time is not None else 0.0 if clock is None else clock
        write(mixer.mix(frame))
        if clock - start_time >= seconds:
            break
    # NaN and infinity are not below the limit
    if end and not np.abs(sound[:end]).max() < _MAX_AMPLITUDE:
        raise Unreadable("damaged: its sound has samples that are NaN, infinite or above 1e6")
    return sound[:end] if end else None


def _write_samples(sound: np.ndarray, chunk: np.ndarray, offset: int) -> int:
    """Writes the part of `chunk` that overlaps `sound`, starting at index `offset`; returns its
    end.
    """
    start, stop = max(offset, 0), min(offset + len(chunk), len(sound))
    if stop <= start:
        return 0
    sound[start:stop] = chunk[start - offset : stop - offset]
    return stop


def num_samples(seconds: float, rate: int) -> int:
    """Returns the maximum number of samples of `read`."""
    return math.ceil(seconds * rate - 1e-6)


def num_spectra(seconds: float, spec: AudioSpec) -> int:
    """Returns the number of spectrogram frames that `log_mel` computes for a duration."""
    window, hop = _steps(spec)
    return max(0, num_samples(seconds, spec.sample_rate) - window) // hop + 1


def _steps(spec: AudioSpec) -> tuple[int, int]:
    """Returns window and hop in samples."""
    return round(spec.window_seconds * spec.sample_rate), round(spec.hop_seconds * spec.sample_rate)


def log_mel(sound: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """Returns the natural logarithm of mel power, float32 [F, M], with Hann windows and no padding
    at the end.

    Audio shorter than a window is padded with silence.
    """
    window, hop = _steps(spec)
    sound = np.pad(sound, (0, max(0, window - len(sound))))
    frames = np.lib.stride_tricks.sliding_window_view(sound, window)[::hop]
    power = np.abs(np.fft.rfft(frames * _hann(window), _fft_length(window), axis=-1)) ** 2
    return np.log(power.astype(np.float32) @ mel_filters(spec) + _POWER_FLOOR).astype(np.float32)


@functools.cache
def mel_filters(spec: AudioSpec) -> np.ndarray:
    """Returns triangular filters [frequencies, M] that overlap by half on the scale 2595 log10(1 +
    f / 700).
    """
    length = _fft_length(_steps(spec)[0])
    frequencies = np.arange(length // 2 + 1) * spec.sample_rate / length
    edges = _hertz(
        np.linspace(
            _mel(spec.f_min), _mel(min(spec.f_max, spec.sample_rate / 2)), spec.num_mels + 2
        )
    )
    rise = (frequencies[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - frequencies[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rise, fall)).astype(np.float32)


@functools.cache
def _hann(length: int) -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def _fft_length(window: int) -> int:
    return 2 ** math.ceil(math.log2(window))


def _mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)
