# SPDX-License-Identifier: Apache-2.0
"""Baselines of the data loader: bare PyAV loops, and other decoders if they are installed."""

import importlib.util
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

from particlejax.data.video.decode import open_file
from particlejax.train.log import log_info

# for each clip: file, frame times in seconds
WantedFrames = Sequence[tuple[str | bytes, np.ndarray]]


def other_decoders(
    wanted: WantedFrames, side: int
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Installed decoders that decode the same frames, each tested on one clip, and the errors of
    those that fail.
    """
    usable: dict[str, Callable[..., Any]] = {}
    unusable: dict[str, str] = {}
    for name, decode in {
        "torchcodec, exact seeks": partial(_torchcodec, mode="exact"),
        "torchcodec, approximate seeks": partial(_torchcodec, mode="approximate"),
        "decord": _decord,
    }.items():
        if importlib.util.find_spec(name.split(",")[0]):
            decode = partial(decode, side=side)
            try:
                decode(*wanted[0])
                usable[f"{name}, decodes and resizes"] = decode
            except Exception as error:  # the other decoders are still measured
                unusable[name] = error_summary(error)
                log_info(f"{name} is installed but does not work ({unusable[name]}): skipped.")
    return usable, unusable


def error_summary(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def decode_only(file: str | bytes, times: np.ndarray, drop: bool = False) -> int:
    """Decodes from the keyframe before the first requested frame to the last; no conversion.
    Returns the number of frames.

    drop: skips frames that no other frame needs, even requested ones: a lower bound of the work.
    """
    with open_file(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        if drop:
            stream.codec_context.skip_frame = "NONREF"
        if times[0] > 1:
            container.seek(int(times[0] / stream.time_base), stream=stream)
        count = 0
        for frame in container.decode(stream):
            count += 1
            if frame.time >= times[-1]:
                break
        return count


def decode_and_scale(file: str | bytes, times: np.ndarray, side: int) -> list[np.ndarray]:
    """Decodes as `decode_only`; converts the requested frames to images of `side` x `side`
    pixels.
    """
    scaler, remaining, frames = VideoReformatter(), list(times), []
    with open_file(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        if times[0] > 1:
            container.seek(int(times[0] / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time >= remaining[0]:
                frames.append(
                    scaler.reformat(
                        frame, side, side, "rgb24", interpolation="AREA", threads=1
                    ).to_ndarray()
                )
                remaining = [t for t in remaining if t > frame.time]
            if not remaining:
                break
    return frames


def _torchcodec(file: str | bytes, times: np.ndarray, side: int, mode: str) -> Any:
    import torch
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(file, num_ffmpeg_threads=1, seek_mode=mode)
    # torchcodec raises past the end, where we repeat the last frame
    times = np.minimum(times, decoder.metadata.end_stream_seconds - 1e-3)
    frames = decoder.get_frames_played_at(list(times)).data
    # reads bytes, as our loader
    return torch.nn.functional.interpolate(
        frames, size=(side, side), mode="bilinear", antialias=True
    )


def _decord(file: str | bytes, times: np.ndarray, side: int) -> Any:
    import decord

    source = io.BytesIO(file) if isinstance(file, bytes) else file
    reader = decord.VideoReader(source, width=side, height=side, num_threads=1)
    return reader.get_batch(
        [min(int(t * reader.get_avg_fps()), len(reader) - 1) for t in times]
    ).asnumpy()
