# SPDX-License-Identifier: Apache-2.0
"""Plots of a report, PNG: curves, confusion matrices, visible particles, reconstructions.

Legend: T frames, H rows, W columns, N particles, P payload size.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from particlejax.particles.painting import TIME_EPS, inside

_MAX_FRAMES = 8  # in a strip
_DPI = 100
_MOST_COUNTS = 25  # a confusion matrix shows counts up to this many classes
MOST_CLASSES = 60  # of a confusion matrix
_MOST_BARS = 200  # of a bar chart
_MOST_LETTERS = 40  # of a name
_DIMMED = 0.25  # brightness outside all particles
_LONGEST_LABEL = 40  # characters of a name


def visible_strip(
    frames: np.ndarray, times: np.ndarray, place: np.ndarray, extent: np.ndarray, path: Path
) -> None:
    """Up to eight of frames uint8 [T, H, W, 3] in a row; particles place, extent [K, 3] are
    outlined and the rest is dimmed.
    """
    height, width = frames.shape[1:3]
    indices = _frame_indices(len(frames))
    figure, axes = _row_of_axes(1, len(indices))
    for ax, index in zip(axes[0], indices, strict=True):
        covering = [
            (center, size)
            for center, size in zip(place, extent, strict=True)
            if len(inside(times[index : index + 1], center[0], size[0], TIME_EPS))
        ]
        brightness = np.full((height, width, 1), _DIMMED)
        for center, size in covering:
            top, left = (center[1] - size[1] / 2) * height, (center[2] - size[2] / 2) * width
            box_height, box_width = size[1] * height, size[2] * width
            brightness[
                round(top) : round(top + box_height), round(left) : round(left + box_width)
            ] = 1
            ax.add_patch(
                Rectangle(
                    (left - 0.5, top - 0.5),
                    box_width,
                    box_height,
                    fill=False,
                    edgecolor="yellow",
                    linewidth=0.8,
                )
            )
        ax.imshow((frames[index] * brightness).astype(np.uint8), interpolation="nearest")
        ax.set_xlabel(f"{times[index]:.2f} s", fontsize=8)
    _save(figure, path)


def reconstruction(rows: Mapping[str, np.ndarray], times: np.ndarray, path: Path) -> None:
    """One labelled row of up to eight frames for each video uint8 [T, H, W, 3]."""
    indices = _frame_indices(len(times))
    figure, axes = _row_of_axes(len(rows), len(indices))
    for row_axes, (name, video) in zip(axes, rows.items(), strict=True):
        row_axes[0].set_ylabel(name, fontsize=8)
        for ax, index in zip(row_axes, indices, strict=True):
            ax.imshow(video[index], interpolation="nearest")
    for ax, index in zip(axes[-1], indices, strict=True):
        ax.set_xlabel(f"{times[index]:.2f} s", fontsize=8)
    _save(figure, path)


def plot_prediction(
    frames: np.ndarray, times: np.ndarray, probs: Mapping[str, float], path: Path
) -> None:
    """Up to eight of frames uint8 [T, H, W, 3] titled with the top class, and a bar for each
    probability.
    """
    indices = _frame_indices(len(frames))
    figure = Figure(
        figsize=(1.35 * len(indices) + 0.4, 2.2 + 0.25 * len(probs)), layout="constrained"
    )
    frames_figure, bars_figure = figure.subfigures(
        2, 1, height_ratios=(1.5, 0.7 + 0.25 * len(probs))
    )
    for ax, index in zip(
        frames_figure.subplots(1, len(indices), squeeze=False)[0], indices, strict=True
    ):
        _hide_ticks(ax)
        ax.imshow(frames[index], interpolation="nearest")
        ax.set_xlabel(f"{times[index]:.2f} s", fontsize=8)
    best = max(probs, key=probs.__getitem__)
    frames_figure.suptitle(f"{_plain(best)}, {probs[best]:.1%}", fontsize=11)
    ax = bars_figure.subplots()
    ax.barh(range(len(probs)), list(probs.values()))
    ax.set_yticks(
        range(len(probs)),
        [f"{_plain(name)} {prob:.3f}" for name, prob in probs.items()],
        fontsize=8,
    )
    ax.set(xlim=(0, 1), xlabel="probability")
    ax.invert_yaxis()
    _save(figure, path)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    title: str,
    is_fraction: bool = False,
) -> None:
    """A line for each series of (steps, values): losses, or metrics from 0 to 1."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, (steps, values) in series.items():
        ax.plot(steps, values, marker="o" if len(steps) < 15 else None, markersize=3, label=name)
    values = [value for _, ys in series.values() for value in ys if not math.isnan(value)]
    if is_fraction:
        ax.set_ylim(0, max(1, *values) + 0.02)
    elif values and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
    ax.set(title=title, xlabel="step", ylabel="share" if is_fraction else "loss")
    ax.grid(alpha=0.3)
    ax.legend()
    _save(figure, path)


