# SPDX-License-Identifier: Apache-2.0
"""Linear probe: logistic regression on features of a frozen network, which are cached.

Legend: N clips, D width, C classes.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from particlejax.config.experiment import DataSpec
from particlejax.config.jobs import ExtractFeaturesSpec, LinearProbeSpec
from particlejax.core import io, tree
from particlejax.core.typing import Params, UserError
from particlejax.data import clips, pipeline, sources
from particlejax.data.modalities import feature_store
from particlejax.data.video.decode import Unreadable
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import packages
from particlejax.reports.markdown import table
from particlejax.train import pretrained, stage
from particlejax.train.classification_metrics import scores
from particlejax.train.log import Progress, say

_STEPS = 2000  # maximum iterations of the regression


class Frozen(NamedTuple):
    """A frozen network, and what identifies it."""

    backbone: backbones.Backbone
    params: Params
    known: dict[str, str]


class Told(NamedTuple):
    """Features float32 [N, D] and labels int [N] of a split's readable clips; how many were
    computed now.
    """

    features: np.ndarray
    label: np.ndarray
    computed: int


def linear_probe(spec: LinearProbeSpec, workdir: Path, name: str) -> None:
    """Job 'linear_probe': fits on features of `config.train_split`, evaluates on
    `config.test_split`.
    """
    del name
    begun = time.perf_counter()
    frozen, bad = load(spec), stage.BadClips(spec.max_unreadable)
    train = sources.open_source(spec.source, spec.train_split, spec.cache_dir)
    test = sources.open_source(spec.source, spec.test_split, spec.cache_dir, train.classes)
    learnt, asked = (tell(frozen, source, spec, bad) for source in (train, test))
    seconds = {"features": time.perf_counter() - begun}
    figures = scores(
        answers(learnt, asked.features, len(train.classes), spec.l2), asked.label, train.classes
    )
    seconds["regression"] = time.perf_counter() - begun - seconds["features"]
    computed, clips_seen = learnt.computed + asked.computed, len(learnt.label) + len(asked.label)
    stage.add_results(
        workdir,
        "linear_probe",
        {
            "model": spec.model,
            spec.test_split: figures,
            "width": learnt.features.shape[1],
            "computed": computed,
            "kept": clips_seen - computed,
            "seconds": seconds,
        },
        bad.all(),
    )
    say(
        f"{spec.model} on {len(asked.label)} clips of {spec.source} ({spec.test_split}): top-1 "
        f"{figures.get('top1', float('nan')):.3f}; features of {computed} clips computed, "
        f"{clips_seen - computed} cached"
    )
    path = workdir / "report.md"
    io.write_text(path, "\n".join(_lines(spec, figures, learnt, computed)))
    say(f"report: {path}")


def load(spec: LinearProbeSpec | ExtractFeaturesSpec) -> Frozen:
    """The network. Raises UserError if its weights are missing, do not fit or lack more than a
    head.
    """
    found = backbones.find(spec.model)
    if not found.video and not (
        (found.sound or found.text) and isinstance(spec, ExtractFeaturesSpec)
    ):
        raise UserError(
            f"{spec.model} does not take video: choose a video model with config.model, such as "
            "i3d."
        )
    if spec.weights == "random":
        say("weights are random: the features are of an untrained network.")
        backbone = backbones.build(found)
        params = jax.jit(backbone.init)(jax.random.key(0))
    else:
        path = spec.weights or str(packages.find(spec.model, "weights"))
        backbone, params, _, report = pretrained.read(path, spec.model)
        lacking = [name for name in report.missing if not name.startswith("head")]
        if lacking:
            raise UserError(
                f"{path} lacks {len(lacking)} parameters of {spec.model} ({lacking[0]}, ...): set "
                "config.model to the model of these weights, or use other config.weights."
            )
        params = jax.tree.map(
            lambda leaf: leaf if isinstance(leaf, np.ndarray) else np.zeros(leaf.shape, leaf.dtype),
            params,
        )
    return Frozen(
        backbone,
        jax.device_put(params),
        {
            "model": spec.model,
            "weights": digest(params),
            "endpoint": spec.endpoint or backbone.spec.last,
        },
    )


def digest(params: Params) -> str:
    """SHA-256 of all parameters except the head's, which do not affect features."""
    total = hashlib.sha256()
    for path, leaf in tree.flatten(params).items():
        if not path.startswith("head"):
            total.update(path.encode() + np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def tell(
    frozen: Frozen, source: sources.Source, spec: LinearProbeSpec, bad: stage.BadClips
) -> Told:
    """Features of every readable, labelled clip of a source, computed unless they are cached."""
    net, folder = (
        frozen.backbone.spec,
        Path(spec.feature_cache_dir).expanduser() if spec.feature_cache_dir else None,
    )
    # a Transformer has position embeddings for a fixed number of frames
    number = net.frames if net.inputs or not spec.num_frames else spec.num_frames
    data = DataSpec(num_frames=number, image_size=net.size, clip_seconds=spec.clip_seconds)
    sampling = {"frames": data.num_frames, "size": data.image_size, "seconds": data.clip_seconds}
    apply = jax.jit(
        lambda params, pixels: backbones.features(frozen.backbone, params, pixels, spec.endpoint)
    )
    labels: dict[int, int] = {}
    keys: dict[int, str] = {}
    for i in range(len(source)):
        record = source[i]
        if record.label >= 0 and (name := key_of(i, record, frozen, sampling, bad)):
            labels[i], keys[i] = record.label, name
    found = {
        i: vector
        for i, name in keys.items()
        if folder and (vector := kept(folder, name)) is not None
    }
    waiting = [i for i in keys if i not in found]
    progress = Progress("features", len(waiting), unit="clip")
    for first in range(0, len(waiting), spec.batch_size):
        part = waiting[first : first + spec.batch_size]
        read = {i: frames for i in part if (frames := _frames(i, source[i], data, bad)) is not None}
        if read:
            # fixed shape: compiles once
            pixels = np.stack(
                [*read.values(), *[next(iter(read.values()))] * (spec.batch_size - len(read))]
            )
            found |= dict(
                zip(read, np.asarray(apply(frozen.params, pixels), np.float32), strict=False)
            )
        for i in read if folder else ():
            feature_store.save(folder, keys[i], found[i])
        for _ in part:
            progress.update()
    progress.close()
    if not found:
        raise UserError(
            f"{spec.source} has no readable, labelled clip in {spec.train_split} or "
            f"{spec.test_split}: set other splits."
        )
    order = sorted(found)
    return Told(
        np.stack([found[i] for i in order]),
        np.array([labels[i] for i in order]),
        len(set(waiting) & found.keys()),
    )


def key_of(
    i: int, record: sources.Record, frozen: Frozen, sampling: dict[str, Any], bad: stage.BadClips
) -> str:
    """Cache key of a clip's features; '' for a missing file, which is recorded."""
    try:
        return feature_store.key(record, frozen.known, sampling)
    except OSError as error:
        bad.note(pipeline.Loaded(None, (pipeline.Bad(i, record.name, str(error)),)))
        return ""


def _frames(
    i: int, record: sources.Record, data: DataSpec, bad: stage.BadClips
) -> np.ndarray | None:
    try:
        return clips.load(record, data, clips.CENTRE).frames
    except Unreadable as error:
        bad.note(pipeline.Loaded(None, (pipeline.Bad(i, record.name, error.reason),)))
        return None


def answers(learnt: Told, asked_ND: np.ndarray, classes: int, penalty: float) -> np.ndarray:
    """Class probabilities [N, C] of a logistic regression on standardized features."""
    scale = StandardScaler().fit(learnt.features)
    if len(set(learnt.label)) < 2:
        raise UserError(
            "the training clips have a single class: set config.train_split to a split with more "
            "classes."
        )
    model = LogisticRegression(C=1 / penalty, max_iter=_STEPS).fit(
        scale.transform(learnt.features), learnt.label
    )
    found = np.zeros((len(asked_ND), classes))
    found[:, model.classes_] = model.predict_proba(scale.transform(asked_ND))
    return found


def kept(folder: Path | None, name: str) -> np.ndarray | None:
    """The cached features of a key, or None if they are missing or damaged; damage is logged."""
    try:
        return feature_store.load(folder, name) if folder else None
    except feature_store.Damaged as error:
        say(f"{error}: its features are computed again.")
        return None


def _lines(
    spec: LinearProbeSpec, figures: dict[str, Any], learnt: Told, computed: int
) -> Iterator[str]:
    yield from (f"# Linear probe of {spec.model} on {spec.source}", "")
    shown: Sequence[tuple[str, Any]] = (
        ("training clips", len(learnt.label)),
        ("feature width", learnt.features.shape[1]),
        ("test clips", figures.get("num_clips", 0)),
        ("features computed now", computed),
        *(
            (f"{spec.test_split} {each}", figures[each])
            for each in ("top1", "top5", "mean_class_accuracy", "ece")
            if each in figures
        ),
    )
    yield from table(
        ["", ""],
        [[name, f"{value:.3f}" if isinstance(value, float) else value] for name, value in shown],
    )
