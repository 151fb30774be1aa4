# SPDX-License-Identifier: Apache-2.0
"""What the data floor is measured against: PyAV in a bare loop, and other packages that decode,
where they are installed.
"""

import importlib.util
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

from particlejax.data.video.decode import open_file
from particlejax.train.log import say

# of each clip the file and the times of its frames, seconds
Wanted = Sequence[tuple[str | bytes, np.ndarray]]


def others(wanted: Wanted, side: int) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Other packages that decode the same frames, each tried on one clip first; and why an
    installed one cannot be used.
    """
    found: dict[str, Callable[..., Any]] = {}
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
                found[f"{name}, decodes and resizes"] = decode
            except Exception as error:  # whatever it lacks, others are measured
                unusable[name] = why(error)
                say(f"{name} is installed but cannot be used ({unusable[name]}): it is left out.")
    return found, unusable


def why(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def bare(file: str | bytes, times: np.ndarray, drop: bool = False) -> int:
    """Frames decoded on the way to the last wanted one, from the keyframe before the first; nothing
    is converted.

    drop: frames that no other needs are not looked at, not even the wanted ones among them: less
    than anyone can do.
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


def least(file: str | bytes, times: np.ndarray, side: int) -> list[np.ndarray]:
    """The frames that `bare` decodes; those that are wanted become pictures of `side` by `side`
    pixels.
    """
    scaler, left, found = VideoReformatter(), list(times), []
    with open_file(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        if times[0] > 1:
            container.seek(int(times[0] / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time >= left[0]:
                found.append(
                    scaler.reformat(
                        frame, side, side, "rgb24", interpolation="AREA", threads=1
                    ).to_ndarray()
                )
                left = [t for t in left if t > frame.time]
            if not left:
                break
    return found


def _torchcodec(file: str | bytes, times: np.ndarray, side: int, mode: str) -> Any:
    import torch
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(file, num_ffmpeg_threads=1, seek_mode=mode)
    # past it, it refuses where we show the last frame
    times = np.minimum(times, decoder.metadata.end_stream_seconds - 1e-3)
    found = decoder.get_frames_played_at(list(times)).data
    # of bytes, as ours
    return torch.nn.functional.interpolate(
        found, size=(side, side), mode="bilinear", antialias=True
    )


def _decord(file: str | bytes, times: np.ndarray, side: int) -> Any:
    import decord

    opened = io.BytesIO(file) if isinstance(file, bytes) else file
    reader = decord.VideoReader(opened, width=side, height=side, num_threads=1)
    return reader.get_batch(
        [min(int(t * reader.get_avg_fps()), len(reader) - 1) for t in times]
    ).asnumpy()
