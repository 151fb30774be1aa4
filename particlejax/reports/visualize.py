# SPDX-License-Identifier: Apache-2.0
"""Pictures of a stage: visible particles, reconstructions and rollouts."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from particlejax.config.experiment import DataSpec
from particlejax.core.typing import Params
from particlejax.data import clips, pipeline, sources
from particlejax.data.video.decode import Unreadable
from particlejax.distributed import cluster, sharding
from particlejax.objectives import masked
from particlejax.particles import packing, painting
from particlejax.particles.types import Batch, Particles
from particlejax.reports import plots
from particlejax.train import stage as run

_CLIP = 1  # index in the split of the first clip to try
_LATER = 0.5  # fraction of the clip that a rollout predicts


class _Shown(NamedTuple):
    """A trained stage and one clip: frames uint8 [T, H, W, 3], times [T] in seconds, and a batch of
    the clip.
    """

    stage: run.Stage
    params: Params
    frames: np.ndarray
    times: np.ndarray
    batch: Batch


def draw(workdir: Path, name: str, mesh: Mesh) -> None:
    """Writes pictures of a stage on pixel particles to report/; none if no clip is readable."""
    stage, params = run.load_trained(f"{workdir}:{name}", mesh, {})
    ways = {
        objective: way
        for objective, way in (
            ("masked_autoencoder", _draw_masked),
            ("future_prediction", _draw_next),
        )
        if objective in stage.spec.objectives
        and stage.spec.objectives[objective].modality == clips.VISION
    }
    if not ways:  # pictures of other modalities say nothing
        return
    split = stage.spec.val_split or stage.data.split
    source = sources.open_source(stage.data.source, split, stage.data.cache_dir)
    found = _first_readable(source, stage.data)
    if found is None:
        return
    particles = clips.particles_of(found, stage.data, stage.particles, np.random.default_rng(0))
    row = pipeline.row_of(stage.data, stage.particles)
    batch = stage.model.normalize(
        packing.pack([packing.Clip(particles, -1, 0)], [0], row.slots, 1, row.clips)
    )
    folder = Path(workdir) / "report"
    folder.mkdir(exist_ok=True)
    for way in ways.values():
        way(
            _Shown(stage, params, found.frames, found.starts, jax.tree.map(np.asarray, batch)),
            folder,
            mesh,
        )


def _draw_masked(shown: _Shown, folder: Path, mesh: Mesh) -> None:
    """Writes NAME_kept.png and NAME_reconstruction.png."""
    stage, params, frames, times, batch = shown
    spec, name = stage.spec.objectives["masked_autoencoder"], stage.name
    # predict all masked particles
    shape = type(spec)(**{**vars(spec), "target_ratio": spec.mask_ratio})
    predict = jax.jit(
        sharding.on(
            mesh,
            lambda p, b: masked.predict_masked(shape, p, stage.model, b, jax.random.key(0), False),
        ),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    answer = jax.tree.map(lambda x: np.asarray(x[0]), predict(params, batch))
    if not cluster.first():
        return
    seen = answer.visible
    plots.kept_strip(frames, times, seen.place, seen.extent, folder / f"{name}_kept.png")
    rows = _rows(frames, times, answer, stage, spec.norm_pix_loss)
    plots.reconstruction(rows, times, folder / f"{name}_reconstruction.png")


def _draw_next(shown: _Shown, folder: Path, mesh: Mesh) -> None:
    """Writes NAME_rollout.png: the second half of the clip, predicted step by step."""
    stage, params, frames, times, batch = shown
    spec, whole = stage.spec.objectives["future_prediction"], batch.particles[clips.VISION]
    duration = whole.extent[whole.segment > 0][:, 0].max()
    steps = max(1, round(float((times[-1] - times[0]) * _LATER / duration)))
    roll = jax.jit(
        sharding.on(mesh, lambda p, b: masked.rollout(spec, p, stage.model, b, 1 - _LATER, steps)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    payload, seen, made = (np.asarray(x[0]) for x in roll(params, batch))
    if not cluster.first():
        return
    row = jax.tree.map(lambda x: x[0], whole)
    past = _paint(
        replace(row, segment=np.where(seen, row.segment, 0)),
        payload,
        np.full(frames.shape, 0.5),
        stage,
        times,
    )
    future = _paint(
        replace(row, segment=np.where(made, row.segment, 0)), payload, past, stage, times
    )
    pixels = {"original": frames / 255, "context": past, "rollout": future}
    plots.reconstruction(
        {
            name: np.clip(video * 255, 0, 255).round().astype(np.uint8)
            for name, video in pixels.items()
        },
        times,
        folder / f"{stage.name}_rollout.png",
    )


def _paint(
    particles: Particles,
    payload: np.ndarray,
    canvas: np.ndarray,
    stage: run.Stage,
    times: np.ndarray,
) -> np.ndarray:
    """Paints these particles on the canvas [T, H, W, 3], pixels in [0, 1]."""
    real = particles.segment > 0
    pixels = clips.pixel_scale(stage.data, stage.particles).to_pixels(payload[real])
    return painting.paint(
        pixels,
        particles.place[real],
        particles.extent[real],
        times,
        canvas.shape[1:3],
        stage.particles.patch_size,
        canvas,
    )


def _first_readable(source: sources.Source, data: DataSpec) -> clips.Clip | None:
    for i in list(range(_CLIP, len(source))) + list(range(min(_CLIP, len(source)))):
        try:
            return clips.load(source[i], data, clips.CENTRE)
        except Unreadable:
            continue
    return None


def _rows(
    frames: np.ndarray,
    times: np.ndarray,
    answer: masked.Prediction,
    stage: run.Stage,
    normalised: bool,
) -> dict[str, np.ndarray]:
    payload = answer.predicted
    # with norm_pix_loss the model predicts normalized pixels: use the target's mean and std
    if normalised:
        true = answer.query.payload
        payload = payload * true.std(-1, keepdims=True) + true.mean(-1, keepdims=True)

    seen = _paint(answer.visible, answer.visible.payload, np.full(frames.shape, 0.5), stage, times)
    made = _paint(answer.query, payload, seen, stage, times)
    pixels = {"original": frames / 255, "visible": seen, "reconstruction": made}
    # the static part has little weight in the loss: show the moving part alone
    if stage.data.temporal_mean_scale < 1:
        pixels |= {
            f"{name},\nmotion": 0.5 + pixels[name] - pixels[name].mean(axis=0)
            for name in ("original", "reconstruction")
        }
    return {
        name: np.clip(video * 255, 0, 255).round().astype(np.uint8)
        for name, video in pixels.items()
    }
