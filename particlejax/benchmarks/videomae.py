# SPDX-License-Identifier: Apache-2.0
"""Benchmarks train steps and inference against VideoMAE of `transformers` and the matmul rate."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from particlejax.benchmarks import linen_videomae
from particlejax.config.job_specs import BenchJob
from particlejax.core import accelerators, flops, io
from particlejax.core.typing import UserError
from particlejax.data import clips as data_clips
from particlejax.data import pipeline
from particlejax.distributed import sharding
from particlejax.objectives import registry
from particlejax.particles import packing
from particlejax.particles.types import Batch
from particlejax.reports.markdown import table
from particlejax.train import eval, train_step
from particlejax.train import stage as run
from particlejax.train.log import log_info
from particlejax.train.train_state import initialize, jit_step

_CLASSES = tuple(map(str, range(10)))
_PEER, _MATMULS = "VideoMAE", "products"


class Workload(NamedTuple):
    """run: runs it n times and waits. flops: FLOPs of a clip, from shapes. num_params: their
    number.
    """

    run: Callable[[int], Any]
    flops: int
    num_params: int
    dtype: str


def bench(experiment: BenchJob, workdir: Path, name: str) -> None:
    """Job 'bench_videomae': writes report.md and results.json. Raises UserError for a stage without
    a baseline.
    """
    del name
    experiment, skipped = _select_dtypes(experiment)
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "left_out": skipped,
    }
    for reason in skipped:
        log_info(reason)
    for _, stage, train in _tasks(experiment):
        _baseline_task(experiment, stage, train)  # fail early
    for task, stage, train in _tasks(experiment):
        results[task] = _measure(
            experiment,
            _workloads(experiment, stage, train),
            experiment.stages[stage].batch_size,
            task,
        )
        run.add_results(workdir, "bench_videomae", results, {})  # a task may take minutes
    text = "\n".join(_report(experiment, results))
    io.write_text(workdir / "report.md", text)
    print(text)


def _select_dtypes(experiment: BenchJob) -> tuple[BenchJob, list[str]]:
    """The experiment with the dtypes that pay here, and messages about skipped ones.

    CPUs without bfloat16 units are slower in bfloat16, with torch many times.
    """
    skipped = [reason for reason in [linen_videomae.unavailable_reason()] if reason]
    rates = {dtype: _matmul_rate(dtype) for dtype in experiment.bench.dtypes}
    fast_dtypes = tuple(dtype for dtype, rate in rates.items() if rate >= rates.get("float32", 0.0))
    skipped += [
        f"{dtype} is skipped: its matmuls are slower here than in float32 ({rate / 1e9:.0f} "
        f"against {rates['float32'] / 1e9:.0f} GFLOP/s): set config.bench.dtypes=('{dtype}',) to "
        "measure it anyway."
        for dtype, rate in rates.items()
        if dtype not in fast_dtypes
    ]
    return replace(experiment, bench=replace(experiment.bench, dtypes=fast_dtypes)), skipped


def _tasks(experiment: BenchJob) -> list[tuple[str, str, bool]]:
    """(name, stage, train): a step of each stage, and the forward pass of classifiers."""
    steps = [(f"{stage}, a step", stage, True) for stage in experiment.stages]
    return steps + [
        (f"{stage}, inference", stage, False)
        for stage, spec in experiment.stages.items()
        if registry.classifies(spec.objectives)
    ]


# -- what is measured


def _workloads(experiment: BenchJob, name: str, train: bool) -> dict[str, Workload]:
    """particlejax on the grid and, for classifiers, on half as many adaptive particles, and the
    baseline, in each dtype.
    """
    task, workloads = _baseline_task(experiment, name, train), {}
    half_spec = replace(experiment.particles, policy="adaptive", budget=task.tokens // 2)
    for dtype in experiment.bench.dtypes:
        typed = replace(experiment, model=replace(experiment.model, dtype=dtype))
        workloads[f"ours, {dtype}"] = _own_workload(typed, name, train)
        if not linen_videomae.unavailable_reason():
            run, num_params = linen_videomae.build_runner(
                experiment.model, task, dtype, experiment.seed
            )
            workloads[f"{_PEER}, {dtype}"] = Workload(
                run, linen_videomae.flops_per_clip(experiment.model, task), num_params, dtype
            )
        if not task.masked:
            workloads[f"ours, half as many adaptive particles, {dtype}"] = _own_workload(
                replace(typed, particles=half_spec), name, train
            )
    return workloads


def _baseline_task(experiment: BenchJob, name: str, train: bool) -> linen_videomae.Task:
    spec, data = experiment.stages[name], experiment.data
    if set(spec.objectives) not in ({"masked_autoencoder"}, {"classify"}):
        raise UserError(
            f"config.stages.{name} has the objectives {', '.join(spec.objectives)}, but VideoMAE "
            "has 'masked_autoencoder' and 'classify' only: give each stage one of these."
        )
    if experiment.particles.policy != "grid" or spec.data or spec.particles or spec.model:
        raise UserError(
            f"config.stages.{name} differs from VideoMAE: set config.particles.policy='grid', and "
            "leave the stage's own data, particles and model empty."
        )
    return linen_videomae.Task(
        (data.num_frames, data.image_size, data.image_size),
        experiment.particles.patch_size,
        spec.batch_size,
        len(_CLASSES),
        spec.objectives.get("masked_autoencoder"),
        train,
    )


def _own_workload(experiment: BenchJob, name: str, train: bool) -> Workload:
    """The compiled program of the training loop, on particles as the data pipeline makes them."""
    stage, mesh = run.build_stage(experiment, name, _CLASSES), sharding.make_mesh(experiment.mesh)
    program, batch = (
        train_step.build_program(stage, stage.targets, stage.spec.num_steps),
        _batch(stage),
    )
    state = initialize(
        stage.model,
        program.optimizer,
        stage.example,
        experiment.seed,
        stage.spec.ema_decay,
        mesh,
        stage.spec.finetune,
    )
    sharding.check_rows(stage.spec.batch_size, mesh, f"config.stages.{name}.batch_size")
    sharded_batch, state_box = sharding.shard_batch(batch, mesh), [state]
    step = jit_step(program.step, state, mesh) if train else eval.jit_predict(stage.model, mesh)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    flops_per_clip = (
        _forward_flops(experiment, name, batch) * (3 if train else 1) // stage.spec.batch_size
    )

    def run_repeatedly(count: int) -> None:
        for _ in range(count):
            if train:
                state_box[0], _ = step(state_box[0], sharded_batch)
            else:
                last = step(state_box[0].params, sharded_batch)
        jax.block_until_ready(state_box[0] if train else last)

    return Workload(run_repeatedly, flops_per_clip, num_params, experiment.model.dtype)


def _forward_flops(experiment: BenchJob, name: str, batch: Batch) -> int:
    """FLOPs of a forward pass with plain attention, as fused kernels hide or recompute some."""
    reference_stage = run.build_stage(
        replace(experiment, model=replace(experiment.model, attention_impl="xla")), name, _CLASSES
    )
    objective = train_step.build_program(
        reference_stage, reference_stage.targets, reference_stage.spec.num_steps
    ).objective
    params = jax.eval_shape(reference_stage.model.init, jax.random.key(0), reference_stage.example)
    return flops.count(
        jax.make_jaxpr(
            lambda weights, inputs, key: objective(
                weights, reference_stage.model, inputs, key, True
            )
        )(params, batch, jax.random.key(0))
    )


def _batch(stage: run.Stage) -> Batch:
    """Random pixels, patchified as in the stage, one clip of two seconds a row."""
    rng, data = np.random.default_rng(0), stage.data
    packed, seconds = [], 2.0
    for i in range(stage.spec.batch_size):
        frames = rng.integers(
            0, 256, (data.num_frames, data.image_size, data.image_size, 3), np.uint8
        )
        clip = data_clips.Clip(frames, seconds)
        packed.append(
            packing.Clip(
                data_clips.make_particles(clip, data, stage.particles, rng), i % len(_CLASSES), i
            )
        )
    row = pipeline.row_shape(data, stage.particles)
    return packing.pack(packed, range(stage.spec.batch_size), row.slots, stage.spec.batch_size, 1)


# -- how it is measured


def _measure(
    experiment: BenchJob, workloads: dict[str, Workload], batch_size: int, task: str
) -> dict[str, Any]:
    """Figures by work, from interleaved repetitions, matmuls first."""
    count = max(1, experiment.bench.num_clips // batch_size)
    for name, workload in workloads.items():
        start = time.perf_counter()
        workload.run(1)  # compile
        log_info(f"{task}: {name} ready in {time.perf_counter() - start:.1f} s")
    seconds: dict[str, list[float]] = {name: [] for name in workloads}
    rates: dict[str, list[float]] = {dtype: [] for dtype in experiment.bench.dtypes}
    for repetition in range(experiment.bench.repetitions):
        for dtype in rates:
            rates[dtype].append(_matmul_rate(dtype))
        for name, workload in workloads.items():
            start = time.perf_counter()
            workload.run(count)
            seconds[name].append((time.perf_counter() - start) / (count * batch_size))
        log_info(f"{task}: repetition {repetition + 1} of {experiment.bench.repetitions}")
    return {_MATMULS: {dtype: float(np.median(values)) for dtype, values in rates.items()}} | {
        name: _metrics(workload, seconds[name], rates[workload.dtype]) | _speedups(seconds, name)
        for name, workload in workloads.items()
    }


def _matmul_rate(dtype: str) -> float:
    """FLOP/s of all devices: the published bfloat16 rate if known, else measured."""
    chip = accelerators.find_chip(jax.devices()[0].device_kind)
    return jax.device_count() * (
        chip.peak_flops
        if chip and dtype == "bfloat16"
        else accelerators.measure_matmul_flops(dtype)
    )


def _metrics(workload: Workload, seconds: list[float], rates: list[float]) -> dict[str, float]:
    utilization = [
        workload.flops / (run_seconds * rate)
        for run_seconds, rate in zip(seconds, rates, strict=True)
    ]
    median = float(np.median(seconds))
    return {
        "clips_per_second": 1 / median,
        "flops_per_clip": workload.flops,
        "flops_per_second": workload.flops / median,
        "utilisation": float(np.median(utilization)),
        "parameters": workload.num_params,
    }


def _speedups(seconds: dict[str, list[float]], name: str) -> dict[str, dict[str, float]]:
    """Speedup over the baseline in each of its dtypes, median over repetitions."""
    baselines = {
        baseline: baseline_seconds
        for baseline, baseline_seconds in seconds.items()
        if baseline.startswith(_PEER)
    }
    return {
        "times": {
            baseline: float(np.median(np.divide(baseline_seconds, seconds[name])))
            for baseline, baseline_seconds in baselines.items()
        }
    }


def _report(experiment: BenchJob, results: dict[str, Any]) -> Iterator[str]:
    data, model, patch_size = (
        experiment.data,
        experiment.model,
        "x".join(map(str, experiment.particles.patch_size)),
    )
    yield from (
        "# particlejax and VideoMAE",
        "",
        f"Width {model.width}, depth {model.depth}, {model.num_heads} heads; decoder "
        f"{model.decoder_width}, {model.decoder_depth}, {model.decoder_num_heads}. Clips of "
        f"{data.num_frames} x {data.image_size} x {data.image_size} in cuboids of {patch_size}, on "
        f"{results['devices']} x {results['device']}.",
        "",
    )
    for reason in results["left_out"]:
        yield from (reason, "")
    yield from (
        "Medians of interleaved repetitions. FLOPs are counted from shapes, a training step is "
        "three forward passes; the fraction of peak is of the published bfloat16 rate, else of "
        "the matmul rate measured in the same repetition. Particle selection is not included: "
        "job bench_particles measures it.",
        "",
    )
    for task, stage, _ in _tasks(experiment):
        rows = dict(results[task])
        rates = ", ".join(
            f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rows.pop(_MATMULS).items()
        )
        peers = [name for name in rows if name.startswith(_PEER)]
        yield from (
            f"## {task}, {experiment.stages[stage].batch_size} clips",
            "",
            f"Products: {rates}.",
            "",
        )
        header = [
            "",
            "clips/s",
            *(f"times {peer}" for peer in peers),
            "M parameters",
            "GFLOP a clip",
            "GFLOP/s",
            "share",
        ]
        yield from table(
            header,
            [
                [
                    name,
                    f"{row['clips_per_second']:.2f}",
                    *(f"{row['times'][peer]:.2f}" for peer in peers),
                    f"{row['parameters'] / 1e6:.2f}",
                    f"{row['flops_per_clip'] / 1e9:.2f}",
                    f"{row['flops_per_second'] / 1e9:.0f}",
                    f"{row['utilisation']:.2f}",
                ]
                for name, row in rows.items()
            ],
        )
        yield ""
