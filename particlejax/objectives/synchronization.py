# SPDX-License-Identifier: Apache-2.0
"""Synchronization: predicts the time shift between audio and video, or between two halves of a
frame.

Mismatched clips come from the same position in the next row, so packed rows keep their layout.
Legend: B rows, L and M slots, S clips of a row, E width of an embedding, A classes.
"""

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.config.objectives import SynchronizationSpec
from particlejax.core.typing import Params
from particlejax.losses import Mean, Means
from particlejax.models.heads import ClipHead, HeadSpec, TokenProjectionHead
from particlejax.models.particle_model import Model
from particlejax.objectives import pretext, time_utils
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles

HEAD, PROJECTION = "synchronization_head", "synchronization_projection"
_MIN_VARIANCE = 1e-6  # added to a product of two variances, against division by 0


def synchronization(spec: SynchronizationSpec) -> Objective:
    """Predicts the shift of the second input against the first, or a mismatched clip
    (arXiv:1804.03641).

    `method='joint'`: encodes both together and classifies. `method='correlation'`: encodes each
    alone and correlates them at each shift (after SyncNet, Chung and Zisserman 2016). One modality
    named twice: the frame's right half is shifted against its left half. Metrics: loss, top1,
    valid_fraction; acc_within_1, the fraction of matched clips predicted within one step of their
    shift.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        label_key, mismatch_key, key = jax.random.split(key, 3)
        num_clips = batch.clip_index.shape[1]
        fixed, moving = _split_pair(spec, batch)
        label = jax.random.randint(label_key, batch.clip_index.shape, 0, 2 * spec.max_shift + 1)
        shifted, valid = shift_in_time(
            moving, label - spec.max_shift, spec.max_shift, spec.shift_stride
        )
        if spec.mismatch_prob:
            mismatched = _draw_mismatch(mismatch_key, batch, spec.mismatch_prob)
            shifted = _select_rows(mismatched, shifted, _roll_rows(shifted))
            label = jnp.where(mismatched, 2 * spec.max_shift + 1, label)
            valid = time_utils.present(shifted, num_clips) & (
                ~mismatched | (batch.clip_index != _roll_rows(batch.clip_index))
            )
        valid &= time_utils.present(fixed, num_clips)
        if spec.method == "correlation":
            logits = _shift_logits(
                spec, params, model, fixed, shifted, num_clips, key if train else None
            )
            return pretext.classification_loss(logits, batch, label, valid, 2 * spec.max_shift + 1)
        inputs = {spec.modalities[0]: fixed, spec.modalities[1]: shifted}
        if spec.modalities[0] == spec.modalities[1]:
            inputs = {
                spec.modalities[0]: jax.tree.map(
                    lambda *both: jnp.concatenate(both, axis=1), fixed, shifted
                )
            }
        return pretext.encode_and_score(
            HEAD,
            params,
            model,
            inputs,
            batch,
            label,
            valid,
            key if train else None,
            2 * spec.max_shift + 1,
        )

    return objective


def _split_pair(spec: SynchronizationSpec, batch: Batch) -> tuple[Particles, Particles]:
    first, second = (batch.particles[name] for name in spec.modalities)
    if spec.modalities[0] != spec.modalities[1]:
        return first, second
    right = first.place[..., 2] > 0.5
    return time_utils.drop_where_not(first, ~right), time_utils.drop_where_not(first, right)


def _shift_logits(
    spec: SynchronizationSpec,
    params: Params,
    model: Model,
    fixed: Particles,
    shifted: Particles,
    num_clips: int,
    key: Array | None,
) -> Array:
    """Logits [B, S, A]: correlation of the two after undoing each shift, and a learned bias for the
    mismatch class.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    features = []
    for name, particles, dropout_key in zip(spec.modalities, (fixed, shifted), keys, strict=True):
        tokens, _ = model.apply(params, "encode", {name: particles}, num_clips, key=dropout_key)
        projected, logit_scale, bias = model.head(params, PROJECTION, tokens, name)
        features.append(projected)
    first, last = time_utils.span(shifted, num_clips)
    step_seconds = time_utils.longest_duration(shifted, last - first) * spec.shift_stride
    logits = jnp.stack(
        [
            correlation(*features, fixed, shifted, step_seconds * num_steps)
            for num_steps in range(-spec.max_shift, spec.max_shift + 1)
        ],
        axis=-1,
    )
    if spec.mismatch_prob:
        logits = jnp.concatenate([logits, jnp.broadcast_to(bias, (*logits.shape[:2], 1))], axis=-1)
    return logits * logit_scale


