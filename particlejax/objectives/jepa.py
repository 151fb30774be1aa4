# SPDX-License-Identifier: Apache-2.0
"""JEPA: predicts an EMA teacher's features of masked particles."""

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.config.objectives import JepaSpec
from particlejax.core.typing import Params
from particlejax.losses import Mean, Means
from particlejax.models.heads import FeatureDecoderHead, modality_tokens
from particlejax.models.particle_model import Model
from particlejax.objectives import masked
from particlejax.objectives.base import TEACHER, Objective, ObjectiveType
from particlejax.particles.types import Batch


def jepa(spec: JepaSpec) -> Objective:
    """Predicts the teacher's features, computed on the whole clip, of masked particles (V-JEPA,
    arXiv:2404.08471).

    The teacher is params['teacher'], or params itself if there is no such branch (in evaluation,
    where they are the EMA already). Metrics: loss; feature_std, the mean standard deviation of the
    teacher's features over the batch; near 0 it means collapse.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        mask_key, dropout_key = jax.random.split(key)
        num_clips, particles = batch.clip_index.shape[1], batch.particles[spec.modality]
        visible, query_slots = masked.mask_particles(spec, model, particles, mask_key)
        tokens, _ = model.apply(
            params,
            "encode",
            {**batch.particles, spec.modality: visible},
            num_clips,
            key=dropout_key if train else None,
        )
        query = particles.take(query_slots)
        predicted = model.head(params, "predictor", tokens, query, spec.modality)
        target = jnp.take_along_axis(
            teacher_features(params, model, batch, spec.modality), query_slots[..., None], axis=1
        )
        error = jnp.abs(predicted - target).mean(axis=-1)
        valid = losses.membership(query.segment, num_clips).any(axis=1) & (batch.clip_index >= 0)
        loss = losses.mean_over(losses.clip_mean(error, query.segment, num_clips), valid)
        return loss, {"loss": loss, "feature_std": feature_std(target, query.segment)}

    return objective


def teacher_features(params: Params, model: Model, batch: Batch, modality: str) -> Array:
    """The teacher's features of each slot of a modality, [B, L, D], layer-normalized, without
    gradient.
    """
    teacher = jax.lax.stop_gradient(params.get(TEACHER, params))
    tokens, _ = model.apply(teacher, "encode", batch.particles, batch.clip_index.shape[1])
    return jax.lax.stop_gradient(
        losses.normalize_payload(
            modality_tokens(tokens, batch.particles, modality).astype(jnp.float32)
        )
    )


def feature_std(features_BQD: Array, segment: Array) -> Mean:
    """Standard deviation of each feature over all particles of the batch, averaged over features;
    weighted by the number of particles, as it has no exact recombination.
    """
    occupied = (segment > 0)[..., None]
    count = jnp.maximum(occupied.sum(), 1)
    mean = jnp.sum(features_BQD * occupied, axis=(0, 1), keepdims=True) / count
    variance = jnp.sum(jnp.square(features_BQD - mean) * occupied, axis=(0, 1)) / count
    return Mean(jnp.sqrt(variance).mean(), jnp.sum(occupied, dtype=jnp.float32))


JEPA = ObjectiveType(jepa, heads=lambda spec, classes: {"predictor": FeatureDecoderHead()})
