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

from particlejax.objectives.label_targets import MULTI_LABEL_SEPARATOR, Targets
from particlejax.train import classification_metrics

# metrics that `score_predictions` returns for labeled clips, by the loss of the head
METRIC_NAMES = {
    "softmax": ("top1", "top5", "mean_class_accuracy", "ece", "chance", "num_clips"),
    "sigmoid": ("num_clips", "mAP", "f1_micro", "f1_macro", "exact_match"),
    "regression": ("num_clips", "mae", "rmse", "r2"),
}


def score_predictions(
    targets: Targets,
    path: Path | None,
    names: Sequence[str],
    label: np.ndarray,
    outputs: np.ndarray,
    classes: tuple[str, ...],
) -> dict[str, Any]:
    """Metrics of outputs float [N, O] for labels int [N] (-1: unlabeled).

    Writes one CSV line per clip to `path` (predictions*.csv), if given, and the confusion matrix of
    one class per clip beside it, to confusion*.csv.
    """
    if targets.loss == "softmax":
        figures = classification_metrics.compute_metrics(outputs, label, classes)
        if path is None:
            return figures
        classification_metrics.write_predictions(path, names, label, outputs, classes)
        beside = path.with_name(path.name.replace("predictions", "confusion"))
        return classification_metrics.write_confusion(beside, figures, classes)
    if path is not None:
        _write(targets, path, names, [classes[n] if n >= 0 else "" for n in label], outputs)
    labeled = np.asarray(label) >= 0
    if not labeled.any():
        return {"num_clips": 0}
    table = targets.table[np.asarray(label)[labeled]]
    if targets.loss == "sigmoid":
        return multilabel_metrics(outputs[labeled], table > 0.5, targets.names)
    return regression_metrics(outputs[labeled, 0], table[:, 0] * targets.std + targets.mean)


def multilabel_metrics(
    probabilities: np.ndarray, target: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """Multi-label metrics of [N, O]: mean average precision (over classes that occur), F1 at
    threshold 0.5, exact match; per_class: average precision (None for a class that does not occur),
    precision, recall, F1 and support, which is the number of clips that have the class.
    """
    predicted, occurs = probabilities > 0.5, target.any(axis=0)
    precision = {
        name: float(metrics.average_precision_score(target[:, i], probabilities[:, i]))
        for i, name in enumerate(names)
        if occurs[i]
    }
    counts = ((predicted & target).sum(axis=0), predicted.sum(axis=0), target.sum(axis=0))
    by_class = classification_metrics.per_class(names, *counts)
    return {
        "num_clips": len(target),
        "mAP": float(np.mean(list(precision.values()))) if precision else 0.0,
        "f1_micro": float(classification_metrics.f1_scores(*(x.sum() for x in counts))),
        "f1_macro": float(classification_metrics.f1_scores(*counts).mean()),
        "exact_match": float((predicted == target).all(axis=1).mean()),
        "average_precision": precision,
        "per_class": {
            name: {"average_precision": precision.get(name)} | figures
            for name, figures in by_class.items()
        },
    }


def regression_metrics(predicted: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Regression metrics of [N]: mean absolute error, root mean squared error, and R^2."""
    variance = float(np.var(target))
    squared = float(np.mean((predicted - target) ** 2))
    return {
        "num_clips": len(target),
        "mae": float(np.abs(predicted - target).mean()),
        "rmse": squared**0.5,
        "r2": 1 - squared / variance if variance else 0.0,
    }


def _write(
    targets: Targets, path: Path, names: Sequence[str], label: Sequence[str], outputs: np.ndarray
) -> None:
    rows = []
    for name, target, output in zip(names, label, outputs, strict=True):
        if targets.loss == "sigmoid":
            predicted = MULTI_LABEL_SEPARATOR.join(
                class_name for class_name, p in zip(targets.names, output, strict=True) if p > 0.5
            )
            rows.append([name, target, predicted, *(f"{p:.6g}" for p in output)])
        else:
            rows.append([name, target, f"{output[0]:.6g}"])
    header = [
        "path",
        "label",
        "predicted",
        *(f"p:{name}" for name in targets.names if targets.loss == "sigmoid"),
    ]
    classification_metrics.write_table(path, header, rows)
