# SPDX-License-Identifier: Apache-2.0
"""Sound of a file as one channel of samples on the clock of its frames, and as log-mel spectra.

Legend: N samples, F spectra, M mel bands.
"""

import functools
import math

import av
import numpy as np
from av.audio.resampler import AudioResampler

from particlejax.config.experiment import AudioSpec
from particlejax.data.video.decode import Unreadable, open_file

_SEEK = 2.0  # seconds into a track from which on seeking saves work
_BEFORE = (
    0.5  # seconds that are decoded before the wanted ones: a decoder needs some packets to settle
)
_FLOOR = 1e-6  # power under which nothing is heard


def read(
    source: str | bytes, origin: float, start: float, seconds: float, rate: int
) -> np.ndarray | None:
    """Samples float32 [N] of `seconds` from `start` on, at `rate` per second; fewer where the track
    ends.

    start: seconds from the video's first frame, which stands at `origin` on the container's clock.
    A gap in the track is silent. None where there is no sound: no track, none that decodes, or it
    ends before `start`.
    """
    try:
        with open_file(source) as container:
            stream = next((s for s in container.streams.audio if s.codec_context is not None), None)
            if stream is None:
                return None
            first = origin + start
            if start > _SEEK:
                _seek(container, stream, first - _BEFORE)
            return _collect(container, stream, first, seconds, rate)
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
    first: float,
    seconds: float,
    rate: int,
) -> np.ndarray | None:
    resampler = AudioResampler(format="flt", layout="mono", rate=rate)
    sound = np.zeros(samples(seconds, rate), np.float32)
    end = 0  # of what was written, in samples
    clock: float | None = None
    # the track breaks off: what came before it counts
    try:
        for frame in container.decode(stream):
            # the start, or a gap
            if clock is None or (frame.time is not None and abs(frame.time - clock) > 0.05):
                clock = frame.time if frame.time is not None else 0.0 if clock is None else clock
            for part in resampler.resample(frame):
                heard = part.to_ndarray().reshape(-1)
                end = max(end, _place(sound, heard, round((clock - first) * rate)))
                clock += len(heard) / rate
            if clock - first >= seconds:
                break
    except av.FFmpegError:
        pass
    return sound[:end] if end else None


def _place(sound: np.ndarray, heard: np.ndarray, at: int) -> int:
    """Writes the part of `heard` that falls into `sound` when the first stands at `at`; returns
    where it ends.
    """
    start, stop = max(at, 0), min(at + len(heard), len(sound))
    if stop <= start:
        return 0
    sound[start:stop] = heard[start - at : stop - at]
    return stop


def samples(seconds: float, rate: int) -> int:
    """How many samples `read` gives at most."""
    return math.ceil(seconds * rate - 1e-6)


def spectra(seconds: float, spec: AudioSpec) -> int:
    """How many spectra `log_mel` makes of so many seconds: in whole samples, as it counts them."""
    window, hop = _steps(spec)
    return max(0, samples(seconds, spec.sample_rate) - window) // hop + 1


def _steps(spec: AudioSpec) -> tuple[int, int]:
    """Samples of a spectrum, and from one to the next."""
    return round(spec.window_seconds * spec.sample_rate), round(spec.hop_seconds * spec.sample_rate)


def log_mel(sound: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """Natural logarithms of mel power, float32 [F, M]: one spectrum each hop, Hann windows, none
    beyond the end.

    Sound shorter than a window is filled up with silence.
    """
    window, hop = _steps(spec)
    sound = np.pad(sound, (0, max(0, window - len(sound))))
    frames = np.lib.stride_tricks.sliding_window_view(sound, window)[::hop]
    power = np.abs(np.fft.rfft(frames * _hann(window), _length(window), axis=-1)) ** 2
    return np.log(power.astype(np.float32) @ mel_filters(spec) + _FLOOR).astype(np.float32)


@functools.cache
def mel_filters(spec: AudioSpec) -> np.ndarray:
    """Triangles [frequencies, M] that overlap by half on the mel scale 2595 log10(1 + f / 700)."""
    length = _length(_steps(spec)[0])
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


def _length(window: int) -> int:
    return 2 ** math.ceil(math.log2(window))


def _mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)
