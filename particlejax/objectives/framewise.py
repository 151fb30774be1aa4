# SPDX-License-Identifier: Apache-2.0
"""Frame-wise regression or classification of a time series from the other modalities.

Legend: B rows, L slots, W values of a particle of the series, M = L W frames, C channels, S clips
of a row.
"""

import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.config.model import FramewiseSpec
from particlejax.core.typing import Metrics, Params, UserError
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
    ) -> tuple[Array, Metrics]:
        told, target, asked = predict(spec, params, model, batch, key if train else None)
        clips = batch.clip.shape[1]
        there = losses.membership(asked, clips).any(axis=1) & (batch.clip >= 0)
        if spec.loss == "sigmoid":
            error = losses.binary_cross_entropy(told, target)
            figure = {"accuracy": ((told > 0) == (target > 0.5)).astype(jnp.float32).mean(axis=-1)}
        else:
            error, figure = (
                losses.squared_error(told, target),
                {"mae": jnp.abs(told - target).mean(axis=-1)},
            )
        figures = {"loss": error, **figure}
        metrics = {
            name: losses.mean(losses.clip_mean(each, asked, clips), there)
            for name, each in figures.items()
        }
        return metrics["loss"], metrics

    return objective


def predict(
    spec: FramewiseSpec, params: Params, model: Model, batch: Batch, key: Array | None
) -> tuple[Array, Array, Array]:
    """Prediction and target of each frame, [B, M, C], and its segment, [B, M], 0 where it is
    ignored.

    Raises UserError if there is no other modality.
    """
    rest = {name: each for name, each in batch.particles.items() if name != spec.modality}
    if not rest:
        raise UserError(
            f"objective framewise predicts {spec.modality} from the other modalities but "
            "config.data.modalities has none: add one there, such as 'vision'."
        )
    each, target = moments(batch.particles[spec.modality], model.payloads[spec.modality].base[0])
    tokens, _ = model.apply(params, "encode", rest, batch.clip.shape[1], key=key)
    told, covered = model.head(params, head_name(spec.modality), tokens, rest, each)
    return told, target, jnp.where(covered, each.segment, 0)


def moments(series: Particles, count: int) -> tuple[Particles, Array]:
    """Each value of a series as a particle of its own without payload, and its channels [B, M, C];
    count: W.
    """
    rows, length, size = series.payload.shape
    step = series.extent[..., :1] / count
    # [B, L, W]
    time = time_utils.start(series)[..., None] + step * (jnp.arange(count) + 0.5)[None, None]
    repeated = [jnp.repeat(x, count, axis=1) for x in (series.place, series.extent, series.segment)]
    place, extent = (
        jnp.concatenate([x.reshape(rows, -1, 1), other[..., 1:]], axis=-1)
        for x, other in zip((time, jnp.broadcast_to(step, time.shape)), repeated[:2], strict=True)
    )
    target = series.payload.reshape(rows, length * count, size // count)
    return Particles(jnp.zeros((*place.shape[:2], 0)), place, extent, repeated[2]), target


FRAMEWISE = ObjectiveType(
    framewise, heads=lambda spec, classes: {head_name(spec.modality): FramewiseHead(spec.modality)}
)
