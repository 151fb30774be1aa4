# SPDX-License-Identifier: Apache-2.0
"""Writes report.md of a run: results, curves and pictures, from the files in its folder."""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from particlejax.config import renames
from particlejax.core import io
from particlejax.distributed import cluster
from particlejax.reports import plots
from particlejax.train import classification_metrics
from particlejax.train.log import log_info

# maximum lengths of lists
_MAX_UNREADABLE, _MAX_CONFUSED, _MAX_CLASSES, _MAX_ABSENT = 20, 5, 200, 20
_METRIC_TITLES = {
    "mAP": "mean average precision",
    "f1_micro": "F1 (micro)",
    "f1_macro": "F1 (macro)",
    "exact_match": "exact match",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "variance explained",
}
# objective metrics that are plotted
_CURVE_METRICS = ("top1", "acc_within_1", "batch_recall_at_1", "feature_std")
_CAPTIONS = {
    "kept": "Input of the encoder: visible particles are outlined, masked ones dimmed.",
    "reconstruction": "Masked particles as predicted by the decoder. Objects should be in "
    "the right place and move correctly. With norm_pix_loss, mean and "
    "contrast of each particle are the target's. With "
    "data.temporal_mean_scale below 1, the static background has little "
    "weight in the loss.",
    "rollout": "The second half of a clip, predicted step by step from the first half; each "
    "step reads the previous predictions.",
}


def write_report(workdir: Path) -> None:
    """`write` on the first process. A report that cannot be written is one line in the log: all
    figures are in results.json before.
    """
    if not cluster.is_primary():
        return
    try:
        log_info(f"report: {write(workdir)}")
    except Exception as error:
        log_info(
            f"{Path(workdir) / 'report.md'} cannot be written ({type(error).__name__}: {error}); "
            "all figures are in results.json."
        )


def draw(name: str | Path, plot: Callable[[], None]) -> bool:
    """Whether `plot` succeeds in drawing; a picture that fails is one line in the log."""
    try:
        plot()
    except Exception as error:
        log_info(f"{name} cannot be drawn ({type(error).__name__}: {error}): left out.")
        return False
    return True


def write(workdir: Path) -> Path:
    """Writes report.md and its curves into workdir, replacing older ones; returns its path."""
    workdir = Path(workdir)
    results = _read(workdir / "results.json")
    unreadable = results.pop("unreadable", [])
    lines = _metric_lines(workdir)
    summary = [f"- {line}" for line in headlines(results)] or ["No stage has finished yet."]
    text = [f"# {workdir.name}", "", *summary, "", *_stage_table(results)]
    for stage, metrics in results.items():
        text += ["", f"## {stage}", "", *_stage(workdir, stage, metrics, lines)]
    text += [
        "",
        *_unreadable_table(unreadable),
        "The config is [config.json](config.json); all metrics over time are in "
        "`metrics.jsonl` and `tensorboard/`.",
        "",
    ]
    path = workdir / "report.md"
    io.write_text(path, "\n".join(text))
    return path


