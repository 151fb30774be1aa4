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
from particlejax.config.model import FuturePredictionSpec, MaskedAutoencoderSpec, MaskSpec
from particlejax.core.typing import Metrics, Params
from particlejax.models.heads import DecoderHead
from particlejax.models.modality import Payload
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
    ) -> tuple[Array, Metrics]:
        loss = error_of(predict_masked(spec, params, model, batch, key, train), batch)
        return loss, {"loss": loss}

    return objective


def future_prediction(spec: FuturePredictionSpec) -> Objective:
    """Predicts what follows a random split time of each clip from all modalities before it;
    metrics: loss.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        loss = error_of(predict_next(spec, params, model, batch, key, train), batch)
        return loss, {"loss": loss}

    return objective


def error_of(found: Prediction, batch: Batch) -> Array:
    """Squared error of the predicted particles, averaged over clips that have any."""
    clips = batch.clip.shape[1]
    error = losses.squared_error(found.predicted, found.target)
    asked = losses.membership(found.query.segment, clips).any(axis=1)
    return losses.mean(
        losses.clip_mean(error, found.query.segment, clips), asked & (batch.clip >= 0)
    )


def predict_masked(
    spec: MaskedAutoencoderSpec, params: Params, model: Model, batch: Batch, key: Array, train: bool
) -> Prediction:
    """Masks a batch, encodes the visible particles and predicts the rest; reports plot this too."""
    mask_key, dropout_key = jax.random.split(key)
    whole = batch.particles[spec.modality]
    seen, asked = hide(spec, model, whole, mask_key)
    query = whole.take(asked)
    particles = {**batch.particles, spec.modality: seen}
    predicted = ask(
        params, model, particles, query, spec.modality, batch, dropout_key if train else None
    )
    return Prediction(query, predicted, _target(query, spec.norm_pix_loss), seen)


def hide(spec: MaskSpec, model: Model, whole: Particles, key: Array) -> tuple[Particles, Array]:
    """The visible particles of one modality, and the masked slots [B, Q] to predict."""
    return part(
        SCORES[spec.mask_type](key, whole, model.payloads[spec.modality].base),
        whole,
        masks.visible_ratio(spec.mask_ratio),
        spec.target_ratio,
    )


def part(scores: Array, whole: Particles, keep: float, predict: float) -> tuple[Particles, Array]:
    """The fraction `keep` with the lowest scores [B, L], and the slots [B, Q] of the fraction
    `predict` with the highest.
    """
    visible, asked, segment = masks.split(scores, whole.segment, keep, predict)
    return replace(whole.take(visible), segment=segment), asked


def change(particles: Particles, base: tuple[int, ...]) -> Array:
    """Mean temporal change of each particle, [B, L]; for single-frame payloads, the deviation from
    the clip's mean.
    """
    payload = particles.payload
    if base and base[0] > 1:
        moments = payload.reshape(*payload.shape[:2], base[0], -1)
        return jnp.abs(jnp.diff(moments, axis=2)).mean(axis=(2, 3))
    same = (particles.segment[:, :, None] == particles.segment[:, None]).astype(jnp.float32)
    mean = jnp.einsum("blm,bmp->blp", same, payload) / same.sum(axis=-1, keepdims=True)
    return jnp.abs(payload - mean).mean(axis=-1)


SCORES: dict[
    str, Callable[[Array, Particles, tuple[int, ...]], Array]
] = {  # higher scores are masked more often
    "random": lambda key, whole, base: masks.random_scores(key, whole.place),
    "tube": lambda key, whole, base: masks.tube_scores(key, whole.place),
    "motion": lambda key, whole, base: masks.ranked_scores(key, change(whole, base), whole.segment),
    # High-variance particles stay visible more often, as AdaMAE learns to sample
    # (arXiv:2211.09120).
    "low_variance": lambda key, whole, base: masks.ranked_scores(
        key, -whole.payload.std(axis=-1), whole.segment
    ),
}


def ask(
    params: Params,
    model: Model,
    particles: Mapping[str, Particles],
    query: Particles,
    modality: str,
    batch: Batch,
    key: Array | None,
) -> Array:
    """Encodes the particles and decodes predictions [B, Q, ...] for the queries."""
    tokens, _ = model.apply(params, "encode", particles, batch.clip.shape[1], key=key)
    return model.head(params, "decoder", tokens, query, modality)


def predict_next(
    spec: FuturePredictionSpec, params: Params, model: Model, batch: Batch, key: Array, train: bool
) -> Prediction:
    """Draws a split time for each clip, encodes what ended before it and predicts what begins after
    it.

    Particles that span the split, such as a caption of the whole clip, are neither encoded nor
    predicted, so that no future information leaks.
    """
    moment_key, dropout_key = jax.random.split(key)
    whole, clips = batch.particles[spec.modality], batch.clip.shape[1]
    first, last = time_utils.span(whole, clips)
    moment = first + (last - first) * jax.random.uniform(
        moment_key, first.shape, jnp.float32, *spec.split_range
    )
    past = {
        name: time_utils.keep(
            p, time_utils.end(p) <= time_utils.of_particle(moment, p) + time_utils.SLACK
        )
        for name, p in batch.particles.items()
    }
    since = time_utils.start(whole) - time_utils.of_particle(moment, whole)
    query = time_utils.keep(
        whole, (since >= -time_utils.SLACK) & (since < (spec.horizon or jnp.inf))
    )
    predicted = ask(
        params, model, past, query, spec.modality, batch, dropout_key if train else None
    )
    target = _target(query, spec.target == "norm_pix")
    if spec.target == "residual":
        target = target - last_known(past[spec.modality], query, model.payloads[spec.modality])
    return Prediction(query, predicted, target, past[spec.modality])


def last_known(past: Particles, query: Particles, what: Payload) -> Array:
    """The last known frame as the payload [B, Q, P] of each query: from the latest past particle of
    the same location, size and clip; 0 if there is none.
    """
    there = time_utils.same_spot(query, past)
    latest = jnp.where(there, time_utils.end(past)[:, None], -jnp.inf).argmax(axis=2)
    payload = jnp.take_along_axis(past.payload, latest[..., None], axis=1)
    if what.base:
        frames = payload.reshape(*payload.shape[:2], what.base[0], -1)
        last = what.still * frames[:, :, -1:] + (1 - what.still) * frames.mean(
            axis=2, keepdims=True
        )
        payload = jnp.broadcast_to(last, frames.shape).reshape(payload.shape)
    return jnp.where(there.any(axis=2)[..., None], payload, 0)


def rollout(
    spec: FuturePredictionSpec, params: Params, model: Model, batch: Batch, share: float, steps: int
) -> tuple[Array, Array, Array]:
    """Autoregressive prediction of what follows the first `share` of each clip, in `steps` steps.

    Returns payloads [B, L, P] (the past unchanged) and two masks bool [B, L]: past and predicted. A
    step is as long as the clip's longest particle. Normalized predictions are rescaled with each
    particle's true mean and standard deviation.
    """
    whole, clips = batch.particles[spec.modality], batch.clip.shape[1]
    first, last = time_utils.span(whole, clips)
    step = time_utils.of_particle(time_utils.longest(whole, last - first), whole)
    begin = (
        time_utils.of_particle(first, whole)
        + jnp.round(share * time_utils.of_particle(last - first, whole) / step) * step
    )
    past = {
        name: time_utils.keep(
            p, time_utils.end(p) <= time_utils.of_particle(first + share * (last - first), p)
        )
        for name, p in batch.particles.items()
    }
    payload, asked = whole.payload, jnp.zeros(whole.segment.shape, bool)
    for number in range(steps):
        moment = begin + number * step
        known = time_utils.keep(
            replace(whole, payload=payload), time_utils.end(whole) <= moment + time_utils.SLACK
        )
        since = time_utils.start(whole) - moment
        query = time_utils.keep(
            whole, (since >= -time_utils.SLACK) & (since < step - time_utils.SLACK)
        )
        predicted = ask(
            params, model, {**past, spec.modality: known}, query, spec.modality, batch, None
        )
        if spec.target == "residual":
            predicted = predicted + last_known(known, query, model.payloads[spec.modality])
        if spec.target == "norm_pix":
            predicted = predicted * whole.payload.std(axis=-1, keepdims=True) + whole.payload.mean(
                axis=-1, keepdims=True
            )
        now = query.segment > 0
        payload, asked = jnp.where(now[..., None], predicted, payload), asked | now
    return payload, (time_utils.end(whole) <= begin + time_utils.SLACK) & (whole.segment > 0), asked


def _target(query: Particles, normalise: bool) -> Array:
    return losses.normalise_payload(query.payload) if normalise else query.payload


MASKED_AUTOENCODER = ObjectiveType(
    masked_autoencoder, heads=lambda spec, classes: {"decoder": DecoderHead()}
)
FUTURE_PREDICTION = ObjectiveType(
    future_prediction, heads=lambda spec, classes: {"decoder": DecoderHead()}
)
