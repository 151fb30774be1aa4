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
from particlejax.config.model import SynchronizationSpec
from particlejax.core.typing import Metrics, Params
from particlejax.models.heads import ClipHead, HeadSpec, TokenProjectionHead
from particlejax.models.particle_model import Model
from particlejax.objectives import pretext, time_utils
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles

HEAD, PROJECTION = "synchronization_head", "synchronization_projection"
_STILL = 1e-6  # added to a product of two variances, against division by 0


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
    ) -> tuple[Array, Metrics]:
        label_key, swap_key, key = jax.random.split(key, 3)
        clips = batch.clip.shape[1]
        fixed, moving = _sides(spec, batch)
        label = jax.random.randint(label_key, batch.clip.shape, 0, 2 * spec.max_shift + 1)
        shown, asked = shift(moving, label - spec.max_shift, spec.max_shift, spec.shift_stride)
        if spec.mismatch_prob:
            swapped = _swapped(swap_key, batch, spec.mismatch_prob)
            shown = _choose(swapped, shown, _next(shown))
            label = jnp.where(swapped, 2 * spec.max_shift + 1, label)
            asked = time_utils.present(shown, clips) & (
                ~swapped | (batch.clip != _next(batch.clip))
            )
        asked &= time_utils.present(fixed, clips)
        if spec.method == "correlation":
            logits = _agreement(spec, params, model, fixed, shown, clips, key if train else None)
            return pretext.score(logits, batch, label, asked, 2 * spec.max_shift + 1)
        pair = {spec.modalities[0]: fixed, spec.modalities[1]: shown}
        if spec.modalities[0] == spec.modalities[1]:
            pair = {
                spec.modalities[0]: jax.tree.map(
                    lambda *both: jnp.concatenate(both, axis=1), fixed, shown
                )
            }
        return pretext.answer(
            HEAD,
            params,
            model,
            pair,
            batch,
            label,
            asked,
            key if train else None,
            2 * spec.max_shift + 1,
        )

    return objective


def _sides(spec: SynchronizationSpec, batch: Batch) -> tuple[Particles, Particles]:
    first, second = (batch.particles[name] for name in spec.modalities)
    if spec.modalities[0] != spec.modalities[1]:
        return first, second
    right = first.place[..., 2] > 0.5
    return time_utils.keep(first, ~right), time_utils.keep(first, right)


def _agreement(
    spec: SynchronizationSpec,
    params: Params,
    model: Model,
    fixed: Particles,
    shown: Particles,
    clips: int,
    key: Array | None,
) -> Array:
    """Logits [B, S, A]: correlation of the two after undoing each shift, and a learned bias for the
    mismatch class.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    made = []
    for name, particles, each in zip(spec.modalities, (fixed, shown), keys, strict=True):
        tokens, _ = model.apply(params, "encode", {name: particles}, clips, key=each)
        said, sharpness, bias = model.head(params, PROJECTION, tokens, name)
        made.append(said)
    first, last = time_utils.span(shown, clips)
    unit = time_utils.longest(shown, last - first) * spec.shift_stride
    logits = jnp.stack(
        [
            correlation(*made, fixed, shown, unit * by)
            for by in range(-spec.max_shift, spec.max_shift + 1)
        ],
        axis=-1,
    )
    if spec.mismatch_prob:
        logits = jnp.concatenate([logits, jnp.broadcast_to(bias, (*logits.shape[:2], 1))], axis=-1)
    return logits * sharpness


def correlation(
    fixed_BME: Array, shown_BLE: Array, fixed: Particles, shown: Particles, by_BS: Array
) -> Array:
    """Correlation over time of a clip's two inputs, the second shifted by `by_BS` seconds; float32
    [B, S] in [-1, 1].

    Each particle of the second is paired with the mean of the first's particles that cover its
    time. 0 where one input is constant.
    """
    clips = by_BS.shape[1]
    time = shown.place[..., 0] + time_utils.of_particle(by_BS, shown)
    own = (shown.segment[:, :, None] == fixed.segment[:, None]) & (shown.segment > 0)[:, :, None]
    reach = fixed.extent[:, None, :, 0] / 2 + time_utils.SLACK
    covers = (own & (jnp.abs(time[..., None] - fixed.place[:, None, :, 0]) <= reach)).astype(
        jnp.float32
    )
    number = covers.sum(axis=-1)
    met = jnp.einsum("blm,bme->ble", covers, fixed_BME) / jnp.maximum(number, 1.0)[..., None]
    meets = jnp.where(number > 0, shown.segment, 0)
    one, other = (_varies(each, meets, clips) for each in (met, shown_BLE))
    pairs = ((one, other), (one, one), (other, other))
    together, first, second = (
        losses.clip_mean((a * b).sum(axis=-1), meets, clips) for a, b in pairs
    )
    return together / jnp.sqrt(first * second + _STILL)


def _varies(x_BLE: Array, segment_BL: Array, clips: int) -> Array:
    """Removes the clip's mean."""
    return x_BLE - jnp.einsum(
        "bls,bse->ble",
        losses.membership(segment_BL, clips),
        losses.clip_mean(x_BLE, segment_BL, clips),
    )


def shift(sound: Particles, by_BS: Array, most: int, step: int) -> tuple[Particles, Array]:
    """Shifts audio against video by `by_BS` steps; also returns which clips are long enough. A step
    is `step` audio patches.

    For every shift the same part of the clip is filled with the same patches: only content differs.
    """
    clips = by_BS.shape[1]
    first, last = time_utils.span(sound, clips)
    unit = time_utils.longest(sound, last - first)
    steps = jnp.floor((last - first + time_utils.SLACK) / jnp.maximum(unit, time_utils.SLACK))
    heard = (steps - 2 * most * step) * unit
    by = by_BS * step * unit
    begin = time_utils.of_particle(first + most * step * unit + by, sound)
    inside = (time_utils.start(sound) >= begin - time_utils.SLACK) & (
        time_utils.end(sound) <= begin + time_utils.of_particle(heard, sound) + time_utils.SLACK
    )
    shown = time_utils.keep(
        time_utils.moved(sound, sound.place[..., 0] - time_utils.of_particle(by, sound)),
        inside & (sound.segment > 0),
    )
    return shown, time_utils.present(shown, clips)


def _next(tree: Particles | Array) -> Particles | Array:
    """Rolls the rows by one."""
    return jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), tree)


def _swapped(key: Array, batch: Batch, share: float) -> Array:
    """Draws the rows whose clips [B, S] are replaced by the next row's; one draw per row, none if
    there is only one row.
    """
    rows, clips = batch.clip.shape
    drawn = jax.random.bernoulli(key, share if rows > 1 else 0.0, (rows, 1))
    return jnp.broadcast_to(drawn, (rows, clips))


def _choose(swapped_BS: Array, own: Particles, other: Particles) -> Particles:
    row = swapped_BS[:, 0]
    return jax.tree.map(
        lambda a, b: jnp.where(row.reshape(-1, *(1,) * (a.ndim - 1)), b, a), own, other
    )


def _heads(spec: SynchronizationSpec, classes: int) -> dict[str, HeadSpec]:
    del classes
    if spec.laid:
        return {PROJECTION: TokenProjectionHead(tuple(sorted(set(spec.laid))))}
    return {HEAD: ClipHead(2 * spec.max_shift + 1 + (spec.mismatch_prob > 0))}


SYNCHRONIZATION = ObjectiveType(
    synchronization, heads=_heads, modalities=lambda spec: spec.modalities
)
