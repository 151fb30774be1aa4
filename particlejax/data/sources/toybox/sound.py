# SPDX-License-Identifier: Apache-2.0
"""What a toy clip sounds like, and the codecs: contacts ring, motion hums, and mp4 bytes come out.

Sound is float32 [32000]: two seconds at 16 kHz, mono.
"""

import io

import av
import numpy as np

from particlejax.data.sources.toybox.actions import FPS, SECONDS, SIZE, Play

RATE = 16_000  # samples a second
TIMES = np.arange(int(RATE * SECONDS)) / RATE


def _burst(
    rng: np.random.Generator, samples: np.ndarray, time: float, pitch: float, noisiness: float
) -> None:
    # adds a struck tone of `pitch` hertz, decaying within about 0.15 s, that starts at `time`
    start = int(round(time * RATE))
    t = TIMES[: len(samples) - start]
    # 2.4: a bar, not a string
    tone = np.sin(2 * np.pi * pitch * t) + 0.4 * np.sin(2 * np.pi * 2.4 * pitch * t)
    strike = (1 - noisiness) * tone + noisiness * rng.uniform(-1, 1, len(t))
    samples[start:] += rng.uniform(0.3, 0.5) * np.exp(-t / 0.04) * strike


def _hum(rng: np.random.Generator, play: Play, radius: float) -> np.ndarray:
    # a soft whirr, the louder the faster anything moves, turns or swells
    steps = np.arange(0, SECONDS, 0.02)
    pose = play.pose_at(steps)
    motions = [
        np.linalg.norm(np.gradient(pose.centers, axis=1), axis=-1).sum(0),
        radius * np.abs(np.gradient(pose.angle)),
        radius * np.abs(np.gradient(pose.scale)),
    ]
    speed = np.minimum(sum(motions) / 0.02, 80)  # pixels a second; a teleport is not a bang
    tone = np.sin(2 * np.pi * rng.uniform(90, 180) * TIMES) + 0.3 * rng.uniform(-1, 1, len(TIMES))
    return 0.015 * np.interp(TIMES, steps, speed / 80) * tone


def synthesize(
    rng: np.random.Generator, play: Play | None, radius: float, material: int
) -> np.ndarray:
    """Sound float32 [32000] of a play: contacts ring higher for smaller bodies, hiss more for
    higher materials.

    None: the room's noise alone.
    """
    samples = rng.uniform(0.001, 0.004) * rng.standard_normal(len(TIMES))
    if play is None:
        return samples.astype(np.float32)
    samples += _hum(rng, play, radius)
    pitch = 6000 / radius * (1 + 0.15 * material)
    for time in play.contacts:
        _burst(rng, samples, float(time), pitch, 0.1 + 0.15 * material)
    return np.clip(samples, -0.99, 0.99).astype(np.float32)


def encode(frames: np.ndarray, audio: np.ndarray) -> bytes:
    """Frames uint8 [T, 64, 64, 3] and sound float32 [samples] as H.264 and AAC in mp4."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # One thread and no routines of this processor's own: the bytes then depend on nothing but
        # the input and the library's version. (With them x264 made one of two files of the same
        # frames, in one run of 25.)
        x264 = {
            "preset": "veryfast",
            "crf": "18",
            "g": "12",
            "threads": "1",
            "x264-params": "cpu-independent=1",
        }
        video = container.add_stream("libx264", rate=FPS, options=x264)
        video.width, video.height, video.pix_fmt = SIZE, SIZE, "yuv420p"
        # half the time
        aac = container.add_stream("aac", rate=RATE, layout="mono", options={"aac_coder": "fast"})
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts = RATE, 0
        container.mux(aac.encode(samples))
        container.mux(aac.encode())
    return buffer.getvalue()
