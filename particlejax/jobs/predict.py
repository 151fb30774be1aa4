# SPDX-License-Identifier: Apache-2.0
"""Predicts the actions in videos; prints the top classes, writes results.json and report.md.

Legend: T frames, H rows, W columns.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from particlejax.config.job_specs import PredictSpec
from particlejax.core import csv_table, io, text, tree
from particlejax.core.typing import Params, UserError
from particlejax.data.sources.folder import VIDEO_SUFFIXES
from particlejax.data.video.decode import Unreadable, Video
from particlejax.models import zoo
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import packages
from particlejax.reports import plots
from particlejax.reports.markdown import table
from particlejax.train import pretrained, stage
from particlejax.train.log import Progress, log_info

# Kinetics-400's class names in the order of its published label map, which is alphabetical.
_KINETICS = Path(zoo.__file__).with_name("kinetics400.txt")
_LABELS = "label_map.txt"
_MOST_PICTURES = 50
_UNPRINTABLE = re.compile("[\udc80-\udcff]")  # bytes of a file name that are not UTF-8


class Predictor(NamedTuple):
    """A network, its parameters and class names."""

    backbone: backbones.Backbone
    params: Params
    class_names: tuple[str, ...]


class VideoPrediction(NamedTuple):
    """Top classes of a video with their probabilities, and a picture in the workdir or ''."""

    probs: dict[str, float]
    picture: str


def predict(spec: PredictSpec, workdir: Path, name: str) -> None:
    """Job 'predict': the top classes of every video of `config.videos`."""
    del name
    files = _files(spec.videos)
    predictor = load_predictor(spec)
    # a Transformer has position embeddings for a fixed number of frames
    if predictor.backbone.spec.inputs:
        spec = dataclasses.replace(spec, num_frames=predictor.backbone.spec.frames)
    classify = jax.jit(
        lambda params, pixels: backbones.classify(predictor.backbone, params, pixels)
    )
    predictions: dict[str, VideoPrediction] = {}
    unreadable: dict[str, str] = {}
    progress = Progress("predict", len(files), unit="video")
    for i, path in enumerate(files):
        shown = text.escape(str(path))
        try:
            views, times = read_views(path, spec, predictor.backbone.spec.size)
        except Unreadable as error:
            unreadable[shown] = error.reason
            log_info(f"{shown} is unreadable ({error.reason}): skipped.")
        else:
            view_probs = [
                jax.nn.softmax(classify(predictor.params, view[None]))[0] for view in views
            ]
            probs = _top_classes(np.mean(view_probs, axis=0), predictor.class_names, spec.top_k)
            log_info(f"{shown}: " + ", ".join(f"{label} {p:.3f}" for label, p in probs.items()))
            stem = _UNPRINTABLE.sub("_", path.stem)
            middle_view, picture = len(views) // 2, f"report/{i:03d}_{stem}.png"
            if i < _MOST_PICTURES:
                plots.plot_prediction(
                    views[middle_view], times[middle_view], probs, workdir / picture
                )
            predictions[shown] = VideoPrediction(probs, picture if i < _MOST_PICTURES else "")
        progress.update()
    progress.close()
    stage.add_results(
        workdir,
        "predict",
        {path: prediction.probs for path, prediction in predictions.items()},
        unreadable,
    )
    report = workdir / "report.md"
    io.write_text(report, "\n".join(_report(spec, predictions, unreadable)))
    log_info(f"report: {report}")


def load_predictor(spec: PredictSpec) -> Predictor:
    """The network with its weights. Raises UserError if they are missing or incomplete, or if it
    does not classify actions.
    """
    if not backbones.find_backbone(spec.model).video or not getattr(
        backbones.find_backbone(spec.model).net, "classes", 0
    ):
        raise UserError(
            f"{spec.model} does not classify actions: choose another config.model, such as i3d."
        )
    if spec.weights == "random":
        log_info("weights are random: predictions are meaningless.")
        backbone = backbones.build_backbone(backbones.find_backbone(spec.model))
        params = jax.jit(backbone.init)(jax.random.key(0))
        return Predictor(backbone, params, _class_names(spec, None, params))
    path = find_weights(spec)
    backbone, params, _, report = pretrained.load_pretrained(str(path), spec.model)
    if report.missing:
        raise UserError(
            f"{path} lacks {len(report.missing)} parameters of {spec.model} ({report.missing[0]}, "
            "...): set config.model to the model of these weights, or use other config.weights."
        )
    return Predictor(backbone, jax.device_put(params), _class_names(spec, path, params))


def find_weights(spec: PredictSpec) -> Path:
    """config.weights, else those of the installed package. Raises UserError if neither exists."""
    if spec.weights:
        return Path(spec.weights).expanduser()
    return packages.find_weights(spec.model, "weights")


def read_views(
    path: Path, spec: PredictSpec, size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Evenly spaced windows of a video, each uint8 [T, size, size, 3] center crops, and frame times
    [T] in seconds.

    A video shorter than a window repeats its last frame.
    """
    view_seconds = spec.num_frames / spec.fps
    with Video(str(path)) as video:
        num_views = min(spec.num_views, max(1, round(video.duration / view_seconds)))
        starts = (
            np.linspace(0, max(video.duration - view_seconds, 0), num_views)
            if num_views > 1
            else ([max(video.duration - view_seconds, 0) / 2])
        )
        clips = [
            video.frames_at(start + np.arange(spec.num_frames) / spec.fps, size) for start in starts
        ]
    return [_center_crop(frames, size) for frames, _ in clips], [times for _, times in clips]


