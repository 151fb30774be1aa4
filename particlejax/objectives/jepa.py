# SPDX-License-Identifier: Apache-2.0
"""JEPA: predicts an EMA teacher's features of masked particles."""

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.config.model import JepaSpec
from particlejax.core.typing import Metrics, Params
from particlejax.models.heads import FeatureDecoderHead, part_of
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
    ) -> tuple[Array, Metrics]:
        mask_key, dropout_key = jax.random.split(key)
        clips, whole = batch.clip.shape[1], batch.particles[spec.modality]
        seen, asked = masked.hide(spec, model, whole, mask_key)
        tokens, _ = model.apply(
            params,
            "encode",
            {**batch.particles, spec.modality: seen},
            clips,
            key=dropout_key if train else None,
        )
        query = whole.take(asked)
        predicted = model.head(params, "predictor", tokens, query, spec.modality)
        target = jnp.take_along_axis(
            features(params, model, batch, spec.modality), asked[..., None], axis=1
        )
        error = jnp.abs(predicted - target).mean(axis=-1)
        there = losses.membership(query.segment, clips).any(axis=1) & (batch.clip >= 0)
        loss = losses.mean(losses.clip_mean(error, query.segment, clips), there)
        return loss, {"loss": loss, "feature_std": spread(target, query.segment)}

    return objective


def features(params: Params, model: Model, batch: Batch, modality: str) -> Array:
    """The teacher's features of each slot of a modality, [B, L, D], layer-normalized, without
    gradient.
    """
    teacher = jax.lax.stop_gradient(params.get(TEACHER, params))
    tokens, _ = model.apply(teacher, "encode", batch.particles, batch.clip.shape[1])
    return jax.lax.stop_gradient(
        losses.normalise_payload(part_of(tokens, batch.particles, modality).astype(jnp.float32))
    )


def spread(features_BQD: Array, segment: Array) -> Array:
    """Standard deviation of each feature over all particles of the batch, averaged over
    features.
    """
    there = (segment > 0)[..., None]
    number = jnp.maximum(there.sum(), 1)
    mean = jnp.sum(features_BQD * there, axis=(0, 1), keepdims=True) / number
    return jnp.sqrt(jnp.sum(jnp.square(features_BQD - mean) * there, axis=(0, 1)) / number).mean()


JEPA = ObjectiveType(jepa, heads=lambda spec, classes: {"predictor": FeatureDecoderHead()})
