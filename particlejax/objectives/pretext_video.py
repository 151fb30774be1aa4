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

from particlejax.config.model import (
    ArrowOfTimeSpec,
    ClipOrderSpec,
    PlaybackSpeedSpec,
    RotationFlipSpec,
)
from particlejax.core.typing import Metrics, Params, UserError
from particlejax.models.heads import ClipHead
from particlejax.models.particle_model import Model
from particlejax.objectives import pretext, time_utils
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles

VISION = "vision"
PERMUTATIONS = np.array(list(itertools.permutations(range(3))))  # new index of each third
TRANSFORMS = 8  # quarter turns, each with and without a mirror


def arrow_of_time(spec: ArrowOfTimeSpec) -> Objective:
    """Forward or backward playback (Wei et al., Learning and Using the Arrow of Time, CVPR 2018).
    Metrics: loss, top1, valid_fraction.
    """
    del spec
    return _pretext(
        "arrow_of_time_head",
        2,
        lambda whole, label, base, key: (reverse(whole, label > 0, base), None),
    )


def rotation_flip(spec: RotationFlipSpec) -> Objective:
    """Predicts the rotation and flip (arXiv:1803.07728). Metrics: loss, top1, valid_fraction."""
    del spec
    return _pretext(
        "rotation_flip_head",
        TRANSFORMS,
        lambda whole, label, base, key: (turn(whole, label, base), None),
    )


def clip_order(spec: ClipOrderSpec) -> Objective:
    """The order of the clip's shuffled thirds (arXiv:1603.08561). Metrics: loss, top1,
    valid_fraction.
    """
    del spec
    return _pretext(
        "clip_order_head", len(PERMUTATIONS), lambda whole, label, base, key: shuffle(whole, label)
    )


def playback_speed(spec: PlaybackSpeedSpec) -> Objective:
    """How many times the speed was doubled (arXiv:2004.06130). Metrics: loss, top1,
    valid_fraction.
    """

    def change(
        whole: Particles, label: Array, base: tuple[int, ...], key: Array
    ) -> tuple[Particles, Array]:
        return faster(whole, label, jax.random.uniform(key, label.shape), spec.max_doublings, base)

    return _pretext("playback_speed_head", spec.max_doublings + 1, change)