def confusion(matrix: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Counts [C, C], rows are true classes, colored by fraction of the row; of more than 60 classes
    those with most errors.
    """
    counts = np.asarray(matrix, float)
    row_fraction = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    if len(classes) > MOST_CLASSES:
        errors = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
        shown = np.sort(np.argsort(-errors, kind="stable")[:MOST_CLASSES])
        counts, row_fraction = (x[np.ix_(shown, shown)] for x in (counts, row_fraction))
        classes = [classes[i] for i in shown]
    side = 2.0 + 0.32 * len(classes)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    ax = figure.subplots()
    ax.imshow(row_fraction, vmin=0, vmax=1, cmap="Blues")
    names = [_plain(name) for name in classes]
    ax.set_xticks(range(len(classes)), names, rotation=90, fontsize=7)
    ax.set_yticks(range(len(classes)), names, fontsize=7)
    ax.set(xlabel="predicted", ylabel="true")
    for (i, j), count in np.ndenumerate(
        counts if len(classes) <= _MOST_COUNTS else np.zeros((0, 0))
    ):
        if count:
            ax.text(
                j,
                i,
                f"{count:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if row_fraction[i, j] > 0.5 else "k",
            )
    _save(figure, path)


def pareto(
    points: Mapping[str, tuple[float, float, float]],
    front_names: Sequence[str],
    path: Path,
    cost: str,
    figure: str,
) -> None:
    """Points (cost, mean, std) with error bars, one color per family (the name before the first
    '-'); `front_names` are joined.
    """
    canvas = Figure(figsize=(7, 4.5), layout="constrained")
    ax = canvas.subplots()
    families = list(dict.fromkeys(name.split("-")[0] for name in points))
    for i, family in enumerate(families):
        family_points = {
            name: point for name, point in points.items() if name.split("-")[0] == family
        }
        x, y, spread = np.array(list(family_points.values())).T
        ax.errorbar(x, y, spread, fmt="o", capsize=3, color=f"C{i}", label=_label(family))
        for name, (cost_value, mean, _) in family_points.items():
            ax.annotate(
                _label(name),
                (cost_value, mean),
                fontsize=7,
                xytext=(4, 4),
                textcoords="offset points",
            )
    ax.plot(
        [points[name][0] for name in front_names],
        [points[name][1] for name in front_names],
        color="0.6",
        zorder=0,
        label="front",
    )
    ax.set(xlabel=cost, ylabel=figure)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    _save(canvas, path)


def _label(name: str) -> str:
    """A name for a picture: not too long, and no formula."""
    short = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 3]}..."
    return short.replace("$", r"\$")


def histograms(series: Mapping[str, Sequence[float]], path: Path, title: str, unit: str) -> None:
    """Histograms of the series, as outlines."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    all_values = np.concatenate([np.asarray(values, float) for values in series.values()])
    edges = np.histogram_bin_edges(all_values, bins=30)
    for name, values in series.items():
        ax.hist(values, edges, histtype="step", label=f"{name} ({len(values)})")
    ax.set(title=title, xlabel=unit, ylabel="clips")
    ax.grid(alpha=0.3)
    ax.legend()
    _save(figure, path)


def bars(series: Mapping[str, Sequence[int]], names: Sequence[str], path: Path, title: str) -> None:
    """A stacked bar of counts for each name; of more than 200 names, for the first ones."""
    if len(names) > _MOST_BARS:
        title = f"{title}, {_MOST_BARS} of {len(names)}"
        names = names[:_MOST_BARS]
        series = {name: counts[:_MOST_BARS] for name, counts in series.items()}
    figure = Figure(figsize=(6, 1.0 + 0.22 * len(names)), layout="constrained")
    ax = figure.subplots()
    left = np.zeros(len(names))
    for name, counts in series.items():
        ax.barh(range(len(names)), counts, left=left, label=name)
        left += np.asarray(counts)
    ax.set_yticks(range(len(names)), [_plain(name) for name in names], fontsize=8)
    ax.invert_yaxis()
    ax.set(title=title, xlabel="clips")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, never over them
    _save(figure, path)


def _frame_indices(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_FRAMES)).round().astype(int))


def _row_of_axes(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(1.35 * columns + 0.4, 1.5 * rows + 0.1), layout="constrained")
    axes: np.ndarray = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        _hide_ticks(ax)
    return figure, axes


def _hide_ticks(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])


def _plain(name: str) -> str:
    """A name as it stands, shortened: '$' begins no formula."""
    short = name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 1] + "…"
    return short.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():  # a letter that the font lacks is a box
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(path, dpi=_DPI)
