# SPDX-License-Identifier: Apache-2.0
"""Metrics of class probabilities: accuracy, calibration, confusion, per-class precision and recall.

Legend: N clips, C classes.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import metrics

from particlejax.core.io import atomic_file

_BINS = 15  # of confidence, as in Guo et al. 2017 (arXiv:1706.04599)
_Z95 = 1.959964  # the 97.5 % quantile of the standard normal distribution


def compute_metrics(
    probabilities: np.ndarray, label: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
    """Figures for results.json from probabilities float [N, C] and labels int [N]; label -1 means
    unlabelled, and such clips are left out.

    top1, top5, mean_class_accuracy (mean recall of the classes that occur), ece (expected
    calibration error), chance and per_class are fractions; confusion counts clips, rows are the
    true classes. A class without clips has no recall and no F1 (None).
    """
    label = np.asarray(label)
    if not (label >= 0).any():
        return {"num_clips": 0}
    probabilities, label = np.asarray(probabilities)[label >= 0], label[label >= 0]
    class_indices = range(len(classes))
    predicted = probabilities.argmax(axis=1)
    num_higher = (probabilities > probabilities[np.arange(len(label)), label][:, None]).sum(axis=1)
    confusion = metrics.confusion_matrix(label, predicted, labels=class_indices)
    occurs = confusion.sum(axis=1) > 0
    report = metrics.classification_report(
        label,
        predicted,
        labels=class_indices,
        target_names=list(classes),
        output_dict=True,
        zero_division=0,
    )
    return {
        "top1": float((predicted == label).mean()),
        "top5": float((num_higher < 5).mean()),
        "mean_class_accuracy": float(
            (np.diag(confusion)[occurs] / confusion.sum(axis=1)[occurs]).mean()
        ),
        "ece": calibration_error(probabilities.max(axis=1), predicted == label),
        "chance": 1 / len(classes),
        "num_clips": len(label),
        "confusion": confusion.tolist(),
        "per_class": {name: _per_class(report[name]) for name in classes},
    }


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % interval (low, high) of a proportion, both within 0 to 1 (Wilson 1927); (0, 1) where
    count is 0.
    """
    if not count:
        return 0.0, 1.0
    share, z2 = successes / count, _Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error over 15 bins of |accuracy - confidence|; confidence float [N],
    right bool [N].
    """
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(correct[bins == index].mean() - confidence[bins == index].mean())
        * (bins == index).mean()
        for index in range(_BINS)
        if (bins == index).any()
    ]
    return float(sum(gaps))


def write_predictions(
    path: Path,
    names: Sequence[str],
    label: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Writes one line per clip: path, label ('' if unlabeled), predicted, and the probability of
    each class as p:CLASS.
    """
    rows = (
        [
            name,
            classes[int(true)] if true >= 0 else "",
            classes[int(probs.argmax())],
            *(f"{p:.6g}" for p in probs),
        ]
        for name, true, probs in zip(names, label, probabilities, strict=True)
    )
    write_table(path, ["path", "label", "predicted", *(f"p:{name}" for name in classes)], rows)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    r"""Writes a CSV atomically; bytes of names that are not UTF-8 become `\udcXX`."""
    with (
        atomic_file(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file).writerows([header, *rows])


def _per_class(class_report: dict[str, float]) -> dict[str, float | None]:
    """Figures of a class; recall and F1 are None without a clip of it."""
    support = int(class_report["support"])
    return {
        "precision": float(class_report["precision"]),
        "recall": float(class_report["recall"]) if support else None,
        "f1": float(class_report["f1-score"]) if support else None,
        "support": support,
    }
