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

from particlejax.config.experiment import MeshSpec
from particlejax.config.jobs import ProbeSpec
from particlejax.config.modalities import ordered
from particlejax.core import io
from particlejax.core.typing import Params, UserError
from particlejax.data import sources
from particlejax.distributed import sharding
from particlejax.jobs import attentive_probe
from particlejax.objectives import registry
from particlejax.reports.markdown import table
from particlejax.train import eval
from particlejax.train import stage as run
from particlejax.train.log import say

_ITERATIONS = 2000  # maximum iterations of the regression
_RANKS = (1, 5, 10)


class Told(NamedTuple):
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
    said = {
        key: value
        for key, value in (("source", spec.source), ("cache_dir", spec.cache_dir))
        if value
    }
    stage, params = run.load_trained(spec.run, mesh, said)
    if spec.weights == "random":
        params = jax.jit(stage.model.init)(jax.random.key(spec.seed), stage.example)
    bad = run.BadClips(spec.max_unreadable)
    learnt, asked = (
        tell(stage, params, spec, split, bad) for split in (spec.train_split, spec.test_split)
    )
    answers = classes(learnt, asked, spec)
    if answers and spec.attentive_steps:
        tokens = (
            attentive_probe.tokens(stage, params, spec, split, tuple(answers), bad)
            for split in (spec.train_split, spec.test_split)
        )
        for shown, top1 in attentive_probe.accuracy(*tokens, spec).items():
            answers[shown]["attentive"] = top1
    figures = {
        "classes": answers,
        "retrieval": retrieval(asked.features),
        "objectives": measured(stage, params, spec, bad),
    }
    run.add_results(
        workdir,
        "probe",
        {"run": spec.run, "weights": spec.weights, "num_clips": len(asked.label), **figures},
        bad.all(),
    )
    lines = list(_lines(spec, figures))
    say("\n".join(lines[2:]))
    io.write_text(workdir / "report.md", "\n".join(lines))
    say(f"report: {workdir / 'report.md'}")


def tell(stage: run.Stage, params: Params, spec: ProbeSpec, split: str, bad: run.BadClips) -> Told:
    """Features of every readable clip of a split. Raises UserError if there is none."""
    mesh = sharding.make_mesh(MeshSpec())
    source = sources.open_source(stage.data.source, split, stage.data.cache_dir, stage.classes)
    names = ordered(stage.example.particles)
    shown = ("", *(names if spec.per_modality and len(names) > 1 else ()))
    heads = registry.heads(stage.spec.objectives)
    compared = heads["projection"].modalities if "projection" in heads else ()
    compute = eval.jit_features(stage.model, mesh, shown, compared)
    numbers, found = eval.per_clip(
        compute,
        params,
        stage.views(source, spec.batch_size),
        mesh,
        bad.note,
        f"features of {split}",
    )
    if found is None:
        raise UserError(
            f"no clip of {stage.data.source} ({split}) is readable: set other splits with "
            "config.train_split and config.test_split."
        )
    return Told(np.array([source[int(n)].label for n in numbers], int), found)


def classes(learnt: Told, asked: Told, spec: ProbeSpec) -> dict[str, dict[str, float]]:
    """Accuracy of each probe, by modality; {} if the clips have fewer than two classes."""
    known, there = learnt.label >= 0, asked.label >= 0
    if len(set(learnt.label[known])) < 2 or not there.any():
        return {}
    probes = {
        "linear": make_pipeline(
            StandardScaler(), LogisticRegression(C=1 / spec.l2, max_iter=_ITERATIONS)
        ),
        "knn": KNeighborsClassifier(min(spec.knn_k, int(known.sum())), metric="cosine"),
    }
    return {
        name or "all": {
            how: float(
                each.fit(learnt.features[name][known], learnt.label[known]).score(
                    asked.features[name][there], asked.label[there]
                )
            )
            for how, each in probes.items()
        }
        for name in learnt.features
        if not name.startswith("embed/")
    }


def retrieval(features: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Recall at R = 1, 5, 10 and median rank (from 1) between each pair of embedded modalities.

    A clip without a modality has the embedding of empty input, and so counts as not found.
    """
    units = {
        name.removeprefix("embed/"): each
        for name, each in features.items()
        if name.startswith("embed/")
    }
    found = {}
    for one, other in itertools.permutations(units, 2):
        alike = units[one] @ units[other].T
        # ties rank the correct clip last
        rank = (alike >= np.diag(alike)[:, None]).sum(axis=1)
        found[f"{one} to {other}"] = {f"R@{k}": float((rank <= k).mean()) for k in _RANKS} | {
            "median rank": float(np.median(rank))
        }
    return found


def measured(
    stage: run.Stage, params: Params, spec: ProbeSpec, bad: run.BadClips
) -> dict[str, float]:
    """The objectives' own metrics on the test split."""
    mesh = sharding.make_mesh(MeshSpec())
    source = sources.open_source(
        stage.data.source, spec.test_split, stage.data.cache_dir, stage.classes
    )
    measure = eval.jit_measure(registry.combine(stage.spec.objectives), stage.model, mesh)
    return eval.metrics_of(measure, params, stage.views(source, spec.batch_size), mesh, bad.note)


def _lines(spec: ProbeSpec, figures: dict[str, Any]) -> Iterator[str]:
    yield from (f"# Probes of the encoder of {spec.run} ({spec.weights} weights)", "")
    if figures["classes"]:
        yield from table(
            ["input", *next(iter(figures["classes"].values()))],
            [
                [shown, *(f"{value:.3f}" for value in each.values())]
                for shown, each in figures["classes"].items()
            ],
        )
        yield ""
    if figures["retrieval"]:
        yield from table(
            ["from, to", *next(iter(figures["retrieval"].values()))],
            [
                [way, *(f"{value:.3f}" for value in each.values())]
                for way, each in figures["retrieval"].items()
            ],
        )
        yield ""
    yield from table(
        ["objective on unseen clips", ""],
        [[name, f"{value:.4f}"] for name, value in figures["objectives"].items()],
    )
    yield ""
