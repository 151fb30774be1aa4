# SPDX-License-Identifier: Apache-2.0
"""Feature distillation: predicts stored features of a published network from the clip alone."""

import jax
import optax
from jax import Array

from particlejax import losses, masks
from particlejax.config.objectives import FeatureDistillationSpec
from particlejax.core.typing import Params
from particlejax.losses import Mean, Means
from particlejax.models.heads import DecoderHead
from particlejax.models.particle_model import Model
from particlejax.objectives import masked
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles

_HUBER_DELTA = 1.0  # error in standard deviations above which the loss is linear


def feature_distillation(spec: FeatureDistillationSpec) -> Objective:
    """Predicts the teacher's features at their positions; the encoder never sees them
    (arXiv:2212.04500).

    The encoder sees the unmasked part of `modality` and all other modalities. Metrics: loss;
    cosine_similarity of predicted and true features.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        mask_key, dropout_key = jax.random.split(key)
        query, num_clips = batch.particles[spec.teacher_modality], batch.clip_index.shape[1]
        inputs = {
            name: particles
            for name, particles in batch.particles.items()
            if name != spec.teacher_modality
        }
        inputs[spec.modality] = visible_particles(spec, model, inputs[spec.modality], mask_key)
        predicted = masked.encode_and_decode(
            params,
            model,
            inputs,
            query,
            spec.teacher_modality,
            batch,
            dropout_key if train else None,
        )
        cosine = optax.cosine_similarity(predicted, query.payload, epsilon=1e-6)
        error = (
            1 - cosine
            if spec.loss == "cosine"
            else optax.huber_loss(predicted, query.payload, delta=_HUBER_DELTA).mean(axis=-1)
        )
        valid = losses.membership(query.segment, num_clips).any(axis=1) & (batch.clip_index >= 0)

        def mean_over_clips(values: Array) -> Mean:
            return losses.mean_over(losses.clip_mean(values, query.segment, num_clips), valid)

        return mean_over_clips(error), {
            "loss": mean_over_clips(error),
            "cosine_similarity": mean_over_clips(cosine),
        }

    return objective


def visible_particles(
    spec: FeatureDistillationSpec, model: Model, particles: Particles, key: Array
) -> Particles:
    """The particles of `modality` that the encoder sees."""
    if not spec.mask_ratio:
        return particles
    return masked.split_by_score(
        masked.SCORES[spec.mask_type](key, particles, model.payloads[spec.modality].patch_size),
        particles,
        masks.visible_ratio(spec.mask_ratio),
        0.0,
    )[0]


FEATURE_DISTILLATION = ObjectiveType(
    feature_distillation,
    heads=lambda spec, classes: {"decoder": DecoderHead()},
    modalities=lambda spec: (spec.modality, spec.teacher_modality),
    unseen=lambda spec: (spec.teacher_modality,),
)
