# SPDX-License-Identifier: Apache-2.0
"""Video pretext tasks: predict which transform was applied to a clip, on the device, one draw per
clip.

Only video is encoded, because audio would reveal the answer. Only payloads carry information:
positions, extents and number of grid or pyramid particles are the same for each class. Legend: B
rows, L slots, S clips of a row, P numbers of a payload.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.config.objectives import (
    ArrowOfTimeSpec,
    ClipOrderSpec,
    PlaybackSpeedSpec,
    RotationFlipSpec,
)
from particlejax.core.typing import Params, UserError
from particlejax.losses import Mean, Means
from particlejax.models.heads import ClipHead
from particlejax.models.particle_model import Model
from particlejax.objectives import pretext, time_utils
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles

VISION = "vision"
PERMUTATIONS = np.array(list(itertools.permutations(range(3))))  # new index of each third
NUM_ROTATION_FLIPS = 8  # quarter turns, each with and without a mirror


def arrow_of_time(spec: ArrowOfTimeSpec) -> Objective:
    """Forward or backward playback (Wei et al., Learning and Using the Arrow of Time, CVPR 2018).
    Metrics: loss, top1, valid_fraction.
    """
    del spec
    return _pretext_objective(
        "arrow_of_time_head",
        2,
        lambda particles, label, patch_size, key: (reverse(particles, label > 0, patch_size), None),
    )


def rotation_flip(spec: RotationFlipSpec) -> Objective:
    """Predicts the rotation and flip (arXiv:1803.07728). Metrics: loss, top1, valid_fraction."""
    del spec
    return _pretext_objective(
        "rotation_flip_head",
        NUM_ROTATION_FLIPS,
        lambda particles, label, patch_size, key: (rotate_flip(particles, label, patch_size), None),
    )


def clip_order(spec: ClipOrderSpec) -> Objective:
    """The order of the clip's shuffled thirds (arXiv:1603.08561). Metrics: loss, top1,
    valid_fraction.
    """
    del spec
    return _pretext_objective(
        "clip_order_head",
        len(PERMUTATIONS),
        lambda particles, label, patch_size, key: shuffle_thirds(particles, label),
    )


def playback_speed(spec: PlaybackSpeedSpec) -> Objective:
    """How many times the speed was doubled (arXiv:2004.06130). Metrics: loss, top1,
    valid_fraction.
    """

    def transform(
        particles: Particles, label: Array, patch_size: tuple[int, ...], key: Array
    ) -> tuple[Particles, Array]:
        return speed_up(
            particles, label, jax.random.uniform(key, label.shape), spec.max_doublings, patch_size
        )

    return _pretext_objective("playback_speed_head", spec.max_doublings + 1, transform)


def _pretext_objective(
    name: str, num_classes: int, transform: Callable[..., tuple[Particles, Array | None]]
) -> Objective:
    """Predicts the applied transform. transform: (particles, label [B, S], base, key) -> encoded
    particles, and which clips are valid (None: all).
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Mean, Means]:
        label_key, transform_key, key = jax.random.split(key, 3)
        particles, label = (
            batch.particles[VISION],
            jax.random.randint(label_key, batch.clip_index.shape, 0, num_classes),
        )
        transformed, valid = transform(particles, label, _patch_size(model, name), transform_key)
        valid = time_utils.present(particles, batch.clip_index.shape[1]) if valid is None else valid
        return pretext.encode_and_score(
            name, params, model, {VISION: transformed}, batch, label, valid, key if train else None
        )

    return objective


def _patch_size(model: Model, name: str) -> tuple[int, ...]:
    patch_size = model.payloads[VISION].patch_size
    assert patch_size, f"{name} needs payloads that are cuboids: give the modality's Payload a base"
    if name == "rotation_flip_head" and patch_size[1] != patch_size[2]:
        raise UserError(
            f"objective rotation_flip rotates cuboids but config.particles.patch_size={patch_size} "
            "is not square: use equal height and width."
        )
    return patch_size


