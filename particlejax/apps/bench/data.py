# SPDX-License-Identifier: Apache-2.0
"""How fast clips come out of the data floor, beside a bare loop that only decodes the same frames, and other decoders."""

import importlib.util
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from particlejax.apps.report import table
from particlejax.data import clips, pipeline, sources
from particlejax.data.decode import Video, open_file
from particlejax.data.sources import Listed, Record
from particlejax.spec import DataSpec, Experiment, ParticleSpec
from particlejax.train import run
from particlejax.train.log import say

_RATE = 25  # frames per second of the files made here, and the length of their groups of pictures
_SHORT, _LONG = 60, 3600  # seconds of the files that random access is tried on
_HD = (1920, 1080)
_HD_SECONDS = 20
_STRIDE = 2  # frames from one wanted frame to the next in the long files
_POSITIONS = 12  # random places tried in a repetition
_MEMORY_STEPS = 10


class Timed(NamedTuple):
    """A repetition: seconds of the clock, and of all cores together."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Work:
    """The clips of one comparison: what the pipeline reads, and for each clip the file and the times of its frames."""

    batches: pipeline.Batches
    steps: int
    threads: int

    @property
    def wanted(self) -> list[tuple[str | bytes, np.ndarray]]:
        """File and times in seconds of every frame that the pipeline will ask for, in its order."""
        found = []
        for k in range(self.steps):
            numbers = self.batches.clips(k)
            for i, number in enumerate(numbers):
                record = self.batches.source[number]
                rng = np.random.default_rng((self.batches.seed, k * len(numbers) + i))
                found.append((record.video, record.start + self._times(record, rng)))
        return found

    def _times(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        with Video(record.video) as video:
            length = record.until(video.duration) - record.start
            offset, times, _ = clips.moments(length, 1 / video.fps, self.batches.data, rng)
            return np.minimum(offset + times, length - 0.5 / video.fps)


def bench(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'bench_data': tables in report.md, figures in results.json."""
    del name
    repetitions = experiment.bench.repetitions
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "repetitions": repetitions}
    for title, work in _works(experiment, workdir):
        figures[title] = _compare(work, repetitions, title)
    figures["random access"] = _random_access(workdir, repetitions, experiment)
    figures["memory"] = _memory(experiment)
    run.add_results(workdir, "bench_data", figures, {})
    text = "\n".join(_report(figures))
    (workdir / "report.md").write_text(text, encoding="utf-8")
    print(text)