def _read(path: Path) -> dict[str, Any]:
    return renames.results(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _metric_lines(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [renames.figures(json.loads(line)) for line in text.split("\n") if line.endswith("}")]


def _classified_splits(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        split: split_metrics
        for split, split_metrics in metrics.items()
        if "chance" in split_metrics
    }


def _other_splits(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Splits with multi-label or regression metrics."""
    return {
        split: split_metrics
        for split, split_metrics in metrics.items()
        if "mAP" in split_metrics or "rmse" in split_metrics
    }


def headlines(results: dict[str, Any]) -> list[str]:
    """One line for each stage and evaluated split of results.json: the main figure."""
    return [
        f"`{stage}`: {line}"
        for stage, metrics in results.items()
        if stage != "unreadable"
        for line in _headlines_of_stage(metrics)
    ]


def _headlines_of_stage(metrics: dict[str, Any]) -> Iterator[str]:
    evaluated, answered = _classified_splits(metrics), _other_splits(metrics)
    for split, split_metrics in evaluated.items():
        count = split_metrics["num_clips"]
        yield (
            f"{classification_metrics.top1_sentence(split_metrics)} on `{split}` "
            f"({count} clips, chance {100 * split_metrics['chance']:.1f} %)"
        )
    for split, split_metrics in answered.items():
        key = next(key for key in _METRIC_TITLES if key in split_metrics)
        yield (
            f"{_METRIC_TITLES[key]} {split_metrics[key]:.3f} on `{split}` "
            f"({split_metrics['num_clips']} clips)"
        )
    if not evaluated and not answered:
        losses = {
            split: split_metrics["loss"]
            for split, split_metrics in metrics.items()
            if "loss" in split_metrics
        }
        yield from (
            f"no clip of `{split}` has what the loss needs"
            if math.isnan(float(loss))
            else f"loss {_number(loss)} on `{split}`"
            for split, loss in losses.items()
        )


def _stage_table(results: dict[str, Any]) -> Iterator[str]:
    rows = {
        stage: metrics["train"]
        for stage, metrics in results.items()
        if "steps" in metrics.get("train", {})
    }
    if rows:
        yield from table(
            ["stage", "steps", "clips seen", "parameters", "seconds", "train loss", "val loss"],
            [
                [
                    stage,
                    train["steps"],
                    train["clips_seen"],
                    f"{train['num_params'] / 1e6:.2f} M",
                    train["wall_seconds"],
                    _number(train.get("loss")),
                    _number(results[stage].get("val", {}).get("loss")),
                ]
                for stage, train in rows.items()
            ],
        )


def _stage(
    workdir: Path, stage: str, metrics: dict[str, Any], lines: list[dict[str, Any]]
) -> Iterator[str]:
    lines_by_split = {
        split: [line for line in lines if (line["stage"], line["split"]) == (stage, split)]
        for split in ("train", "val")
    }
    series = {
        split: (
            [line["step"] for line in split_lines],
            [float(line["loss"]) for line in split_lines],
        )
        for split, split_lines in lines_by_split.items()
        if split_lines
    }
    folder = workdir / "report"
    path = folder / f"{stage}_loss.png"
    if series and draw(path, partial(plots.curves, series, path, stage)):
        yield from (f"![loss of {stage}](report/{stage}_loss.png)", "")
    curves = {
        f"{name}, {split}": curve
        for split, split_lines in lines_by_split.items()
        for name, curve in _metric_curves(split_lines).items()
    }
    path = folder / f"{stage}_shares.png"
    if curves and draw(path, partial(plots.curves, curves, path, stage, is_fraction=True)):
        yield from (f"![accuracy and feature std during training](report/{stage}_shares.png)", "")
    for kind, caption in _CAPTIONS.items():
        if (workdir / "report" / f"{stage}_{kind}.png").exists():
            yield from (f"![{stage}, {kind}](report/{stage}_{kind}.png)", "", caption, "")
    for split, split_metrics in _classified_splits(metrics).items():
        yield from _evaluation(workdir, f"{stage}_{split}", split, split_metrics)
    for split, split_metrics in _other_splits(metrics).items():
        yield from (f"### Measured on `{split}`", "")
        keys = [key for key in _METRIC_TITLES if key in split_metrics]
        yield from table(
            ["clips", *(_METRIC_TITLES[key] for key in keys)],
            [
                [
                    split_metrics["num_clips"],
                    *(
                        classification_metrics.with_interval(
                            split_metrics[key], split_metrics["num_clips"]
                        )
                        if key == "exact_match"
                        else _number(split_metrics[key])
                        for key in keys
                    ),
                ]
            ],
        )
        yield ""
        if "per_class" in split_metrics:
            yield from _class_table(split_metrics["per_class"], "average_precision")


def _metric_curves(lines: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of metrics between 0 and 1, and of feature_std, which falls to 0 in a
    collapse.
    """
    keys = dict.fromkeys(
        key for line in lines for key in line if key.split("/")[-1] in _CURVE_METRICS
    )
    return {
        key: (
            [line["step"] for line in lines if key in line],
            [float(line[key]) for line in lines if key in line],
        )
        for key in keys
    }


def _evaluation(workdir: Path, name: str, split: str, metrics: dict[str, Any]) -> Iterator[str]:
    classes, count = list(metrics["per_class"]), metrics["num_clips"]
    shares = {"top-1": "top1"} | ({"top-5": "top5"} if len(classes) > 5 else {})
    others = {
        "mean class accuracy": "mean_class_accuracy",
        "calibration error": "ece",
        "chance": "chance",
    }
    yield from (f"### Measured on `{split}`", "")
    yield from table(
        ["clips", *(f"{title} (95 % interval)" for title in shares), *others],
        [
            [
                count,
                *(
                    classification_metrics.with_interval(metrics[key], count)
                    for key in shares.values()
                ),
                *(_number(metrics[key]) for key in others.values()),
            ]
        ],
    )
    yield ""
    file = metrics.get("confusion_file", "")
    confusion = (
        np.asarray(metrics["confusion"])
        if "confusion" in metrics
        else classification_metrics.read_confusion(workdir / file)
    )
    path = workdir / "report" / f"{name}_confusion.png"
    if draw(path, partial(plots.confusion, confusion, classes, path)):
        yield from (f"![confusion on {split}](report/{name}_confusion.png)", "")
        if len(classes) > plots.MOST_CLASSES:
            yield from (f"The {plots.MOST_CLASSES} of {len(classes)} classes with most errors.", "")
    if file:
        yield from (f"All counts, rows are the true classes: [{file}]({file}).", "")
    yield from _class_table(metrics["per_class"], "f1")
    if pairs := _confused(confusion, classes):
        yield from ("Most often confused: " + ", ".join(pairs) + ".", "")


def _class_table(per_class: dict[str, dict[str, Any]], order_by: str) -> Iterator[str]:
    """The classes that have clips, worst first; the others have no figures to judge them by."""
    measured = {name: figures for name, figures in per_class.items() if figures["support"]}
    worst_first = sorted(measured, key=lambda name: measured[name][order_by])
    rows = [
        [
            name,
            *(
                [_number(measured[name]["average_precision"])]
                if "average_precision" in measured[name]
                else []
            ),
            _number(measured[name]["precision"]),
            classification_metrics.with_interval(
                measured[name]["recall"], measured[name]["support"]
            ),
            _number(measured[name]["f1"]),
            measured[name]["support"],
        ]
        for name in worst_first[:_MAX_CLASSES]
    ]
    precision = ["average precision"] if order_by == "average_precision" else []
    title = (precision or ["F1"])[0]
    yield from (f"Classes, lowest {title} first:", "")
    header = ["class", *precision, "precision", "recall (95 % interval)", "F1", "clips"]
    yield from table(header, rows)
    yield ""
    if len(worst_first) > _MAX_CLASSES:
        left = len(worst_first) - _MAX_CLASSES
        yield from (f"{left} more classes are in results.json.", "")
    absent = [name for name in per_class if name not in measured]
    if absent:
        listed = ", ".join(absent[:_MAX_ABSENT]) + (", ..." if len(absent) > _MAX_ABSENT else "")
        yield from (f"Without a clip here, and so not judged ({len(absent)}): {listed}.", "")


def _confused(counts: np.ndarray, classes: list[str]) -> list[str]:
    errors = counts - np.diag(np.diag(counts))
    order = np.argsort(-errors, axis=None, kind="stable")[:_MAX_CONFUSED]
    pairs = [np.unravel_index(i, errors.shape) for i in order]
    return [f"{classes[i]} as {classes[j]} ({errors[i, j]})" for i, j in pairs if errors[i, j]]


def _unreadable_table(unreadable: list[dict[str, str]]) -> Iterator[str]:
    if unreadable:
        yield from (f"## {len(unreadable)} clips were unreadable and skipped", "")
        yield from table(
            ["clip", "reason"],
            [[clip["path"], clip["reason"]] for clip in unreadable[:_MAX_UNREADABLE]],
        )
        yield ""


def table(header: list[str], rows: list[list[Any]]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        cells = (" ".join(str(cell).splitlines()).replace("|", "\\|") for cell in row)
        yield "| " + " | ".join(cells) + " |"


def _number(value: float | str | None) -> str:
    return "" if value is None else f"{float(value):.3f}"
