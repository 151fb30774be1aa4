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
from particlejax.config.data import DataSpec, ParticleSpec
from particlejax.config.job_specs import BenchJob
from particlejax.core import io
from particlejax.core.io import atomic_file
from particlejax.data import clips, pipeline, sources
from particlejax.data.sources import ListSource, Record
from particlejax.data.video.decode import Video
from particlejax.reports.markdown import table
from particlejax.train import stage
from particlejax.train.log import log_info

_RATE = 25  # frames/s and GOP length of the generated files
_SHORT_SECONDS, _LONG_SECONDS = 60, 3600  # seconds; lengths of the files for random access
_HD = (1920, 1080)
_HD_SECONDS = 20
_STRIDE = 2  # frames between sampled frames in the long files
_POSITIONS = 12  # random positions in a repetition
_MEMORY_STEPS = 10
_READ_AHEAD = 12  # prefetched batches of a process, plus one
_NUM_BATCHES = 10**6  # batches
_SIDE = 112  # short side in pixels in random access
_DECODE_ONLY, _DECODE_ONLY_DROPPING = (
    "PyAV, decodes only",
    "PyAV, decodes only and drops what no other frame needs",
)
_PROCESSES = "particlejax, whole pipeline in as many processes as threads"
_DECODE_AND_SCALE = "PyAV, decodes and scales what is wanted"  # the minimum of any consumer


class Timing(NamedTuple):
    """A repetition: wall-clock seconds, and CPU seconds of all cores and processes."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Workload:
    """The clips of a comparison: the pipeline's data, and the file and frame times of each clip."""

    batches: pipeline.TrainBatches
    steps: int
    threads: int
    processes: bool = False  # whether to measure processes too; for large frames, threads suffice

    @property
    def wanted_frames(self) -> decoders.WantedFrames:
        """File and frame times in seconds of all frames that the pipeline reads, in order."""
        wanted = []
        for batch in range(self.steps):
            clip_indices = self.batches.clip_indices(batch)
            for i, clip_index in enumerate(clip_indices):
                record = self.batches.source[clip_index]
                rng = np.random.default_rng((self.batches.seed, batch * len(clip_indices) + i))
                wanted.append((record.video, record.start + self._times(record, rng)))
        return wanted

    def _times(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        with Video(record.video) as video:
            length = record.until(video.duration) - record.start
            offset, times, _ = clips.sample_times(length, 1 / video.fps, self.batches.data, rng)
            return np.minimum(offset + times, length - 0.5 / video.fps)


def bench(experiment: BenchJob, workdir: Path, name: str) -> None:
    """Job 'bench_dataloader': writes report.md and results.json."""
    del name
    repetitions = experiment.bench.repetitions
    results: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "repetitions": repetitions}
    for title, workload in _workloads(experiment, workdir):
        results[title] = _compare(workload, repetitions, title)
    results["random access"] = _random_access(workdir, repetitions, experiment)
    results["memory"] = _memory(experiment)
    stage.add_results(workdir, "bench_dataloader", results, {})
    text = "\n".join(_report(results))
    io.write_text(workdir / "report.md", text)
    print(text)


