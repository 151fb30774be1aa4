# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained run on a source with the same class names."""

from dataclasses import replace
from pathlib import Path

from particlejax.config.experiment import Experiment, as_dict
from particlejax.core.typing import UserError
from particlejax.data import sources
from particlejax.distributed import cluster, sharding
from particlejax.objectives import label_targets
from particlejax.reports import markdown
from particlejax.train import loop
from particlejax.train import stage as run
from particlejax.train.log import MetricLog, say


def evaluate(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'evaluate': evaluates `config.run` on `config.data.source`, with the run's frames and
    particles.
    """
    if not experiment.run:
        raise UserError("config.run is empty: set the run to evaluate with --config.run=RUN_DIR.")
    mesh = sharding.make_mesh(experiment.mesh)
    stage, params = run.load_trained(experiment.run, mesh, run.asked(experiment.data))
    if not stage.classes or "classify" not in stage.spec.objectives:
        raise UserError(
            f"stage {stage.name} of {experiment.run} is not a classifier: name one that is, as "
            "RUN_DIR:STAGE."
        )
    # other losses accept new values and combinations of labels
    known = stage.classes if stage.targets.loss == "softmax" else None
    source = sources.open_source(stage.data.source, stage.data.split, stage.data.cache_dir, known)
    stage = replace(
        stage, classes=source.classes, targets=label_targets.asked(stage.targets, source.classes)
    )
    bad = run.BadClips(stage.data.max_unreadable)
    context = loop.Context(
        experiment, workdir, mesh, MetricLog(workdir, experiment.log, name, as_dict(experiment))
    )
    figures = loop.classify(stage, params, source, context, "", bad.note)
    context.log.close()
    run.add_results(workdir, stage.name, {stage.data.split: figures}, bad.all())
    first = next(
        ((name, figures[name]) for name in ("top1", "mAP", "mae") if name in figures),
        ("no labelled clips", 0),
    )
    say(
        f"{stage.name} on {len(source)} clips of {stage.data.source} ({stage.data.split}): "
        f"{first[0]} {first[1]:.3f}"
    )
    if cluster.first():
        say(f"report: {markdown.write(workdir)}")
