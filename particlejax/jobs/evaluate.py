# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained run on a source with the same class names."""

from pathlib import Path

from particlejax.config.fields import as_dict
from particlejax.config.job_specs import EvaluateJob
from particlejax.core.typing import UserError
from particlejax.distributed import sharding
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
    stage, source = run.on_labeled_source(stage)
    run.log_source(stage.name, stage.data.source, {stage.data.split: source})
    unreadable = run.UnreadableClips(stage.data.max_unreadable)
    context = loop.Context(
        experiment, workdir, mesh, MetricLog(workdir, experiment.log, name, as_dict(experiment))
    )
    metrics = loop.evaluate_classification(stage, params, source, context, "", unreadable.record)
    context.log.close()
    run.add_results(workdir, stage.name, {stage.data.split: metrics}, unreadable.gather_all())
    log_info(
        f"{stage.name} on {metrics['num_clips']} labeled of {len(source)} clips of "
        f"{stage.data.source}:"
    )
    for line in markdown.headlines({stage.name: {stage.data.split: metrics}}):
        log_info(line)
    markdown.write_report(workdir)
