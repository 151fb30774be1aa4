# SPDX-License-Identifier: Apache-2.0
"""Damages media files and compares what is read of them with a plain decoding loop of PyAV.

    PYTHONPATH=. python tests/fuzz_media.py [PLACES]

Every odd file of shared/data (where present) and one file of each kind of `samples` is truncated at
PLACES places (10) and has bytes flipped in as many ways, by a fixed seed. Each input is read in a
child process and has one outcome:

read    as many frames as the plain loop, and sound where it has some
named   no frames, and a reason
silent  other frames than the plain loop, or no sound, without a reason
raised  an exception that is no reason
crash   the child died
hang    one input took more than `_CPU_SECONDS` of a core
"""

import io
import multiprocessing
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

import av
import make_odd_files
import numpy as np
from av.stream import Disposition
from make_media import recording
from processes import DEADLINE

from particlejax.data.modalities import audio
from particlejax.data.video.decode import Unreadable, Video

_KINDS = (  # container, picture codec, sound codec
    ("mp4", "libx264", "aac"),
    ("mov", "mpeg4", "pcm_s16le"),
    ("matroska", "libx264", "ac3"),
    ("webm", "libvpx", "libopus"),
    ("mpegts", "mpeg2video", "mp2"),
    ("avi", "mpeg4", "mp2"),
    ("flv", "flv1", "aac"),
)
DEADLY = b"a file that ends its process"  # to test that such files are counted
_MAX_FLIPPED = 32  # bytes per input
_HEADER = 2048  # bytes in which every second input is flipped
_CPU_SECONDS = 120  # of a core per input; the longest intact odd file takes 3
_SOUND_SECONDS, _RATE = 10.0, 16000


class Case(NamedTuple):
    """A damaged file: `name` tells how to make it again."""

    name: str
    data: bytes


class Outcome(NamedTuple):
    """kind: see the module's docstring. detail: the reason, error or difference."""

    kind: str
    detail: str


def samples() -> dict[str, bytes]:
    """A small file of each kind."""
    return {
        f"{container}-{pictures}-{sound}": recording(
            container, (sound, "stereo", 48000, 0.1), codec=pictures
        )
        for container, pictures, sound in _KINDS
    }


def odd_files() -> dict[str, bytes]:
    """The odd files of shared/data; none where it is absent."""
    if not make_odd_files.FILES.exists():
        return {}
    paths = sorted(make_odd_files.FILES.iterdir())
    return {p.name: p.read_bytes() for p in paths if p.suffix not in (".md", ".csv")}


def damaged(name: str, data: bytes, places: int) -> Iterator[Case]:
    """The file truncated at `places` places, then with bytes flipped in as many ways."""
    rng = np.random.default_rng(list(name.encode()))
    for size in np.sort(rng.integers(1, len(data), places)):
        yield Case(f"{name} truncated to {size} bytes", data[:size])
    for i in range(places):
        flipped = np.frombuffer(data, np.uint8).copy()
        end = min(_HEADER, len(data)) if i % 2 else len(data)
        at = rng.integers(0, end, rng.integers(1, _MAX_FLIPPED + 1))
        flipped[at] ^= rng.integers(1, 256, len(at), np.uint8)
        yield Case(f"{name} flipped in way {i} of {places}", flipped.tobytes())


def num_frames(data: bytes) -> int:
    """The number of frames that a plain decoding loop finds."""
    try:
        with av.open(io.BytesIO(data)) as container:
            films = [
                stream
                for stream in container.streams.video
                if not stream.disposition & Disposition.attached_pic
            ]
            best = container.streams.best("video")
            return sum(1 for _ in _decoded(container, best if best in films else films[0]))
    except (av.FFmpegError, ValueError, IndexError):
        return 0


def has_sound(data: bytes, start: float) -> bool:
    """Whether a plain decoding loop finds sound of the track that players take, in the seconds that
    are compared.
    """
    try:
        with av.open(io.BytesIO(data)) as container:
            tracks = [s for s in container.streams.audio if s.codec_context is not None]
            defaults = [s for s in tracks if s.disposition & Disposition.default]
            return any(
                frame.time is not None and start <= frame.time < start + _SOUND_SECONDS
                for frame in _decoded(container, (defaults or tracks)[0])
            )
    except (av.FFmpegError, ValueError, IndexError):
        return False


def _decoded(
    container: av.container.InputContainer, stream: av.stream.Stream
) -> Iterator[av.frame.Frame]:
    if stream.codec_context is None:
        return
    stream.thread_count, stream.thread_type = 1, "NONE"  # threads give up earlier
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            packet = None  # truncated: the decoder still holds frames
        try:
            yield from stream.codec_context.decode(packet)
        except av.FFmpegError:
            pass
        if packet is None:
            return


def read(data: bytes) -> Outcome:
    """Reads a file as training does, and compares."""
    try:
        with Video(data) as video:
            count = sum(1 for _ in video.iter_frames(16))
            shown, _ = video.frames_at(np.linspace(0, min(video.duration, 3600.0), 5), 16)
            origin = video.origin
        sound = audio.read(data, origin, 0.0, _SOUND_SECONDS, _RATE)
    except Unreadable as error:
        return Outcome("named", error.reason)
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return Outcome("raised", repr(error))
    expected = num_frames(data)
    if count != expected or len(shown) != 5:
        return Outcome("silent", f"{count} frames of {expected}")
    if sound is None and has_sound(data, origin):
        return Outcome("silent", "no sound")
    return Outcome("read", "")


def _serve(connection: Connection) -> None:
    """Reads what comes, in the child."""
    av.logging.set_level(av.logging.PANIC)
    while (data := connection.recv()) is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + _CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        if data == DEADLY:
            os.abort()
        connection.send(read(data))


def outcomes(cases: Iterable[Case]) -> Iterator[tuple[Case, Outcome]]:
    """Reads each case in a child process, which is started again if it dies."""
    context = multiprocessing.get_context("spawn")
    child = connection = None
    try:
        for case in cases:
            if child is None:
                connection, other = context.Pipe()
                child = context.Process(target=_serve, args=(other,), daemon=True)
                child.start()
                other.close()
            connection.send(case.data)
            if not connection.poll(DEADLINE):
                child.kill()  # it waits for ever
            try:
                outcome = connection.recv()
            except (EOFError, ConnectionResetError):
                child.join()
                is_hang = child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
                outcome = Outcome("hang" if is_hang else "crash", f"exit code {child.exitcode}")
                child = None
            yield case, outcome
    finally:
        if child is not None:
            child.kill()
            child.join()


def main() -> None:
    """Prints the figures, and each outcome that should not be."""
    places = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    files = samples() | odd_files()
    counts: Counter[str] = Counter()
    for case, outcome in outcomes(c for name in files for c in damaged(name, files[name], places)):
        counts[outcome.kind] += 1
        if outcome.kind not in ("read", "named"):
            print(f"{outcome.kind}: {case.name}: {outcome.detail}", flush=True)
    kinds = ("read", "named", "silent", "raised", "crash", "hang")
    figures = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    print(f"{len(files)} files, {counts.total()} inputs: {figures}")


if __name__ == "__main__":
    main()
