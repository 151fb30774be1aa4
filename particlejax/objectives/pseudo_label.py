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
from particlejax.config.training import PseudoLabelSpec
from particlejax.core.typing import Metrics, Params
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
    ) -> tuple[Array, Metrics]:
        view_key, dropout_key = jax.random.split(key)
        clips = batch.label.shape[1]
        teacher = params.get(TEACHER, params) if spec.teacher == "ema" else params
        tokens, _ = model.apply(jax.lax.stop_gradient(teacher), "encode", batch.particles, clips)
        said = jax.nn.softmax(jax.lax.stop_gradient(model.head(teacher, "head", tokens, clips)))
        seen = disturbed(spec, batch.particles, view_key)
        tokens, _ = model.apply(params, "encode", seen, clips, key=dropout_key if train else None)
        logits = model.head(params, "head", tokens, clips)
        if spec.target == "soft":
            each = jnp.square(jax.nn.softmax(logits) - said).mean(axis=-1)
        else:
            each = losses.cross_entropy(logits, said.argmax(axis=-1))
        asked = (batch.label < 0) & (batch.clip >= 0)
        sure = (said.max(axis=-1) >= spec.threshold).astype(jnp.float32)
        loss = losses.mean(each * sure, asked)
        return loss, {"loss": loss, "confident_fraction": losses.mean(sure, asked)}

    return objective


def disturbed(
    spec: PseudoLabelSpec, particles: Mapping[str, Particles], key: Array
) -> dict[str, Particles]:
    """A random subset of each clip's particles per modality, with noise on numeric payloads."""
    seen = {}
    for i, name in enumerate(ordered(particles)):
        whole = particles[name]
        mask_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
        visible, _, segment = masks.split(
            masks.random_scores(mask_key, whole.place),
            whole.segment,
            masks.visible_ratio(spec.mask_ratio),
            0.0,
        )
        part = whole.take(visible)
        payload = part.payload
        if jnp.issubdtype(payload.dtype, jnp.floating):
            payload = payload + spec.noise_std * jax.random.normal(
                noise_key, payload.shape, payload.dtype
            )
        seen[name] = replace(part, payload=payload, segment=segment)
    return seen


PSEUDO_LABEL = ObjectiveType(
    pseudo_label,
    heads=lambda spec, classes: classification(classes),
    modalities=lambda spec: (),
    labelled=True,
)