def correlation(
    fixed_BME: Array, shifted_BLE: Array, fixed: Particles, shifted: Particles, shift_BS: Array
) -> Array:
    """Correlation over time of a clip's two inputs, the second shifted by `shift_BS` seconds;
    float32 [B, S] in [-1, 1].

    Each particle of the second is paired with the mean of the first's particles that cover its
    time. 0 where one input is constant.
    """
    num_clips = shift_BS.shape[1]
    time = shifted.place[..., 0] + time_utils.gather_clip_value(shift_BS, shifted)
    same_clip = (shifted.segment[:, :, None] == fixed.segment[:, None]) & (shifted.segment > 0)[
        :, :, None
    ]
    reach = fixed.extent[:, None, :, 0] / 2 + time_utils.TIME_EPS
    covers = (same_clip & (jnp.abs(time[..., None] - fixed.place[:, None, :, 0]) <= reach)).astype(
        jnp.float32
    )
    num_covering = covers.sum(axis=-1)
    fixed_mean = (
        jnp.einsum("blm,bme->ble", covers, fixed_BME) / jnp.maximum(num_covering, 1.0)[..., None]
    )
    covered_segment = jnp.where(num_covering > 0, shifted.segment, 0)
    fixed_centered, shifted_centered = (
        _remove_clip_mean(features, covered_segment, num_clips)
        for features in (fixed_mean, shifted_BLE)
    )
    pairs = (
        (fixed_centered, shifted_centered),
        (fixed_centered, fixed_centered),
        (shifted_centered, shifted_centered),
    )
    covariance, first, second = (
        losses.clip_mean((a * b).sum(axis=-1), covered_segment, num_clips) for a, b in pairs
    )
    return covariance / jnp.sqrt(first * second + _MIN_VARIANCE)


def _remove_clip_mean(x_BLE: Array, segment_BL: Array, num_clips: int) -> Array:
    """Removes the clip's mean."""
    return x_BLE - jnp.einsum(
        "bls,bse->ble",
        losses.membership(segment_BL, num_clips),
        losses.clip_mean(x_BLE, segment_BL, num_clips),
    )


def shift_in_time(
    particles: Particles, shift_BS: Array, max_shift: int, stride: int
) -> tuple[Particles, Array]:
    """Shifts audio against video by `shift_BS` steps; also returns which clips are long enough. A
    step is `stride` audio patches.

    For every shift the same part of the clip is filled with the same patches: only content differs.
    """
    num_clips = shift_BS.shape[1]
    first, last = time_utils.span(particles, num_clips)
    patch_seconds = time_utils.longest_duration(particles, last - first)
    num_patches = jnp.floor(
        (last - first + time_utils.TIME_EPS) / jnp.maximum(patch_seconds, time_utils.TIME_EPS)
    )
    shown_seconds = (num_patches - 2 * max_shift * stride) * patch_seconds
    offset = shift_BS * stride * patch_seconds
    window_start = time_utils.gather_clip_value(
        first + max_shift * stride * patch_seconds + offset, particles
    )
    inside = (time_utils.start(particles) >= window_start - time_utils.TIME_EPS) & (
        time_utils.end(particles)
        <= window_start
        + time_utils.gather_clip_value(shown_seconds, particles)
        + time_utils.TIME_EPS
    )
    shifted = time_utils.drop_where_not(
        time_utils.with_time(
            particles, particles.place[..., 0] - time_utils.gather_clip_value(offset, particles)
        ),
        inside & (particles.segment > 0),
    )
    return shifted, time_utils.present(shifted, num_clips)


def _roll_rows(tree: Particles | Array) -> Particles | Array:
    """Rolls the rows by one."""
    return jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), tree)


def _draw_mismatch(key: Array, batch: Batch, prob: float) -> Array:
    """Draws the rows whose clips [B, S] are replaced by the next row's; one draw per row, none if
    there is only one row.
    """
    num_rows, num_clips = batch.clip_index.shape
    draws = jax.random.bernoulli(key, prob if num_rows > 1 else 0.0, (num_rows, 1))
    return jnp.broadcast_to(draws, (num_rows, num_clips))


def _select_rows(mismatched_BS: Array, own: Particles, other: Particles) -> Particles:
    use_other = mismatched_BS[:, 0]
    return jax.tree.map(
        lambda a, b: jnp.where(use_other.reshape(-1, *(1,) * (a.ndim - 1)), b, a), own, other
    )


def _heads(spec: SynchronizationSpec, classes: int) -> dict[str, HeadSpec]:
    del classes
    if spec.correlated_modalities:
        return {PROJECTION: TokenProjectionHead(tuple(sorted(set(spec.correlated_modalities))))}
    return {HEAD: ClipHead(2 * spec.max_shift + 1 + (spec.mismatch_prob > 0))}


SYNCHRONIZATION = ObjectiveType(
    synchronization, heads=_heads, modalities=lambda spec: spec.modalities
)
