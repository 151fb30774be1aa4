# SPDX-License-Identifier: Apache-2.0
"""Converts a source to a sharded TFDS data set, in a process pool or an Apache Beam pipeline."""

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from particlejax.config.experiment import Experiment
from particlejax.core.errors import UserError, install_line
from particlejax.data import tfds_export as data
from particlejax.train import stage
from particlejax.train.log import Progress, say


def prepare_data(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'prepare_data': writes `config.data.source` to OUT/NAME/1.0.0; keeps existing shards."""
    del name
    spec = experiment.prepare
    plan = data.plan(
        experiment.data.source,
        spec.data_dir or str(workdir),
        spec.name,
        experiment.data.cache_dir,
        spec.clips_per_shard,
        experiment.data.decode_timeout_seconds,
    )
    left, whole = plan.left, len(plan.shards)
    say(
        f"prepare: {whole} shards into {plan.folder}"
        + (f", {whole - len(left)} exist" if len(left) < whole else "")
    )
    progress = Progress("prepare_data", whole, whole - len(left), unit="shard")
    for _ in _beam(left, spec.num_workers) if spec.beam else _pool(left, spec.num_workers):
        progress.update()
    progress.close()
    figures = data.finish(plan)
    bad = figures.pop("bad")
    for clip, reason in bad.items():
        say(f"clip {clip} is unreadable ({reason}): skipped.")
    stage.add_results(workdir, "prepare_data", figures, bad)
    if len(bad) > experiment.data.max_unreadable:
        raise UserError(
            f"{len(bad)} clips are unreadable, more than "
            f"config.data.max_unreadable={experiment.data.max_unreadable}: see "
            f"{workdir / stage.RESULTS}, repair them or raise the limit."
        )
    for split, count in figures["num_clips"].items():
        if not count:
            say(f"split {split} has no readable clips: skipped.")
    if not any(figures["num_clips"].values()):
        raise UserError(
            f"no clip of {experiment.data.source} is readable, so no data set is written: "
            f"{workdir / stage.RESULTS} lists the reasons."
        )
    say(f"prepared {figures['num_clips']} clips: use --config.data.source=tfds:{plan.folder}")


def _pool(shards: Iterable[data.Shard], workers: int) -> Iterator[Any]:
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(data.write, shard) for shard in shards]
            try:
                for done in as_completed(waiting):
                    yield done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory: run the same command again "
            "with fewer --config.prepare.num_workers; written shards are kept."
        ) from error


def _beam(shards: Iterable[data.Shard], workers: int) -> Iterator[Any]:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            f"config.prepare.beam needs Apache Beam: run `{install_line('beam')}`, or set it to "
            "False."
        ) from error
    options = PipelineOptions(
        ["--direct_num_workers", str(workers), "--direct_running_mode", "multi_processing"]
    )
    shards = list(shards)
    if shards:
        with beam.Pipeline(options=options) as pipeline:
            _ = pipeline | beam.Create(shards) | beam.Reshuffle() | beam.Map(data.write)
    yield from shards
