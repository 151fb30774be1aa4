# SPDX-License-Identifier: Apache-2.0
"""Hidden words told from everything else of the clip (VideoBERT, arXiv:1904.01766): those of a
text, and those that k-means makes of what is seen.
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
    """The head that holds the codes of a modality."""
    return f"codebook_{modality}"


def masked_lm(spec: MaskedLmSpec) -> Objective:
    """Which word stands at a place whose word is hidden; metrics: loss, top1.

    A hidden word is not there at all, and the decoder is asked at its place, so that no id need be
    set aside for a mask.
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
    """Into which cluster a hidden particle falls; metrics: loss, top1, codebook_perplexity (how
    many are used; see `used`).
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
    """Masks a batch, encodes what is left and tells the codes [B, Q] of what is asked for, as
    logits [B, Q, C].
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
    """How many codes of like frequency would tell as much as these, by their entropy: 1 in a
    collapse.
    """
    number = jnp.einsum(
        "bqc,bq->c", jax.nn.one_hot(codes_BQ, count), (segment > 0).astype(jnp.float32)
    )
    share = number / jnp.maximum(number.sum(), 1)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def _told(found: Prediction, batch: Batch) -> tuple[Array, Metrics]:
    """Cross-entropy of what was asked for; metrics: loss, top1."""
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
