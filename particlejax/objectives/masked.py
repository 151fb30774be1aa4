# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoding of one modality, and prediction of its future from the past.

Legend: B rows, L slots, K visible, Q queries, S clips of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses, masks
from particlejax.config.objectives import FuturePredictionSpec, MaskedAutoencoderSpec, MaskSpec
from particlejax.core.typing import Params
from particlejax.losses import Mean, Means
from particlejax.models.heads import DecoderHead
from particlejax.models.modality import ModalitySpec
from particlejax.models.particle_model import Model
from particlejax.objectives import time_utils
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles


class Prediction(NamedTuple):
    """Queries, predictions and targets, [B, Q, ...], and the visible slots [B, K] with their
    segments.
    """

    query: Particles
    predicted: Array
    target: Array
    visible: Particles


def masked_autoencoder(spec: MaskedAutoencoderSpec) -> Objective:
    """Masked autoencoder (MAE, arXiv:2111.06377; VideoMAE, arXiv:2203.12602) over one modality;
    metrics: loss.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        loss = masked_mse(predict_masked(spec, params, model, batch, key, train), batch)
        return loss, {"loss": loss}

    return objective


def future_prediction(spec: FuturePredictionSpec) -> Objective:
    """Predicts what follows a random split time of each clip from all modalities before it;
    metrics: loss.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        loss = masked_mse(predict_future(spec, params, model, batch, key, train), batch)
        return loss, {"loss": loss}

    return objective


def masked_mse(prediction: Prediction, batch: Batch) -> Mean:
    """Squared error of the predicted particles, averaged over clips that have any."""
    num_clips = batch.clip_index.shape[1]
    error = losses.squared_error(prediction.predicted, prediction.target)
    has_query = losses.membership(prediction.query.segment, num_clips).any(axis=1)
    return losses.mean_over(
        losses.clip_mean(error, prediction.query.segment, num_clips),
        has_query & (batch.clip_index >= 0),
    )


def predict_masked(
    spec: MaskedAutoencoderSpec, params: Params, model: Model, batch: Batch, key: Array, train: bool
) -> Prediction:
    """Masks a batch, encodes the visible particles and predicts the rest; reports plot this too."""
    mask_key, dropout_key = jax.random.split(key)
    particles = batch.particles[spec.modality]
    visible, query_slots = mask_particles(spec, model, particles, mask_key)
    query = particles.take(query_slots)
    inputs = {**batch.particles, spec.modality: visible}
    predicted = encode_and_decode(
        params, model, inputs, query, spec.modality, batch, dropout_key if train else None
    )
    return Prediction(query, predicted, _make_target(query, spec.norm_pix_loss), visible)


def mask_particles(
    spec: MaskSpec, model: Model, particles: Particles, key: Array
) -> tuple[Particles, Array]:
    """The visible particles of one modality, and the masked slots [B, Q] to predict."""
    return split_by_score(
        SCORES[spec.mask_type](key, particles, model.payloads[spec.modality].patch_size),
        particles,
        masks.visible_ratio(spec.mask_ratio),
        spec.target_ratio,
    )


def split_by_score(
    scores: Array, particles: Particles, keep_ratio: float, target_ratio: float
) -> tuple[Particles, Array]:
    """The fraction `keep_ratio` with the lowest scores [B, L], and the slots [B, Q] of the fraction
    `target_ratio` with the highest.
    """
    visible, query_slots, segment = masks.split(scores, particles.segment, keep_ratio, target_ratio)
    return replace(particles.take(visible), segment=segment), query_slots


def motion_score(particles: Particles, patch_size: tuple[int, ...]) -> Array:
    """Mean temporal change of each particle, [B, L]; for single-frame payloads, the deviation from
    the clip's mean.
    """
    payload = particles.payload
    if patch_size and patch_size[0] > 1:
        frames = payload.reshape(*payload.shape[:2], patch_size[0], -1)
        return jnp.abs(jnp.diff(frames, axis=2)).mean(axis=(2, 3))
    same_clip = (particles.segment[:, :, None] == particles.segment[:, None]).astype(jnp.float32)
    mean = jnp.einsum("blm,bmp->blp", same_clip, payload) / same_clip.sum(axis=-1, keepdims=True)
    return jnp.abs(payload - mean).mean(axis=-1)


SCORES: dict[
    str, Callable[[Array, Particles, tuple[int, ...]], Array]
] = {  # higher scores are masked more often
    "random": lambda key, particles, patch_size: masks.random_scores(key, particles.place),
    "tube": lambda key, particles, patch_size: masks.tube_scores(key, particles.place),
    "motion": lambda key, particles, patch_size: masks.ranked_scores(
        key, motion_score(particles, patch_size), particles.segment
    ),
    # High-variance particles stay visible more often, as AdaMAE learns to sample
    # (arXiv:2211.09120).
    "low_variance": lambda key, particles, patch_size: masks.ranked_scores(
        key, -particles.payload.std(axis=-1), particles.segment
    ),
}


def encode_and_decode(
    params: Params,
    model: Model,
    particles: Mapping[str, Particles],
    query: Particles,
    modality: str,
    batch: Batch,
    key: Array | None,
) -> Array:
    """Encodes the particles and decodes predictions [B, Q, ...] for the queries."""
    tokens, _ = model.apply(params, "encode", particles, batch.clip_index.shape[1], key=key)
    return model.head(params, "decoder", tokens, query, modality)


