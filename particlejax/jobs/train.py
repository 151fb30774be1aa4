# SPDX-License-Identifier: Apache-2.0
"""Trains every stage of an experiment, then writes pictures and the report."""

from functools import partial
from pathlib import Path

from particlejax.config.experiment import Experiment
from particlejax.config.fields import as_dict
from particlejax.distributed import cluster, sharding
from particlejax.reports import markdown, visualize
from particlejax.train import loop
from particlejax.train.log import MetricLog, log_info
from particlejax.train.stage import read_results


def train(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'train': trains all stages, writes pictures and report.md, prints the main figures."""
    mesh = sharding.make_mesh(experiment.mesh)
    log_info(f"devices: {sharding.describe(mesh)}")
    log = MetricLog(workdir, experiment.log, name, as_dict(experiment))
    try:
        loop.train(loop.Context(experiment, workdir, mesh, log))
    finally:
        log.close()
    for stage in experiment.stages:
        draw = partial(visualize.draw_reconstructions, workdir, stage, mesh)
        markdown.draw(f"reconstructions of {stage}", draw)
    markdown.write_report(workdir)
    if cluster.is_primary():
        for line in markdown.headlines(read_results(workdir)):
            log_info(line)
