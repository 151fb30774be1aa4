# SPDX-License-Identifier: Apache-2.0
"""Metrics of class probabilities: accuracy, calibration, confusion, per-class precision and recall.

Legend: N clips, C classes.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import metrics

from particlejax.core.io import atomic_file

_BINS = 15  # of confidence, as in Guo et al. 2017 (arXiv:1706.04599)
_MOST_CLASSES = 100  # up to which results.json holds a confusion matrix
_Z95 = 1.959964  # the 97.5 % quantile of the standard normal distribution


def compute_metrics(
    probabilities: np.ndarray, label: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
    """Figures for results.json from probabilities float [N, C] and labels int [N]; label -1 means
    unlabelled, and such clips are left out.

    top1, top5, mean_class_accuracy (mean recall of the classes that occur), ece (expected
    calibration error), chance and per_class are fractions; support and confusion count clips, rows
    of the latter are the true classes.
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
        "per_class": per_class(
            classes, np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
        ),
    }


def per_class(
    names: Sequence[str], correct: np.ndarray, predicted: np.ndarray, support: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """Figures of each class from its numbers of clips [C]: correctly predicted, predicted, and with
    the class (support). A class without a clip has no recall and no F1 (None); precision is 0
    where nothing is predicted.
    """
    precision, recall = correct / np.maximum(predicted, 1), correct / np.maximum(support, 1)
    f1 = f1_scores(correct, predicted, support)
    return {
        name: {
            "precision": float(precision[i]),
            "recall": float(recall[i]) if support[i] else None,
            "f1": float(f1[i]) if support[i] else None,
            "support": int(support[i]),
        }
        for i, name in enumerate(names)
    }


def f1_scores(correct: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Harmonic means of precision and recall; 0 without any clip."""
    return 2 * correct / np.maximum(predicted + support, 1)


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


def with_interval(share: float, count: int) -> str:
    """A share of `count` clips and its 95 % interval, such as '0.500 (0.215 to 0.785)'."""
    low, high = wilson_interval(round(share * count), count)
    return f"{share:.3f} ({low:.3f} to {high:.3f})"


def top1_sentence(figures: Mapping[str, Any]) -> str:
    """Such as 'top-1 accuracy 50.0 % (95 % interval 21.5 to 78.5)' for figures of
    `compute_metrics`.
    """
    if not figures["num_clips"]:
        return "no labeled clip"
    share, count = figures["top1"], figures["num_clips"]
    low, high = wilson_interval(round(share * count), count)
    return f"top-1 accuracy {100 * share:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})"


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


def write_confusion(path: Path, figures: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Writes the counts of a confusion matrix to a CSV: a line for each true class, a column for
    each predicted one.

    Returns the figures with the file's name as confusion_file; without the matrix itself for more
    than 100 classes. Does nothing without a matrix.
    """
    if "confusion" not in figures:
        return figures
    rows = ([name, *row] for name, row in zip(classes, figures["confusion"], strict=True))
    write_table(path, ["true class, predicted:", *classes], rows)
    kept = {
        key: value
        for key, value in figures.items()
        if key != "confusion" or len(classes) <= _MOST_CLASSES
    }
    return kept | {"confusion_file": path.name}


def read_confusion(path: Path) -> np.ndarray:
    """The counts [C, C] of a file of `write_confusion`."""
    with open(path, newline="", encoding="utf-8") as file:
        return np.array([row[1:] for row in csv.reader(file)][1:], int)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    r"""Writes a CSV atomically; bytes of names that are not UTF-8 become `\udcXX`."""
    with (
        atomic_file(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file).writerows([header, *rows])
