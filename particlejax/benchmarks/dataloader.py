# SPDX-License-Identifier: Apache-2.0
"""Benchmarks the data loader against bare decoding loops and other decoders."""

import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from particlejax.benchmarks import decoders
from particlejax.config.experiment import DataSpec, Experiment, ParticleSpec
from particlejax.core import io
from particlejax.core.io import fresh_file
from particlejax.data import clips, pipeline, sources
from particlejax.data.sources import Listed, Record
from particlejax.data.video.decode import Video
from particlejax.reports.markdown import table
from particlejax.train import stage
from particlejax.train.log import say

_RATE = 25  # frames/s and GOP length of the generated files
_SHORT, _LONG = 60, 3600  # seconds; lengths of the files for random access
_HD = (1920, 1080)
_HD_SECONDS = 20
_STRIDE = 2  # frames between sampled frames in the long files
_POSITIONS = 12  # random positions in a repetition
_MEMORY_STEPS = 10
_READ_AHEAD = 12  # prefetched batches of a process, plus one
_ENDLESS = 10**6  # batches
_SIDE = 112  # short side in pixels in random access
_BARE, _DROPS = "PyAV, decodes only", "PyAV, decodes only and drops what no other frame needs"
_PROCESSES = "particlejax, whole pipeline in as many processes as threads"
_LEAST = "PyAV, decodes and scales what is wanted"  # the minimum of any consumer


class Timed(NamedTuple):
    """A repetition: wall-clock seconds, and CPU seconds of all cores and processes."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Work:
    """The clips of a comparison: the pipeline's data, and the file and frame times of each clip."""

    batches: pipeline.Batches
    steps: int
    threads: int
    processes: bool = False  # whether to measure processes too; for large frames, threads suffice

    @property
    def wanted(self) -> decoders.Wanted:
        """File and frame times in seconds of all frames that the pipeline reads, in order."""
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
    """Job 'bench_dataloader': writes report.md and results.json."""
    del name
    repetitions = experiment.bench.repetitions
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "repetitions": repetitions}
    for title, work in _works(experiment, workdir):
        figures[title] = _compare(work, repetitions, title)
    figures["random access"] = _random_access(workdir, repetitions, experiment)
    figures["memory"] = _memory(experiment)
    stage.add_results(workdir, "bench_dataloader", figures, {})
    text = "\n".join(_report(figures))
    io.write_text(workdir / "report.md", text)
    print(text)