def _workloads(experiment: BenchJob, workdir: Path) -> Iterator[tuple[str, Workload]]:
    data, spec = experiment.data, experiment.bench
    source = sources.open_split(data)
    batches = pipeline.TrainBatches(
        source, data, experiment.particles, experiment.seed, spec.batch_size
    )
    yield (
        "short clips",
        Workload(
            batches, max(1, spec.num_clips // spec.batch_size), data.num_threads, processes=True
        ),
    )
    path = workdir / "hd.mp4"
    _make_video(path, _HD, _HD_SECONDS if spec.num_clips > 50 else 2)
    with Video(str(path)) as video:
        length = video.duration - data.num_frames * _STRIDE / _RATE
    starts = np.random.default_rng(0).uniform(
        0, max(length, 0.0), max(spec.batch_size, spec.num_clips // 20)
    )
    records = tuple(
        Record(
            f"{start:.2f}", str(path), start=start, end=start + data.num_frames * _STRIDE / _RATE
        )
        for start in starts
    )
    # a thread decodes a whole batch, so each needs several
    rows = max(1, len(records) // (4 * data.num_threads))
    batches = replace(
        batches,
        source=ListSource((), records),
        data=replace(data, frame_sampling="dense", frame_stride=(_STRIDE, _STRIDE)),
        num_rows=rows,
    )
    yield "1080p", Workload(batches, len(records) // rows, data.num_threads)


# -- the whole pipeline against decoding alone


def _compare(workload: Workload, repetitions: int, title: str) -> dict[str, Any]:
    wanted = workload.wanted_frames
    contenders: dict[str, Callable[[], Any]] = {
        "particlejax, whole pipeline": lambda: _drain(workload),
        _DECODE_ONLY: lambda: _decode_all(decoders.decode_only, wanted, workload.threads),
        _DECODE_AND_SCALE: lambda: _decode_all(
            partial(decoders.decode_and_scale, side=workload.batches.data.image_size),
            wanted,
            workload.threads,
        ),
        _DECODE_ONLY_DROPPING: lambda: _decode_all(
            partial(decoders.decode_only, drop=True), wanted, workload.threads
        ),
    }
    if workload.processes:
        contenders[_PROCESSES] = lambda: _steady_throughput(workload)
    other_decoders, unusable = decoders.other_decoders(
        wanted, workload.batches.data.decode_short_side or workload.batches.data.image_size
    )
    contenders |= {
        name: partial(_decode_all, decode, wanted, workload.threads)
        for name, decode in other_decoders.items()
    }
    times: dict[str, list[Timing]] = {name: [] for name in contenders}
    for repetition in range(repetitions + 1):
        for name, run in list(contenders.items()):
            if name == _PROCESSES and not repetition:
                continue  # new processes in each repetition
            try:
                timing = _time(run)
            except Exception as error:  # another package fails on a clip
                if name not in other_decoders:
                    raise
                del contenders[name], times[name]
                unusable[name] = decoders.error_summary(error)
                continue
            if repetition:  # the first one is warm-up
                times[name].append(timing)
        log_info(f"{title}: repetition {repetition} of {repetitions}")
    walls = {
        name: float(np.median([timing.wall for timing in timings]))
        for name, timings in times.items()
    }
    rows = {
        name: {
            "clips_per_second": len(wanted) / walls[name],
            "cores": float(np.median([timing.cpu / timing.wall for timing in timings])),
            "of_bare": walls[_DECODE_ONLY] / walls[name],
            "of_dropping": walls[_DECODE_ONLY_DROPPING] / walls[name],
            "all_seconds": [round(timing.wall, 3) for timing in timings],
        }
        for name, timings in times.items()
    }
    return {"rows": rows, "unusable": unusable}


def _time(run: Callable[[], Any]) -> Timing:
    """The time of `go()`, or the Timed that it returns."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    result = run()
    return (
        result
        if isinstance(result, Timing)
        else Timing(time.perf_counter() - wall, _cpu_seconds() - cpu)
    )


def _cpu_seconds() -> float:
    """CPU seconds of this process and its children, also ended ones."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        time.process_time()
        + children.ru_utime
        + children.ru_stime
        + sum(_cpu_seconds_of(child.pid) for child in active_children())
    )


def _cpu_seconds_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # not Linux, or it has just ended
        return 0.0
    # user and system time
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _drain(workload: Workload) -> None:
    for loaded in pipeline.read_batches(workload.batches, 0, workload.steps, workload.batches.data):
        _check_readable(loaded)


def _steady_throughput(workload: Workload) -> Timing:
    """Throughput of as many processes as threads, each with one thread, in the steady state.

    Counting begins after more batches than can be prefetched, and the data continues after the last
    counted batch, so as many batches are prefetched at the end as at the start.
    """
    first = _READ_AHEAD * workload.threads
    data, last = (
        replace(workload.batches.data, num_workers=workload.threads, num_threads=1),
        first + workload.steps,
    )
    with closing(pipeline.read_batches(workload.batches, 0, _NUM_BATCHES, data)) as stream:
        for batch, loaded in enumerate(stream, 1):
            _check_readable(loaded)
            if batch == first:
                wall, cpu = time.perf_counter(), _cpu_seconds()
            if batch == last:
                return Timing(time.perf_counter() - wall, _cpu_seconds() - cpu)
    raise AssertionError("the data ended early")


def _check_readable(loaded: pipeline.LoadedBatch) -> None:
    if loaded.unreadable:
        raise RuntimeError(f"the benchmark's clips must decode: {loaded.unreadable[0]}")


def _decode_all(decode: Callable[..., Any], wanted: decoders.WantedFrames, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda clip: decode(*clip), wanted):
            pass


# -- random access


def _random_access(workdir: Path, repetitions: int, experiment: BenchJob) -> dict[str, Any]:
    frames, spec = experiment.data.num_frames, experiment.bench
    lengths = (_SHORT_SECONDS, _LONG_SECONDS) if spec.num_clips > 50 else (2, 6)
    milliseconds: dict[str, list[float]] = {}
    rng = np.random.default_rng(0)
    paths = [workdir / f"{length}s.mp4" for length in lengths]
    data = DataSpec(num_frames=frames, image_size=_SIDE, cache_dir=experiment.data.cache_dir)
    _make_video(paths[0], (320, 240), lengths[0])
    _repeat_video(paths[0], paths[1], lengths[1] // lengths[0])
    span = frames * _STRIDE / _RATE
    for _ in range(repetitions):
        for path, length in zip(paths, lengths, strict=True):
            starts = rng.uniform(0, length - span, _POSITIONS)
            seconds = (
                _time(
                    lambda file=path, offsets=starts: [
                        _clip(file, start, span, data) for start in offsets
                    ]
                ).wall
                / _POSITIONS
            )
            milliseconds.setdefault(f"out of {length} s", []).append(1000 * seconds)
        end = lengths[0] - span
        milliseconds.setdefault(f"the end of {lengths[0]} s, decoded from its start", []).append(
            1000 * _time(partial(_from_start, paths[0], end, span, frames)).wall
        )
    return {name: {"milliseconds": float(np.median(times))} for name, times in milliseconds.items()}


def _clip(path: Path, start: float, span: float, data: DataSpec) -> None:
    """Loads a clip as in training, including opening the file and reading its length."""
    clips.load(Record(path.name, str(path), start=start, end=start + span), data, clips.CENTER_VIEW)


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


def _make_video(path: Path, size: tuple[int, int], seconds: int) -> None:
    """Writes a video of moving textures with one keyframe a second."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (size[1] // 8 + 16, size[0] // 8 + 64, 3), np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)
    with atomic_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=_RATE, options={"g": str(_RATE), "preset": "veryfast"}
        )
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for i in range(seconds * _RATE):
            x, y = (3 * i) % 500, (i % 100)
            frame = np.ascontiguousarray(texture[y : y + size[1], x : x + size[0]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _repeat_video(path: Path, out: Path, num_repeats: int) -> None:
    """Repeats a video `num_repeats` times in one file by copying packets."""
    if out.exists():
        return
    with atomic_file(out) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        output_stream, shift = None, 0
        for _ in range(num_repeats):
            with av.open(str(path)) as source:
                stream = source.streams.video[0]
                output_stream = output_stream or container.add_stream_from_template(stream)
                length = round(stream.frames / (_RATE * stream.time_base))
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = (
                            packet.pts + shift,
                            packet.dts + shift,
                            output_stream,
                        )
                        container.mux(packet)
                shift += length


# -- memory


def _memory(experiment: BenchJob) -> dict[str, Any]:
    """Resident memory in MiB by number of clips, of a worker process and of this process when it
    decodes.
    """
    spec = experiment.bench
    source = sources.open_source("toybox:tiny", "train", experiment.data.cache_dir)
    data = replace(
        experiment.data, num_frames=8, image_size=32, decode_short_side=0, frame_sampling="uniform"
    )
    batches = pipeline.TrainBatches(
        source, data, ParticleSpec(patch_size=(2, 16, 16)), 0, spec.batch_size
    )
    steps = max(_MEMORY_STEPS, spec.memory_clips // spec.batch_size)
    measured_batches = [
        batch for batch in range(steps) if (batch + 1) % (steps // _MEMORY_STEPS) == 0
    ]
    usage: dict[str, Any] = {
        "num_clips": [(batch + 1) * spec.batch_size for batch in measured_batches]
    }
    for name, workers in (("a worker process", 1), ("this process, decoding itself", 0)):
        running_before = set(active_children())
        mib = []
        for batch, _ in enumerate(
            pipeline.read_batches(batches, 0, steps, replace(data, num_workers=workers))
        ):
            if batch in measured_batches:
                started = [child.pid for child in set(active_children()) - running_before]
                mib.append(round(sum(map(_resident_mib, started or [os.getpid()])), 1))
        usage[name] = mib
        log_info(
            f"memory of {name}: {mib[0]:.0f} MiB after {usage['num_clips'][0]} clips, "
            f"{mib[-1]:.0f} "
            f"MiB after {usage['num_clips'][-1]}"
        )
    return usage


def _resident_mib(pid: int) -> float:
    try:
        return (
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        )
    except OSError:  # not Linux, or it has just ended
        return math.nan


def _report(results: dict[str, Any]) -> Iterator[str]:
    yield from (
        "# Data loader",
        "",
        f"{results['cores']} cores; medians of {results['repetitions']} interleaved repetitions.",
        "",
    )
    for title in ("short clips", "1080p"):
        yield from (f"## {title}", "")
        yield from table(
            ["", "clips/s", "cores busy", "of PyAV that only decodes", "of PyAV that drops, too"],
            [
                [
                    name,
                    f"{row['clips_per_second']:.1f}",
                    f"{row['cores']:.2f}",
                    f"{row['of_bare']:.2f}",
                    f"{row['of_dropping']:.2f}",
                ]
                for name, row in results[title]["rows"].items()
            ],
        )
        yield from (
            "",
            *(
                f"{name} is installed but does not work: {reason}\n"
                for name, reason in results[title]["unusable"].items()
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
        [[name, f"{row['milliseconds']:.1f}"] for name, row in results["random access"].items()],
    )
    memory = dict(results["memory"])
    yield from ("", "## Resident memory, MiB", "")
    yield from table(
        ["clips", *memory.pop("num_clips")], [[name, *mib] for name, mib in memory.items()]
    )
    yield ""
