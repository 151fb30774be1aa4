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

from particlejax.config.data import DataSpec
from particlejax.config.job_specs import ExtractFeaturesSpec, LinearProbeSpec
from particlejax.core import io, tree
from particlejax.core.typing import Params, UserError
from particlejax.data import clips, pipeline, sources
from particlejax.data.modalities import feature_store
from particlejax.data.video.decode import Unreadable
from particlejax.data.video.frame_ops import center_crop
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import description
from particlejax.models.zoo.networks import BackboneSpec
from particlejax.reports.markdown import table
from particlejax.train import pretrained, stage
from particlejax.train.classification_metrics import (
    compute_metrics,
    top1_sentence,
    with_interval,
    write_confusion,
)
from particlejax.train.log import Progress, log_info

_MAX_STEPS = 2000  # maximum iterations of the regression


class FrozenBackbone(NamedTuple):
    """A frozen network, and what identifies it."""

    backbone: backbones.Backbone
    params: Params
    identity: dict[str, str]


class SplitFeatures(NamedTuple):
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
    start = time.perf_counter()
    frozen, unreadable = load_backbone(spec), stage.UnreadableClips(spec.max_unreadable)
    train = sources.open_source(
        spec.source, spec.train_split, spec.cache_dir, key="config.train_split"
    )
    test = sources.open_source(
        spec.source, spec.test_split, spec.cache_dir, train.classes, key="config.test_split"
    )
    train_features, test_features = (
        compute_features(frozen, source, spec, unreadable) for source in (train, test)
    )
    seconds = {"features": time.perf_counter() - start}
    metrics = compute_metrics(
        predict_probabilities(train_features, test_features.features, len(train.classes), spec.l2),
        test_features.label,
        train.classes,
    )
    metrics = write_confusion(workdir / f"confusion_{spec.test_split}.csv", metrics, train.classes)
    seconds["regression"] = time.perf_counter() - start - seconds["features"]
    computed, clips_seen = (
        train_features.computed + test_features.computed,
        len(train_features.label) + len(test_features.label),
    )
    stage.add_results(
        workdir,
        "linear_probe",
        {
            "model": frozen.identity["model"],
            spec.test_split: metrics,
            "width": train_features.features.shape[1],
            "computed": computed,
            "kept": clips_seen - computed,
            "seconds": seconds,
        },
        unreadable.gather_all(),
    )
    name = frozen.identity["model"]
    log_info(
        f"{name} on {len(test_features.label)} clips of {spec.source} ({spec.test_split}): "
        f"{top1_sentence(metrics)}; features of {computed} clips computed, "
        f"{clips_seen - computed} cached"
    )
    path = workdir / "report.md"
    io.write_text(path, "\n".join(_report(frozen, spec, metrics, train_features, computed)))
    log_info(f"report: {path}")


def load_backbone(spec: LinearProbeSpec | ExtractFeaturesSpec) -> FrozenBackbone:
    """The network. Raises UserError if its weights are missing, do not fit or lack more than a
    head.
    """

    def check(network: BackboneSpec) -> None:
        has_features = network.sound or network.text
        if not network.video and not (has_features and isinstance(spec, ExtractFeaturesSpec)):
            raise UserError(
                f"{network.name} does not take video: choose a video model with config.model, such "
                "as i3d."
            )

    if spec.weights == "random":
        log_info("weights are random: the features are of an untrained network.")
    backbone, params, _ = pretrained.load_network(spec.model, spec.weights, check)
    network = backbone.spec
    identity = {
        "model": network.name,
        "weights": digest(params),
        "endpoint": spec.endpoint or network.default_endpoint,
    }
    if settings := description.own_settings(network):
        identity["settings"] = settings
    return FrozenBackbone(backbone, params, identity)


def digest(params: Params) -> str:
    """SHA-256 of all parameters except the head's, which do not affect features."""
    sha256 = hashlib.sha256()
    for path, leaf in tree.flatten(params).items():
        if not path.startswith("head"):
            sha256.update(path.encode() + np.ascontiguousarray(leaf).tobytes())
    return sha256.hexdigest()


