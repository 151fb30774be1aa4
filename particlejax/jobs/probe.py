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
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from particlejax.config.job_specs import ProbeSpec
from particlejax.config.modalities import ordered
from particlejax.config.training import MeshSpec
from particlejax.core import io
from particlejax.core.typing import Params, UserError
from particlejax.data import sources
from particlejax.distributed import sharding
from particlejax.jobs import attentive_probe
from particlejax.objectives import registry
from particlejax.reports.markdown import table
from particlejax.train import eval
from particlejax.train import stage as run
from particlejax.train.log import log_info

_MAX_ITERATIONS = 2000  # maximum iterations of the regression
_RECALL_RANKS = (1, 5, 10)


class SplitFeatures(NamedTuple):
    """Labels int [N] of a split, -1 for unlabelled, and features float64 [N, D] by the names of
    `eval.jit_features`.
    """

    label: np.ndarray
    features: dict[str, np.ndarray]


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
    if accuracies and spec.attentive_steps:
        tokens = (
            attentive_probe.collect_tokens(
                stage, params, spec, split, tuple(accuracies), unreadable
            )
            for split in (spec.train_split, spec.test_split)
        )
        for inputs, top1 in attentive_probe.accuracy(*tokens, spec).items():
            accuracies[inputs]["attentive"] = top1
    metrics = {
        "classes": accuracies,
        "retrieval": retrieval(test_features.features),
        "objectives": objective_metrics(stage, params, spec, unreadable),
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
    lines = list(_report(spec, metrics))
    log_info("\n".join(lines[2:]))
    io.write_text(workdir / "report.md", "\n".join(lines))
    log_info(f"report: {workdir / 'report.md'}")


def compute_features(
    stage: run.Stage, params: Params, spec: ProbeSpec, split: str, unreadable: run.UnreadableClips
) -> SplitFeatures:
    """Features of every readable clip of a split. Raises UserError if there is none."""
    mesh = sharding.make_mesh(MeshSpec())
    source = sources.open_split(
        stage.data, split, stage.classes, attentive_probe.split_key(spec, split)
    )
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
    return SplitFeatures(
        np.array([source[int(index)].label for index in clip_indices], int), features
    )


def classify_probes(
    train: SplitFeatures, test: SplitFeatures, spec: ProbeSpec
) -> dict[str, dict[str, float]]:
    """Accuracy of each probe, by modality; {} if the clips have fewer than two classes."""
    train_labeled, test_labeled = train.label >= 0, test.label >= 0
    if len(set(train.label[train_labeled])) < 2 or not test_labeled.any():
        return {}
    probes = {
        "linear": make_pipeline(
            StandardScaler(), LogisticRegression(C=1 / spec.l2, max_iter=_MAX_ITERATIONS)
        ),
        "knn": KNeighborsClassifier(min(spec.knn_k, int(train_labeled.sum())), metric="cosine"),
    }
    return {
        name or "all": {
            method: float(
                probe_model.fit(
                    train.features[name][train_labeled], train.label[train_labeled]
                ).score(test.features[name][test_labeled], test.label[test_labeled])
            )
            for method, probe_model in probes.items()
        }
        for name in train.features
        if not name.startswith("embed/")
    }


def retrieval(features: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Recall at R = 1, 5, 10 and median rank (from 1) between each pair of embedded modalities.

    A clip without a modality has the embedding of empty input, and so counts as not found.
    """
    embeddings = {
        name.removeprefix("embed/"): embedding
        for name, embedding in features.items()
        if name.startswith("embed/")
    }
    metrics = {}
    for query, target in itertools.permutations(embeddings, 2):
        similarity = embeddings[query] @ embeddings[target].T
        # ties rank the correct clip last
        rank = (similarity >= np.diag(similarity)[:, None]).sum(axis=1)
        metrics[f"{query} to {target}"] = {
            f"R@{rank_limit}": float((rank <= rank_limit).mean()) for rank_limit in _RECALL_RANKS
        } | {"median rank": float(np.median(rank))}
    return metrics


def objective_metrics(
    stage: run.Stage, params: Params, spec: ProbeSpec, unreadable: run.UnreadableClips
) -> dict[str, float]:
    """The objectives' own metrics on the test split, measured as in training."""
    mesh = sharding.make_mesh(MeshSpec())
    source = sources.open_split(stage.data, spec.test_split, stage.classes, "config.test_split")
    objective = registry.combine(stage.spec.objectives, stage.targets)
    return eval.evaluate_metrics(
        eval.jit_evaluation(objective, stage.model, mesh),
        params,
        stage.eval_batches(source, spec.batch_size),
        mesh,
        unreadable.record,
    )


def _report(spec: ProbeSpec, metrics: dict[str, Any]) -> Iterator[str]:
    yield from (f"# Probes of the encoder of {spec.run} ({spec.weights} weights)", "")
    if metrics["classes"]:
        yield from table(
            ["input", *next(iter(metrics["classes"].values()))],
            [
                [name, *(f"{value:.3f}" for value in row.values())]
                for name, row in metrics["classes"].items()
            ],
        )
        yield ""
    if metrics["retrieval"]:
        yield from table(
            ["from, to", *next(iter(metrics["retrieval"].values()))],
            [
                [direction, *(f"{value:.3f}" for value in row.values())]
                for direction, row in metrics["retrieval"].items()
            ],
        )
        yield ""
    yield from table(
        ["objective on unseen clips", ""],
        [[name, f"{value:.4f}"] for name, value in metrics["objectives"].items()],
    )
    yield ""