def _center_crop(frames_THWC: np.ndarray, size: int) -> np.ndarray:
    top, left = ((n - size) // 2 for n in frames_THWC.shape[1:3])
    return frames_THWC[:, top : top + size, left : left + size]


def _top_classes(
    probabilities: np.ndarray, class_names: Sequence[str], top_k: int
) -> dict[str, float]:
    return {
        class_names[i]: float(probabilities[i])
        for i in np.argsort(-probabilities, kind="stable")[:top_k]
    }


def _files(videos: str) -> list[Path]:
    if not videos:
        raise UserError(
            "config.videos is empty: set a video, or a folder of them, with --config.videos=PATH."
        )
    path = Path(text.find_path(os.path.expanduser(videos)))
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
        if not files:
            raise UserError(f"{path} contains no video: give a folder with files such as clip.mp4.")
        return files
    if not path.exists():
        raise UserError(f"{path} does not exist: check config.videos.")
    return [path]


def _class_names(spec: PredictSpec, weights: Path | None, params: Params) -> tuple[str, ...]:
    num_classes = tree.flatten(params)["head/bias"].size
    default_path = weights.parent / _LABELS if weights else _KINETICS
    path = (
        Path(spec.class_names).expanduser()
        if spec.class_names
        else default_path
        if default_path.is_file()
        else _KINETICS
    )
    if not path.is_file():
        raise UserError(f"{path} does not exist: check config.class_names.")
    class_names = csv_table.read_names(path)
    if len(class_names) == num_classes:
        return class_names
    if spec.class_names:
        raise UserError(
            f"{path} has {len(class_names)} names but the model has {num_classes} classes: use its "
            "label map."
        )
    return tuple(f"class {i}" for i in range(num_classes))


def _report(
    spec: PredictSpec, predictions: dict[str, VideoPrediction], unreadable: dict[str, str]
) -> Iterator[str]:
    yield from (f"# Predictions of {spec.model}", "")
    if spec.weights == "random":
        yield from ("The weights are random: predictions are meaningless.", "")
    for path, (probs, picture) in predictions.items():
        yield from (f"## {path}", "")
        rows: list[list[Any]] = [[label, f"{p:.3f}"] for label, p in probs.items()]
        yield from (*table(["action", "probability"], rows), "")
        if picture:
            yield from (f"![{next(iter(probs))}](<{picture}>)", "")
    if unreadable:
        yield from (f"## {len(unreadable)} unreadable videos", "")
        yield from (
            *table(["video", "reason"], [[path, reason] for path, reason in unreadable.items()]),
            "",
        )
