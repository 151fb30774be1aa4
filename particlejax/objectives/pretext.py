# SPDX-License-Identifier: Apache-2.0
"""One question about each clip with a few answers: the loss that temporal and pair objectives
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
    """What the encoder makes of the particles, asked the question, and what `score` says of
    that.
    """
    clips = batch.clip.shape[1]
    tokens, _ = model.apply(params, "encode", particles, clips, key=key)
    return score(model.head(params, question, tokens, clips), batch, label, asked, ordered)


def score(
    logits: Array, batch: Batch, label: Array, asked: Array, ordered: int = 0
) -> tuple[Array, Metrics]:
    """Cross-entropy of the label [B, S] of the clips that are asked; metrics: loss, top1,
    valid_fraction (their share of all clips).

    Where the first `ordered` answers stand in an order: acc_within_1, the share of the clips
    labelled by one of them for which it or its neighbour was said.
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