def _works(experiment: Experiment, workdir: Path) -> Iterator[tuple[str, Work]]:
    data, spec = experiment.data, experiment.bench
    source = sources.open_source(data.source, data.split, data.cache_dir)
    batches = pipeline.Batches(source, data, experiment.particles, experiment.seed, spec.rows)
    yield "short clips", Work(batches, max(1, spec.clips // spec.rows), data.threads)
    path = workdir / "hd.mp4"
    _make(path, _HD, _HD_SECONDS if spec.clips > 50 else 2)
    with Video(str(path)) as video:
        length = video.duration - data.frames * _STRIDE / _RATE
    starts = np.random.default_rng(0).uniform(0, max(length, 0.0), max(spec.rows, spec.clips // 20))
    records = tuple(Record(f"{s:.2f}", str(path), start=s, end=s + data.frames * _STRIDE / _RATE) for s in starts)
    batches = replace(batches, source=Listed((), records), data=replace(data, sample="dense", stride=(_STRIDE, _STRIDE)))
    yield "1080p", Work(batches, max(1, len(records) // spec.rows), data.threads)


# -- the whole pipeline against decoding alone


def _compare(work: Work, repetitions: int, title: str) -> dict[str, Any]:
    wanted = work.wanted
    side = work.batches.data.decode_side or work.batches.data.size
    rivals: dict[str, Callable[[], Any]] = {
        "particlejax, whole pipeline": lambda: _drain(work),
        "PyAV, decodes only": lambda: _each(_bare, wanted, work.threads),
    }
    for package, decode in (("torchcodec", _torchcodec), ("decord", _decord)):
        if importlib.util.find_spec(package):
            rivals[f"{package}, decodes and resizes"] = lambda d=decode: _each(lambda p, t: d(p, t, side), wanted, work.threads)
    times: dict[str, list[Timed]] = {name: [] for name in rivals}
    for repetition in range(repetitions + 1):
        for name, go in rivals.items():
            timed = _timed(go)
            if repetition:  # the first one warms files and code
                times[name].append(timed)
        say(f"{title}: repetition {repetition} of {repetitions}")
    base = np.median([t.wall for t in times["PyAV, decodes only"]])
    return {name: {"clips_per_second": len(wanted) / float(np.median([t.wall for t in each])),
                   "cores": float(np.median([t.cpu / t.wall for t in each])),
                   "of_bare": float(base / np.median([t.wall for t in each])),
                   "all_seconds": [round(t.wall, 3) for t in each]} for name, each in times.items()}


def _timed(go: Callable[[], Any]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    go()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu)


def _drain(work: Work) -> None:
    for loaded in pipeline.read(work.batches, 0, work.steps, work.batches.data):
        if loaded.bad:
            raise RuntimeError(f"the benchmark's clips must decode: {loaded.bad[0]}")


def _each(decode: Callable[[Any, np.ndarray], Any], wanted: Sequence[tuple[str | bytes, np.ndarray]], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda each: decode(*each), wanted):
            pass


def _bare(path: str | bytes, times: np.ndarray) -> int:
    """Frames decoded on the way to the last wanted one, from the keyframe before the first; nothing is converted."""
    with open_file(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        if times[0] > 1:
            container.seek(int(times[0] / stream.time_base), stream=stream)
        count = 0
        for frame in container.decode(stream):
            count += 1
            if frame.time >= times[-1]:
                break
        return count


def _torchcodec(path: str, times: np.ndarray, side: int) -> Any:
    from torchcodec.decoders import VideoDecoder

    found = VideoDecoder(path, num_ffmpeg_threads=1).get_frames_played_at(list(times)).data
    import torch

    return torch.nn.functional.interpolate(found.float(), size=(side, side), mode="bilinear", antialias=True)


def _decord(path: str, times: np.ndarray, side: int) -> Any:
    import decord

    reader = decord.VideoReader(path, width=side, height=side, num_threads=1)
    return reader.get_batch([min(int(t * reader.get_avg_fps()), len(reader) - 1) for t in times]).asnumpy()


# -- random access


def _random_access(workdir: Path, repetitions: int, experiment: Experiment) -> dict[str, Any]:
    frames, spec = experiment.data.frames, experiment.bench
    lengths = (_SHORT, _LONG) if spec.clips > 50 else (2, 6)
    found: dict[str, list[float]] = {}
    rng = np.random.default_rng(0)
    paths = [workdir / f"{length}s.mp4" for length in lengths]
    _make(paths[0], (320, 240), lengths[0])
    _repeat(paths[0], paths[1], lengths[1] // lengths[0])
    span = frames * _STRIDE / _RATE
    for _ in range(repetitions):
        for path, length in zip(paths, lengths, strict=True):
            starts = rng.uniform(0, length - span, _POSITIONS)
            seconds = _timed(lambda p=path, s=starts: [_clip(p, start, span, frames) for start in s]).wall / _POSITIONS
            found.setdefault(f"out of {length} s", []).append(1000 * seconds)
        start = lengths[0] - span
        found.setdefault(f"the end of {lengths[0]} s, decoded from its start", []).append(
            1000 * _timed(lambda: _from_start(paths[0], start, span, frames)).wall)
    return {name: {"milliseconds": float(np.median(each))} for name, each in found.items()}


def _clip(path: Path, start: float, span: float, frames: int) -> None:
    with Video(str(path)) as video:
        video.frames_at(start + (np.arange(frames) + 0.5) * span / frames, 112)


def _from_start(path: Path, start: float, span: float, frames: int) -> None:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        wanted = list(start + (np.arange(frames) + 0.5) * span / frames)
        for frame in container.decode(stream):
            if wanted and frame.time >= wanted[0]:
                wanted.pop(0)
                frame.reformat(150, 112, "rgb24").to_ndarray()
            if not wanted:
                break


def _make(path: Path, size: tuple[int, int], seconds: int) -> None:
    """A film of textures that move, with a keyframe a second."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (size[1] // 8 + 16, size[0] // 8 + 64, 3), np.uint8)
    large = large.repeat(8, axis=0).repeat(8, axis=1)
    fresh = path.with_name(path.name + ".tmp")
    with av.open(str(fresh), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_RATE, options={"g": str(_RATE), "preset": "veryfast"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for i in range(seconds * _RATE):
            x, y = (3 * i) % 500, (i % 100)
            picture = np.ascontiguousarray(large[y : y + size[1], x : x + size[0]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    os.replace(fresh, path)


def _repeat(path: Path, out: Path, times: int) -> None:
    """The same film `times` over in one file, its packets copied."""
    if out.exists():
        return
    fresh = out.with_name(out.name + ".tmp")
    with av.open(str(fresh), "w", format="mp4") as container:
        made, shift = None, 0
        for _ in range(times):
            with av.open(str(path)) as source:
                stream = source.streams.video[0]
                made = made or container.add_stream_from_template(stream)
                length = round(stream.frames / (_RATE * stream.time_base))
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, made
                        container.mux(packet)
                shift += length
    os.replace(fresh, out)


# -- memory


def _memory(experiment: Experiment) -> dict[str, Any]:
    """Resident memory of this process while it decodes clip after clip, in MiB."""
    spec = experiment.bench
    source = sources.open_source("toybox:tiny", "train", experiment.data.cache_dir)
    data = replace(experiment.data, frames=8, size=32, decode_side=0, sample="span")
    batches = pipeline.Batches(source, data, ParticleSpec(base=(2, 16, 16)), 0, spec.rows)
    steps = max(_MEMORY_STEPS, spec.memory_clips // spec.rows)
    marks: list[tuple[int, float]] = []
    for k, _ in enumerate(pipeline.read(batches, 0, steps, data)):
        if (k + 1) % (steps // _MEMORY_STEPS) == 0:
            marks.append(((k + 1) * spec.rows, _resident()))
    say(f"memory: {marks[0][1]:.0f} MiB after {marks[0][0]} clips, {marks[-1][1]:.0f} MiB after {marks[-1][0]}")
    return {"clips": [clip for clip, _ in marks], "mib": [round(mib, 1) for _, mib in marks]}


def _resident() -> float:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:  # not Linux: the most that it ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _report(figures: dict[str, Any]) -> Iterator[str]:
    yield from ("# The data floor", "", f"{figures['cores']} cores; medians of {figures['repetitions']} interleaved "
                "repetitions.", "")
    for title in ("short clips", "1080p"):
        yield from (f"## {title}", "")
        yield from table(["", "clips/s", "cores busy", "of PyAV that only decodes"], [
            [name, f"{each['clips_per_second']:.1f}", f"{each['cores']:.2f}", f"{each['of_bare']:.2f}"]
            for name, each in figures[title].items()])
        yield ""
    yield from ("## Random access, 320x240, one thread", "")
    yield from table(["frames", "ms a clip"], [[name, f"{each['milliseconds']:.1f}"]
                                               for name, each in figures["random access"].items()])
    memory = figures["memory"]
    yield from ("", "## Memory of the process", "")
    yield from table(["clips", *memory["clips"]], [["MiB", *memory["mib"]]])
    yield ""
