# SPDX-License-Identifier: Apache-2.0
"""Compares particle policies on real clips: reconstruction at equal counts, and selection cost."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from particlejax.config.data import ParticleSpec
from particlejax.config.job_specs import BenchJob
from particlejax.config.objectives import ClassifySpec
from particlejax.config.training import MeshSpec, OptimSpec
from particlejax.core import io
from particlejax.data import clips, pipeline, sources
from particlejax.distributed import sharding
from particlejax.models import particle_model as models
from particlejax.models.heads import classification
from particlejax.models.modality import ModalitySpec
from particlejax.objectives import registry
from particlejax.particles import packing, painting, policies
from particlejax.particles.types import Batch
from particlejax.reports.markdown import table
from particlejax.train import optim, stage
from particlejax.train.log import log_info
from particlejax.train.train_state import initialize, jit_step, make_step

_FRACTIONS = (8, 4, 2)  # fractions 1/n of the grid's particles
_BATCH_SIZE = 2  # batch size of the timed steps
_NUM_CLASSES = 10


def bench(experiment: BenchJob, workdir: Path, name: str) -> None:
    """Job 'bench_particles': writes report.md and results.json."""
    del name
    loaded = _load_clips(experiment)
    results = {
        "num_clips": len(loaded),
        "decibels": _psnr_table(experiment, loaded),
        "cost": _cost(experiment, loaded),
    }
    stage.add_results(workdir, "bench_particles", results, {})
    text = "\n".join(_report(experiment, results))
    io.write_text(workdir / "report.md", text)
    print(text)


def _load_clips(experiment: BenchJob) -> list[clips.Clip]:
    data = experiment.data
    source = sources.open_split(data)
    indices = (
        np.linspace(0, len(source) - 1, min(experiment.bench.num_clips, len(source)))
        .round()
        .astype(int)
    )
    return [clips.load(source[int(i)], data, clips.CENTER_VIEW) for i in indices]


# -- what is kept


def _psnr_table(experiment: BenchJob, loaded: list[clips.Clip]) -> dict[str, dict[str, float]]:
    """Mean PSNR in dB of clips painted from their particles, by grid fraction and policy."""
    psnr: dict[str, dict[str, float]] = {}
    for share in _FRACTIONS:
        psnr[f"1/{share}"] = {}
        for name, spec in _contenders(experiment, share):
            psnr[f"1/{share}"][name] = float(np.mean([_psnr(clip, spec) for clip in loaded]))
        log_info(
            f"1/{share}: "
            + ", ".join(f"{name} {value:.2f} dB" for name, value in psnr[f"1/{share}"].items())
        )
    return psnr


def _contenders(experiment: BenchJob, divisor: int) -> Iterator[tuple[str, ParticleSpec]]:
    spec, size = (
        experiment.particles,
        (experiment.data.num_frames, experiment.data.image_size, experiment.data.image_size),
    )
    budget = policies.particle_count(size, replace(spec, policy="grid", budget=0)) // divisor
    for doublings in range(divisor.bit_length()):  # in space; the remaining factor is in time
        scale = (divisor // 4**doublings, 2**doublings, 2**doublings)
        shape = tuple(b * s for b, s in zip(spec.patch_size, scale, strict=True))
        if (
            scale[0]
            and np.prod(scale) == divisor
            and not any(n % s for n, s in zip(size, shape, strict=True))
        ):
            yield (
                f"grid of {'x'.join(map(str, shape))}",
                replace(spec, policy="tubes", budget=0, tubes=((shape, shape),)),
            )
    for name, changes in (
        ("run_length", {"policy": "run_length"}),
        ("adaptive, both at once", {"split_axes": ("spacetime",)}),
        ("adaptive", {}),
        ("adaptive, four levels", {"num_levels": 4}),
        ("adaptive, absolute", {"split_criterion": "absolute_error"}),
    ):
        contender = replace(spec, **({"policy": "adaptive", "budget": budget} | changes))
        try:
            policies.check(size, contender)
        except ValueError:
            continue
        yield name, contender


def _psnr(clip: clips.Clip, spec: ParticleSpec) -> float:
    particles = policies.cut_clip(clip.frames, clip.frame_starts, spec)
    background = np.full(clip.frames.shape, 127.5, np.float32)
    painted = painting.paint(
        particles.payload.astype(np.float32),
        particles.place,
        particles.extent,
        clip.frame_starts,
        clip.frames.shape[1:3],
        spec.patch_size,
        background,
    )
    error = float(np.mean((painted - clip.frames) ** 2))
    return 10 * np.log10(255**2 / max(error, 1e-2))


# -- what it costs


def _cost(experiment: BenchJob, loaded: list[clips.Clip]) -> dict[str, float]:
    """Milliseconds a clip: training steps on the full grid and on half of it, and selecting that
    half.
    """
    size = (experiment.data.num_frames, experiment.data.image_size, experiment.data.image_size)
    grid_spec = replace(experiment.particles, policy="grid", budget=0)
    half_spec = replace(
        experiment.particles,
        policy="adaptive",
        budget=policies.particle_count(size, grid_spec) // 2,
    )
    videos, times = (
        np.stack([getattr(clip, field) for clip in loaded[:_BATCH_SIZE]])
        for field in ("frames", "frame_starts")
    )
    on_device = jax.jit(jax.vmap(lambda video, t: policies.cut_clip(video, t, half_spec)))
    steps = {
        name: _train_step(experiment, spec)
        for name, spec in (("whole", grid_spec), ("half", half_spec))
    }
    workloads: dict[str, Callable[[], Any]] = {
        **{f"step on the {name}": step for name, step in steps.items()},
        "choosing, numpy": lambda: [
            policies.cut_clip(v, t, half_spec) for v, t in zip(videos, times, strict=True)
        ],
        "the grid, numpy": lambda: [
            policies.cut_clip(v, t, grid_spec) for v, t in zip(videos, times, strict=True)
        ],
        "choosing, jax": lambda: jax.block_until_ready(on_device(videos, times)),
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in workloads}
    for repetition in range(experiment.bench.repetitions + 1):
        for name, run in workloads.items():
            start = time.perf_counter()
            run()
            if repetition:  # the first run compiles
                milliseconds[name].append(1000 * (time.perf_counter() - start) / _BATCH_SIZE)
        log_info(f"cost: repetition {repetition} of {experiment.bench.repetitions}")
    return {name: float(np.median(times)) for name, times in milliseconds.items()}


def _train_step(experiment: BenchJob, spec: ParticleSpec) -> Callable[[], Any]:
    """A training step on random particles of the policy's count, as a function."""
    batch = _random_batch(experiment, spec)
    vision = batch.particles["vision"]
    model = models.build(
        experiment.model,
        {"vision": ModalitySpec(vision.payload.shape[-1])},
        heads=classification(_NUM_CLASSES),
    )
    mesh, optimizer = sharding.make_mesh(MeshSpec()), optim.build_optimizer(OptimSpec(), 100)
    state = initialize(model, optimizer, jax.tree.map(lambda x: x[:1], batch), 0, 0.0, mesh)
    classify = registry.combine({"classify": ClassifySpec()})
    step = jit_step(make_step(model, classify, optimizer, ema=0.0, accumulate=1), state, mesh)
    state_box, sharded_batch = [state], sharding.shard_batch(batch, mesh)

    def run_once() -> None:
        state_box[0], _ = step(state_box[0], sharded_batch)
        jax.block_until_ready(state_box[0])

    return run_once


