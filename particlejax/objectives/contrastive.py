# SPDX-License-Identifier: Apache-2.0
"""Contrastive learning between the modalities of a clip, and temporal alignment of text.

Legend: B rows, L slots, S clips of a row, E width of an embedding, N clips of the batch.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses, masks
from particlejax.config.modalities import ordered
from particlejax.config.objectives import ContrastiveSpec, TemporalAlignmentSpec
from particlejax.core.typing import Params
from particlejax.losses import Mean, Means
from particlejax.models.heads import ParticleHead, ProjectionHead
from particlejax.models.particle_model import Model
from particlejax.objectives import time_utils
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles

ALIGNMENT, PROJECTION = "temporal_alignment_head", "projection"


def temporal_alignment(spec: TemporalAlignmentSpec) -> Objective:
    """Predicts the time of each particle of a modality from its payload and the rest of the clip
    (temporal alignment of words, arXiv:2204.02968). Its own time is masked: set to the clip's
    middle, with the clip's length.

    Scores particles no longer than half their clip. Metrics: loss, top1, mae_seconds (mean distance
    between the middle of the predicted bin and the true time).
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        particles, num_clips = batch.particles[spec.modality], batch.clip_index.shape[1]
        first, last = (
            time_utils.gather_clip_value(bound, particles)
            for bound in time_utils.span(particles, num_clips)
        )
        time, length = particles.place[..., 0], jnp.maximum(last - first, time_utils.TIME_EPS)
        label = jnp.clip(
            jnp.floor((time - first) / length * spec.num_bins), 0, spec.num_bins - 1
        ).astype(jnp.int32)
        extent = jnp.concatenate([length[..., None], particles.extent[..., 1:]], axis=-1)
        hidden = replace(time_utils.with_time(particles, (first + last) / 2), extent=extent)
        inputs = {**batch.particles, spec.modality: hidden}
        tokens, _ = model.apply(params, "encode", inputs, num_clips, key=key if train else None)
        logits = model.head(params, ALIGNMENT, tokens, inputs, spec.modality)
        query_segment = jnp.where(
            particles.extent[..., 0] <= length / 2 + time_utils.TIME_EPS, particles.segment, 0
        )
        valid = losses.membership(query_segment, num_clips).any(axis=1) & (batch.clip_index >= 0)
        predicted_bin = logits.argmax(axis=-1)
        error_seconds = jnp.abs(first + (predicted_bin + 0.5) / spec.num_bins * length - time)
        loss, accuracy, seconds = (
            losses.mean_over(losses.clip_mean(values, query_segment, num_clips), valid)
            for values in (
                losses.cross_entropy(logits, label),
                (predicted_bin == label).astype(jnp.float32),
                error_seconds,
            )
        )
        return loss, {"loss": loss, "top1": accuracy, "mae_seconds": seconds}

    return objective


def contrastive(spec: ContrastiveSpec) -> Objective:
    """Finds the matching clip among all clips (CLIP, arXiv:2103.00020; SigLIP, arXiv:2303.15343).

    Compares two modalities, each encoded alone, or two masked views if one modality is named twice.
    Negatives are all clips of the batch (or micro-batch) over the whole mesh: arrays are global
    under jit and the compiler gathers them. Clips that lack a modality are ignored. Metrics: loss;
    batch_recall_at_1, the fraction of clips whose nearest neighbor is their own.

    As the number of negatives is that of the batch, the mean over several batches, weighted by
    their matching pairs, is not the value over all of their clips at once: it depends on the batch
    size, as in CLIP.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        view_key, *keys = jax.random.split(key, 3)
        views = _views(spec, batch, view_key)
        num_clips = batch.clip_index.shape[1]
        embeddings = []
        for name, view, dropout_key in zip(spec.modalities, views, keys, strict=True):
            tokens, _ = model.apply(
                params, "encode", {name: view}, num_clips, key=dropout_key if train else None
            )
            embedding, logit_scale, bias = model.head(params, PROJECTION, tokens, num_clips, name)
            embeddings.append(embedding.reshape(-1, embedding.shape[-1]))
        both_present = (
            time_utils.present(views[0], num_clips)
            & time_utils.present(views[1], num_clips)
            & (batch.clip_index >= 0)
        )
        similarity = jnp.einsum("ne,me->nm", *embeddings)
        valid = both_present.reshape(-1)
        loss = (
            infonce(similarity * logit_scale, valid)
            if spec.loss == "infonce"
            else sigmoid(similarity * logit_scale + bias, valid)
        )
        correct = jnp.where(valid[None], similarity, -jnp.inf).argmax(axis=1) == jnp.arange(
            len(valid)
        )
        recall = losses.mean_over(correct, valid)
        loss = recall._replace(value=loss)
        return loss, {
            "loss": loss,
            "batch_recall_at_1": recall,
            "logit_scale": recall._replace(value=logit_scale),
        }

    return objective


def _views(spec: ContrastiveSpec, batch: Batch, key: Array) -> tuple[Particles, Particles]:
    first, second = (batch.particles[name] for name in spec.modalities)
    if spec.modalities[0] != spec.modalities[1]:
        return first, second
    rank = masks.rank_fraction(masks.random_scores(key, first.place), first.segment)
    visible = masks.visible_ratio(spec.mask_ratio)
    return time_utils.drop_where_not(first, rank < visible), time_utils.drop_where_not(
        first, (rank > 1 - visible) & (rank < 1)
    )


def infonce(logits_NM: Array, valid: Array) -> Array:
    """InfoNCE: cross-entropy of finding each clip's own pair, both ways, mean over valid clips."""
    logits = jnp.where(valid[:, None] & valid[None], logits_NM, -1e9)
    labels = jnp.arange(len(valid))
    loss = (losses.cross_entropy(logits, labels) + losses.cross_entropy(logits.T, labels)) / 2
    return losses.mean(loss, valid)


def sigmoid(logits_NM: Array, valid: Array) -> Array:
    """Sigmoid loss: each pair is a binary choice; the sum over a clip's pairs, mean over valid
    clips.
    """
    signs = 2 * jnp.eye(len(valid)) - 1
    pair_loss = -jax.nn.log_sigmoid(signs * logits_NM) * (valid[:, None] & valid[None])
    return losses.mean(pair_loss.sum(axis=1), valid)


CONTRASTIVE = ObjectiveType(
    contrastive,
    heads=lambda spec, classes: {PROJECTION: ProjectionHead(ordered(set(spec.modalities)))},
    modalities=lambda spec: spec.modalities,
)
TEMPORAL_ALIGNMENT = ObjectiveType(
    temporal_alignment, heads=lambda spec, classes: {ALIGNMENT: ParticleHead(spec.num_bins)}
)
