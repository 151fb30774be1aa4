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

_MOST_BAD, _PAIRS = 20, 5  # maximum lengths of lists
_ANSWERS = {
    "mAP": "mean average precision",
    "f1_micro": "F1 (micro)",
    "f1_macro": "F1 (macro)",
    "exact_match": "exact match",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "variance explained",
}
# objective metrics that are plotted
_SHARES = ("top1", "acc_within_1", "batch_recall_at_1", "feature_std")
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
    bad = results.pop("unreadable", [])
    lines = _metric_lines(workdir)
    summary = [f"- {line}" for line in headlines(results)] or ["No stage has finished yet."]
    text = [f"# {workdir.name}", "", *summary, "", *_stage_table(results)]
    for stage, figures in results.items():
        text += ["", f"## {stage}", "", *_stage(workdir, stage, figures, lines)]
    text += [
        "",
        *_bad(bad),
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


def _evaluated(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {split: each for split, each in figures.items() if "confusion" in each}


def _answered(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Splits with multi-label or regression metrics."""
    return {split: each for split, each in figures.items() if "mAP" in each or "rmse" in each}


def headlines(results: dict[str, Any]) -> list[str]:
    """One line for each stage and evaluated split of results.json: the main figure."""
    return [
        f"`{stage}`: {line}"
        for stage, figures in results.items()
        if stage != "unreadable"
        for line in _headlines_of_stage(figures)
    ]


def _headlines_of_stage(figures: dict[str, Any]) -> Iterator[str]:
    evaluated, answered = _evaluated(figures), _answered(figures)
    for split, each in evaluated.items():
        count = each["num_clips"]
        low, high = classification_metrics.wilson_interval(round(each["top1"] * count), count)
        yield (
            f"top-1 accuracy {100 * each['top1']:.1f} % (95 % interval {100 * low:.1f} to "
            f"{100 * high:.1f}) on `{split}` ({count} clips, chance {100 * each['chance']:.1f} %)"
        )
    for split, each in answered.items():
        key = next(key for key in _ANSWERS if key in each)
        yield f"{_ANSWERS[key]} {each[key]:.3f} on `{split}` ({each['num_clips']} clips)"
    if not evaluated and not answered:
        losses = {split: each["loss"] for split, each in figures.items() if "loss" in each}
        yield from (f"loss {_number(loss)} on `{split}`" for split, loss in losses.items())


def _stage_table(results: dict[str, Any]) -> Iterator[str]:
    rows = {
        stage: figures["train"]
        for stage, figures in results.items()
        if "steps" in figures.get("train", {})
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
    workdir: Path, stage: str, figures: dict[str, Any], lines: list[dict[str, Any]]
) -> Iterator[str]:
    mine = {
        split: [line for line in lines if (line["stage"], line["split"]) == (stage, split)]
        for split in ("train", "val")
    }
    series = {
        split: ([line["step"] for line in each], [float(line["loss"]) for line in each])
        for split, each in mine.items()
        if each
    }
    if series:
        plots.curves(series, workdir / "report" / f"{stage}_loss.png", stage)
        yield from (f"![loss of {stage}](report/{stage}_loss.png)", "")
    if shares := {
        f"{name}, {split}": curve
        for split, each in mine.items()
        for name, curve in _shares(each).items()
    }:
        plots.curves(shares, workdir / "report" / f"{stage}_shares.png", stage, shares=True)
        yield from (f"![accuracy and feature std during training](report/{stage}_shares.png)", "")
    for kind, caption in _CAPTIONS.items():
        if (workdir / "report" / f"{stage}_{kind}.png").exists():
            yield from (f"![{stage}, {kind}](report/{stage}_{kind}.png)", "", caption, "")
    for split, each in _evaluated(figures).items():
        yield from _evaluation(workdir, f"{stage}_{split}", split, each)
    for split, each in _answered(figures).items():
        yield from (f"### Measured on `{split}`", "")
        shown = [key for key in _ANSWERS if key in each]
        yield from table(
            ["clips", *(_ANSWERS[key] for key in shown)],
            [[each["num_clips"], *(_number(each[key]) for key in shown)]],
        )
        yield ""


def _shares(lines: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of metrics between 0 and 1, and of feature_std, which falls to 0 in a
    collapse.
    """
    keys = dict.fromkeys(key for line in lines for key in line if key.split("/")[-1] in _SHARES)
    return {
        key: (
            [line["step"] for line in lines if key in line],
            [float(line[key]) for line in lines if key in line],
        )
        for key in keys
    }


def _evaluation(workdir: Path, name: str, split: str, figures: dict[str, Any]) -> Iterator[str]:
    classes = list(figures["per_class"])
    yield from (f"### Measured on `{split}`", "")
    yield from table(
        ["clips", "top-1", "top-5", "mean class accuracy", "calibration error", "chance"],
        [
            [
                figures["num_clips"],
                *(
                    _number(figures[key])
                    for key in ("top1", "top5", "mean_class_accuracy", "ece", "chance")
                ),
            ]
        ],
    )
    plots.confusion(figures["confusion"], classes, workdir / "report" / f"{name}_confusion.png")
    yield from (
        "",
        f"![confusion on {split}](report/{name}_confusion.png)",
        "",
        "Classes, lowest F1 first:",
        "",
    )
    order = sorted(classes, key=lambda each: figures["per_class"][each]["f1"])
    yield from table(
        ["class", "precision", "recall", "F1", "clips"],
        [
            [
                each,
                *(
                    _number(figures["per_class"][each][key])
                    for key in ("precision", "recall", "f1")
                ),
                figures["per_class"][each]["support"],
            ]
            for each in order
        ],
    )
    pairs = _confused(np.asarray(figures["confusion"]), classes)
    if pairs:
        yield from ("", "Most often confused: " + ", ".join(pairs) + ".", "")


def _confused(counts: np.ndarray, classes: list[str]) -> list[str]:
    off = counts * (1 - np.eye(len(classes), dtype=int))
    order = np.argsort(-off, axis=None, kind="stable")[:_PAIRS]
    found = [np.unravel_index(i, off.shape) for i in order]
    return [f"{classes[i]} as {classes[j]} ({off[i, j]})" for i, j in found if off[i, j]]


def _bad(bad: list[dict[str, str]]) -> Iterator[str]:
    if bad:
        yield from (f"## {len(bad)} clips were unreadable and skipped", "")
        yield from table(
            ["clip", "reason"], [[each["path"], each["reason"]] for each in bad[:_MOST_BAD]]
        )
        yield ""


def table(head: list[str], rows: list[list[Any]]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"


def _number(value: float | str | None) -> str:
    return "" if value is None else f"{float(value):.3f}"
