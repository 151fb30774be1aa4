# SPDX-License-Identifier: Apache-2.0
"""Masked token prediction (VideoBERT, arXiv:1904.01766): words of a text, or k-means tokens of
video.
"""

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses, masks
from particlejax.config.model import MaskedLmSpec, MaskedVisualTokensSpec
from particlejax.core.typing import Metrics, Params
from particlejax.models.heads import CodebookHead, DecoderHead, FeatureDecoderHead, QueryHead
from particlejax.models.particle_model import Model
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.objectives.masked import Prediction, ask, hide, part
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
    ) -> tuple[Array, Metrics]:
        mask_key, dropout_key = jax.random.split(key)
        whole = batch.particles[spec.modality]
        visible = masks.visible_ratio(spec.mask_ratio)
        seen, asked = part(masks.random_scores(mask_key, whole.place), whole, visible, 1 - visible)
        query = whole.take(asked)
        logits = ask(
            params,
            model,
            {**batch.particles, spec.modality: seen},
            query,
            spec.modality,
            batch,
            dropout_key if train else None,
        )
        return _told(Prediction(query, logits, query.payload[..., 0], seen), batch)

    return objective


def masked_visual_tokens(spec: MaskedVisualTokensSpec) -> Objective:
    """Predicts the cluster of masked particles; metrics: loss, top1, codebook_perplexity (see
    `used`).
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        found = predict_codes(spec, params, model, batch, key, train)
        loss, metrics = _told(found, batch)
        return loss, metrics | {
            "codebook_perplexity": used(found.target, found.query.segment, spec.codebook_size)
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
    whole = batch.particles[spec.modality]
    seen, asked = hide(spec, model, whole, mask_key)
    query = whole.take(asked)
    tokens, _ = model.apply(
        params,
        "encode",
        {**batch.particles, spec.modality: seen},
        batch.clip.shape[1],
        key=dropout_key if train else None,
    )
    logits = model.head(params, HEAD, tokens, query, spec.modality)
    return Prediction(
        query, logits, model.head(params, codebook_name(spec.modality), query.payload), seen
    )


def used(codes_BQ: Array, segment: Array, count: int) -> Array:
    """Perplexity of the code distribution, exp(entropy): the effective number of codes, 1 on
    collapse.
    """
    number = jnp.einsum(
        "bqc,bq->c", jax.nn.one_hot(codes_BQ, count), (segment > 0).astype(jnp.float32)
    )
    share = number / jnp.maximum(number.sum(), 1)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def _told(found: Prediction, batch: Batch) -> tuple[Array, Metrics]:
    """Cross-entropy of the masked tokens; metrics: loss, top1."""
    segment, clips = found.query.segment, batch.clip.shape[1]
    each = losses.clip_mean(losses.cross_entropy(found.predicted, found.target), segment, clips)
    right = losses.clip_mean(
        (found.predicted.argmax(axis=-1) == found.target).astype(jnp.float32), segment, clips
    )
    there = losses.membership(segment, clips).any(axis=1) & (batch.clip >= 0)
    loss = losses.mean(each, there)
    return loss, {"loss": loss, "top1": losses.mean(right, there)}


MASKED_LM = ObjectiveType(masked_lm, heads=lambda spec, classes: {"decoder": DecoderHead()})
MASKED_VISUAL_TOKENS = ObjectiveType(
    masked_visual_tokens,
    heads=lambda spec, classes: {
        "predictor": FeatureDecoderHead(),
        HEAD: QueryHead(spec.codebook_size),
        codebook_name(spec.modality): CodebookHead(spec.modality, spec.codebook_size),
    },
)
