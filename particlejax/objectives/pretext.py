# SPDX-License-Identifier: Apache-2.0
"""Clip-level pretext classification: the loss that temporal and synchronization objectives
share.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.core.typing import Metrics, Params
from particlejax.models.particle_model import Model
from particlejax.particles.types import Batch, Particles


def answer(
    question: str,
    params: Params,
    model: Model,
    particles: Mapping[str, Particles],
    batch: Batch,
    label: Array,
    asked: Array,
    key: Array | None,
    ordered: int = 0,
) -> tuple[Array, Metrics]:
    """Encodes the particles, applies the head `question`, and returns the loss and metrics of
    `score`.
    """
    clips = batch.clip.shape[1]
    tokens, _ = model.apply(params, "encode", particles, clips, key=key)
    return score(model.head(params, question, tokens, clips), batch, label, asked, ordered)


def score(
    logits: Array, batch: Batch, label: Array, asked: Array, ordered: int = 0
) -> tuple[Array, Metrics]:
    """Cross-entropy of the label [B, S] over valid clips; metrics: loss, top1, valid_fraction (of
    all clips).

    If the first `ordered` classes are ordinal: acc_within_1, the fraction of the clips with such a
    label whose prediction is at most one class off.
    """
    there = batch.clip >= 0
    asked &= there
    loss = losses.mean(losses.cross_entropy(logits, label), asked)
    said = logits.argmax(axis=-1)
    metrics = {
        "loss": loss,
        "top1": losses.mean(said == label, asked),
        "valid_fraction": losses.mean(asked, there),
    }
    if ordered:
        metrics["acc_within_1"] = losses.mean(
            (said < ordered) & (jnp.abs(said - label) <= 1), asked & (label < ordered)
        )
    return loss, metrics
