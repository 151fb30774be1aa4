# SPDX-License-Identifier: Apache-2.0
"""Predicts the actions in videos; prints the top classes, writes results.json and report.md.

Legend: T frames, H rows, W columns.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from particlejax.config.jobs import PredictSpec
from particlejax.core import io, tree
from particlejax.core.typing import Params, UserError
from particlejax.data.sources.folder import VIDEO_SUFFIXES
from particlejax.data.video.decode import Unreadable, Video
from particlejax.models import zoo
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import packages
from particlejax.reports import plots
from particlejax.reports.markdown import table
from particlejax.train import pretrained, stage
from particlejax.train.log import Progress, say

# Kinetics-400's class names in the order of its published label map, which is alphabetical.
_KINETICS = Path(zoo.__file__).with_name("kinetics400.txt")
_LABELS = "label_map.txt"
_MOST_PICTURES = 50


class Recogniser(NamedTuple):
    """A network, its parameters and class names."""

    backbone: backbones.Backbone
    params: Params
    labels: tuple[str, ...]


class Seen(NamedTuple):
    """Top classes of a video with their probabilities, and a picture in the workdir or ''."""

    answer: dict[str, float]
    picture: str


def predict(spec: PredictSpec, workdir: Path, name: str) -> None:
    """Job 'predict': the top classes of every video of `config.videos`."""
    del name
    files = _files(spec.videos)
    recogniser = load(spec)
    # a Transformer has position embeddings for a fixed number of frames
    if recogniser.backbone.spec.inputs:
        spec = dataclasses.replace(spec, num_frames=recogniser.backbone.spec.frames)
    classify = jax.jit(
        lambda params, pixels: backbones.classify(recogniser.backbone, params, pixels)
    )
    seen: dict[str, Seen] = {}
    bad: dict[str, str] = {}
    progress = Progress("predict", len(files), unit="video")
    for i, path in enumerate(files):
        try:
            windows, times = watch(path, spec, recogniser.backbone.spec.size)
        except Unreadable as error:
            bad[str(path)] = error.reason
            say(f"{path} is unreadable ({error.reason}): skipped.")
        else:
            each = [
                jax.nn.softmax(classify(recogniser.params, window[None]))[0] for window in windows
            ]
            answer = _best(np.mean(each, axis=0), recogniser.labels, spec.top_k)
            say(f"{path}: " + ", ".join(f"{label} {p:.3f}" for label, p in answer.items()))
            middle, picture = len(windows) // 2, f"report/{i:03d}_{path.stem}.png"
            if i < _MOST_PICTURES:
                plots.answers(windows[middle], times[middle], answer, workdir / picture)
            seen[str(path)] = Seen(answer, picture if i < _MOST_PICTURES else "")
        progress.update()
    progress.close()
    stage.add_results(workdir, "predict", {path: each.answer for path, each in seen.items()}, bad)
    report = workdir / "report.md"
    io.write_text(report, "\n".join(_lines(spec, seen, bad)))
    say(f"report: {report}")


def load(spec: PredictSpec) -> Recogniser:
    """The network with its weights. Raises UserError if they are missing or incomplete, or if it
    does not classify actions.
    """
    if not backbones.find(spec.model).video or not getattr(
        backbones.find(spec.model).net, "classes", 0
    ):
        raise UserError(
            f"{spec.model} does not classify actions: choose another config.model, such as i3d."
        )
    if spec.weights == "random":
        say("weights are random: predictions are meaningless.")
        backbone = backbones.build(backbones.find(spec.model))
        params = jax.jit(backbone.init)(jax.random.key(0))
        return Recogniser(backbone, params, _labels(spec, None, params))
    path = find_weights(spec)
    backbone, params, _, report = pretrained.read(str(path), spec.model)
    if report.missing:
        raise UserError(
            f"{path} lacks {len(report.missing)} parameters of {spec.model} ({report.missing[0]}, "
            "...): set config.model to the model of these weights, or use other config.weights."
        )
    return Recogniser(backbone, jax.device_put(params), _labels(spec, path, params))


def find_weights(spec: PredictSpec) -> Path:
    """config.weights, else those of the installed package. Raises UserError if neither exists."""
    if spec.weights:
        return Path(spec.weights).expanduser()
    return packages.find(spec.model, "weights")


def watch(path: Path, spec: PredictSpec, size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Evenly spaced windows of a video, each uint8 [T, size, size, 3] center crops, and frame times
    [T] in seconds.

    A video shorter than a window repeats its last frame.
    """
    span = spec.num_frames / spec.fps
    with Video(str(path)) as video:
        count = min(spec.num_views, max(1, round(video.duration / span)))
        starts = (
            np.linspace(0, max(video.duration - span, 0), count)
            if count > 1
            else ([max(video.duration - span, 0) / 2])
        )
        taken = [
            video.frames_at(start + np.arange(spec.num_frames) / spec.fps, size) for start in starts
        ]
    return [_centre(frames, size) for frames, _ in taken], [times for _, times in taken]


def _centre(frames_THWC: np.ndarray, size: int) -> np.ndarray:
    top, left = ((n - size) // 2 for n in frames_THWC.shape[1:3])
    return frames_THWC[:, top : top + size, left : left + size]


def _best(probabilities: np.ndarray, labels: Sequence[str], top: int) -> dict[str, float]:
    return {
        labels[i]: float(probabilities[i]) for i in np.argsort(-probabilities, kind="stable")[:top]
    }


def _files(text: str) -> list[Path]:
    if not text:
        raise UserError(
            "config.videos is empty: set a video, or a folder of them, with --config.videos=PATH."
        )
    path = Path(text).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
        if not files:
            raise UserError(f"{path} contains no video: give a folder with files such as clip.mp4.")
        return files
    if not path.exists():
        raise UserError(f"{path} does not exist: check config.videos.")
    return [path]


def _labels(spec: PredictSpec, weights: Path | None, params: Params) -> tuple[str, ...]:
    classes = tree.flatten(params)["head/bias"].size
    beside = weights.parent / _LABELS if weights else _KINETICS
    path = (
        Path(spec.class_names).expanduser()
        if spec.class_names
        else beside
        if beside.is_file()
        else _KINETICS
    )
    if not path.is_file():
        raise UserError(f"{path} does not exist: check config.class_names.")
    labels = tuple(
        line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    )
    if len(labels) == classes:
        return labels
    if spec.class_names:
        raise UserError(
            f"{path} has {len(labels)} names but the model has {classes} classes: use its label "
            "map."
        )
    return tuple(f"class {i}" for i in range(classes))


def _lines(spec: PredictSpec, seen: dict[str, Seen], bad: dict[str, str]) -> Iterator[str]:
    yield from (f"# Predictions of {spec.model}", "")
    if spec.weights == "random":
        yield from ("The weights are random: predictions are meaningless.", "")
    for path, (answer, picture) in seen.items():
        yield from (f"## {path}", "")
        rows: list[list[Any]] = [[label, f"{p:.3f}"] for label, p in answer.items()]
        yield from (*table(["action", "probability"], rows), "")
        if picture:
            yield from (f"![{next(iter(answer))}](<{picture}>)", "")
    if bad:
        yield from (f"## {len(bad)} unreadable videos", "")
        yield from (
            *table(["video", "reason"], [[path, reason] for path, reason in bad.items()]),
            "",
        )
