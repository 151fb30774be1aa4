# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained run on any source with the same label names: results.json, predictions.csv,
report.md.
"""

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
    """Job 'evaluate': `config.run` on `config.data.source` and `.split`; frames and particles are
    the run's own.
    """
    if not experiment.run:
        raise UserError("config.run is empty: name the run to evaluate with --config.run=RUN_DIR.")
    mesh = sharding.make_mesh(experiment.mesh)
    stage, params = run.load_trained(experiment.run, mesh, run.asked(experiment.data))
    if not stage.classes or "classify" not in stage.spec.objectives:
        raise UserError(
            f"stage {stage.name} of {experiment.run} does not classify: name one that does as "
            "RUN_DIR:STAGE."
        )
    # else other numbers and combinations are none the worse
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
        ("no clip with a label", 0),
    )
    say(
        f"{stage.name} on {len(source)} clips of {stage.data.source} ({stage.data.split}): "
        f"{first[0]} {first[1]:.3f}"
    )
    if cluster.first():
        say(f"report: {markdown.write(workdir)}")
