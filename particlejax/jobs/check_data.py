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

from particlejax.config.experiment import DataSpec, Experiment
from particlejax.core import io
from particlejax.core.typing import UserError
from particlejax.data import inspect, sources
from particlejax.data.video import timeout
from particlejax.data.video.decode import Unreadable
from particlejax.reports import plots
from particlejax.reports.markdown import table
from particlejax.train import stage
from particlejax.train.log import Progress, say

_MOST = 20  # lines of a list in the report
Looks = dict[str, list[inspect.Seen]]


def check_data(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'check_data': decodes every clip of every split of `config.data.source`."""
    del name
    data = experiment.data
    if not data.source:
        raise UserError(
            "config.data.source is empty: name the data to check, as in "
            "--config.data.source=folder:PATH."
        )
    seen, bad, classes = _look(data)
    alike = _alike(seen)
    figures = {split: _figures(clips, classes) for split, clips in seen.items()}
    figures["near_duplicates"] = [list(pair) for pair in alike]
    stage.add_results(workdir, "check", figures, bad)
    path = workdir / "report.md"
    io.write_text(path, "\n".join(_report(data.source, seen, figures, bad, workdir)))
    if not any(seen.values()):
        raise UserError(
            f"none of the {len(bad)} clips of {data.source} can be read "
            f"({next(iter(bad.values()))}, ...): {path} lists the reasons; repair the files or "
            "use other data."
        )
    say(
        f"{sum(map(len, seen.values()))} clips are readable, {len(bad)} are not; "
        f"{len(alike)} near-duplicates across splits"
    )
    say(f"report: {path}")


def _look(data: DataSpec) -> tuple[Looks, dict[str, str], tuple[str, ...]]:
    seen: Looks = {}
    bad: dict[str, str] = {}
    classes: tuple[str, ...] = ()
    for split in sources.splits(data.source, data.cache_dir):
        source = sources.open_source(data.source, split, data.cache_dir)
        seen[split], classes = [], source.classes
        progress = Progress(split, len(source), unit="clip")
        for found in _read(source, data):
            if isinstance(found, inspect.Seen):
                seen[split].append(found)
            else:
                bad[found[0]] = found[1]
                say(f"clip {found[0]} is unreadable ({found[1]})")
            progress.update()
        progress.close()
    return seen, bad, classes


def _read(source: sources.Source, data: DataSpec) -> Iterator[inspect.Found]:
    """Yields the findings of each clip in order; consecutive clips of one file are decoded
    together.
    """
    waiting: deque[Future[list[inspect.Found]]] = deque()
    with ThreadPoolExecutor(data.num_threads) as pool:
        for _, clips in groupby(
            map(source.__getitem__, range(len(source))), lambda record: record.video
        ):
            waiting.append(pool.submit(_file, list(clips), data.decode_timeout_seconds))
            if len(waiting) > 2 * data.num_threads:  # bounds memory: records may hold whole files
                yield from waiting.popleft().result()
        for each in waiting:
            yield from each.result()


def _file(clips: Sequence[sources.Record], limit: float) -> list[inspect.Found]:
    """Findings of the clips of one file; its time limit is `limit` seconds per minute of video."""
    file = clips[0].video
    try:
        minutes = timeout.within(limit, partial(inspect.seconds, file), file) / 60
        return timeout.within(limit * max(1.0, minutes), partial(inspect.look, clips), file)
    except Unreadable as error:
        return [(clip.name, error.reason) for clip in clips]


def _alike(seen: Looks) -> list[tuple[str, str]]:
    clips = [(split, each) for split, found in seen.items() for each in found]
    if not clips:
        return []
    pairs = inspect.look_alikes(
        np.stack([each.print for _, each in clips]), [split for split, _ in clips]
    )
    return [
        (f"{clips[i][0]}: {clips[i][1].name}", f"{clips[j][0]}: {clips[j][1].name}")
        for i, j in pairs
    ]


def _figures(clips: Sequence[inspect.Seen], classes: Sequence[str]) -> dict[str, Any]:
    if not clips:
        return {"num_clips": 0}
    seconds = np.array([each.seconds for each in clips])
    labels = Counter(classes[each.label] for each in clips if each.label >= 0)
    return {
        "num_clips": len(clips),
        "hours": float(seconds.sum() / 3600),
        "frames": sum(each.frames for each in clips),
        "seconds": {
            "least": float(seconds.min()),
            "median": float(np.median(seconds)),
            "most": float(seconds.max()),
        },
        "sizes": _counts(f"{each.width}x{each.height}" for each in clips),
        "rates": _counts(f"{each.fps:g}" for each in clips),
        "audio": sum(each.audio for each in clips),
        "captions": sum(each.captioned for each in clips),
        "labels": dict(sorted(labels.items())),
        "unlabelled": sum(each.label < 0 for each in clips),
    }


def _counts(values: Iterator[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _report(
    source: str, seen: Looks, figures: dict[str, Any], bad: dict[str, str], workdir: Path
) -> Iterator[str]:
    yield from (f"# {source}", "")
    splits = [split for split in seen if figures[split]["num_clips"]]
    if splits:
        yield from _tables(splits, seen, figures, workdir)
    yield from _lists(figures["near_duplicates"], bad)
    yield from ("All figures are in [results.json](results.json).", "")


def _tables(
    splits: Sequence[str], seen: Looks, figures: dict[str, Any], workdir: Path
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
        [_row(split, figures[split]) for split in splits],
    )
    lengths = {split: [each.seconds for each in seen[split]] for split in splits}
    plots.histograms(lengths, workdir / "report" / "seconds.png", "length of the clips", "seconds")
    yield from ("", "![lengths](report/seconds.png)", "")
    classes = sorted({label for split in splits for label in figures[split]["labels"]})
    if classes:
        counts = {
            split: [figures[split]["labels"].get(label, 0) for label in classes] for split in splits
        }
        plots.bars(counts, classes, workdir / "report" / "classes.png", "clips of each class")
        yield from ("![classes](report/classes.png)", "")
        absent = [
            f"{label} in {split}"
            for split in splits
            for label in classes
            if not figures[split]["labels"].get(label)
        ]
        if absent:
            yield from ("No clip of " + ", ".join(absent[:_MOST]) + ".", "")


def _lists(pairs: Sequence[Sequence[str]], bad: dict[str, str]) -> Iterator[str]:
    yield from (f"## {len(pairs)} near-duplicates across splits", "")
    if pairs:
        yield from (
            *table(["one", "other"], pairs[:_MOST]),
            "",
            "Near-duplicates in two splits inflate the accuracy: give them the same `group`, or "
            "move them into one split.",
            "",
        )
    yield from (f"## {len(bad)} unreadable clips", "")
    if bad:
        yield from (
            *table(
                ["clip", "reason"], [[clip, reason] for clip, reason in list(bad.items())[:_MOST]]
            ),
            "",
        )


def _row(split: str, figures: dict[str, Any]) -> list[Any]:
    seconds, n = figures["seconds"], figures["num_clips"]
    return [
        split,
        n,
        f"{figures['hours']:.3g}",
        ", ".join(f"{seconds[key]:.2f}" for key in ("least", "median", "most")),
        _most(figures["sizes"]),
        _most(figures["rates"]),
        f"{figures['audio'] / n:.0%}",
        f"{figures['captions'] / n:.0%}",
        figures["unlabelled"],
    ]


def _most(counts: dict[str, int]) -> str:
    shown = [f"{value} ({count})" for value, count in list(counts.items())[:3]]
    return ", ".join(shown) + (f" and {len(counts) - 3} others" if len(counts) > 3 else "")
