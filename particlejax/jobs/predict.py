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

from particlejax import api
from particlejax.config.job_specs import PredictSpec
from particlejax.core import io, text
from particlejax.core.typing import Params, UserError
from particlejax.data.sources.folder import VIDEO_SUFFIXES
from particlejax.data.video.decode import Unreadable
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import packages
from particlejax.models.zoo.convert.description import DEFAULT_MODEL
from particlejax.models.zoo.networks import BackboneSpec
from particlejax.reports import plots
from particlejax.reports.markdown import table
from particlejax.train import pretrained, stage
from particlejax.train.log import Progress, log_info

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
            network = predictor.backbone.spec
            views, times = read_views(path, spec, network.size, network.short_side)
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
    name = predictor.backbone.spec.name
    io.write_text(report, "\n".join(_report(spec, name, predictions, unreadable)))
    log_info(f"report: {report}")


def load_predictor(spec: PredictSpec) -> Predictor:
    """The network with its weights. Raises UserError if they are missing or incomplete, or if it
    does not classify actions.
    """
    if spec.weights == "random":
        log_info("weights are random: predictions are meaningless.")
    network = pretrained.load_network(spec.model, spec.weights, _check_network)
    backbone = network.backbone
    if not network.has_head:
        raise UserError(
            f"{spec.weights} holds {backbone.spec.name} without a trained classification head: "
            "name fine-tuned weights, or train on its features with experiments/linear_probe.py."
        )
    return Predictor(
        backbone,
        network.params,
        pretrained.class_names(network, spec.weights or str(find_weights(spec)), spec.class_names),
    )


def _check_network(spec: BackboneSpec) -> None:
    """Raises UserError for a network that does not classify clips."""
    if not spec.video or not getattr(spec.net, "classes", 0):
        raise UserError(
            f"{spec.name} does not classify actions: choose another config.model, such as i3d."
        )


def find_weights(spec: PredictSpec) -> Path:
    """config.weights, else those of the installed package. Raises UserError if neither exists."""
    if spec.weights:
        return Path(spec.weights).expanduser()
    return packages.find_weights(spec.model or DEFAULT_MODEL, "weights")


def read_views(
    path: Path, spec: PredictSpec, size: int, short_side: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Evenly spaced windows of a video and their frame times; see `api.windows`."""
    found = api.windows(str(path), spec.num_frames, size, spec.num_views, spec.fps, short_side)
    return [frames for frames, _ in found], [times for _, times in found]


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


def _report(
    spec: PredictSpec,
    name: str,
    predictions: dict[str, VideoPrediction],
    unreadable: dict[str, str],
) -> Iterator[str]:
    yield from (f"# Predictions of {name}", "")
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
