# SPDX-License-Identifier: Apache-2.0
"""Text matching: classifies whether a text belongs to its clip; negatives are shifted or hard.

Legend: B rows, L slots, S clips of a row, D width, N = B S clips of the batch, row by row.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.config.objectives import TextMatchingSpec
from particlejax.core.typing import Params
from particlejax.losses import Mean, Means
from particlejax.models.heads import ClipHead
from particlejax.models.particle_model import Model
from particlejax.objectives import pretext, time_utils
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles

HEAD = "text_matching_head"
_SAMPLING_SCALE = 10.0  # scale of cosines before the softmax that samples negatives


def text_matching(spec: TextMatchingSpec) -> Objective:
    """Does the text belong to the clip (image-text matching of ALBEF, arXiv:2107.07651)? Metrics:
    loss, top1, valid_fraction.

    A clip with the same words is no negative. A negative takes the time span of the clip's own
    text, so that only its words differ.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        mismatch_key, draw_key, key = jax.random.split(key, 3)
        num_clips, text = batch.clip_index.shape[1], batch.particles[spec.modality]
        other_modalities = {
            name: particles for name, particles in batch.particles.items() if name != spec.modality
        }
        texts = unpack_clips(text, num_clips)
        allowed = valid_negatives(texts, batch)
        if spec.negatives == "hard":
            negative = sample_hard_negatives(
                draw_key, similarity(params, model, batch, spec.modality), allowed
            )
        else:
            negative = (jnp.arange(len(allowed)) + num_clips) % len(allowed)
        possible = jnp.take_along_axis(allowed, negative[:, None], axis=1)[:, 0]
        mismatched = (
            jax.random.bernoulli(mismatch_key, spec.mismatch_prob, possible.shape) & possible
        )
        shown_text = repack_text(
            texts, jnp.where(mismatched, negative, jnp.arange(len(allowed))), text, num_clips
        )
        has_others = jnp.stack(
            [time_utils.present(p, num_clips) for p in other_modalities.values()]
        ).any(axis=0)
        label = (~mismatched).reshape(batch.clip_index.shape).astype(jnp.int32)
        return pretext.encode_and_score(
            HEAD,
            params,
            model,
            {**other_modalities, spec.modality: shown_text},
            batch,
            label,
            time_utils.present(text, num_clips) & has_others,
            key if train else None,
        )

    return objective


def unpack_clips(text: Particles, num_clips: int) -> Particles:
    """Unpacks particles per clip, [N, L, ...], in slot order, padding last; segment is 1 for a
    particle, else 0.
    """
    in_clip = text.segment[:, None] == jnp.arange(1, num_clips + 1)[None, :, None]  # [B, S, L]
    index = jnp.argsort(~in_clip, axis=-1, stable=True).reshape(-1, in_clip.shape[-1])
    unpacked = jax.tree.map(lambda x: jnp.repeat(x, num_clips, axis=0), text).take(index)
    return replace(
        unpacked,
        segment=jnp.sort(in_clip, axis=-1, descending=True).reshape(index.shape).astype(jnp.int32),
    )


def valid_negatives(texts: Particles, batch: Batch) -> Array:
    """Whether clip m's text is a valid negative for clip n, bool [N, N]: it exists and its words
    differ.
    """
    clip_id, occupied = batch.clip_index.reshape(-1), texts.segment > 0
    payload = jnp.where(occupied[..., None], texts.payload, 0)
    same_text = (payload[:, None] == payload[None]).all(axis=(2, 3)) & (
        occupied[:, None] == occupied[None]
    ).all(axis=2)
    has_text = occupied.any(axis=1) & (clip_id >= 0)
    return ~same_text & has_text[:, None] & has_text[None]


def similarity(params: Params, model: Model, batch: Batch, modality: str) -> Array:
    """Similarity of each two clips, [N, N], without gradient: sum of the cosines of their texts and
    of their other modalities.

    Each is encoded alone; the mean over the batch is subtracted.
    """
    num_clips = batch.clip_index.shape[1]
    groups = {name == modality: {} for name in batch.particles}
    for name, particles in batch.particles.items():
        groups[name == modality][name] = particles
    return sum(
        _cosine_similarity(
            jax.lax.stop_gradient(params), model, group, batch.clip_index >= 0, num_clips
        )
        for group in groups.values()
    )


def _cosine_similarity(
    params: Params, model: Model, particles: dict[str, Particles], valid: Array, num_clips: int
) -> Array:
    tokens, _ = model.apply(params, "encode", particles, num_clips)
    pooled = losses.clip_mean(
        tokens.x.astype(jnp.float32), tokens.segment, num_clips, tokens.size
    ).reshape(valid.size, -1)
    valid = valid.reshape(-1, 1) & jnp.stack(
        [time_utils.present(p, num_clips) for p in particles.values()]
    ).any(axis=0).reshape(-1, 1)
    centered = (
        pooled - jnp.sum(pooled * valid, axis=0, keepdims=True) / jnp.maximum(valid.sum(), 1)
    ) * valid
    normalized = centered / jnp.sqrt(jnp.sum(jnp.square(centered), axis=-1, keepdims=True) + 1e-6)
    return jnp.einsum("nd,md->nm", normalized, normalized)


def sample_hard_negatives(key: Array, similarity_NN: Array, allowed_NN: Array) -> Array:
    """Samples a negative clip for each, int [N], from a softmax of similarity (ALBEF, section 3.2)
    over valid ones.
    """
    return jax.random.categorical(
        key, jnp.where(allowed_NN, _SAMPLING_SCALE * similarity_NN, -1e9), axis=-1
    )


def repack_text(texts: Particles, indices: Array, own_text: Particles, num_clips: int) -> Particles:
    """Packs the chosen clips' particles into rows of S L slots, rescaled to the time span of
    `own_text`.
    """
    shown_text = jax.tree.map(lambda x: x[indices], texts)
    first, last = (x.reshape(-1, 1) for x in time_utils.span(own_text, num_clips))
    text_start, text_end = time_utils.span(shown_text, 1)
    stretch = (last - first) / jnp.maximum(text_end - text_start, time_utils.TIME_EPS)
    shown_text = time_utils.with_time(
        shown_text, first + (shown_text.place[..., 0] - text_start) * stretch
    )
    extent = jnp.concatenate(
        [(shown_text.extent[..., 0] * stretch)[..., None], shown_text.extent[..., 1:]], axis=-1
    )
    segment = jnp.tile(jnp.arange(1, num_clips + 1), len(indices) // num_clips)[:, None]
    shown_text = replace(
        shown_text, extent=extent, segment=jnp.where(shown_text.segment > 0, segment, 0)
    )
    return jax.tree.map(lambda x: x.reshape(len(own_text.segment), -1, *x.shape[2:]), shown_text)


TEXT_MATCHING = ObjectiveType(text_matching, heads=lambda spec, classes: {HEAD: ClipHead(2)})
