# SPDX-License-Identifier: Apache-2.0
"""Small media files that tests make for themselves."""

import io
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

_FPS = 10


def recording(
    container: str,
    *tracks: tuple[str, str, int, float],
    default: int = 0,
    seconds: float = 1.0,
    codec: str = "mpeg4",
) -> bytes:
    """Frames of moving noise, and tracks of a 440 Hz tone: (codec, layout, rate, amplitude of every
    channel).
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container, options={"fflags": "+bitexact"}) as out:
        video = out.add_stream(codec, rate=_FPS)
        video.thread_count = 1  # the same bytes every time
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        streams = [out.add_stream(name, rate=rate, layout=of) for name, of, rate, _ in tracks]
        for i, stream in enumerate(streams):
            stream.disposition = Disposition.default if i == default else Disposition(0)
        noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        for i in range(round(seconds * _FPS)):
            moved = np.ascontiguousarray(np.roll(noise, i, axis=1))
            picture = av.VideoFrame.from_ndarray(moved, format="rgb24")
            picture.pts, picture.time_base = i, Fraction(1, _FPS)
            out.mux(video.encode(picture))
        out.mux(video.encode(None))
        for stream, (_, layout, rate, amplitude) in zip(streams, tracks, strict=True):
            wave = amplitude * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
            channels = np.repeat(wave[:, None], stream.codec_context.layout.nb_channels, 1)
            samples = np.round(32767 * channels).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return file.getvalue()