def reverse(particles: Particles, backward_BS: Array, patch_size: tuple[int, ...]) -> Particles:
    """Mirrors the chosen clips in time within their own span: positions, and the frames within
    payloads.
    """
    first, last = time_utils.span(particles, backward_BS.shape[1])
    backward = time_utils.gather_clip_value(backward_BS, particles)
    index = np.arange(particles.payload.shape[-1]).reshape(*patch_size, -1)[::-1].reshape(-1)
    time = jnp.where(
        backward,
        time_utils.gather_clip_value(first + last, particles) - particles.place[..., 0],
        particles.place[..., 0],
    )
    payload = jnp.where(backward[..., None], particles.payload[..., index], particles.payload)
    return time_utils.with_time(replace(particles, payload=payload), time)


def rotate_flip(particles: Particles, label_BS: Array, patch_size: tuple[int, ...]) -> Particles:
    """Rotates each clip by label % 4 quarter turns counter-clockwise, then flips it horizontally if
    label >= 4.
    """
    pixels = np.arange(particles.payload.shape[-1]).reshape(*patch_size, -1)
    # of (row, column) about the center
    quarter, mirror = (np.array([[0.0, -1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, -1.0]]))
    indices, rotations = [], []
    for label in range(NUM_ROTATION_FLIPS):
        rotated, rotation = (
            np.rot90(pixels, label % 4, axes=(1, 2)),
            np.linalg.matrix_power(quarter, label % 4),
        )
        indices.append((rotated[:, :, ::-1] if label >= 4 else rotated).reshape(-1))
        rotations.append(mirror @ rotation if label >= 4 else rotation)
    label = time_utils.gather_clip_value(label_BS, particles)
    rotation = jnp.asarray(np.stack(rotations), jnp.float32)[label]
    center = jnp.einsum("blij,blj->bli", rotation, particles.place[..., 1:] - 0.5) + 0.5
    extent = jnp.einsum("blij,blj->bli", jnp.abs(rotation), particles.extent[..., 1:])
    payload = jnp.take_along_axis(particles.payload, jnp.asarray(np.stack(indices))[label], axis=-1)
    return Particles(
        payload,
        jnp.concatenate([particles.place[..., :1], center], axis=-1),
        jnp.concatenate([particles.extent[..., :1], extent], axis=-1),
        particles.segment,
    )


def shuffle_thirds(particles: Particles, label_BS: Array) -> tuple[Particles, Array]:
    """Permutes the thirds of each clip by its label; also returns which clips have particles in
    every third.

    A third is a multiple of the longest particle, so that coarse and fine particles stay aligned in
    each; particles across a border, or past the last third, are dropped.
    """
    num_clips = label_BS.shape[1]
    first, last = time_utils.span(particles, num_clips)
    unit = time_utils.longest_duration(particles, (last - first) / 3)
    length = unit * jnp.floor(
        (last - first + time_utils.TIME_EPS) / 3 / jnp.maximum(unit, time_utils.TIME_EPS)
    )
    third = jnp.maximum(time_utils.gather_clip_value(length, particles), time_utils.TIME_EPS)
    time_since_start = time_utils.start(particles) - time_utils.gather_clip_value(first, particles)
    third_index = jnp.floor((time_since_start + time_utils.TIME_EPS) / third).astype(jnp.int32)
    fits = (
        time_utils.end(particles) - time_utils.gather_clip_value(first, particles)
        <= (third_index + 1) * third + time_utils.TIME_EPS
    )
    kept = (third_index < 3) & fits & (particles.segment > 0)
    third_index = jnp.minimum(third_index, 2)
    target_third = jnp.asarray(PERMUTATIONS)[
        time_utils.gather_clip_value(label_BS, particles), third_index
    ]
    shuffled = time_utils.drop_where_not(
        time_utils.with_time(
            particles, particles.place[..., 0] + (target_third - third_index) * third
        ),
        kept,
    )
    # [B, L, S, 3]
    covered_thirds = (
        time_utils.clip_membership(shuffled, num_clips)[..., None]
        & (target_third[..., None] == jnp.arange(3)[None, None])[:, :, None]
    )
    return shuffled, covered_thirds.any(axis=1).all(axis=-1)