def _pretext(
    name: str, answers: int, change: Callable[..., tuple[Particles, Array | None]]
) -> Objective:
    """Predicts the applied transform. change: (particles, label [B, S], base, key) -> encoded
    particles, and which clips are valid (None: all).
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        label_key, change_key, key = jax.random.split(key, 3)
        whole, label = (
            batch.particles[VISION],
            jax.random.randint(label_key, batch.clip.shape, 0, answers),
        )
        shown, asked = change(whole, label, _base(model, name), change_key)
        asked = time_utils.present(whole, batch.clip.shape[1]) if asked is None else asked
        return pretext.answer(
            name, params, model, {VISION: shown}, batch, label, asked, key if train else None
        )

    return objective


def _base(model: Model, name: str) -> tuple[int, ...]:
    base = model.payloads[VISION].base
    assert base, f"{name} needs payloads that are cuboids: give the modality's Payload a base"
    if name == "rotation_flip_head" and base[1] != base[2]:
        raise UserError(
            f"objective rotation_flip rotates cuboids but config.particles.patch_size={base} "
            "is not square: use equal height and width."
        )
    return base


def reverse(whole: Particles, backward_BS: Array, base: tuple[int, ...]) -> Particles:
    """Mirrors the chosen clips in time within their own span: positions, and the frames within
    payloads.
    """
    first, last = time_utils.span(whole, backward_BS.shape[1])
    backward = time_utils.of_particle(backward_BS, whole)
    index = np.arange(whole.payload.shape[-1]).reshape(*base, -1)[::-1].reshape(-1)
    time = jnp.where(
        backward,
        time_utils.of_particle(first + last, whole) - whole.place[..., 0],
        whole.place[..., 0],
    )
    payload = jnp.where(backward[..., None], whole.payload[..., index], whole.payload)
    return time_utils.moved(replace(whole, payload=payload), time)


def turn(whole: Particles, label_BS: Array, base: tuple[int, ...]) -> Particles:
    """Rotates each clip by label % 4 quarter turns counter-clockwise, then flips it horizontally if
    label >= 4.
    """
    pixels = np.arange(whole.payload.shape[-1]).reshape(*base, -1)
    # of (row, column) about the center
    quarter, mirror = (np.array([[0.0, -1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, -1.0]]))
    index, ways = [], []
    for label in range(TRANSFORMS):
        turned, way = (
            np.rot90(pixels, label % 4, axes=(1, 2)),
            np.linalg.matrix_power(quarter, label % 4),
        )
        index.append((turned[:, :, ::-1] if label >= 4 else turned).reshape(-1))
        ways.append(mirror @ way if label >= 4 else way)
    label = time_utils.of_particle(label_BS, whole)
    way = jnp.asarray(np.stack(ways), jnp.float32)[label]
    centre = jnp.einsum("blij,blj->bli", way, whole.place[..., 1:] - 0.5) + 0.5
    size = jnp.einsum("blij,blj->bli", jnp.abs(way), whole.extent[..., 1:])
    payload = jnp.take_along_axis(whole.payload, jnp.asarray(np.stack(index))[label], axis=-1)
    return Particles(
        payload,
        jnp.concatenate([whole.place[..., :1], centre], axis=-1),
        jnp.concatenate([whole.extent[..., :1], size], axis=-1),
        whole.segment,
    )


def shuffle(whole: Particles, label_BS: Array) -> tuple[Particles, Array]:
    """Permutes the thirds of each clip by its label; also returns which clips have particles in
    every third.

    A third is a multiple of the longest particle, so that coarse and fine particles stay aligned in
    each; particles across a border, or past the last third, are dropped.
    """
    clips = label_BS.shape[1]
    first, last = time_utils.span(whole, clips)
    unit = time_utils.longest(whole, (last - first) / 3)
    length = unit * jnp.floor(
        (last - first + time_utils.SLACK) / 3 / jnp.maximum(unit, time_utils.SLACK)
    )
    third = jnp.maximum(time_utils.of_particle(length, whole), time_utils.SLACK)
    since = time_utils.start(whole) - time_utils.of_particle(first, whole)
    number = jnp.floor((since + time_utils.SLACK) / third).astype(jnp.int32)
    ends = (
        time_utils.end(whole) - time_utils.of_particle(first, whole)
        <= (number + 1) * third + time_utils.SLACK
    )
    stays = (number < 3) & ends & (whole.segment > 0)
    number = jnp.minimum(number, 2)
    to = jnp.asarray(PERMUTATIONS)[time_utils.of_particle(label_BS, whole), number]
    shown = time_utils.keep(
        time_utils.moved(whole, whole.place[..., 0] + (to - number) * third), stays
    )
    # [B, L, S, 3]
    each = (
        time_utils.member(shown, clips)[..., None]
        & (to[..., None] == jnp.arange(3)[None, None])[:, :, None]
    )
    return shown, each.any(axis=1).all(axis=-1)


def faster(
    whole: Particles, label_BS: Array, where_BS: Array, most: int, base: tuple[int, ...]
) -> tuple[Particles, Array]:
    """Part of each clip with its speed doubled `label` times, and which clips are long enough for
    it.

    For every label the output has the same length, start, extents and number of particles: slower
    clips show a shorter part, positioned by `where_BS` in [0, 1). Doubling merges every other frame
    of two consecutive particles into one; particles without a successor are dropped.
    """
    clips = label_BS.shape[1]
    first, last = time_utils.span(whole, clips)
    unit = time_utils.longest(whole, (last - first) / 2**most)
    steps = jnp.floor((last - first + time_utils.SLACK) / jnp.maximum(unit, time_utils.SLACK))
    part = jnp.floor(steps / 2**most)
    source = part * 2.0**label_BS
    begin = first + unit * jnp.floor(where_BS * (steps - source + 1))
    since = time_utils.start(whole) - time_utils.of_particle(begin, whole)
    until = time_utils.end(whole) - time_utils.of_particle(begin + source * unit, whole)
    there = (since >= -time_utils.SLACK) & (until <= time_utils.SLACK) & (whole.segment > 0)
    shown = time_utils.keep(time_utils.moved(whole, since + whole.extent[..., 0] / 2), there)
    for step in range(most):
        doubled = _doubled(shown, base)
        fast = time_utils.of_particle(label_BS, whole) > step
        shown = jax.tree.map(
            lambda a, b, f=fast: jnp.where(f[..., None] if a.ndim == 3 else f, a, b), doubled, shown
        )
    return shown, time_utils.present(shown, clips)


def _doubled(shown: Particles, base: tuple[int, ...]) -> Particles:
    start, duration, time = time_utils.start(shown), shown.extent[..., 0], shown.place[..., 0]
    # [B, L, M], whether M may precede L
    later = jnp.abs(time[:, :, None] - time[:, None] - duration[:, None]) < time_utils.SLACK
    as_long = jnp.abs(duration[:, :, None] - duration[:, None]) < time_utils.SLACK
    pair = later & as_long & time_utils.same_spot(shown, shown)
    next_one, found = pair.argmax(axis=1), pair.any(axis=1)
    even = jnp.round(start / jnp.maximum(duration, time_utils.SLACK)).astype(jnp.int32) % 2 == 0
    after = jnp.take_along_axis(shown.payload, next_one[..., None], axis=1)
    frames = jnp.concatenate(
        [x.reshape(*x.shape[:2], base[0], -1) for x in (shown.payload, after)], axis=2
    )[:, :, ::2]
    new = replace(shown, payload=frames.reshape(shown.payload.shape))
    return time_utils.keep(time_utils.moved(new, start / 2 + duration / 2), even & found)


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
ROTATION_FLIP = _type(rotation_flip, "rotation_flip_head", lambda spec: TRANSFORMS)
