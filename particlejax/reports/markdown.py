# SPDX-License-Identifier: Apache-2.0
"""Writes report.md of a run: results, curves and pictures, from the files in its folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from particlejax.config import renames
from particlejax.core import io
from particlejax.reports import plots
from particlejax.train import classification_metrics

_MAX_UNREADABLE, _MAX_CONFUSED, _MAX_CLASSES = 20, 5, 20  # maximum lengths of lists
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
        if "confusion" in split_metrics
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
        low, high = classification_metrics.wilson_interval(
            round(split_metrics["top1"] * count), count
        )
        yield (
            f"top-1 accuracy {100 * split_metrics['top1']:.1f} % (95 % interval {100 * low:.1f} to "
            f"{100 * high:.1f}) on `{split}` ({count} clips, chance "
            f"{100 * split_metrics['chance']:.1f} %)"
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
        yield from (f"loss {_number(loss)} on `{split}`" for split, loss in losses.items())


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
    if series:
        plots.curves(series, workdir / "report" / f"{stage}_loss.png", stage)
        yield from (f"![loss of {stage}](report/{stage}_loss.png)", "")
    if curves := {
        f"{name}, {split}": curve
        for split, split_lines in lines_by_split.items()
        for name, curve in _metric_curves(split_lines).items()
    }:
        plots.curves(curves, workdir / "report" / f"{stage}_shares.png", stage, is_fraction=True)
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
            [[split_metrics["num_clips"], *(_number(split_metrics[key]) for key in keys)]],
        )
        yield ""


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
    classes = list(metrics["per_class"])
    yield from (f"### Measured on `{split}`", "")
    yield from table(
        ["clips", "top-1", "top-5", "mean class accuracy", "calibration error", "chance"],
        [
            [
                metrics["num_clips"],
                *(
                    _number(metrics[key])
                    for key in ("top1", "top5", "mean_class_accuracy", "ece", "chance")
                ),
            ]
        ],
    )
    plots.confusion(metrics["confusion"], classes, workdir / "report" / f"{name}_confusion.png")
    yield from (
        "",
        f"![confusion on {split}](report/{name}_confusion.png)",
        "",
        "Classes, lowest F1 first:",
        "",
    )
    # a class without clips is not the worst one; older results have 0 for it
    measured = [name for name in classes if metrics["per_class"][name]["support"]]
    order = sorted(measured, key=lambda class_name: metrics["per_class"][class_name]["f1"])
    yield from table(
        ["class", "precision", "recall", "F1", "clips"],
        [
            [
                class_name,
                *(
                    _number(metrics["per_class"][class_name][key])
                    for key in ("precision", "recall", "f1")
                ),
                metrics["per_class"][class_name]["support"],
            ]
            for class_name in order
        ],
    )
    if unmeasured := [name for name in classes if name not in measured]:
        yield from ("", f"No clip of {_listed(unmeasured)}.")
    pairs = _confused(np.asarray(metrics["confusion"]), classes)
    if pairs:
        yield from ("", "Most often confused: " + ", ".join(pairs) + ".", "")


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _MAX_CLASSES} other classes" * (len(names) > _MAX_CLASSES)
    return ", ".join(names[:_MAX_CLASSES]) + rest


def _confused(counts: np.ndarray, classes: list[str]) -> list[str]:
    errors = counts * (1 - np.eye(len(classes), dtype=int))
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
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"


def _number(value: float | str | None) -> str:
    return "" if value is None else f"{float(value):.3f}"