def _random_batch(experiment: BenchJob, spec: ParticleSpec) -> Batch:
    rng, row = (
        np.random.default_rng(0),
        pipeline.row_shape(replace(experiment.data, clips_per_row=1), spec),
    )
    num_rows = sharding.make_mesh(MeshSpec()).size * _BATCH_SIZE
    empty = packing.pack([], [], row.slots, num_rows, 1)
    vision = empty.particles["vision"]
    shape = vision.segment.shape
    filled = replace(
        vision,
        payload=rng.normal(size=vision.payload.shape).astype(np.float32),
        segment=np.ones(shape, np.int32),
        place=rng.random((*shape, 3), np.float32),
        extent=np.full((*shape, 3), 0.1, np.float32),
    )
    clip = np.arange(num_rows, dtype=np.int32)[:, None]
    return replace(empty, particles={"vision": filled}, label=clip % _NUM_CLASSES, clip_index=clip)


def _report(experiment: BenchJob, results: dict[str, Any]) -> Iterator[str]:
    data, model = experiment.data, experiment.model
    yield from (
        "# Particles",
        "",
        f"{results['num_clips']} clips of {data.num_frames} frames of {data.image_size} x "
        f"{data.image_size}, patch_size {experiment.particles.patch_size}. PSNR in dB of clips "
        "painted from their particles.",
        "",
    )
    for fraction, psnr in results["decibels"].items():
        best = max(value for name, value in psnr.items() if name.startswith("grid"))
        yield from table(
            [f"{fraction} of the particles", "dB", "vs. the best grid"],
            [[name, f"{value:.2f}", f"{value - best:+.2f}"] for name, value in psnr.items()],
        )
        yield ""
    cost = results["cost"]
    saved_ms = cost["step on the whole"] - cost["step on the half"]
    yield from (
        f"Milliseconds a clip, a model of width {model.width} and depth {model.depth}, medians:",
        "",
    )
    yield from table(
        ["", "ms a clip", "fraction of the saved time"],
        [[name, f"{value:.2f}", f"{100 * value / saved_ms:.1f} %"] for name, value in cost.items()],
    )
    yield ""