def predict_future(
    spec: FuturePredictionSpec, params: Params, model: Model, batch: Batch, key: Array, train: bool
) -> Prediction:
    """Draws a split time for each clip, encodes what ended before it and predicts what begins after
    it.

    Particles that span the split, such as a caption of the whole clip, are neither encoded nor
    predicted, so that no future information leaks.
    """
    moment_key, dropout_key = jax.random.split(key)
    particles, num_clips = batch.particles[spec.modality], batch.clip_index.shape[1]
    first, last = time_utils.span(particles, num_clips)
    split_time = first + (last - first) * jax.random.uniform(
        moment_key, first.shape, jnp.float32, *spec.split_range
    )
    past = {
        name: time_utils.drop_where_not(
            p,
            time_utils.end(p) <= time_utils.gather_clip_value(split_time, p) + time_utils.TIME_EPS,
        )
        for name, p in batch.particles.items()
    }
    time_after_split = time_utils.start(particles) - time_utils.gather_clip_value(
        split_time, particles
    )
    query = time_utils.drop_where_not(
        particles,
        (time_after_split >= -time_utils.TIME_EPS) & (time_after_split < (spec.horizon or jnp.inf)),
    )
    predicted = encode_and_decode(
        params, model, past, query, spec.modality, batch, dropout_key if train else None
    )
    target = _make_target(query, spec.target == "norm_pix")
    if spec.target == "residual":
        target = target - copy_last_frame(past[spec.modality], query, model.payloads[spec.modality])
    return Prediction(query, predicted, target, past[spec.modality])


def copy_last_frame(past: Particles, query: Particles, modality_spec: ModalitySpec) -> Array:
    """The last known frame as the payload [B, Q, P] of each query: from the latest past particle of
    the same location, size and clip; 0 if there is none.
    """
    same_location = time_utils.same_location(query, past)
    latest = jnp.where(same_location, time_utils.end(past)[:, None], -jnp.inf).argmax(axis=2)
    payload = jnp.take_along_axis(past.payload, latest[..., None], axis=1)
    if modality_spec.patch_size:
        frames = payload.reshape(*payload.shape[:2], modality_spec.patch_size[0], -1)
        last = modality_spec.temporal_mean_scale * frames[:, :, -1:] + (
            1 - modality_spec.temporal_mean_scale
        ) * frames.mean(axis=2, keepdims=True)
        payload = jnp.broadcast_to(last, frames.shape).reshape(payload.shape)
    return jnp.where(same_location.any(axis=2)[..., None], payload, 0)


def rollout(
    spec: FuturePredictionSpec,
    params: Params,
    model: Model,
    batch: Batch,
    observed_fraction: float,
    num_steps: int,
) -> tuple[Array, Array, Array]:
    """Autoregressive prediction of what follows the first `observed_fraction` of each clip, in
    `num_steps` steps.

    Returns payloads [B, L, P] (the past unchanged) and two masks bool [B, L]: past and predicted. A
    step is as long as the clip's longest particle. Normalized predictions are rescaled with each
    particle's true mean and standard deviation.
    """
    particles, num_clips = batch.particles[spec.modality], batch.clip_index.shape[1]
    first, last = time_utils.span(particles, num_clips)
    step = time_utils.gather_clip_value(
        time_utils.longest_duration(particles, last - first), particles
    )
    start_time = (
        time_utils.gather_clip_value(first, particles)
        + jnp.round(
            observed_fraction * time_utils.gather_clip_value(last - first, particles) / step
        )
        * step
    )
    past = {
        name: time_utils.drop_where_not(
            p,
            time_utils.end(p)
            <= time_utils.gather_clip_value(first + observed_fraction * (last - first), p),
        )
        for name, p in batch.particles.items()
    }
    payload, is_predicted = particles.payload, jnp.zeros(particles.segment.shape, bool)
    for step_index in range(num_steps):
        split_time = start_time + step_index * step
        observed = time_utils.drop_where_not(
            replace(particles, payload=payload),
            time_utils.end(particles) <= split_time + time_utils.TIME_EPS,
        )
        time_after_split = time_utils.start(particles) - split_time
        query = time_utils.drop_where_not(
            particles,
            (time_after_split >= -time_utils.TIME_EPS)
            & (time_after_split < step - time_utils.TIME_EPS),
        )
        predicted = encode_and_decode(
            params, model, {**past, spec.modality: observed}, query, spec.modality, batch, None
        )
        if spec.target == "residual":
            predicted = predicted + copy_last_frame(observed, query, model.payloads[spec.modality])
        if spec.target == "norm_pix":
            predicted = predicted * particles.payload.std(
                axis=-1, keepdims=True
            ) + particles.payload.mean(axis=-1, keepdims=True)
        is_current = query.segment > 0
        payload, is_predicted = (
            jnp.where(is_current[..., None], predicted, payload),
            is_predicted | is_current,
        )
    return (
        payload,
        (time_utils.end(particles) <= start_time + time_utils.TIME_EPS) & (particles.segment > 0),
        is_predicted,
    )


def _make_target(query: Particles, normalize: bool) -> Array:
    return losses.normalize_payload(query.payload) if normalize else query.payload


MASKED_AUTOENCODER = ObjectiveType(
    masked_autoencoder, heads=lambda spec, classes: {"decoder": DecoderHead()}
)
FUTURE_PREDICTION = ObjectiveType(
    future_prediction, heads=lambda spec, classes: {"decoder": DecoderHead()}
)