def compute_features(
    frozen: FrozenBackbone,
    source: sources.Source,
    spec: LinearProbeSpec,
    unreadable: stage.UnreadableClips,
) -> SplitFeatures:
    """Features of every readable, labelled clip of a source, computed unless they are cached."""
    network, folder = (
        frozen.backbone.spec,
        Path(spec.feature_cache_dir).expanduser() if spec.feature_cache_dir else None,
    )
    # a Transformer has position embeddings for a fixed number of frames
    num_frames = network.frames if network.inputs or not spec.num_frames else spec.num_frames
    data = DataSpec(
        num_frames=num_frames,
        image_size=network.short_side or network.size,
        clip_seconds=spec.clip_seconds,
    )
    sampling = {"frames": num_frames, "size": network.size, "seconds": data.clip_seconds}
    if network.short_side:
        sampling["short_side"] = network.short_side
    apply = jax.jit(
        lambda params, pixels: backbones.features(frozen.backbone, params, pixels, spec.endpoint)
    )
    labels: dict[int, int] = {}
    keys: dict[int, str] = {}
    for index in range(len(source)):
        record = source[index]
        if record.label >= 0 and (name := feature_key(index, record, frozen, sampling, unreadable)):
            labels[index], keys[index] = record.label, name
    features = {
        index: vector
        for index, name in keys.items()
        if folder and (vector := load_stored(folder, name)) is not None
    }
    pending = [index for index in keys if index not in features]
    progress = Progress("features", len(pending), unit="clip")
    for start in range(0, len(pending), spec.batch_size):
        chunk = pending[start : start + spec.batch_size]
        frames_by_index = {
            index: center_crop(frames, network.size)
            for index in chunk
            if (frames := _read_frames(index, source[index], data, unreadable)) is not None
        }
        if frames_by_index:
            # fixed shape: compiles once
            pixels = np.stack(
                [
                    *frames_by_index.values(),
                    *[next(iter(frames_by_index.values()))]
                    * (spec.batch_size - len(frames_by_index)),
                ]
            )
            features |= dict(
                zip(
                    frames_by_index,
                    np.asarray(apply(frozen.params, pixels), np.float32),
                    strict=False,
                )
            )
        for index in frames_by_index if folder else ():
            feature_store.save(folder, keys[index], features[index])
        for _ in chunk:
            progress.update()
    progress.close()
    if not features:
        raise UserError(
            f"{spec.source} has no readable, labelled clip in {spec.train_split} or "
            f"{spec.test_split}: set other splits."
        )
    order = sorted(features)
    return SplitFeatures(
        np.stack([features[index] for index in order]),
        np.array([labels[index] for index in order]),
        len(set(pending) & features.keys()),
    )


def feature_key(
    index: int,
    record: sources.Record,
    frozen: FrozenBackbone,
    sampling: dict[str, Any],
    unreadable: stage.UnreadableClips,
) -> str:
    """Cache key of a clip's features; '' for a missing file, which is recorded."""
    try:
        return feature_store.key(record, frozen.identity, sampling)
    except OSError as error:
        unreadable.record(
            pipeline.LoadedBatch(None, (pipeline.UnreadableClip(index, record.name, str(error)),))
        )
        return ""


def _read_frames(
    index: int, record: sources.Record, data: DataSpec, unreadable: stage.UnreadableClips
) -> np.ndarray | None:
    try:
        return clips.load(record, data, clips.CENTER_VIEW).frames
    except Unreadable as error:
        unreadable.record(
            pipeline.LoadedBatch(None, (pipeline.UnreadableClip(index, record.name, error.reason),))
        )
        return None


def predict_probabilities(
    train_features: SplitFeatures, test_ND: np.ndarray, num_classes: int, l2: float
) -> np.ndarray:
    """Class probabilities [N, C] of a logistic regression on standardized features."""
    labeled = train_features.label >= 0
    features, label = train_features.features[labeled], train_features.label[labeled]
    if len(set(label)) < 2:
        raise UserError(
            "the training clips have a single class: set config.train_split to a split with more "
            "classes."
        )
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=1 / l2, max_iter=_MAX_STEPS).fit(scaler.transform(features), label)
    probs = np.zeros((len(test_ND), num_classes))
    probs[:, model.classes_] = model.predict_proba(scaler.transform(test_ND))
    return probs


def load_stored(folder: Path | None, name: str) -> np.ndarray | None:
    """The cached features of a key, or None if they are missing or damaged; damage is logged."""
    try:
        return feature_store.load(folder, name) if folder else None
    except feature_store.DamagedFeatures as error:
        log_info(f"{error}: its features are computed again.")
        return None


def _report(
    frozen: FrozenBackbone,
    spec: LinearProbeSpec,
    metrics: dict[str, Any],
    train_features: SplitFeatures,
    computed: int,
) -> Iterator[str]:
    yield from (f"# Linear probe of {frozen.identity['model']} on {spec.source}", "")
    entries: Sequence[tuple[str, Any]] = (
        ("training clips", len(train_features.label)),
        ("feature width", train_features.features.shape[1]),
        ("test clips", metrics.get("num_clips", 0)),
        ("features computed now", computed),
        *(
            (
                f"{spec.test_split} {key}",
                with_interval(metrics[key], metrics["num_clips"])
                if key.startswith("top")
                else f"{metrics[key]:.3f}",
            )
            for key in ("top1", "top5", "mean_class_accuracy", "ece")
            if key in metrics and (key != "top5" or len(metrics["per_class"]) > 5)
        ),
    )
    yield from table(["", ""], [list(entry) for entry in entries])
