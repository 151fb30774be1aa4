# SPDX-License-Identifier: Apache-2.0
"""Compares particle policies on real clips: reconstruction at equal counts, and selection cost."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from particlejax.config.experiment import Experiment, MeshSpec, OptimSpec, ParticleSpec
from particlejax.config.model import ClassifySpec
from particlejax.core import io
from particlejax.data import clips, pipeline, sources
from particlejax.distributed import sharding
from particlejax.models import particle_model as models
from particlejax.models.heads import classification
from particlejax.models.modality import Payload
from particlejax.objectives import registry
from particlejax.particles import packing, painting, policies
from particlejax.particles.types import Batch
from particlejax.reports.markdown import table
from particlejax.train import optim, stage
from particlejax.train.log import say
from particlejax.train.train_state import initialise, jit_step, make_step

_SHARES = (8, 4, 2)  # fractions 1/n of the grid's particles
_ROWS = 2  # batch size of the timed steps
_CLASSES = 10


def bench(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'bench_particles': writes report.md and results.json."""
    del name
    seen = _clips(experiment)
    figures = {
        "num_clips": len(seen),
        "decibels": _decibels(experiment, seen),
        "cost": _cost(experiment, seen),
    }
    stage.add_results(workdir, "bench_particles", figures, {})
    text = "\n".join(_report(experiment, figures))
    io.write_text(workdir / "report.md", text)
    print(text)


def _clips(experiment: Experiment) -> list[clips.Clip]:
    data = experiment.data
    source = sources.open_source(data.source, data.split, data.cache_dir)
    chosen = (
        np.linspace(0, len(source) - 1, min(experiment.bench.num_clips, len(source)))
        .round()
        .astype(int)
    )
    return [clips.load(source[int(i)], data, clips.CENTRE) for i in chosen]


# -- what is kept


def _decibels(experiment: Experiment, seen: list[clips.Clip]) -> dict[str, dict[str, float]]:
    """Mean PSNR in dB of clips painted from their particles, by grid fraction and policy."""
    found: dict[str, dict[str, float]] = {}
    for share in _SHARES:
        found[f"1/{share}"] = {}
        for name, spec in _rivals(experiment, share):
            found[f"1/{share}"][name] = float(np.mean([_psnr(clip, spec) for clip in seen]))
        say(
            f"1/{share}: "
            + ", ".join(f"{name} {value:.2f} dB" for name, value in found[f"1/{share}"].items())
        )
    return found


