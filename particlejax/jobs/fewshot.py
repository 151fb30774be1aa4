# SPDX-License-Identifier: Apache-2.0
"""Few-shot classification by prototypes, and active learning, with a trained run.

Legend: N clips, D width, C classes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from particlejax.config.data import DataSpec
from particlejax.config.job_specs import ActiveLearningJob, FewshotPrototypesJob
from particlejax.core.typing import UserError
from particlejax.data import label_subset, sources
from particlejax.distributed import sharding
from particlejax.reports import markdown
from particlejax.train import classification_metrics, eval, sample_selection, stage
from particlejax.train.log import log_info


class _TrainedRun:
    """A trained run, and the source to evaluate it on."""

    def __init__(self, experiment: FewshotPrototypesJob | ActiveLearningJob) -> None:
        if not experiment.run:
            raise UserError("config.run is empty: set the trained run with --config.run=RUN_DIR.")
        self.spec, self.mesh = experiment.eval, sharding.make_mesh(experiment.mesh)
        sharding.check_rows(self.spec.batch_size, self.mesh, "config.eval.batch_size")
        self.stage, self.params = stage.load_trained(
            experiment.run, self.mesh, stage.data_overrides(experiment.data)
        )
        self.unreadable = stage.UnreadableClips(self.stage.data.max_unreadable)

    def open(self, split: str, classes: tuple[str, ...] | None, key: str) -> sources.Source:
        """A split of the source; `key` is the setting that names it."""
        return sources.open_split(self.stage.data, split, classes, key)

    def evaluate_clips(
        self, source: sources.Source, predict: Any, name: str
    ) -> tuple[np.ndarray, Any]:
        """Indices of the readable clips, and the output of `predict` for each, averaged over the
        views.
        """
        views = self.stage.eval_batches(
            source, self.spec.batch_size, self.spec.views, self.spec.scale
        )
        return eval.mean_per_clip(
            predict, self.params, views, self.mesh, self.unreadable.record, name
        )


def fewshot_prototypes(experiment: FewshotPrototypesJob, workdir: Path, name: str) -> None:
    """Job 'fewshot_prototypes': nearest class mean of the features of `data.shots` clips a class
    from `data.split` (prototypical networks, arXiv:1703.05175).

    Evaluates `eval.splits`; writes results.json, predictions_SPLIT.csv and report.md.
    """
    del name
    trained = _TrainedRun(experiment)
    predict = eval.jit_features(trained.stage.model, trained.mesh)
    labeled = label_subset.limit_labels(
        trained.open(experiment.data.split, None, "config.data.split"),
        DataSpec(shots=experiment.data.shots, labelled_csv=experiment.data.labelled_csv),
        experiment.seed,
    )
    if not labeled.classes:
        raise UserError(
            f"{trained.stage.data.source} has no labels: give clips.csv a column 'label'."
        )
    clip_indices, features = trained.evaluate_clips(labeled, predict, "features")
    centers = sample_selection.class_centers(
        features[""], label_subset.labels(labeled)[clip_indices], len(labeled.classes)
    )
    metrics: dict[str, Any] = {
        "known": {"num_clips": len(clip_indices), "classes": len(labeled.classes)}
    }
    for split in experiment.eval.splits:
        source = trained.open(split, labeled.classes, "config.eval.splits")
        clip_indices, features = trained.evaluate_clips(source, predict, f"features of {split}")
        probabilities, label = (
            sample_selection.nearest_center_probs(features[""], centers),
            label_subset.labels(source)[clip_indices],
        )
        names = [source[int(index)].name for index in clip_indices]
        classification_metrics.write_predictions(
            workdir / f"predictions_{split}.csv", names, label, probabilities, labeled.classes
        )
        figures = classification_metrics.compute_metrics(probabilities, label, labeled.classes)
        metrics[split] = classification_metrics.write_confusion(
            workdir / f"confusion_{split}.csv", figures, labeled.classes
        )
        log_info(
            f"prototypes of {metrics['known']['num_clips']} clips on {split}: "
            f"{classification_metrics.top1_sentence(figures)}"
        )
    stage.add_results(workdir, "fewshot_prototypes", metrics, trained.unreadable.gather_all())
    markdown.write_report(workdir)


def active_learning(experiment: ActiveLearningJob, workdir: Path, name: str) -> None:
    """Job 'active_learning': selects the clips of `data.split` to label next, best first.

    Labelled clips (of `data.labelled_csv` or `data.shots`, else of the source) are excluded.
    next.csv lists the selected clips with their predictions; listed.csv adds the labelled ones, for
    `config.data.labelled_csv` of the next round.
    """
    del name
    trained, spec = _TrainedRun(experiment), experiment.active_learning
    if trained.stage.targets is None or trained.stage.targets.loss != "softmax":
        raise UserError(
            f"stage {trained.stage.name} of {experiment.run} is not a single-label classifier: "
            "name one that is, as RUN_DIR:STAGE."
        )
    source = trained.open(experiment.data.split, trained.stage.classes, "config.data.split")
    labeled = _labeled_indices(source, experiment)
    model, mesh = trained.stage.model, trained.mesh
    clip_indices, features = trained.evaluate_clips(
        source, eval.jit_features(model, mesh), "features"
    )
    _, probabilities = trained.evaluate_clips(source, eval.jit_predict(model, mesh), "classes")
    candidates = ~np.isin(clip_indices, labeled)
    if not candidates.any():
        raise UserError(
            f"every clip of {trained.stage.data.source} has a label: list the labelled ones in "
            "config.data.labelled_csv, or set another config.data.split."
        )
    selected = sample_selection.STRATEGIES[spec.strategy](
        probabilities, features[""], candidates, spec.num_clips, experiment.seed
    )
    predicted = probabilities.argmax(axis=1)
    rows = [
        [
            source[int(clip_indices[i])].name,
            source.classes[predicted[i]],
            f"{probabilities[i, predicted[i]]:.4f}",
        ]
        for i in selected
    ]
    classification_metrics.write_table(
        workdir / "next.csv", ["path", "predicted", "probability"], rows
    )
    classification_metrics.write_table(
        workdir / "listed.csv",
        ["path"],
        [[source[int(index)].name] for index in labeled] + [row[:1] for row in rows],
    )
    counts = {"known": len(labeled), "chosen": len(rows), "left": int(candidates.sum()) - len(rows)}
    stage.add_results(
        workdir, "active_learning", {"round": counts}, trained.unreadable.gather_all()
    )
    log_info(f"{len(rows)} clips to label next, by {spec.strategy}: {workdir / 'next.csv'}")
    markdown.write_report(workdir)


def _labeled_indices(source: sources.Source, experiment: ActiveLearningJob) -> np.ndarray:
    data, label = experiment.data, label_subset.labels(source)
    if data.labelled_csv:
        return label_subset.read_list(source, data.labelled_csv)
    return (
        label_subset.draw_shots(label, data.shots, experiment.seed, source.classes)
        if data.shots
        else np.flatnonzero(label >= 0)
    )
