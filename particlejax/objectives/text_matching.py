# SPDX-License-Identifier: Apache-2.0
"""Text matching: classifies whether a text belongs to its clip; negatives are shifted or hard.

Legend: B rows, L slots, S clips of a row, D width, N = B S clips of the batch, row by row.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.config.model import TextMatchingSpec
from particlejax.core.typing import Metrics, Params
from particlejax.models.heads import ClipHead
from particlejax.models.particle_model import Model
from particlejax.objectives import pretext, time_utils
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.particles.types import Batch, Particles

HEAD = "text_matching_head"
_SHARPNESS = 10.0  # scale of cosines before the softmax that samples negatives


def text_matching(spec: TextMatchingSpec) -> Objective:
    """Does the text belong to the clip (image-text matching of ALBEF, arXiv:2107.07651)? Metrics:
    loss, top1, valid_fraction.

    A clip with the same words is no negative. A negative takes the time span of the clip's own
    text, so that only its words differ.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        swap_key, draw_key, key = jax.random.split(key, 3)
        clips, text = batch.clip.shape[1], batch.particles[spec.modality]
        rest = {name: each for name, each in batch.particles.items() if name != spec.modality}
        each = apart(text, clips)
        may = others(each, batch)
        if spec.negatives == "hard":
            negative = draw(draw_key, alike(params, model, batch, spec.modality), may)
        else:
            negative = (jnp.arange(len(may)) + clips) % len(may)
        possible = jnp.take_along_axis(may, negative[:, None], axis=1)[:, 0]
        swapped = jax.random.bernoulli(swap_key, spec.mismatch_prob, possible.shape) & possible
        shown = given(each, jnp.where(swapped, negative, jnp.arange(len(may))), text, clips)
        seen = jnp.stack([time_utils.present(p, clips) for p in rest.values()]).any(axis=0)
        label = (~swapped).reshape(batch.clip.shape).astype(jnp.int32)
        return pretext.answer(
            HEAD,
            params,
            model,
            {**rest, spec.modality: shown},
            batch,
            label,
            time_utils.present(text, clips) & seen,
            key if train else None,
        )

    return objective


def apart(text: Particles, clips: int) -> Particles:
    """Unpacks particles per clip, [N, L, ...], in slot order, padding last; segment is 1 for a
    particle, else 0.
    """
    own = text.segment[:, None] == jnp.arange(1, clips + 1)[None, :, None]  # [B, S, L]
    index = jnp.argsort(~own, axis=-1, stable=True).reshape(-1, own.shape[-1])
    found = jax.tree.map(lambda x: jnp.repeat(x, clips, axis=0), text).take(index)
    return replace(
        found,
        segment=jnp.sort(own, axis=-1, descending=True).reshape(index.shape).astype(jnp.int32),
    )


def others(each: Particles, batch: Batch) -> Array:
    """Whether clip m's text is a valid negative for clip n, bool [N, N]: it exists and its words
    differ.
    """
    number, here = batch.clip.reshape(-1), each.segment > 0
    payload = jnp.where(here[..., None], each.payload, 0)
    same = (payload[:, None] == payload[None]).all(axis=(2, 3)) & (here[:, None] == here[None]).all(
        axis=2
    )
    there = here.any(axis=1) & (number >= 0)
    return ~same & there[:, None] & there[None]


def alike(params: Params, model: Model, batch: Batch, modality: str) -> Array:
    """Similarity of each two clips, [N, N], without gradient: sum of the cosines of their texts and
    of their other modalities.

    Each is encoded alone; the mean over the batch is subtracted.
    """
    clips = batch.clip.shape[1]
    read = {name == modality: {} for name in batch.particles}
    for name, particles in batch.particles.items():
        read[name == modality][name] = particles
    return sum(
        _cosines(jax.lax.stop_gradient(params), model, each, batch.clip >= 0, clips)
        for each in read.values()
    )


def _cosines(
    params: Params, model: Model, particles: dict[str, Particles], there: Array, clips: int
) -> Array:
    tokens, _ = model.apply(params, "encode", particles, clips)
    pooled = losses.clip_mean(
        tokens.x.astype(jnp.float32), tokens.segment, clips, tokens.mass
    ).reshape(there.size, -1)
    there = there.reshape(-1, 1) & jnp.stack(
        [time_utils.present(p, clips) for p in particles.values()]
    ).any(axis=0).reshape(-1, 1)
    centred = (
        pooled - jnp.sum(pooled * there, axis=0, keepdims=True) / jnp.maximum(there.sum(), 1)
    ) * there
    unit = centred / jnp.sqrt(jnp.sum(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)
    return jnp.einsum("nd,md->nm", unit, unit)


def draw(key: Array, alike_NN: Array, may_NN: Array) -> Array:
    """Samples a negative clip for each, int [N], from a softmax of similarity (ALBEF, section 3.2)
    over valid ones.
    """
    return jax.random.categorical(key, jnp.where(may_NN, _SHARPNESS * alike_NN, -1e9), axis=-1)


def given(each: Particles, chosen: Array, own: Particles, clips: int) -> Particles:
    """Packs the chosen clips' particles into rows of S L slots, rescaled to the time span of
    `own`.
    """
    shown = jax.tree.map(lambda x: x[chosen], each)
    first, last = (x.reshape(-1, 1) for x in time_utils.span(own, clips))
    begin, end = time_utils.span(shown, 1)
    stretch = (last - first) / jnp.maximum(end - begin, time_utils.SLACK)
    shown = time_utils.moved(shown, first + (shown.place[..., 0] - begin) * stretch)
    extent = jnp.concatenate(
        [(shown.extent[..., 0] * stretch)[..., None], shown.extent[..., 1:]], axis=-1
    )
    number = jnp.tile(jnp.arange(1, clips + 1), len(chosen) // clips)[:, None]
    shown = replace(shown, extent=extent, segment=jnp.where(shown.segment > 0, number, 0))
    return jax.tree.map(lambda x: x.reshape(len(own.segment), -1, *x.shape[2:]), shown)


TEXT_MATCHING = ObjectiveType(text_matching, heads=lambda spec, classes: {HEAD: ClipHead(2)})