def _rivals(experiment: Experiment, share: int) -> Iterator[tuple[str, ParticleSpec]]:
    spec, size = (
        experiment.particles,
        (experiment.data.num_frames, experiment.data.image_size, experiment.data.image_size),
    )
    budget = policies.particle_count(size, replace(spec, policy="grid", budget=0)) // share
    for doublings in range(share.bit_length()):  # in space; the remaining factor is in time
        scale = (share // 4**doublings, 2**doublings, 2**doublings)
        shape = tuple(b * s for b, s in zip(spec.patch_size, scale, strict=True))
        if (
            scale[0]
            and np.prod(scale) == share
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
        each = replace(spec, **({"policy": "adaptive", "budget": budget} | changes))
        try:
            policies.check(size, each)
        except ValueError:
            continue
        yield name, each


def _psnr(clip: clips.Clip, spec: ParticleSpec) -> float:
    particles = policies.cut_clip(clip.frames, clip.starts, spec)
    blank = np.full(clip.frames.shape, 127.5, np.float32)
    painted = painting.paint(
        particles.payload.astype(np.float32),
        particles.place,
        particles.extent,
        clip.starts,
        clip.frames.shape[1:3],
        spec.patch_size,
        blank,
    )
    error = float(np.mean((painted - clip.frames) ** 2))
    return 10 * np.log10(255**2 / max(error, 1e-2))


# -- what it costs


def _cost(experiment: Experiment, seen: list[clips.Clip]) -> dict[str, float]:
    """Milliseconds a clip: training steps on the full grid and on half of it, and selecting that
    half.
    """
    size = (experiment.data.num_frames, experiment.data.image_size, experiment.data.image_size)
    grid = replace(experiment.particles, policy="grid", budget=0)
    half = replace(
        experiment.particles, policy="adaptive", budget=policies.particle_count(size, grid) // 2
    )
    videos, times = (
        np.stack([getattr(clip, field) for clip in seen[:_ROWS]]) for field in ("frames", "starts")
    )
    on_device = jax.jit(jax.vmap(lambda video, t: policies.cut_clip(video, t, half)))
    steps = {name: _step(experiment, spec) for name, spec in (("whole", grid), ("half", half))}
    works: dict[str, Callable[[], Any]] = {
        **{f"step on the {name}": step for name, step in steps.items()},
        "choosing, numpy": lambda: [
            policies.cut_clip(v, t, half) for v, t in zip(videos, times, strict=True)
        ],
        "the grid, numpy": lambda: [
            policies.cut_clip(v, t, grid) for v, t in zip(videos, times, strict=True)
        ],
        "choosing, jax": lambda: jax.block_until_ready(on_device(videos, times)),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(experiment.bench.repetitions + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            if repetition:  # the first run compiles
                taken[name].append(1000 * (time.perf_counter() - begun) / _ROWS)
        say(f"cost: repetition {repetition} of {experiment.bench.repetitions}")
    return {name: float(np.median(each)) for name, each in taken.items()}


def _step(experiment: Experiment, spec: ParticleSpec) -> Callable[[], Any]:
    """A training step on random particles of the policy's count, as a function."""
    batch = _random_batch(experiment, spec)
    vision = batch.particles["vision"]
    model = models.build(
        experiment.model,
        {"vision": Payload(vision.payload.shape[-1])},
        heads=classification(_CLASSES),
    )
    mesh, optimizer = sharding.make_mesh(MeshSpec()), optim.build(OptimSpec(), 100)
    state = initialise(model, optimizer, jax.tree.map(lambda x: x[:1], batch), 0, 0.0, mesh)
    classify = registry.combine({"classify": ClassifySpec()})
    step = jit_step(make_step(model, classify, optimizer, ema=0.0, accumulate=1), state, mesh)
    held, placed = [state], sharding.put(batch, mesh)

    def once() -> None:
        held[0], _ = step(held[0], placed)
        jax.block_until_ready(held[0])

    return once


def _random_batch(experiment: Experiment, spec: ParticleSpec) -> Batch:
    rng, row = (
        np.random.default_rng(0),
        pipeline.row_of(replace(experiment.data, clips_per_row=1), spec),
    )
    rows = sharding.make_mesh(MeshSpec()).size * _ROWS
    empty = packing.pack([], [], row.slots, rows, 1)
    vision = empty.particles["vision"]
    shape = vision.segment.shape
    full = replace(
        vision,
        payload=rng.normal(size=vision.payload.shape).astype(np.float32),
        segment=np.ones(shape, np.int32),
        place=rng.random((*shape, 3), np.float32),
        extent=np.full((*shape, 3), 0.1, np.float32),
    )
    clip = np.arange(rows, dtype=np.int32)[:, None]
    return replace(empty, particles={"vision": full}, label=clip % _CLASSES, clip=clip)


def _report(experiment: Experiment, figures: dict[str, Any]) -> Iterator[str]:
    data, model = experiment.data, experiment.model
    yield from (
        "# Particles",
        "",
        f"{figures['num_clips']} clips of {data.num_frames} frames of {data.image_size} x "
        f"{data.image_size}, patch_size {experiment.particles.patch_size}. PSNR in dB of clips "
        "painted from their particles.",
        "",
    )
    for share, each in figures["decibels"].items():
        best = max(value for name, value in each.items() if name.startswith("grid"))
        yield from table(
            [f"{share} of the particles", "dB", "vs. the best grid"],
            [[name, f"{value:.2f}", f"{value - best:+.2f}"] for name, value in each.items()],
        )
        yield ""
    cost = figures["cost"]
    saved = cost["step on the whole"] - cost["step on the half"]
    yield from (
        f"Milliseconds a clip, a model of width {model.width} and depth {model.depth}, medians:",
        "",
    )
    yield from table(
        ["", "ms a clip", "fraction of the saved time"],
        [[name, f"{value:.2f}", f"{100 * value / saved:.1f} %"] for name, value in cost.items()],
    )
    yield ""
