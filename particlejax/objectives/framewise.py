# SPDX-License-Identifier: Apache-2.0
"""Frame-wise regression and classification: what a series says at each moment, told from what is
seen and heard then.

Legend: B rows, L slots, W values of a particle of the series, M = L W moments, C channels, S clips
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
    """The head that tells this modality."""
    return f"framewise_head_{modality}"


def framewise(spec: FramewiseSpec) -> Objective:
    """The channels at each moment, from the tokens that cover it; the series itself is not shown.

    A moment that no particle covers is not asked for, and a clip without a series counts for
    nothing. Metrics: loss, and mae or, for loss='sigmoid', accuracy (share of the channels).
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
    """What is told and what is true of each moment, [B, M, C], and whose the moment is, [B, M], 0
    where it is not asked for.

    Raises UserError where there is nothing but the series.
    """
    rest = {name: each for name, each in batch.particles.items() if name != spec.modality}
    if not rest:
        raise UserError(
            f"objective trace tells {spec.modality} from the other modalities and "
            "config.data.modalities has none: add "
            "one there, such as 'vision'."
        )
    each, target = moments(batch.particles[spec.modality], model.payloads[spec.modality].base[0])
    tokens, _ = model.apply(params, "encode", rest, batch.clip.shape[1], key=key)
    told, covered = model.head(params, head_name(spec.modality), tokens, rest, each)
    return told, target, jnp.where(covered, each.segment, 0)


def moments(series: Particles, count: int) -> tuple[Particles, Array]:
    """Each value of a series as a moment of its own, without payload, and its channels [B, M, C];
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
