# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained run on a source with the same class names."""

from dataclasses import replace
from pathlib import Path

from particlejax.config.fields import as_dict
from particlejax.config.job_specs import EvaluateJob
from particlejax.core.typing import UserError
from particlejax.data import sources
from particlejax.distributed import cluster, sharding
from particlejax.objectives import label_targets
from particlejax.reports import markdown
from particlejax.train import loop
from particlejax.train import stage as run
from particlejax.train.log import MetricLog, log_info


def evaluate(experiment: EvaluateJob, workdir: Path, name: str) -> None:
    """Job 'evaluate': evaluates `config.run` on `config.data.source`, with the run's frames and
    particles.
    """
    if not experiment.run:
        raise UserError("config.run is empty: set the run to evaluate with --config.run=RUN_DIR.")
    mesh = sharding.make_mesh(experiment.mesh)
    stage, params = run.load_trained(experiment.run, mesh, run.data_overrides(experiment.data))
    if not stage.classes or "classify" not in stage.spec.objectives:
        raise UserError(
            f"stage {stage.name} of {experiment.run} is not a classifier: name one that is, as "
            "RUN_DIR:STAGE."
        )
    # other losses accept new values and combinations of labels
    run_classes = stage.classes if stage.targets.loss == "softmax" else None
    source = sources.open_split(stage.data, classes=run_classes)
    run.log_source(stage.name, stage.data.source, {stage.data.split: source})
    stage = replace(
        stage,
        classes=source.classes,
        targets=label_targets.remap_to_source(stage.targets, source.classes, stage.data.source),
    )
    unreadable = run.UnreadableClips(stage.data.max_unreadable)
    context = loop.Context(
        experiment, workdir, mesh, MetricLog(workdir, experiment.log, name, as_dict(experiment))
    )
    metrics = loop.evaluate_classification(stage, params, source, context, "", unreadable.record)
    context.log.close()
    run.add_results(workdir, stage.name, {stage.data.split: metrics}, unreadable.gather_all())
    main_metric = next(
        ((name, metrics[name]) for name in ("top1", "mAP", "mae") if name in metrics),
        ("no labelled clips", 0),
    )
    log_info(
        f"{stage.name} on {len(source)} clips of {stage.data.source} ({stage.data.split}): "
        f"{main_metric[0]} {main_metric[1]:.3f}"
    )
    if cluster.is_primary():
        log_info(f"report: {markdown.write(workdir)}")
