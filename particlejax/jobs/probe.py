# SPDX-License-Identifier: Apache-2.0
"""Probes a run's frozen encoder: k-NN, linear and attentive accuracy, retrieval between modalities,
and its objectives on unseen clips.

Legend: N clips, D width, E embedding width, C classes.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from particlejax.config.job_specs import ProbeSpec
from particlejax.config.modalities import ordered
from particlejax.config.training import MeshSpec
from particlejax.core import io
from particlejax.core.typing import Params, UserError
from particlejax.distributed import sharding
from particlejax.jobs import attentive_probe
from particlejax.objectives import registry
from particlejax.objectives.label_targets import Targets
from particlejax.reports.markdown import table
from particlejax.train import eval, predictions
from particlejax.train import stage as run
from particlejax.train.classification_metrics import with_interval
from particlejax.train.log import json_ready, log_info

_MAX_ITERATIONS = 2000  # maximum iterations of the regression
_RECALL_RANKS = (1, 5, 10)
_METRIC = {"softmax": "top1", "sigmoid": "mAP", "regression": "r2"}  # of probes, by the run's loss


class SplitFeatures(NamedTuple):
    """Labels int [N] of a split, -1 for unlabelled, features float64 [N, D] by the names of
    `eval.jit_features`, and the head targets of the split's labels, None for a run without a head.
    """

    label: np.ndarray
    features: dict[str, np.ndarray]
    targets: Targets | None = None


def probe(spec: ProbeSpec, workdir: Path, name: str) -> None:
    """Job 'probe': probes `config.run`; writes results.json and report.md."""
    del name
    if not spec.run:
        raise UserError(
            "config.run is empty: set the run whose encoder is probed with --config.run=RUN_DIR."
        )
    mesh = sharding.make_mesh(MeshSpec())
    overrides = {
        key: value
        for key, value in (("source", spec.source), ("cache_dir", spec.cache_dir))
        if value
    }
    stage, params = run.load_trained(spec.run, mesh, overrides)
    if spec.weights == "random":
        params = jax.jit(stage.model.init)(jax.random.key(spec.seed % 2**32), stage.example)
    unreadable = run.UnreadableClips(spec.max_unreadable)
    train_features, test_features = (
        compute_features(stage, params, spec, split, unreadable)
        for split in (spec.train_split, spec.test_split)
    )
    accuracies = classify_probes(train_features, test_features, spec)
    metric = _METRIC[_loss(test_features)]
    if accuracies and spec.attentive_steps and metric != "top1":
        log_info("the attentive probe is for one class per clip and is left out.")
    elif accuracies and spec.attentive_steps:
        tokens = (
            attentive_probe.collect_tokens(
                stage, params, spec, split, tuple(accuracies), unreadable
            )
            for split in (spec.train_split, spec.test_split)
        )
        for inputs, top1 in attentive_probe.accuracy(*tokens, spec).items():
            accuracies[inputs]["attentive"] = top1
    metrics = {
        "metric": metric,
        "num_labeled_clips": int((test_features.label >= 0).sum()),
        "classes": accuracies,
        "retrieval": retrieval(test_features.features),
        "objectives": json_ready(objective_metrics(stage, params, spec, unreadable)),
    }
    run.add_results(
        workdir,
        "probe",
        {
            "run": spec.run,
            "weights": spec.weights,
            "num_clips": len(test_features.label),
            **metrics,
        },
        unreadable.gather_all(),
    )
    lines = list(_report(spec, metrics, len(stage.classes)))
    log_info("\n".join(lines[2:]))
    io.write_text(workdir / "report.md", "\n".join(lines))
    log_info(f"report: {workdir / 'report.md'}")


def compute_features(
    stage: run.Stage, params: Params, spec: ProbeSpec, split: str, unreadable: run.UnreadableClips
) -> SplitFeatures:
    """Features of every readable clip of a split. Raises UserError if there is none."""
    mesh = sharding.make_mesh(MeshSpec())
    stage, source = run.on_source(stage, split, attentive_probe.split_key(spec, split))
    names = ordered(stage.example.particles)
    inputs = ("", *(names if spec.per_modality and len(names) > 1 else ()))
    heads = registry.heads(stage.spec.objectives)
    compared = heads["projection"].modalities if "projection" in heads else ()
    compute = eval.jit_features(stage.model, mesh, inputs, compared)
    clip_indices, features = eval.mean_per_clip(
        compute,
        params,
        stage.eval_batches(source, spec.batch_size),
        mesh,
        unreadable.record,
        f"features of {split}",
    )
    if features is None:
        raise UserError(
            f"no clip of {stage.data.source} ({split}) is readable: set other splits with "
            "config.train_split and config.test_split."
        )
    label = np.array([source[int(index)].label for index in clip_indices], int)
    return SplitFeatures(label, features, stage.targets)


def classify_probes(
    train: SplitFeatures, test: SplitFeatures, spec: ProbeSpec
) -> dict[str, dict[str, float]]:
    """The figure of each probe, by modality: accuracy, or mean average precision for several
    classes a clip, or R^2 for numbers; {} if the clips have fewer than two labels.
    """
    train_labeled, test_labeled = train.label >= 0, test.label >= 0
    if len(set(train.label[train_labeled])) < 2 or not test_labeled.any():
        return {}
    loss, neighbors = _loss(train), min(spec.knn_k, int(train_labeled.sum()))
    logistic = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / spec.l2, max_iter=_MAX_ITERATIONS)
    )
    linear, neighbor_probe = {
        "softmax": (logistic, KNeighborsClassifier),
        "sigmoid": (_OneByOne(logistic), KNeighborsRegressor),  # the share of neighbors
        "regression": (make_pipeline(StandardScaler(), Ridge(spec.l2)), KNeighborsRegressor),
    }[loss]
    probes = {"linear": linear, "knn": neighbor_probe(neighbors, metric="cosine")}
    target = _target(train)[train_labeled]
    return {
        name or "all": {
            method: _score(
                probe_model.fit(train.features[name][train_labeled], target).predict(
                    test.features[name][test_labeled]
                ),
                _target(test)[test_labeled],
                loss,
            )
            for method, probe_model in probes.items()
        }
        for name in train.features
        if not name.startswith(("embed/", "present/"))
    }


def _loss(split: SplitFeatures) -> str:
    return split.targets.loss if split.targets else "softmax"


def _target(split: SplitFeatures) -> np.ndarray:
    """Labels [N], or what the head of several classes or a number is to predict, [N, O]."""
    if _loss(split) == "softmax":
        return split.label
    return split.targets.table[np.maximum(split.label, 0)]


def _score(predicted: np.ndarray, target: np.ndarray, loss: str) -> float:
    if loss == "softmax":
        return float((predicted == target).mean())
    if loss == "sigmoid":
        names = [str(i) for i in range(target.shape[1])]
        return predictions.multilabel_metrics(predicted, target > 0.5, names)["mAP"]
    return predictions.regression_metrics(predicted.reshape(-1), target[:, 0])["r2"]


class _OneByOne:
    """A classifier of each class by itself that predicts probabilities [N, O]; a class that all or
    none of the clips have is constant.
    """

    def __init__(self, classifier: Any) -> None:
        self.classifier, self.fitted = classifier, []

    def fit(self, x_ND: np.ndarray, target_NO: np.ndarray) -> "_OneByOne":
        self.fitted = [
            clone(self.classifier).fit(x_ND, column) if len(set(column)) > 1 else column[0]
            for column in target_NO.T > 0.5
        ]
        return self

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        columns = [
            np.full(len(x_ND), float(one))
            if isinstance(one, np.bool_)
            else one.predict_proba(x_ND)[:, 1]
            for one in self.fitted
        ]
        return np.stack(columns, axis=1)


def retrieval(features: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Recall at R = 1, 5, 10 and median rank (from 1) between two embedded modalities, over the
    clips that have both.
    """
    embeddings = {
        name.removeprefix("embed/"): embedding
        for name, embedding in features.items()
        if name.startswith("embed/")
    }
    metrics = {}
    for query, target in itertools.permutations(embeddings, 2):
        both = (features[f"present/{query}"] > 0) & (features[f"present/{target}"] > 0)
        if not both.any():
            continue
        similarity = embeddings[query][both] @ embeddings[target][both].T
        # ties rank the correct clip last
        rank = (similarity >= np.diag(similarity)[:, None]).sum(axis=1)
        metrics[f"{query} to {target}"] = {
            f"R@{rank_limit}": float((rank <= rank_limit).mean()) for rank_limit in _RECALL_RANKS
        } | {"median rank": float(np.median(rank)), "clips": int(both.sum())}
    return metrics


