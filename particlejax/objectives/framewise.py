# SPDX-License-Identifier: Apache-2.0
"""Frame-wise regression or classification of a time series from the other modalities.

Legend: B rows, L slots, W values of a particle of the series, M = L W frames, C channels, S clips
of a row.
"""

import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.config.objectives import FramewiseSpec
from particlejax.core.typing import Params, UserError
from particlejax.losses import Mean, Means
from particlejax.models.heads import FramewiseHead
from particlejax.models.particle_model import Model
from particlejax.objectives import time_utils
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles


def head_name(modality: str) -> str:
    """Name of the head for this modality."""
    return f"framewise_head_{modality}"


def framewise(spec: FramewiseSpec) -> Objective:
    """Predicts the channels of each frame from the tokens that cover it; the series itself is
    masked.

    Frames without a covering token are ignored, and so are clips without a series. Metrics: loss,
    and mae or, for loss='sigmoid', accuracy (fraction of the channels).
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        predicted, target, segment = predict_framewise(
            spec, params, model, batch, key if train else None
        )
        num_clips = batch.clip_index.shape[1]
        valid = losses.membership(segment, num_clips).any(axis=1) & (batch.clip_index >= 0)
        if spec.loss == "sigmoid":
            error = losses.binary_cross_entropy(predicted, target)
            metric = {
                "accuracy": ((predicted > 0) == (target > 0.5)).astype(jnp.float32).mean(axis=-1)
            }
        else:
            error, metric = (
                losses.squared_error(predicted, target),
                {"mae": jnp.abs(predicted - target).mean(axis=-1)},
            )
        frame_metrics = {"loss": error, **metric}
        metrics = {
            name: losses.mean_over(losses.clip_mean(values, segment, num_clips), valid)
            for name, values in frame_metrics.items()
        }
        return metrics["loss"], metrics

    return objective


def predict_framewise(
    spec: FramewiseSpec, params: Params, model: Model, batch: Batch, key: Array | None
) -> tuple[Array, Array, Array]:
    """Prediction and target of each frame, [B, M, C], and its segment, [B, M], 0 where it is
    ignored.

    Raises UserError if there is no other modality.
    """
    inputs = {
        name: particles for name, particles in batch.particles.items() if name != spec.modality
    }
    if not inputs:
        raise UserError(
            f"objective framewise predicts {spec.modality} from the other modalities but "
            "config.data.modalities has none: add one there, such as 'vision'."
        )
    frames, target = to_frames(
        batch.particles[spec.modality], model.payloads[spec.modality].patch_size[0]
    )
    tokens, _ = model.apply(params, "encode", inputs, batch.clip_index.shape[1], key=key)
    predicted, covered = model.head(params, head_name(spec.modality), tokens, inputs, frames)
    return predicted, target, jnp.where(covered, frames.segment, 0)


def to_frames(series: Particles, frames_per_particle: int) -> tuple[Particles, Array]:
    """Each value of a series as a particle of its own without payload, and its channels [B, M, C];
    frames_per_particle: W.
    """
    batch_size, num_slots, payload_size = series.payload.shape
    frame_duration = series.extent[..., :1] / frames_per_particle
    # [B, L, W]
    time = (
        time_utils.start(series)[..., None]
        + frame_duration * (jnp.arange(frames_per_particle) + 0.5)[None, None]
    )
    repeated = [
        jnp.repeat(x, frames_per_particle, axis=1)
        for x in (series.place, series.extent, series.segment)
    ]
    place, extent = (
        jnp.concatenate([x.reshape(batch_size, -1, 1), field[..., 1:]], axis=-1)
        for x, field in zip(
            (time, jnp.broadcast_to(frame_duration, time.shape)), repeated[:2], strict=True
        )
    )
    target = series.payload.reshape(
        batch_size, num_slots * frames_per_particle, payload_size // frames_per_particle
    )
    return Particles(jnp.zeros((*place.shape[:2], 0)), place, extent, repeated[2]), target


FRAMEWISE = ObjectiveType(
    framewise, heads=lambda spec, classes: {head_name(spec.modality): FramewiseHead(spec.modality)}
)
