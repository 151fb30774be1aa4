# SPDX-License-Identifier: Apache-2.0
"""Summarizes a data source; finds unreadable files, clips that are the same or look alike, and what
does not fit.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from particlejax.config.data import DataSpec
from particlejax.config.job_specs import CheckDataJob
from particlejax.core import io
from particlejax.core.typing import UserError
from particlejax.data import duplicates, inspect, inspect_source, sources
from particlejax.data.duplicates import SplitClip
from particlejax.distributed import cluster
from particlejax.objectives.label_targets import MULTI_LABEL_SEPARATOR
from particlejax.reports import data_check
from particlejax.reports.data_check import UNREADABLE, ClipProblem, Findings
from particlejax.train import stage
from particlejax.train.log import Progress, log_info

_TRAIN = "train"  # the split whose accuracy is not reported


class _Inspected(NamedTuple):
    clips: dict[str, list[SplitClip]]  # readable ones, by split
    unreadable: list[ClipProblem]


def check_data(experiment: CheckDataJob, workdir: Path, name: str) -> None:
    """Job 'check_data': decodes every clip of every split of `config.data.source`."""
    del name
    data = experiment.data
    if not data.source:
        raise UserError(
            "config.data.source is empty: name the data to check, as in "
            "--config.data.source=folder:PATH."
        )
    clips_by_split, unreadable = _inspect_source(data)
    clips = [clip for split_clips in clips_by_split.values() for clip in split_clips]
    pairs = duplicates.find_pairs(clips)
    counts = data_check.count_pairs(pairs)
    findings = Findings(
        data.source,
        {split: [clip.info.seconds for clip in found] for split, found in clips_by_split.items()},
        _statistics(clips_by_split),
        pairs,
        [*unreadable, *_problems(clips)],
        list(_notes(data, clips)),
    )
    if not cluster.is_primary():
        return
    # a check of before, also of other data, is replaced
    io.write_json(workdir / stage.RESULTS, _results(findings, counts))
    path = data_check.write(findings, workdir)
    if not clips:
        raise UserError(
            f"none of the {len(unreadable)} clips of {data.source} can be read "
            f"({unreadable[0].text}, ...): {path} lists the reasons; repair the files or use other "
            "data."
        )
    _log(findings, counts, path)


def _results(findings: Findings, counts: Mapping[str, Any]) -> dict[str, Any]:
    near_duplicates = [
        [str(pair.one), str(pair.other)]
        for pair in findings.pairs
        if pair.is_across and pair.kind in duplicates.CONTENT_KINDS
    ]
    return {
        "check": {
            **findings.statistics,
            "pairs": counts,
            "near_duplicates": near_duplicates,
            "problems": dict(Counter(problem.kind for problem in findings.problems)),
            "notes": list(findings.notes),
        },
        "unreadable": [
            {"path": problem.clip, "reason": problem.text} for problem in findings.unreadable
        ],
    }


def _log(findings: Findings, counts: Mapping[str, Mapping[str, int]], path: Path) -> None:
    num_clips = sum(map(len, findings.seconds.values()))
    log_info(f"{num_clips} clips are readable, {len(findings.unreadable)} are not")
    for note in findings.notes:
        log_info(note)
    log_info(f"files and clips that do not fit: {data_check.count_kinds(findings.misfits)}")
    log_info(f"pairs within one split: {data_check.summary(counts['within_one_split'])}")
    log_info(f"pairs across splits: {data_check.summary(counts['across_splits'])}")
    log_info(f"report: {path}; all pairs: {path.with_name(data_check.PAIRS)}")
    across, within = counts["across_splits"], counts["within_one_split"]
    num_across = sum(across[kind] for kind in duplicates.KINDS)
    contradictory = across["contradictory labels"] + within["contradictory labels"]
    if num_across or contradictory:
        log_info(
            f"check failed: pairs across splits: {num_across}, pairs with contradictory labels: "
            f"{contradictory}; the report says what to do about each"
        )
    else:
        log_info("check passed: no pair across splits, no contradictory labels")


# -- inspection


def _inspect_source(data: DataSpec) -> _Inspected:
    clips_by_split: dict[str, list[SplitClip]] = {}
    unreadable: list[ClipProblem] = []
    for split in sources.splits(data.source, data.cache_dir):
        source = sources.open_source(data.source, split, data.cache_dir)
        parts = np.cumsum([count for _, count, _ in sources.parts_of(source)])
        clips_by_split[split] = []
        progress = Progress(split, len(source), unit="clip")
        for i, result in enumerate(inspect_source.inspect_clips(source, data)):
            if isinstance(result, inspect.ClipInfo):
                label = source.classes[result.label] if result.label >= 0 else ""
                part = int(np.searchsorted(parts, i, side="right"))
                clips_by_split[split].append(SplitClip(split, result, label, part))
            else:
                unreadable.append(ClipProblem(split, result[0], UNREADABLE, result[1]))
                log_info(f"clip {result[0]} is unreadable ({result[1]})")
            progress.update()
        progress.close()
    return _Inspected(clips_by_split, unreadable)


# -- findings of single clips, and of all


def _problems(clips: Sequence[SplitClip]) -> Iterator[ClipProblem]:
    """Yields the problems of each clip, and those of its file with the first clip of it."""
    seen = set()
    for clip in clips:
        if not clip.info.fingerprint.has_content:
            text = "black or of one color: it is compared by exact equality alone"
            yield ClipProblem(clip.split, clip.info.name, "no content", text)
        problems = clip.info.problems
        if clip.info.file not in seen:
            seen.add(clip.info.file)
            problems = (*clip.info.file.problems, *problems)
        for problem in problems:
            yield ClipProblem(clip.split, clip.info.name, *problem)


def _notes(data: DataSpec, clips: Sequence[SplitClip]) -> Iterator[str]:
    """Yields what does not fit between the settings of sampling and the clips."""
    if not clips:
        return
    infos = [clip.info for clip in clips]
    few = [info.frames for info in infos if info.frames < data.num_frames]
    if few:
        yield (
            f"{len(few)} of {len(clips)} clips have fewer than config.data.num_frames="
            f"{data.num_frames} frames (the shortest {min(few)}): frames are repeated; set the "
            "number of the training, or a smaller one"
        )
    span = np.full(len(infos), data.clip_seconds)
    setting = f"config.data.clip_seconds={data.clip_seconds:g}"
    if data.frame_sampling == "dense":
        stride = round(math.sqrt(data.frame_stride[0] * data.frame_stride[1]))
        span = np.array([data.num_frames * stride / info.fps for info in infos])
        setting = f"{data.num_frames} frames of stride {stride} (config.data.frame_stride)"
    seconds = np.array([info.seconds for info in infos])
    short = int((seconds + 1 / np.array([info.fps for info in infos]) < span).sum())
    if short:
        most = "most clips" if 2 * short > len(clips) else "some clips"
        yield (
            f"{setting} is longer than {most} ({short} of {len(clips)}, median "
            f"{np.median(seconds):.2f} s): the last frame is repeated; set a shorter one"
        )


def _statistics(clips_by_split: Mapping[str, Sequence[SplitClip]]) -> dict[str, dict[str, Any]]:
    class_counts = {split: _class_counts(clips) for split, clips in clips_by_split.items()}
    classes = sorted(set().union(*class_counts.values()))
    if _are_numbers(classes):  # targets of a regression
        class_counts, classes = {split: {} for split in class_counts}, []
    measured = [split for split in clips_by_split if split != _TRAIN] or list(clips_by_split)
    return {
        split: {"num_clips": 0}
        if not clips
        else _split_statistics(clips)
        | {
            "class_counts": class_counts[split],
            "missing": [name for name in classes if name not in class_counts[split]],
            "few_clips": {
                name: count
                for name, count in class_counts[split].items()
                if split in measured and not data_check.is_measurable(count)
            },
        }
        for split, clips in clips_by_split.items()
    }


def _class_counts(clips: Sequence[SplitClip]) -> dict[str, int]:
    """Returns the number of clips of each class; a label 'a|b' is of two classes."""
    counts = Counter(
        name for clip in clips if clip.label for name in clip.label.split(MULTI_LABEL_SEPARATOR)
    )
    return dict(sorted(counts.items()))


def _are_numbers(classes: Sequence[str]) -> bool:
    """Whether the labels are numbers that are not only integers, which may be class names."""
    try:
        return any(float(name) % 1 for name in classes) and bool(classes)
    except ValueError:
        return False


def _split_statistics(clips: Sequence[SplitClip]) -> dict[str, Any]:
    infos = [clip.info for clip in clips]
    seconds = np.array([info.seconds for info in infos])
    labels = Counter(clip.label for clip in clips if clip.label)
    return {
        "num_clips": len(clips),
        "hours": float(seconds.sum() / 3600),
        "frames": sum(info.frames for info in infos),
        "seconds": {
            "least": float(seconds.min()),
            "median": float(np.median(seconds)),
            "most": float(seconds.max()),
        },
        "sizes": _counts(f"{info.width}x{info.height}" for info in infos),
        "rates": _counts(f"{info.fps:g}" for info in infos),
        "audio": sum(info.audio for info in infos),
        "captions": sum(info.captioned for info in infos),
        "no_content": sum(not info.fingerprint.has_content for info in infos),
        "labels": dict(sorted(labels.items())),
        "unlabelled": sum(info.label < 0 for info in infos),
    }


def _counts(values: Iterator[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())
