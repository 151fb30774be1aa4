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
from particlejax.config.model import ContrastiveSpec, TemporalAlignmentSpec
from particlejax.core.typing import Metrics, Params
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
    ) -> tuple[Array, Metrics]:
        whole, clips = batch.particles[spec.modality], batch.clip.shape[1]
        first, last = (
            time_utils.of_particle(each, whole) for each in time_utils.span(whole, clips)
        )
        time, length = whole.place[..., 0], jnp.maximum(last - first, time_utils.SLACK)
        label = jnp.clip(
            jnp.floor((time - first) / length * spec.num_bins), 0, spec.num_bins - 1
        ).astype(jnp.int32)
        extent = jnp.concatenate([length[..., None], whole.extent[..., 1:]], axis=-1)
        hidden = replace(time_utils.moved(whole, (first + last) / 2), extent=extent)
        particles = {**batch.particles, spec.modality: hidden}
        tokens, _ = model.apply(params, "encode", particles, clips, key=key if train else None)
        logits = model.head(params, ALIGNMENT, tokens, particles, spec.modality)
        asked = jnp.where(whole.extent[..., 0] <= length / 2 + time_utils.SLACK, whole.segment, 0)
        there = losses.membership(asked, clips).any(axis=1) & (batch.clip >= 0)
        said = logits.argmax(axis=-1)
        off = jnp.abs(first + (said + 0.5) / spec.num_bins * length - time)
        loss, right, seconds = (
            losses.mean(losses.clip_mean(each, asked, clips), there)
            for each in (
                losses.cross_entropy(logits, label),
                (said == label).astype(jnp.float32),
                off,
            )
        )
        return loss, {"loss": loss, "top1": right, "mae_seconds": seconds}

    return objective


def contrastive(spec: ContrastiveSpec) -> Objective:
    """Finds the matching clip among all clips (CLIP, arXiv:2103.00020; SigLIP, arXiv:2303.15343).

    Compares two modalities, each encoded alone, or two masked views if one modality is named twice.
    Negatives are all clips of the batch (or micro-batch) over the whole mesh: arrays are global
    under jit and the compiler gathers them. Clips that lack a modality are ignored. Metrics: loss;
    batch_recall_at_1, the fraction of clips whose nearest neighbor is their own.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        view_key, *keys = jax.random.split(key, 3)
        views = _views(spec, batch, view_key)
        clips = batch.clip.shape[1]
        units = []
        for name, view, each in zip(spec.modalities, views, keys, strict=True):
            tokens, _ = model.apply(
                params, "encode", {name: view}, clips, key=each if train else None
            )
            unit, sharpness, bias = model.head(params, PROJECTION, tokens, clips, name)
            units.append(unit.reshape(-1, unit.shape[-1]))
        both = (
            time_utils.present(views[0], clips)
            & time_utils.present(views[1], clips)
            & (batch.clip >= 0)
        )
        alike = jnp.einsum("ne,me->nm", *units)
        there = both.reshape(-1)
        loss = (
            infonce(alike * sharpness, there)
            if spec.loss == "infonce"
            else sigmoid(alike * sharpness + bias, there)
        )
        nearest = jnp.where(there[None], alike, -jnp.inf).argmax(axis=1) == jnp.arange(len(there))
        return loss, {
            "loss": loss,
            "batch_recall_at_1": losses.mean(nearest, there),
            "logit_scale": sharpness,
        }

    return objective


def _views(spec: ContrastiveSpec, batch: Batch, key: Array) -> tuple[Particles, Particles]:
    first, second = (batch.particles[name] for name in spec.modalities)
    if spec.modalities[0] != spec.modalities[1]:
        return first, second
    share = masks.share_rank(masks.random_scores(key, first.place), first.segment)
    visible = masks.visible_ratio(spec.mask_ratio)
    return time_utils.keep(first, share < visible), time_utils.keep(
        first, (share > 1 - visible) & (share < 1)
    )


def infonce(logits_NM: Array, there: Array) -> Array:
    """InfoNCE: cross-entropy of finding each clip's own pair, both ways, mean over valid clips."""
    logits = jnp.where(there[:, None] & there[None], logits_NM, -1e9)
    own = jnp.arange(len(there))
    both = (losses.cross_entropy(logits, own) + losses.cross_entropy(logits.T, own)) / 2
    return losses.mean(both, there)


def sigmoid(logits_NM: Array, there: Array) -> Array:
    """Sigmoid loss: each pair is a binary choice; the sum over a clip's pairs, mean over valid
    clips.
    """
    sign = 2 * jnp.eye(len(there)) - 1
    each = -jax.nn.log_sigmoid(sign * logits_NM) * (there[:, None] & there[None])
    return losses.mean(each.sum(axis=1), there)


CONTRASTIVE = ObjectiveType(
    contrastive,
    heads=lambda spec, classes: {PROJECTION: ProjectionHead(ordered(set(spec.modalities)))},
    modalities=lambda spec: spec.modalities,
)
TEMPORAL_ALIGNMENT = ObjectiveType(
    temporal_alignment, heads=lambda spec, classes: {ALIGNMENT: ParticleHead(spec.num_bins)}
)
