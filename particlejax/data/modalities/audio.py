# SPDX-License-Identifier: Apache-2.0
"""Audio of a file as mono samples on the time axis of its frames, and as log-mel spectrograms.

Legend: N samples, F spectrogram frames, M mel bands.
"""

import functools
import math

import av
import numpy as np
from av.audio.resampler import AudioResampler

from particlejax.config.data import AudioSpec
from particlejax.data.video.decode import Unreadable, open_file

_MIN_SEEK_SECONDS = 2.0  # start in seconds above which seeking is faster
_PREROLL_SECONDS = 0.5  # seconds to decode before the start: a decoder needs some packets to settle
_POWER_FLOOR = 1e-6  # added to the power before the logarithm


def read(
    source: str | bytes, origin: float, start: float, seconds: float, rate: int
) -> np.ndarray | None:
    """Reads samples float32 [N] of `seconds` from `start` at `rate` per second; fewer if the track
    ends.

    start: seconds from the video's first frame, which is at `origin` on the container's clock. Gaps
    in the track are silent. Returns None without audio: no track, no decodable one, or it ends
    before `start`.
    """
    try:
        with open_file(source) as container:
            stream = next(
                (
                    candidate
                    for candidate in container.streams.audio
                    if candidate.codec_context is not None
                ),
                None,
            )
            if stream is None:
                return None
            start_time = origin + start
            if start > _MIN_SEEK_SECONDS:
                _seek(container, stream, start_time - _PREROLL_SECONDS)
            return _collect(container, stream, start_time, seconds, rate)
    except (Unreadable, av.FFmpegError):
        return None


def _seek(
    container: av.container.InputContainer, stream: av.audio.stream.AudioStream, time: float
) -> None:
    try:
        container.seek(int(time / float(stream.time_base)), stream=stream)
    except av.FFmpegError:
        container.seek(0)


def _collect(
    container: av.container.InputContainer,
    stream: av.audio.stream.AudioStream,
    start_time: float,
    seconds: float,
    rate: int,
) -> np.ndarray | None:
    resampler = AudioResampler(format="flt", layout="mono", rate=rate)
    sound = np.zeros(num_samples(seconds, rate), np.float32)
    end = 0  # end of the written samples
    clock: float | None = None
    # a truncated track: keep the samples before the error
    try:
        for frame in container.decode(stream):
            # at the start or after a gap, take the frame's own time
            if clock is None or (frame.time is not None and abs(frame.time - clock) > 0.05):
                clock = frame.time if frame.time is not None else 0.0 if clock is None else clock
            for resampled in resampler.resample(frame):
                chunk = resampled.to_ndarray().reshape(-1)
                end = max(end, _write_samples(sound, chunk, round((clock - start_time) * rate)))
                clock += len(chunk) / rate
            if clock - start_time >= seconds:
                break
    except av.FFmpegError:
        pass
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
