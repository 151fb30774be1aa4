# SPDX-License-Identifier: Apache-2.0
"""Summarizes a data source and lists unreadable files and near-duplicates."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from particlejax.config.data import DataSpec
from particlejax.config.job_specs import CheckDataJob
from particlejax.core import io
from particlejax.core.typing import UserError
from particlejax.data import inspect, sources
from particlejax.data.video import timeout
from particlejax.data.video.decode import Unreadable
from particlejax.reports import plots
from particlejax.reports.markdown import table
from particlejax.train import stage
from particlejax.train.log import Progress, log_info

_MAX_LINES = 20  # lines of a list in the report
ClipInfos = dict[str, list[inspect.ClipInfo]]


def check_data(experiment: CheckDataJob, workdir: Path, name: str) -> None:
    """Job 'check_data': decodes every clip of every split of `config.data.source`."""
    del name
    data = experiment.data
    if not data.source:
        raise UserError(
            "config.data.source is empty: name the data to check, as in "
            "--config.data.source=folder:PATH."
        )
    clips_by_split, unreadable, classes = _inspect_source(data)
    duplicates = _near_duplicates(clips_by_split)
    statistics = {split: _statistics(clips, classes) for split, clips in clips_by_split.items()}
    statistics["near_duplicates"] = [list(pair) for pair in duplicates]
    stage.add_results(workdir, "check", statistics, unreadable)
    path = workdir / "report.md"
    io.write_text(
        path, "\n".join(_report(data.source, clips_by_split, statistics, unreadable, workdir))
    )
    if not any(clips_by_split.values()):
        raise UserError(
            f"none of the {len(unreadable)} clips of {data.source} can be read "
            f"({next(iter(unreadable.values()))}, ...): {path} lists the reasons; repair the files "
            "or use other data."
        )
    log_info(
        f"{sum(map(len, clips_by_split.values()))} clips are readable, {len(unreadable)} are not; "
        f"{len(duplicates)} near-duplicates across splits"
    )
    log_info(f"report: {path}")


def _inspect_source(data: DataSpec) -> tuple[ClipInfos, dict[str, str], tuple[str, ...]]:
    clips_by_split: ClipInfos = {}
    unreadable: dict[str, str] = {}
    classes: tuple[str, ...] = ()
    for split in sources.splits(data.source, data.cache_dir):
        source = sources.open_source(data.source, split, data.cache_dir)
        clips_by_split[split], classes = [], source.classes
        progress = Progress(split, len(source), unit="clip")
        for result in _inspect_clips(source, data):
            if isinstance(result, inspect.ClipInfo):
                clips_by_split[split].append(result)
            else:
                unreadable[result[0]] = result[1]
                log_info(f"clip {result[0]} is unreadable ({result[1]})")
            progress.update()
        progress.close()
    return clips_by_split, unreadable, classes


def _inspect_clips(source: sources.Source, data: DataSpec) -> Iterator[inspect.InspectionResult]:
    """Yields the findings of each clip in order; consecutive clips of one file are decoded
    together.
    """
    pending: deque[Future[list[inspect.InspectionResult]]] = deque()
    with ThreadPoolExecutor(data.num_threads) as pool:
        for _, clips in groupby(
            map(source.__getitem__, range(len(source))), lambda record: record.video
        ):
            pending.append(
                pool.submit(_inspect_clips_of_file, list(clips), data.decode_timeout_seconds)
            )
            if len(pending) > 2 * data.num_threads:  # bounds memory: records may hold whole files
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


def _inspect_clips_of_file(
    clips: Sequence[sources.Record], limit: float
) -> list[inspect.InspectionResult]:
    """Findings of the clips of one file; its time limit is `limit` seconds per minute of video."""
    file = clips[0].video
    try:
        minutes = timeout.run_with_timeout(limit, partial(inspect.duration, file), file) / 60
        return timeout.run_with_timeout(
            limit * max(1.0, minutes), partial(inspect.inspect_file, clips), file
        )
    except Unreadable as error:
        return [(clip.name, error.reason) for clip in clips]


def _near_duplicates(clips_by_split: ClipInfos) -> list[tuple[str, str]]:
    clips = [(split, info) for split, infos in clips_by_split.items() for info in infos]
    if not clips:
        return []
    pairs = inspect.near_duplicates(
        np.stack([info.fingerprint for _, info in clips]), [split for split, _ in clips]
    )
    return [
        (f"{clips[i][0]}: {clips[i][1].name}", f"{clips[j][0]}: {clips[j][1].name}")
        for i, j in pairs
    ]


def _statistics(clips: Sequence[inspect.ClipInfo], classes: Sequence[str]) -> dict[str, Any]:
    if not clips:
        return {"num_clips": 0}
    seconds = np.array([clip.seconds for clip in clips])
    labels = Counter(classes[clip.label] for clip in clips if clip.label >= 0)
    return {
        "num_clips": len(clips),
        "hours": float(seconds.sum() / 3600),
        "frames": sum(clip.frames for clip in clips),
        "seconds": {
            "least": float(seconds.min()),
            "median": float(np.median(seconds)),
            "most": float(seconds.max()),
        },
        "sizes": _counts(f"{clip.width}x{clip.height}" for clip in clips),
        "rates": _counts(f"{clip.fps:g}" for clip in clips),
        "audio": sum(clip.audio for clip in clips),
        "captions": sum(clip.captioned for clip in clips),
        "labels": dict(sorted(labels.items())),
        "unlabelled": sum(clip.label < 0 for clip in clips),
    }


def _counts(values: Iterator[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _report(
    source: str,
    clips_by_split: ClipInfos,
    statistics: dict[str, Any],
    unreadable: dict[str, str],
    workdir: Path,
) -> Iterator[str]:
    yield from (f"# {source}", "")
    splits = [split for split in clips_by_split if statistics[split]["num_clips"]]
    if splits:
        yield from _tables(splits, clips_by_split, statistics, workdir)
    yield from _lists(statistics["near_duplicates"], unreadable)
    yield from ("All figures are in [results.json](results.json).", "")


def _tables(
    splits: Sequence[str], clips_by_split: ClipInfos, statistics: dict[str, Any], workdir: Path
) -> Iterator[str]:
    yield from table(
        [
            "split",
            "clips",
            "hours",
            "seconds: least, median, most",
            "sizes",
            "frames/s",
            "with sound",
            "with caption",
            "unlabelled",
        ],
        [_row(split, statistics[split]) for split in splits],
    )
    lengths = {split: [clip.seconds for clip in clips_by_split[split]] for split in splits}
    plots.histograms(lengths, workdir / "report" / "seconds.png", "length of the clips", "seconds")
    yield from ("", "![lengths](report/seconds.png)", "")
    classes = sorted({label for split in splits for label in statistics[split]["labels"]})
    if classes:
        counts = {
            split: [statistics[split]["labels"].get(label, 0) for label in classes]
            for split in splits
        }
        plots.bars(counts, classes, workdir / "report" / "classes.png", "clips of each class")
        yield from ("![classes](report/classes.png)", "")
        missing = [
            f"{label} in {split}"
            for split in splits
            for label in classes
            if not statistics[split]["labels"].get(label)
        ]
        if missing:
            yield from ("No clip of " + ", ".join(missing[:_MAX_LINES]) + ".", "")


def _lists(pairs: Sequence[Sequence[str]], unreadable: dict[str, str]) -> Iterator[str]:
    yield from (f"## {len(pairs)} near-duplicates across splits", "")
    if pairs:
        yield from (
            *table(["one", "other"], pairs[:_MAX_LINES]),
            "",
            "Near-duplicates in two splits inflate the accuracy: give them the same `group`, or "
            "move them into one split.",
            "",
        )
    yield from (f"## {len(unreadable)} unreadable clips", "")
    if unreadable:
        yield from (
            *table(
                ["clip", "reason"],
                [[clip, reason] for clip, reason in list(unreadable.items())[:_MAX_LINES]],
            ),
            "",
        )


def _row(split: str, statistics: dict[str, Any]) -> list[Any]:
    seconds, n = statistics["seconds"], statistics["num_clips"]
    return [
        split,
        n,
        f"{statistics['hours']:.3g}",
        ", ".join(f"{seconds[key]:.2f}" for key in ("least", "median", "most")),
        _most_common(statistics["sizes"]),
        _most_common(statistics["rates"]),
        f"{statistics['audio'] / n:.0%}",
        f"{statistics['captions'] / n:.0%}",
        statistics["unlabelled"],
    ]


def _most_common(counts: dict[str, int]) -> str:
    texts = [f"{value} ({count})" for value, count in list(counts.items())[:3]]
    return ", ".join(texts) + (f" and {len(counts) - 3} others" if len(counts) > 3 else "")
