# SPDX-License-Identifier: Apache-2.0
"""Converts a source to a sharded TFDS data set, in a process pool or an Apache Beam pipeline."""

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from particlejax.config.job_specs import PrepareDataJob
from particlejax.core.errors import UserError, install_line
from particlejax.data import tfds_export as data
from particlejax.train import stage
from particlejax.train.log import Progress, log_info


def prepare_data(experiment: PrepareDataJob, workdir: Path, name: str) -> None:
    """Job 'prepare_data': writes `config.data.source` to OUT/NAME/1.0.0; keeps existing shards."""
    del name
    spec = experiment.prepare
    plan = data.make_plan(
        experiment.data.source,
        spec.data_dir or str(workdir),
        spec.name,
        experiment.data.cache_dir,
        spec.clips_per_shard,
        experiment.data.decode_timeout_seconds,
    )
    remaining, num_shards = plan.remaining, len(plan.shards)
    log_info(
        f"prepare: {num_shards} shards into {plan.folder}"
        + (f", {num_shards - len(remaining)} exist" if len(remaining) < num_shards else "")
    )
    progress = Progress("prepare_data", num_shards, num_shards - len(remaining), unit="shard")
    for _ in (
        _beam(remaining, spec.num_workers) if spec.beam else _pool(remaining, spec.num_workers)
    ):
        progress.update()
    progress.close()
    summary = data.finish(plan)
    unreadable = summary.pop("bad")
    for clip, reason in unreadable.items():
        log_info(f"clip {clip} is unreadable ({reason}): skipped.")
    stage.add_results(workdir, "prepare_data", summary, unreadable)
    if len(unreadable) > experiment.data.max_unreadable:
        raise UserError(
            f"{len(unreadable)} clips are unreadable, more than "
            f"config.data.max_unreadable={experiment.data.max_unreadable}: see "
            f"{workdir / stage.RESULTS}, repair them or raise the limit."
        )
    for split, count in summary["num_clips"].items():
        if not count:
            log_info(f"split {split} has no readable clips: skipped.")
    if not any(summary["num_clips"].values()):
        raise UserError(
            f"no clip of {experiment.data.source} is readable, so no data set is written: "
            f"{workdir / stage.RESULTS} lists the reasons."
        )
    log_info(f"prepared {summary['num_clips']} clips: use --config.data.source=tfds:{plan.folder}")


def _pool(shards: Iterable[data.Shard], num_workers: int) -> Iterator[Any]:
    try:
        with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(data.write_shard, shard) for shard in shards]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory: run the same command again "
            "with fewer --config.prepare.num_workers; written shards are kept."
        ) from error


def _beam(shards: Iterable[data.Shard], num_workers: int) -> Iterator[Any]:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            f"config.prepare.beam needs Apache Beam: run `{install_line('beam')}`, or set it to "
            "False."
        ) from error
    options = PipelineOptions(
        ["--direct_num_workers", str(num_workers), "--direct_running_mode", "multi_processing"]
    )
    shards = list(shards)
    if shards:
        with beam.Pipeline(options=options) as pipeline:
            _ = pipeline | beam.Create(shards) | beam.Reshuffle() | beam.Map(data.write_shard)
    yield from shards
