# SPDX-License-Identifier: Apache-2.0
"""One question about each clip with a few answers: the loss that temporal and pair objectives share."""

from collections.abc import Mapping

from jax import Array

from particlejax import losses
from particlejax.models.model import Model
from particlejax.particles.types import Batch, Particles
from particlejax.typing import Metrics, Params


def answer(question: str, params: Params, model: Model, particles: Mapping[str, Particles], batch: Batch, label: Array,
           asked: Array, key: Array | None) -> tuple[Array, Metrics]:
    """Cross-entropy of the label [B, S] of the clips that are asked; metrics: loss, top1, asked (their share of all clips)."""
    clips = batch.clip.shape[1]
    tokens, _ = model.apply(params, "encode", particles, clips, key=key)
    logits = model.apply(params, "ask", tokens, clips, question)
    there = batch.clip >= 0
    asked &= there
    loss = losses.mean(losses.cross_entropy(logits, label), asked)
    return loss, {"loss": loss, "top1": losses.mean(logits.argmax(axis=-1) == label, asked), "asked": losses.mean(asked, there)}
