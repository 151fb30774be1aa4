# SPDX-License-Identifier: Apache-2.0
"""Masked token prediction (VideoBERT, arXiv:1904.01766): words of a text, or k-means tokens of
video.
"""

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses, masks
from particlejax.config.objectives import MaskedLmSpec, MaskedVisualTokensSpec
from particlejax.core.typing import Params
from particlejax.losses import Mean, Means
from particlejax.models.heads import CodebookHead, DecoderHead, FeatureDecoderHead, QueryHead
from particlejax.models.particle_model import Model
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.objectives.masked import (
    Prediction,
    encode_and_decode,
    mask_particles,
    split_by_score,
)
from particlejax.particles.types import Batch

HEAD = "masked_visual_tokens_head"


def codebook_name(modality: str) -> str:
    """Name of the head with the codebook of a modality."""
    return f"codebook_{modality}"


def masked_lm(spec: MaskedLmSpec) -> Objective:
    """Masked language modeling; metrics: loss, top1.

    Masked words are removed and the decoder queries their positions, so no mask id is needed.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        mask_key, dropout_key = jax.random.split(key)
        particles = batch.particles[spec.modality]
        visible = masks.visible_ratio(spec.mask_ratio)
        shown, query_slots = split_by_score(
            masks.random_scores(mask_key, particles.place), particles, visible, 1 - visible
        )
        query = particles.take(query_slots)
        logits = encode_and_decode(
            params,
            model,
            {**batch.particles, spec.modality: shown},
            query,
            spec.modality,
            batch,
            dropout_key if train else None,
        )
        return _token_loss(Prediction(query, logits, query.payload[..., 0], shown), batch)

    return objective


def masked_visual_tokens(spec: MaskedVisualTokensSpec) -> Objective:
    """Predicts the cluster of masked particles; metrics: loss, top1, codebook_perplexity (see
    `perplexity`).
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        prediction = predict_codes(spec, params, model, batch, key, train)
        loss, metrics = _token_loss(prediction, batch)
        return loss, metrics | {
            "codebook_perplexity": perplexity(
                prediction.target, prediction.query.segment, spec.codebook_size
            )
        }

    return objective


def predict_codes(
    spec: MaskedVisualTokensSpec,
    params: Params,
    model: Model,
    batch: Batch,
    key: Array,
    train: bool,
) -> Prediction:
    """Masks a batch, encodes the visible particles and predicts the codes [B, Q] of the masked ones
    as logits [B, Q, C].
    """
    mask_key, dropout_key = jax.random.split(key)
    particles = batch.particles[spec.modality]
    visible, query_slots = mask_particles(spec, model, particles, mask_key)
    query = particles.take(query_slots)
    tokens, _ = model.apply(
        params,
        "encode",
        {**batch.particles, spec.modality: visible},
        batch.clip_index.shape[1],
        key=dropout_key if train else None,
    )
    logits = model.head(params, HEAD, tokens, query, spec.modality)
    return Prediction(
        query, logits, model.head(params, codebook_name(spec.modality), query.payload), visible
    )


def perplexity(codes_BQ: Array, segment: Array, num_codes: int) -> Mean:
    """Perplexity of the code distribution of a batch, exp(entropy): the effective number of codes,
    1 on collapse; weighted by the number of particles, as it has no exact recombination.
    """
    counts = jnp.einsum(
        "bqc,bq->c", jax.nn.one_hot(codes_BQ, num_codes), (segment > 0).astype(jnp.float32)
    )
    probs = counts / jnp.maximum(counts.sum(), 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(probs, probs))
    return Mean(jnp.exp(entropy), jnp.sum(segment > 0, dtype=jnp.float32))


def _token_loss(prediction: Prediction, batch: Batch) -> tuple[Mean, Means]:
    """Cross-entropy of the masked tokens; metrics: loss, top1."""
    segment, num_clips = prediction.query.segment, batch.clip_index.shape[1]
    clip_loss = losses.clip_mean(
        losses.cross_entropy(prediction.predicted, prediction.target), segment, num_clips
    )
    accuracy = losses.clip_mean(
        (prediction.predicted.argmax(axis=-1) == prediction.target).astype(jnp.float32),
        segment,
        num_clips,
    )
    valid = losses.membership(segment, num_clips).any(axis=1) & (batch.clip_index >= 0)
    loss = losses.mean_over(clip_loss, valid)
    return loss, {"loss": loss, "top1": losses.mean_over(accuracy, valid)}


MASKED_LM = ObjectiveType(masked_lm, heads=lambda spec, classes: {"decoder": DecoderHead()})
MASKED_VISUAL_TOKENS = ObjectiveType(
    masked_visual_tokens,
    heads=lambda spec, classes: {
        "predictor": FeatureDecoderHead(),
        HEAD: QueryHead(spec.codebook_size),
        codebook_name(spec.modality): CodebookHead(spec.modality, spec.codebook_size),
    },
)
