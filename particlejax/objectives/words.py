# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling given everything else of the clip (VideoBERT, arXiv:1904.01766)."""

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses, masks
from particlejax.models.model import Model
from particlejax.modelspec import WordsSpec
from particlejax.objectives.masked import ask
from particlejax.objectives.types import Objective
from particlejax.particles.types import Batch, Particles
from particlejax.typing import Metrics, Params


def words(spec: WordsSpec) -> Objective:
    """Which word stands at a place whose word is hidden; metrics: loss, top1.

    A hidden word is not there at all, and the decoder is asked at its place, so that no id need be set aside for a mask.
    """

    def objective(params: Params, model: Model, batch: Batch, key: Array, train: bool) -> tuple[Array, Metrics]:
        mask_key, dropout_key = jax.random.split(key)
        whole, clips = batch.particles[spec.modality], batch.clip.shape[1]
        scores = masks.random_scores(mask_key, whole.place)
        visible, asked, segment = masks.split(scores, whole.segment, spec.keep, 1 - spec.keep)
        query = whole.take(asked)
        seen = Particles(**{**vars(whole.take(visible)), "segment": segment})
        logits = ask(params, model, {**batch.particles, spec.modality: seen}, query, spec.modality, batch,
                     dropout_key if train else None)
        word = query.payload[..., 0]
        each = losses.clip_mean(losses.cross_entropy(logits, word), query.segment, clips)
        right = losses.clip_mean((logits.argmax(axis=-1) == word).astype(jnp.float32), query.segment, clips)
        there = losses.membership(query.segment, clips).any(axis=1) & (batch.clip >= 0)
        loss = losses.mean(each, there)
        return loss, {"loss": loss, "top1": losses.mean(right, there)}

    return objective