def objective_metrics(
    stage: run.Stage, params: Params, spec: ProbeSpec, unreadable: run.UnreadableClips
) -> dict[str, float]:
    """The objectives' own metrics on the test split, measured as in training."""
    mesh = sharding.make_mesh(MeshSpec())
    stage, source = run.on_source(stage, spec.test_split, "config.test_split")
    objective = registry.combine(stage.spec.objectives, stage.targets)
    return eval.evaluate_metrics(
        eval.jit_evaluation(objective, stage.model, mesh),
        params,
        stage.eval_batches(source, spec.batch_size),
        mesh,
        unreadable.record,
    )


def _report(spec: ProbeSpec, metrics: dict[str, Any], num_classes: int) -> Iterator[str]:
    yield from (f"# Probes of the encoder of {spec.run} ({spec.weights} weights)", "")
    if metrics["classes"]:
        count, metric = metrics["num_labeled_clips"], metrics["metric"]
        titles = {"top1": "top-1 accuracy (95 % interval)", "mAP": "mean average precision"}
        yield from (f"{titles.get(metric, 'variance explained')} on {count} clips:", "")
        yield from table(
            ["input", *next(iter(metrics["classes"].values()))],
            [
                [
                    name,
                    *(
                        with_interval(value, count) if metric == "top1" else f"{value:.3f}"
                        for value in row.values()
                    ),
                ]
                for name, row in metrics["classes"].items()
            ],
        )
        yield ""
    if metrics["retrieval"]:
        yield from table(
            ["from, to", *next(iter(metrics["retrieval"].values()))],
            [
                [direction, *(f"{value:.4g}" for value in row.values())]
                for direction, row in metrics["retrieval"].items()
            ],
        )
        yield ""
    yield from table(
        ["objective on unseen clips", ""],
        [
            [name, f"{float(value):.4f}"]
            for name, value in metrics["objectives"].items()
            if num_classes > 5 or not name.endswith("/top5")
        ],
    )
    yield ""
