# SPDX-License-Identifier: Apache-2.0
"""Feature distillation: predicts stored features of a published network from the clip alone."""

import jax
import optax
from jax import Array

from particlejax import losses, masks
from particlejax.config.model import FeatureDistillationSpec
from particlejax.core.typing import Metrics, Params
from particlejax.models.heads import DecoderHead
from particlejax.models.particle_model import Model
from particlejax.objectives import masked
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles

_KNEE = 1.0  # error in standard deviations above which the loss is linear


def feature_distillation(spec: FeatureDistillationSpec) -> Objective:
    """Predicts the teacher's features at their positions; the encoder never sees them
    (arXiv:2212.04500).

    The encoder sees the unmasked part of `modality` and all other modalities. Metrics: loss;
    cosine_similarity of predicted and true features.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        mask_key, dropout_key = jax.random.split(key)
        query, clips = batch.particles[spec.teacher_modality], batch.clip.shape[1]
        seen = {
            name: each for name, each in batch.particles.items() if name != spec.teacher_modality
        }
        seen[spec.modality] = visible(spec, model, seen[spec.modality], mask_key)
        predicted = masked.ask(
            params, model, seen, query, spec.teacher_modality, batch, dropout_key if train else None
        )
        alike = optax.cosine_similarity(predicted, query.payload, epsilon=1e-6)
        error = (
            1 - alike
            if spec.loss == "cosine"
            else optax.huber_loss(predicted, query.payload, delta=_KNEE).mean(axis=-1)
        )
        there = losses.membership(query.segment, clips).any(axis=1) & (batch.clip >= 0)

        def of_clips(values: Array) -> Array:
            return losses.mean(losses.clip_mean(values, query.segment, clips), there)

        return of_clips(error), {"loss": of_clips(error), "cosine_similarity": of_clips(alike)}

    return objective


def visible(spec: FeatureDistillationSpec, model: Model, whole: Particles, key: Array) -> Particles:
    """The particles of `modality` that the encoder sees."""
    if not spec.mask_ratio:
        return whole
    return masked.part(
        masked.SCORES[spec.mask_type](key, whole, model.payloads[spec.modality].base),
        whole,
        masks.visible_ratio(spec.mask_ratio),
        0.0,
    )[0]


FEATURE_DISTILLATION = ObjectiveType(
    feature_distillation,
    heads=lambda spec, classes: {"decoder": DecoderHead()},
    modalities=lambda spec: (spec.modality, spec.teacher_modality),
    unseen=lambda spec: (spec.teacher_modality,),
)
