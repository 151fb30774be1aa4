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
from particlejax.config.experiment import Experiment
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
from particlejax.train.log import say
from particlejax.train.train_state import initialise, jit_step

_CLASSES = tuple(map(str, range(10)))
_PEER, _PRODUCTS = "VideoMAE", "products"


class Work(NamedTuple):
    """times: runs it n times and waits. operations: FLOPs of a clip, from shapes. parameters: their
    number.
    """

    times: Callable[[int], Any]
    operations: int
    parameters: int
    dtype: str


def bench(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'bench_videomae': writes report.md and results.json. Raises UserError for a stage without
    a baseline.
    """
    del name
    experiment, said = _worthwhile(experiment)
    figures: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "left_out": said,
    }
    for sentence in said:
        say(sentence)
    for _, stage, train in _tasks(experiment):
        _task(experiment, stage, train)  # fail early
    for task, stage, train in _tasks(experiment):
        figures[task] = _measured(
            experiment, _works(experiment, stage, train), experiment.stages[stage].batch_size, task
        )
        run.add_results(workdir, "bench_videomae", figures, {})  # a task may take minutes
    text = "\n".join(_report(experiment, figures))
    io.write_text(workdir / "report.md", text)
    print(text)


def _worthwhile(experiment: Experiment) -> tuple[Experiment, list[str]]:
    """The experiment with the dtypes that pay here, and messages about skipped ones.

    CPUs without bfloat16 units are slower in bfloat16, with torch many times.
    """
    said = [sentence for sentence in [linen_videomae.missing()] if sentence]
    rates = {dtype: _rate(dtype) for dtype in experiment.bench.dtypes}
    fast = tuple(dtype for dtype, rate in rates.items() if rate >= rates.get("float32", 0.0))
    said += [
        f"{dtype} is skipped: its matmuls are slower here than in float32 ({rate / 1e9:.0f} "
        f"against {rates['float32'] / 1e9:.0f} GFLOP/s): set config.bench.dtypes=('{dtype}',) to "
        "measure it anyway."
        for dtype, rate in rates.items()
        if dtype not in fast
    ]
    return replace(experiment, bench=replace(experiment.bench, dtypes=fast)), said


def _tasks(experiment: Experiment) -> list[tuple[str, str, bool]]:
    """(name, stage, train): a step of each stage, and the forward pass of classifiers."""
    steps = [(f"{stage}, a step", stage, True) for stage in experiment.stages]
    return steps + [
        (f"{stage}, inference", stage, False)
        for stage, spec in experiment.stages.items()
        if registry.classifies(spec.objectives)
    ]


# -- what is measured


def _works(experiment: Experiment, name: str, train: bool) -> dict[str, Work]:
    """particlejax on the grid and, for classifiers, on half as many adaptive particles, and the
    baseline, in each dtype.
    """
    task, found = _task(experiment, name, train), {}
    half = replace(experiment.particles, policy="adaptive", budget=task.tokens // 2)
    for dtype in experiment.bench.dtypes:
        typed = replace(experiment, model=replace(experiment.model, dtype=dtype))
        found[f"ours, {dtype}"] = _ours(typed, name, train)
        if not linen_videomae.missing():
            times, parameters = linen_videomae.build(experiment.model, task, dtype, experiment.seed)
            found[f"{_PEER}, {dtype}"] = Work(
                times, linen_videomae.operations(experiment.model, task), parameters, dtype
            )
        if not task.masked:
            found[f"ours, half as many adaptive particles, {dtype}"] = _ours(
                replace(typed, particles=half), name, train
            )
    return found


def _task(experiment: Experiment, name: str, train: bool) -> linen_videomae.Task:
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


def _ours(experiment: Experiment, name: str, train: bool) -> Work:
    """The compiled program of the training loop, on particles as the data pipeline makes them."""
    stage, mesh = run.build(experiment, name, _CLASSES), sharding.make_mesh(experiment.mesh)
    made, batch = train_step.of(stage, stage.targets, stage.spec.num_steps), _batch(stage)
    state = initialise(
        stage.model,
        made.optimizer,
        stage.example,
        experiment.seed,
        stage.spec.ema_decay,
        mesh,
        stage.spec.finetune,
    )
    sharding.check_rows(stage.spec.batch_size, mesh, f"config.stages.{name}.batch_size")
    placed, held = sharding.put(batch, mesh), [state]
    call = jit_step(made.step, state, mesh) if train else eval.jit_predict(stage.model, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    operations = _operations(experiment, name, batch) * (3 if train else 1) // stage.spec.batch_size

    def times(number: int) -> None:
        for _ in range(number):
            if train:
                held[0], _ = call(held[0], placed)
            else:
                last = call(held[0].params, placed)
        jax.block_until_ready(held[0] if train else last)

    return Work(times, operations, parameters, experiment.model.dtype)


def _operations(experiment: Experiment, name: str, batch: Batch) -> int:
    """FLOPs of a forward pass with plain attention, as fused kernels hide or recompute some."""
    plain = run.build(
        replace(experiment, model=replace(experiment.model, attention_impl="xla")), name, _CLASSES
    )
    objective = train_step.of(plain, plain.targets, plain.spec.num_steps).objective
    params = jax.eval_shape(plain.model.init, jax.random.key(0), plain.example)
    return flops.count(
        jax.make_jaxpr(lambda p, b, key: objective(p, plain.model, b, key, True))(
            params, batch, jax.random.key(0)
        )
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
                data_clips.particles_of(clip, data, stage.particles, rng), i % len(_CLASSES), i
            )
        )
    row = pipeline.row_of(data, stage.particles)
    return packing.pack(packed, range(stage.spec.batch_size), row.slots, stage.spec.batch_size, 1)


# -- how it is measured


def _measured(
    experiment: Experiment, works: dict[str, Work], rows: int, task: str
) -> dict[str, Any]:
    """Figures by work, from interleaved repetitions, matmuls first."""
    number = max(1, experiment.bench.num_clips // rows)
    for name, work in works.items():
        begun = time.perf_counter()
        work.times(1)  # compile
        say(f"{task}: {name} ready in {time.perf_counter() - begun:.1f} s")
    seconds: dict[str, list[float]] = {name: [] for name in works}
    rates: dict[str, list[float]] = {dtype: [] for dtype in experiment.bench.dtypes}
    for repetition in range(experiment.bench.repetitions):
        for dtype in rates:
            rates[dtype].append(_rate(dtype))
        for name, work in works.items():
            begun = time.perf_counter()
            work.times(number)
            seconds[name].append((time.perf_counter() - begun) / (number * rows))
        say(f"{task}: repetition {repetition + 1} of {experiment.bench.repetitions}")
    return {_PRODUCTS: {dtype: float(np.median(each)) for dtype, each in rates.items()}} | {
        name: _figures(work, seconds[name], rates[work.dtype]) | _beside(seconds, name)
        for name, work in works.items()
    }


def _rate(dtype: str) -> float:
    """FLOP/s of all devices: the published bfloat16 rate if known, else measured."""
    chip = accelerators.known(jax.devices()[0].device_kind)
    return jax.device_count() * (
        chip.product if chip and dtype == "bfloat16" else accelerators.product(dtype)
    )


def _figures(work: Work, seconds: list[float], rates: list[float]) -> dict[str, float]:
    share = [work.operations / (each * rate) for each, rate in zip(seconds, rates, strict=True)]
    each = float(np.median(seconds))
    return {
        "clips_per_second": 1 / each,
        "flops_per_clip": work.operations,
        "flops_per_second": work.operations / each,
        "utilisation": float(np.median(share)),
        "parameters": work.parameters,
    }


def _beside(seconds: dict[str, list[float]], name: str) -> dict[str, dict[str, float]]:
    """Speedup over the baseline in each of its dtypes, median over repetitions."""
    peers = {other: each for other, each in seconds.items() if other.startswith(_PEER)}
    return {
        "times": {
            other: float(np.median(np.divide(each, seconds[name]))) for other, each in peers.items()
        }
    }


def _report(experiment: Experiment, figures: dict[str, Any]) -> Iterator[str]:
    data, model, base = (
        experiment.data,
        experiment.model,
        "x".join(map(str, experiment.particles.patch_size)),
    )
    yield from (
        "# particlejax and VideoMAE",
        "",
        f"Width {model.width}, depth {model.depth}, {model.num_heads} heads; decoder "
        f"{model.decoder_width}, {model.decoder_depth}, {model.decoder_num_heads}. Clips of "
        f"{data.num_frames} x {data.image_size} x "
        f"{data.image_size} in cuboids of {base}, on {figures['devices']} x {figures['device']}.",
        "",
    )
    for sentence in figures["left_out"]:
        yield from (sentence, "")
    yield from (
        "Medians of interleaved repetitions. FLOPs are counted from shapes, a training step is "
        "three forward passes; the fraction of peak is of the published bfloat16 rate, else of "
        "the matmul rate measured in the same repetition. Particle selection is not included: "
        "job bench_particles measures it.",
        "",
    )
    for task, stage, _ in _tasks(experiment):
        found = dict(figures[task])
        rates = ", ".join(
            f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in found.pop(_PRODUCTS).items()
        )
        peers = [name for name in found if name.startswith(_PEER)]
        yield from (
            f"## {task}, {experiment.stages[stage].batch_size} clips",
            "",
            f"Products: {rates}.",
            "",
        )
        head = [
            "",
            "clips/s",
            *(f"times {peer}" for peer in peers),
            "M parameters",
            "GFLOP a clip",
            "GFLOP/s",
            "share",
        ]
        yield from table(
            head,
            [
                [
                    name,
                    f"{each['clips_per_second']:.2f}",
                    *(f"{each['times'][peer]:.2f}" for peer in peers),
                    f"{each['parameters'] / 1e6:.2f}",
                    f"{each['flops_per_clip'] / 1e9:.2f}",
                    f"{each['flops_per_second'] / 1e9:.0f}",
                    f"{each['utilisation']:.2f}",
                ]
                for name, each in found.items()
            ],
        )
        yield ""