def speed_up(
    particles: Particles,
    label_BS: Array,
    offset_BS: Array,
    max_doublings: int,
    patch_size: tuple[int, ...],
) -> tuple[Particles, Array]:
    """Part of each clip with its speed doubled `label` times, and which clips are long enough for
    it.

    For every label the output has the same length, start, extents and number of particles: slower
    clips show a shorter part, positioned by `offset_BS` in [0, 1). Doubling merges every other
    frame of two consecutive particles into one; particles without a successor are dropped.
    """
    num_clips = label_BS.shape[1]
    first, last = time_utils.span(particles, num_clips)
    unit = time_utils.longest_duration(particles, (last - first) / 2**max_doublings)
    num_steps = jnp.floor(
        (last - first + time_utils.TIME_EPS) / jnp.maximum(unit, time_utils.TIME_EPS)
    )
    shown_steps = jnp.floor(num_steps / 2**max_doublings)
    source_steps = shown_steps * 2.0**label_BS
    start_time = first + unit * jnp.floor(offset_BS * (num_steps - source_steps + 1))
    time_since_start = time_utils.start(particles) - time_utils.gather_clip_value(
        start_time, particles
    )
    time_past_end = time_utils.end(particles) - time_utils.gather_clip_value(
        start_time + source_steps * unit, particles
    )
    inside = (
        (time_since_start >= -time_utils.TIME_EPS)
        & (time_past_end <= time_utils.TIME_EPS)
        & (particles.segment > 0)
    )
    shown = time_utils.drop_where_not(
        time_utils.with_time(particles, time_since_start + particles.extent[..., 0] / 2), inside
    )
    for step in range(max_doublings):
        doubled = _double_speed(shown, patch_size)
        fast = time_utils.gather_clip_value(label_BS, particles) > step
        shown = jax.tree.map(
            lambda a, b, f=fast: jnp.where(f[..., None] if a.ndim == 3 else f, a, b), doubled, shown
        )
    return shown, time_utils.present(shown, num_clips)


def _double_speed(shown: Particles, patch_size: tuple[int, ...]) -> Particles:
    start, duration, time = time_utils.start(shown), shown.extent[..., 0], shown.place[..., 0]
    # [B, L, M], whether M may precede L
    follows = jnp.abs(time[:, :, None] - time[:, None] - duration[:, None]) < time_utils.TIME_EPS
    same_duration = jnp.abs(duration[:, :, None] - duration[:, None]) < time_utils.TIME_EPS
    pair = follows & same_duration & time_utils.same_location(shown, shown)
    successor, has_successor = pair.argmax(axis=1), pair.any(axis=1)
    is_even = (
        jnp.round(start / jnp.maximum(duration, time_utils.TIME_EPS)).astype(jnp.int32) % 2 == 0
    )
    successor_payload = jnp.take_along_axis(shown.payload, successor[..., None], axis=1)
    frames = jnp.concatenate(
        [x.reshape(*x.shape[:2], patch_size[0], -1) for x in (shown.payload, successor_payload)],
        axis=2,
    )[:, :, ::2]
    doubled = replace(shown, payload=frames.reshape(shown.payload.shape))
    return time_utils.drop_where_not(
        time_utils.with_time(doubled, start / 2 + duration / 2), is_even & has_successor
    )


def _type(
    make: Callable[..., Objective], head: str, outputs: Callable[[Any], int]
) -> ObjectiveType:
    return ObjectiveType(
        make,
        heads=lambda spec, classes: {head: ClipHead(outputs(spec))},
        modalities=lambda spec: (VISION,),
    )


CLIP_ORDER = _type(clip_order, "clip_order_head", lambda spec: len(PERMUTATIONS))
PLAYBACK_SPEED = _type(playback_speed, "playback_speed_head", lambda spec: spec.max_doublings + 1)
ARROW_OF_TIME = _type(arrow_of_time, "arrow_of_time_head", lambda spec: 2)
ROTATION_FLIP = _type(rotation_flip, "rotation_flip_head", lambda spec: NUM_ROTATION_FLIPS)
