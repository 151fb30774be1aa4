# SPDX-License-Identifier: Apache-2.0
"""Pictures of a stage: visible particles, reconstructions and rollouts."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from particlejax.config.data import DataSpec
from particlejax.core.typing import Params
from particlejax.data import clips, pipeline, sources
from particlejax.data.video.decode import Unreadable
from particlejax.distributed import cluster, sharding
from particlejax.objectives import masked
from particlejax.particles import packing, painting
from particlejax.particles.types import Batch, Particles
from particlejax.reports import plots
from particlejax.train import stage as run

_CLIP_INDEX = 1  # index in the split of the first clip to try
_ROLLOUT_FRACTION = 0.5  # fraction of the clip that a rollout predicts


class _StageClip(NamedTuple):
    """A trained stage and one clip: frames uint8 [T, H, W, 3], times [T] in seconds, and a batch of
    the clip.
    """

    stage: run.Stage
    params: Params
    frames: np.ndarray
    times: np.ndarray
    batch: Batch


def draw_reconstructions(workdir: Path, name: str, mesh: Mesh) -> None:
    """Writes pictures of a stage on pixel particles to report/; none if no clip is readable."""
    stage, params = run.load_trained(f"{workdir}:{name}", mesh, {})
    drawers = {
        objective: drawer
        for objective, drawer in (
            ("masked_autoencoder", _draw_masked),
            ("future_prediction", _draw_rollout),
        )
        if objective in stage.spec.objectives
        and stage.spec.objectives[objective].modality == clips.VISION
    }
    if not drawers:  # pictures of other modalities say nothing
        return
    split = stage.spec.val_split or stage.data.split
    source = sources.open_split(stage.data, split)
    clip = _first_readable(source, stage.data)
    if clip is None:
        return
    particles = clips.make_particles(clip, stage.data, stage.particles, np.random.default_rng(0))
    row = pipeline.row_shape(stage.data, stage.particles)
    batch = stage.model.normalize(
        packing.pack([packing.Clip(particles, -1, 0)], [0], row.slots, 1, row.max_clips)
    )
    folder = Path(workdir) / "report"
    folder.mkdir(exist_ok=True)
    for drawer in drawers.values():
        drawer(
            _StageClip(
                stage, params, clip.frames, clip.frame_starts, jax.tree.map(np.asarray, batch)
            ),
            folder,
            mesh,
        )


def _draw_masked(stage_clip: _StageClip, folder: Path, mesh: Mesh) -> None:
    """Writes NAME_kept.png and NAME_reconstruction.png."""
    stage, params, frames, times, batch = stage_clip
    spec, name = stage.spec.objectives["masked_autoencoder"], stage.name
    # predict all masked particles
    full_spec = type(spec)(**{**vars(spec), "target_ratio": spec.mask_ratio})
    predict = jax.jit(
        sharding.with_mesh(
            mesh,
            lambda p, b: masked.predict_masked(
                full_spec, p, stage.model, b, jax.random.key(0), False
            ),
        ),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    prediction = jax.tree.map(lambda x: np.asarray(x[0]), predict(params, batch))
    if not cluster.is_primary():
        return
    visible = prediction.visible
    plots.visible_strip(frames, times, visible.place, visible.extent, folder / f"{name}_kept.png")
    rows = _reconstruction_rows(frames, times, prediction, stage, spec.norm_pix_loss)
    plots.reconstruction(rows, times, folder / f"{name}_reconstruction.png")


def _draw_rollout(stage_clip: _StageClip, folder: Path, mesh: Mesh) -> None:
    """Writes NAME_rollout.png: the second half of the clip, predicted step by step."""
    stage, params, frames, times, batch = stage_clip
    spec, particles = stage.spec.objectives["future_prediction"], batch.particles[clips.VISION]
    duration = particles.extent[particles.segment > 0][:, 0].max()
    num_steps = max(1, round(float((times[-1] - times[0]) * _ROLLOUT_FRACTION / duration)))
    rollout = jax.jit(
        sharding.with_mesh(
            mesh,
            lambda p, b: masked.rollout(spec, p, stage.model, b, 1 - _ROLLOUT_FRACTION, num_steps),
        ),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    payload, is_observed, is_predicted = (np.asarray(x[0]) for x in rollout(params, batch))
    if not cluster.is_primary():
        return
    row = jax.tree.map(lambda x: x[0], particles)
    past = _paint(
        replace(row, segment=np.where(is_observed, row.segment, 0)),
        payload,
        np.full(frames.shape, 0.5),
        stage,
        times,
    )
    future = _paint(
        replace(row, segment=np.where(is_predicted, row.segment, 0)), payload, past, stage, times
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
    occupied = particles.segment > 0
    pixels = clips.pixel_scale(stage.data, stage.particles).to_pixels(payload[occupied])
    return painting.paint(
        pixels,
        particles.place[occupied],
        particles.extent[occupied],
        times,
        canvas.shape[1:3],
        stage.particles.patch_size,
        canvas,
    )


def _first_readable(source: sources.Source, data: DataSpec) -> clips.Clip | None:
    for i in list(range(_CLIP_INDEX, len(source))) + list(range(min(_CLIP_INDEX, len(source)))):
        try:
            return clips.load(source[i], data, clips.CENTER_VIEW)
        except Unreadable:
            continue
    return None


def _reconstruction_rows(
    frames: np.ndarray,
    times: np.ndarray,
    prediction: masked.Prediction,
    stage: run.Stage,
    normalized: bool,
) -> dict[str, np.ndarray]:
    payload = prediction.predicted
    # with norm_pix_loss the model predicts normalized pixels: use the target's mean and std
    if normalized:
        target = prediction.query.payload
        payload = payload * target.std(-1, keepdims=True) + target.mean(-1, keepdims=True)

    visible = _paint(
        prediction.visible, prediction.visible.payload, np.full(frames.shape, 0.5), stage, times
    )
    reconstructed = _paint(prediction.query, payload, visible, stage, times)
    pixels = {"original": frames / 255, "visible": visible, "reconstruction": reconstructed}
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