def _works(experiment: Experiment, workdir: Path) -> Iterator[tuple[str, Work]]:
    data, spec = experiment.data, experiment.bench
    source = sources.open_source(data.source, data.split, data.cache_dir)
    batches = pipeline.Batches(source, data, experiment.particles, experiment.seed, spec.batch_size)
    yield (
        "short clips",
        Work(batches, max(1, spec.num_clips // spec.batch_size), data.num_threads, processes=True),
    )
    path = workdir / "hd.mp4"
    _make(path, _HD, _HD_SECONDS if spec.num_clips > 50 else 2)
    with Video(str(path)) as video:
        length = video.duration - data.num_frames * _STRIDE / _RATE
    starts = np.random.default_rng(0).uniform(
        0, max(length, 0.0), max(spec.batch_size, spec.num_clips // 20)
    )
    records = tuple(
        Record(f"{s:.2f}", str(path), start=s, end=s + data.num_frames * _STRIDE / _RATE)
        for s in starts
    )
    # a thread decodes a whole batch, so each needs several
    rows = max(1, len(records) // (4 * data.num_threads))
    batches = replace(
        batches,
        source=Listed((), records),
        data=replace(data, frame_sampling="dense", frame_stride=(_STRIDE, _STRIDE)),
        rows=rows,
    )
    yield "1080p", Work(batches, len(records) // rows, data.num_threads)


# -- the whole pipeline against decoding alone


def _compare(work: Work, repetitions: int, title: str) -> dict[str, Any]:
    wanted = work.wanted
    rivals: dict[str, Callable[[], Any]] = {
        "particlejax, whole pipeline": lambda: _drain(work),
        _BARE: lambda: _each(decoders.bare, wanted, work.threads),
        _LEAST: lambda: _each(
            partial(decoders.least, side=work.batches.data.image_size), wanted, work.threads
        ),
        _DROPS: lambda: _each(partial(decoders.bare, drop=True), wanted, work.threads),
    }
    if work.processes:
        rivals[_PROCESSES] = lambda: _steady(work)
    others, unusable = decoders.others(
        wanted, work.batches.data.decode_short_side or work.batches.data.image_size
    )
    rivals |= {
        name: partial(_each, decode, wanted, work.threads) for name, decode in others.items()
    }
    times: dict[str, list[Timed]] = {name: [] for name in rivals}
    for repetition in range(repetitions + 1):
        for name, go in list(rivals.items()):
            if name == _PROCESSES and not repetition:
                continue  # new processes in each repetition
            try:
                timed = _timed(go)
            except Exception as error:  # another package fails on a clip
                if name not in others:
                    raise
                del rivals[name], times[name]
                unusable[name] = decoders.why(error)
                continue
            if repetition:  # the first one is warm-up
                times[name].append(timed)
        say(f"{title}: repetition {repetition} of {repetitions}")
    walls = {name: float(np.median([t.wall for t in each])) for name, each in times.items()}
    rows = {
        name: {
            "clips_per_second": len(wanted) / walls[name],
            "cores": float(np.median([t.cpu / t.wall for t in each])),
            "of_bare": walls[_BARE] / walls[name],
            "of_dropping": walls[_DROPS] / walls[name],
            "all_seconds": [round(t.wall, 3) for t in each],
        }
        for name, each in times.items()
    }
    return {"rows": rows, "unusable": unusable}


def _timed(go: Callable[[], Any]) -> Timed:
    """The time of `go()`, or the Timed that it returns."""
    wall, cpu = time.perf_counter(), _cpu()
    own = go()
    return own if isinstance(own, Timed) else Timed(time.perf_counter() - wall, _cpu() - cpu)


def _cpu() -> float:
    """CPU seconds of this process and its children, also ended ones."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        time.process_time()
        + ended.ru_utime
        + ended.ru_stime
        + sum(_cpu_of(child.pid) for child in active_children())
    )


def _cpu_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # not Linux, or it has just ended
        return 0.0
    # user and system time
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _drain(work: Work) -> None:
    for loaded in pipeline.read(work.batches, 0, work.steps, work.batches.data):
        _refuse(loaded)


def _steady(work: Work) -> Timed:
    """Throughput of as many processes as threads, each with one thread, in the steady state.

    Counting begins after more batches than can be prefetched, and the data continues after the last
    counted batch, so as many batches are prefetched at the end as at the start.
    """
    first = _READ_AHEAD * work.threads
    data, last = (
        replace(work.batches.data, num_workers=work.threads, num_threads=1),
        first + work.steps,
    )
    with closing(pipeline.read(work.batches, 0, _ENDLESS, data)) as stream:
        for k, loaded in enumerate(stream, 1):
            _refuse(loaded)
            if k == first:
                wall, cpu = time.perf_counter(), _cpu()
            if k == last:
                return Timed(time.perf_counter() - wall, _cpu() - cpu)
    raise AssertionError("the data ended early")


def _refuse(loaded: pipeline.Loaded) -> None:
    if loaded.bad:
        raise RuntimeError(f"the benchmark's clips must decode: {loaded.bad[0]}")


def _each(decode: Callable[..., Any], wanted: decoders.Wanted, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda each: decode(*each), wanted):
            pass


# -- random access


def _random_access(workdir: Path, repetitions: int, experiment: Experiment) -> dict[str, Any]:
    frames, spec = experiment.data.num_frames, experiment.bench
    lengths = (_SHORT, _LONG) if spec.num_clips > 50 else (2, 6)
    found: dict[str, list[float]] = {}
    rng = np.random.default_rng(0)
    paths = [workdir / f"{length}s.mp4" for length in lengths]
    data = DataSpec(num_frames=frames, image_size=_SIDE, cache_dir=experiment.data.cache_dir)
    _make(paths[0], (320, 240), lengths[0])
    _repeat(paths[0], paths[1], lengths[1] // lengths[0])
    span = frames * _STRIDE / _RATE
    for _ in range(repetitions):
        for path, length in zip(paths, lengths, strict=True):
            starts = rng.uniform(0, length - span, _POSITIONS)
            seconds = (
                _timed(lambda p=path, s=starts: [_clip(p, start, span, data) for start in s]).wall
                / _POSITIONS
            )
            found.setdefault(f"out of {length} s", []).append(1000 * seconds)
        end = lengths[0] - span
        found.setdefault(f"the end of {lengths[0]} s, decoded from its start", []).append(
            1000 * _timed(partial(_from_start, paths[0], end, span, frames)).wall
        )
    return {name: {"milliseconds": float(np.median(each))} for name, each in found.items()}


def _clip(path: Path, start: float, span: float, data: DataSpec) -> None:
    """Loads a clip as in training, including opening the file and reading its length."""
    clips.load(Record(path.name, str(path), start=start, end=start + span), data, clips.CENTRE)


def _from_start(path: Path, start: float, span: float, frames: int) -> None:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        wanted = list(start + (np.arange(frames) + 0.5) * span / frames)
        for frame in container.decode(stream):
            if wanted and frame.time >= wanted[0]:
                wanted.pop(0)
                frame.reformat(_SIDE * 4 // 3 // 2 * 2, _SIDE, "rgb24").to_ndarray()
            if not wanted:
                break


def _make(path: Path, size: tuple[int, int], seconds: int) -> None:
    """Writes a video of moving textures with one keyframe a second."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (size[1] // 8 + 16, size[0] // 8 + 64, 3), np.uint8)
    large = large.repeat(8, axis=0).repeat(8, axis=1)
    with fresh_file(path) as fresh, av.open(str(fresh), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=_RATE, options={"g": str(_RATE), "preset": "veryfast"}
        )
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for i in range(seconds * _RATE):
            x, y = (3 * i) % 500, (i % 100)
            picture = np.ascontiguousarray(large[y : y + size[1], x : x + size[0]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _repeat(path: Path, out: Path, times: int) -> None:
    """Repeats a video `times` times in one file by copying packets."""
    if out.exists():
        return
    with fresh_file(out) as fresh, av.open(str(fresh), "w", format="mp4") as container:
        made, shift = None, 0
        for _ in range(times):
            with av.open(str(path)) as source:
                stream = source.streams.video[0]
                made = made or container.add_stream_from_template(stream)
                length = round(stream.frames / (_RATE * stream.time_base))
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = (
                            packet.pts + shift,
                            packet.dts + shift,
                            made,
                        )
                        container.mux(packet)
                shift += length


# -- memory


def _memory(experiment: Experiment) -> dict[str, Any]:
    """Resident memory in MiB by number of clips, of a worker process and of this process when it
    decodes.
    """
    spec = experiment.bench
    source = sources.open_source("toybox:tiny", "train", experiment.data.cache_dir)
    data = replace(
        experiment.data, num_frames=8, image_size=32, decode_short_side=0, frame_sampling="uniform"
    )
    batches = pipeline.Batches(
        source, data, ParticleSpec(patch_size=(2, 16, 16)), 0, spec.batch_size
    )
    steps = max(_MEMORY_STEPS, spec.memory_clips // spec.batch_size)
    marks = [k for k in range(steps) if (k + 1) % (steps // _MEMORY_STEPS) == 0]
    found: dict[str, Any] = {"num_clips": [(k + 1) * spec.batch_size for k in marks]}
    for name, workers in (("a worker process", 1), ("this process, decoding itself", 0)):
        before = set(active_children())
        mib = []
        for k, _ in enumerate(pipeline.read(batches, 0, steps, replace(data, num_workers=workers))):
            if k in marks:
                started = [child.pid for child in set(active_children()) - before]
                mib.append(round(sum(map(_resident, started or [os.getpid()])), 1))
        found[name] = mib
        say(
            f"memory of {name}: {mib[0]:.0f} MiB after {found['num_clips'][0]} clips, "
            f"{mib[-1]:.0f} "
            f"MiB after {found['num_clips'][-1]}"
        )
    return found


def _resident(pid: int) -> float:
    try:
        return (
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        )
    except OSError:  # not Linux, or it has just ended
        return math.nan


def _report(figures: dict[str, Any]) -> Iterator[str]:
    yield from (
        "# Data loader",
        "",
        f"{figures['cores']} cores; medians of {figures['repetitions']} interleaved repetitions.",
        "",
    )
    for title in ("short clips", "1080p"):
        yield from (f"## {title}", "")
        yield from table(
            ["", "clips/s", "cores busy", "of PyAV that only decodes", "of PyAV that drops, too"],
            [
                [
                    name,
                    f"{each['clips_per_second']:.1f}",
                    f"{each['cores']:.2f}",
                    f"{each['of_bare']:.2f}",
                    f"{each['of_dropping']:.2f}",
                ]
                for name, each in figures[title]["rows"].items()
            ],
        )
        yield from (
            "",
            *(
                f"{name} is installed but does not work: {why}\n"
                for name, why in figures[title]["unusable"].items()
            ),
        )
    yield from (
        "CPU time includes child processes. The loop that drops skips all frames that no other "
        "frame needs, even requested ones: an upper bound that no reader of these frames can "
        "reach.",
        "",
    )
    yield from ("## Random access, 320x240, one thread, loading a clip as in training", "")
    yield from table(
        ["frames", "ms a clip"],
        [[name, f"{each['milliseconds']:.1f}"] for name, each in figures["random access"].items()],
    )
    memory = dict(figures["memory"])
    yield from ("", "## Resident memory, MiB", "")
    yield from table(
        ["clips", *memory.pop("num_clips")], [[name, *mib] for name, mib in memory.items()]
    )
    yield ""
