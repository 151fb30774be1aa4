# SPDX-License-Identifier: Apache-2.0
"""Clip-level pretext classification: the loss that temporal and synchronization objectives
share.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.core.typing import Params
from particlejax.losses import Mean, Means
from particlejax.models.particle_model import Model
from particlejax.particles.types import Batch, Particles


def encode_and_score(
    head: str,
    params: Params,
    model: Model,
    particles: Mapping[str, Particles],
    batch: Batch,
    label: Array,
    valid: Array,
    key: Array | None,
    num_ordered: int = 0,
) -> tuple[Mean, Means]:
    """Encodes the particles, applies the head `head`, and returns the loss and metrics of
    `classification_loss`.
    """
    num_clips = batch.clip_index.shape[1]
    tokens, _ = model.apply(params, "encode", particles, num_clips, key=key)
    return classification_loss(
        model.head(params, head, tokens, num_clips), batch, label, valid, num_ordered
    )


def classification_loss(
    logits: Array, batch: Batch, label: Array, valid: Array, num_ordered: int = 0
) -> tuple[Mean, Means]:
    """Cross-entropy of the label [B, S] over valid clips; metrics: loss, top1, valid_fraction (of
    all clips).

    If the first `num_ordered` classes are ordinal: acc_within_1, the fraction of the clips with
    such a label whose prediction is at most one class off.
    """
    is_clip = batch.clip_index >= 0
    valid &= is_clip
    loss = losses.mean_over(losses.cross_entropy(logits, label), valid)
    predicted = logits.argmax(axis=-1)
    metrics = {
        "loss": loss,
        "top1": losses.mean_over(predicted == label, valid),
        "valid_fraction": losses.mean_over(valid, is_clip),
    }
    if num_ordered:
        metrics["acc_within_1"] = losses.mean_over(
            (predicted < num_ordered) & (jnp.abs(predicted - label) <= 1),
            valid & (label < num_ordered),
        )
    return loss, metrics
