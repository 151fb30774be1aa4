# SPDX-License-Identifier: Apache-2.0
"""Semi-supervised learning: predictions on the whole clip are targets for a masked, noisy view of
it.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses, masks
from particlejax.config.modalities import ordered
from particlejax.config.objectives import PseudoLabelSpec
from particlejax.core.typing import Params
from particlejax.losses import Mean, Means
from particlejax.models.heads import classification
from particlejax.models.particle_model import Model
from particlejax.objectives.base import TEACHER, Objective, ObjectiveType
from particlejax.objectives.label_targets import Targets
from particlejax.particles.types import Batch, Particles


def pseudo_label(spec: PseudoLabelSpec, targets: Targets | None = None) -> Objective:
    """Loss of unlabeled clips; metrics: loss, and the fraction of them above the confidence
    threshold.
    """
    del targets

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        view_key, dropout_key = jax.random.split(key)
        num_clips = batch.label.shape[1]
        teacher = params.get(TEACHER, params) if spec.teacher == "ema" else params
        tokens, _ = model.apply(
            jax.lax.stop_gradient(teacher), "encode", batch.particles, num_clips
        )
        teacher_probs = jax.nn.softmax(
            jax.lax.stop_gradient(model.head(teacher, "head", tokens, num_clips))
        )
        augmented = augmented_view(spec, batch.particles, view_key)
        tokens, _ = model.apply(
            params, "encode", augmented, num_clips, key=dropout_key if train else None
        )
        logits = model.head(params, "head", tokens, num_clips)
        if spec.target == "soft":
            clip_loss = jnp.square(jax.nn.softmax(logits) - teacher_probs).mean(axis=-1)
        else:
            clip_loss = losses.cross_entropy(logits, teacher_probs.argmax(axis=-1))
        unlabeled = (batch.label < 0) & (batch.clip_index >= 0)
        confident = (teacher_probs.max(axis=-1) >= spec.threshold).astype(jnp.float32)
        loss = losses.mean_over(clip_loss * confident, unlabeled)
        return loss, {"loss": loss, "confident_fraction": losses.mean_over(confident, unlabeled)}

    return objective


def augmented_view(
    spec: PseudoLabelSpec, particles: Mapping[str, Particles], key: Array
) -> dict[str, Particles]:
    """A random subset of each clip's particles per modality, with noise on numeric payloads."""
    view = {}
    for i, name in enumerate(ordered(particles)):
        modality_particles = particles[name]
        mask_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
        visible, _, segment = masks.split(
            masks.random_scores(mask_key, modality_particles.place),
            modality_particles.segment,
            masks.visible_ratio(spec.mask_ratio),
            0.0,
        )
        visible_particles = modality_particles.take(visible)
        payload = visible_particles.payload
        if jnp.issubdtype(payload.dtype, jnp.floating):
            payload = payload + spec.noise_std * jax.random.normal(
                noise_key, payload.shape, payload.dtype
            )
        view[name] = replace(visible_particles, payload=payload, segment=segment)
    return view


PSEUDO_LABEL = ObjectiveType(
    pseudo_label,
    heads=lambda spec, classes: classification(classes),
    modalities=lambda spec: (),
    labelled=True,
)
