# SPDX-License-Identifier: Apache-2.0
"""Predictions of a trained head: writes them and scores them as multi-class, multi-label or
regression.

Legend: N clips, O outputs of the head.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import metrics

from particlejax.objectives.label_targets import SEVERAL, Targets
from particlejax.train import classification_metrics

# metrics that `score` returns for labeled clips, by the loss of the head
FIGURES = {
    "softmax": ("top1", "top5", "mean_class_accuracy", "ece", "chance", "num_clips"),
    "sigmoid": ("num_clips", "mAP", "f1_micro", "f1_macro", "exact_match"),
    "regression": ("num_clips", "mae", "rmse", "r2"),
}


def score(
    targets: Targets,
    path: Path | None,
    names: Sequence[str],
    label: np.ndarray,
    answers: np.ndarray,
    classes: tuple[str, ...],
) -> dict[str, Any]:
    """Metrics of outputs float [N, O] for labels int [N] (-1: unlabeled); writes one CSV line per
    clip to `path`, if given.
    """
    if targets.loss == "softmax":
        if path is not None:
            classification_metrics.write_predictions(path, names, label, answers, classes)
        return classification_metrics.scores(answers, label, classes)
    if path is not None:
        _write(targets, path, names, [classes[n] if n >= 0 else "" for n in label], answers)
    known = np.asarray(label) >= 0
    if not known.any():
        return {"num_clips": 0}
    table = targets.table[np.asarray(label)[known]]
    if targets.loss == "sigmoid":
        return several(answers[known], table > 0.5, targets.names)
    return numbers(answers[known, 0], table[:, 0] * targets.spread + targets.middle)


def several(probabilities: np.ndarray, true: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Multi-label metrics of [N, O]: mean average precision (over classes that occur), F1 at
    threshold 0.5, exact match.
    """
    said, occurs = probabilities > 0.5, true.any(axis=0)
    precision = {
        name: float(metrics.average_precision_score(true[:, i], probabilities[:, i]))
        for i, name in enumerate(names)
        if occurs[i]
    }
    return {
        "num_clips": len(true),
        "mAP": float(np.mean(list(precision.values()))) if precision else 0.0,
        "f1_micro": float(metrics.f1_score(true, said, average="micro", zero_division=0)),
        "f1_macro": float(metrics.f1_score(true, said, average="macro", zero_division=0)),
        "exact_match": float((said == true).all(axis=1).mean()),
        "average_precision": precision,
    }


def numbers(found: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Regression metrics of [N]: mean absolute error, root mean squared error, and R^2."""
    variance = float(np.var(true))
    squared = float(np.mean((found - true) ** 2))
    return {
        "num_clips": len(true),
        "mae": float(np.abs(found - true).mean()),
        "rmse": squared**0.5,
        "r2": 1 - squared / variance if variance else 0.0,
    }


def _write(
    targets: Targets, path: Path, names: Sequence[str], label: Sequence[str], answers: np.ndarray
) -> None:
    rows = []
    for name, true, each in zip(names, label, answers, strict=True):
        if targets.loss == "sigmoid":
            said = SEVERAL.join(one for one, p in zip(targets.names, each, strict=True) if p > 0.5)
            rows.append([name, true, said, *(f"{p:.6g}" for p in each)])
        else:
            rows.append([name, true, f"{each[0]:.6g}"])
    head = [
        "path",
        "label",
        "predicted",
        *(f"p:{name}" for name in targets.names if targets.loss == "sigmoid"),
    ]
    classification_metrics.write_table(path, head, rows)
