# SPDX-License-Identifier: Apache-2.0
"""Few-shot classification by prototypes, and active learning, with a trained run.

Legend: N clips, D width, C classes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from particlejax.config.experiment import Experiment
from particlejax.core.typing import UserError
from particlejax.data import label_subset, sources
from particlejax.distributed import sharding
from particlejax.reports import markdown
from particlejax.train import classification_metrics, eval, sample_selection, stage
from particlejax.train.log import say


class _Trained:
    """A trained run, and the source to evaluate it on."""

    def __init__(self, experiment: Experiment) -> None:
        if not experiment.run:
            raise UserError("config.run is empty: set the trained run with --config.run=RUN_DIR.")
        self.spec, self.mesh = experiment.eval, sharding.make_mesh(experiment.mesh)
        sharding.check_rows(self.spec.batch_size, self.mesh, "config.eval.batch_size")
        self.stage, self.params = stage.load_trained(
            experiment.run, self.mesh, stage.asked(experiment.data)
        )
        self.bad = stage.BadClips(self.stage.data.max_unreadable)

    def open(self, split: str, classes: tuple[str, ...] | None) -> sources.Source:
        """A split of the source."""
        return sources.open_source(
            self.stage.data.source, split, self.stage.data.cache_dir, classes
        )

    def look(self, source: sources.Source, predict: Any, name: str) -> tuple[np.ndarray, Any]:
        """Indices of the readable clips, and the output of `predict` for each, averaged over the
        views.
        """
        views = self.stage.views(source, self.spec.batch_size, self.spec.views, self.spec.scale)
        return eval.per_clip(predict, self.params, views, self.mesh, self.bad.note, name)


def fewshot_prototypes(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'fewshot_prototypes': nearest class mean of the features of `data.shots` clips a class
    from `data.split` (prototypical networks, arXiv:1703.05175).

    Evaluates `eval.splits`; writes results.json, predictions_SPLIT.csv and report.md.
    """
    del name
    trained = _Trained(experiment)
    predict = eval.jit_features(trained.stage.model, trained.mesh)
    known = label_subset.limit(
        trained.open(experiment.data.split, None), experiment.data, experiment.seed
    )
    if not known.classes:
        raise UserError(
            f"{trained.stage.data.source} has no labels: give clips.csv a column 'label'."
        )
    numbers, found = trained.look(known, predict, "features")
    centres = sample_selection.centres(
        found[""], label_subset.labels(known)[numbers], len(known.classes)
    )
    figures: dict[str, Any] = {"known": {"num_clips": len(numbers), "classes": len(known.classes)}}
    for split in experiment.eval.splits:
        asked = trained.open(split, known.classes)
        numbers, found = trained.look(asked, predict, f"features of {split}")
        probabilities, label = (
            sample_selection.nearest(found[""], centres),
            label_subset.labels(asked)[numbers],
        )
        names = [asked[int(n)].name for n in numbers]
        classification_metrics.write_predictions(
            workdir / f"predictions_{split}.csv", names, label, probabilities, known.classes
        )
        figures[split] = classification_metrics.scores(probabilities, label, known.classes)
        say(
            f"prototypes of {figures['known']['num_clips']} clips on {split}: top-1 "
            f"{figures[split].get('top1', float('nan')):.3f}"
        )
    stage.add_results(workdir, "fewshot_prototypes", figures, trained.bad.all())
    say(f"report: {markdown.write(workdir)}")


def active_learning(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'active_learning': selects the clips of `data.split` to label next, best first.

    Labelled clips (of `data.labelled_csv` or `data.shots`, else of the source) are excluded.
    next.csv lists the selected clips with their predictions; listed.csv adds the labelled ones, for
    `config.data.labelled_csv` of the next round.
    """
    del name
    trained, spec = _Trained(experiment), experiment.active_learning
    if trained.stage.targets is None or trained.stage.targets.loss != "softmax":
        raise UserError(
            f"stage {trained.stage.name} of {experiment.run} is not a single-label classifier: "
            "name one that is, as RUN_DIR:STAGE."
        )
    source = trained.open(experiment.data.split, trained.stage.classes)
    known = _known(source, experiment)
    model, mesh = trained.stage.model, trained.mesh
    numbers, found = trained.look(source, eval.jit_features(model, mesh), "features")
    _, probabilities = trained.look(source, eval.jit_predict(model, mesh), "classes")
    open_to = ~np.isin(numbers, known)
    if not open_to.any():
        raise UserError(
            f"every clip of {trained.stage.data.source} has a label: list the labelled ones in "
            "config.data.labelled_csv, or set another config.data.split."
        )
    wanted = sample_selection.SELECT[spec.strategy](
        probabilities, found[""], open_to, spec.num_clips, experiment.seed
    )
    best = probabilities.argmax(axis=1)
    rows = [
        [source[int(numbers[i])].name, source.classes[best[i]], f"{probabilities[i, best[i]]:.4f}"]
        for i in wanted
    ]
    classification_metrics.write_table(
        workdir / "next.csv", ["path", "predicted", "probability"], rows
    )
    classification_metrics.write_table(
        workdir / "listed.csv",
        ["path"],
        [[source[int(n)].name] for n in known] + [row[:1] for row in rows],
    )
    figures = {"known": len(known), "chosen": len(rows), "left": int(open_to.sum()) - len(rows)}
    stage.add_results(workdir, "active_learning", {"round": figures}, trained.bad.all())
    say(f"{len(rows)} clips to label next, by {spec.strategy}: {workdir / 'next.csv'}")
    say(f"report: {markdown.write(workdir)}")


def _known(source: sources.Source, experiment: Experiment) -> np.ndarray:
    data, label = experiment.data, label_subset.labels(source)
    if data.labelled_csv:
        return label_subset.read_list(source, data.labelled_csv)
    return (
        label_subset.draw(label, data.shots, experiment.seed, source.classes)
        if data.shots
        else np.flatnonzero(label >= 0)
    )
