# SPDX-License-Identifier: Apache-2.0
"""Fusions and options of a block: one table through one battery. Who reads whom is proved by
gradients exactly zero.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax.config.experiment import Experiment, ModelSpec
from particlejax.core import tree
from particlejax.core.typing import UserError
from particlejax.models import particle_model as models
from particlejax.models.heads import DecoderHead, classification
from particlejax.models.modality import ModalitySpec
from particlejax.nn import fusion, rope
from particlejax.particles import packing
from particlejax.particles.types import Batch, Particles

SPEC = ModelSpec(
    width=24,
    depth=3,
    num_heads=2,
    decoder_width=16,
    decoder_depth=1,
    decoder_num_heads=1,
    mlp_ratio=2,
    unroll_layers=False,
)
VARIANTS = {
    "early": {},
    "token": dict(pool_type="cls"),
    "separate": dict(share_encoder=False),
    "bottleneck": dict(fusion="bottleneck", fusion_layer=1, num_bottlenecks=2),
    "late": dict(fusion="late"),
    "cross": dict(fusion="cross", fusion_layer=1),
    "cross separate": dict(fusion="cross", fusion_layer=2, share_encoder=False, pool_type="cls"),
    "bottleneck separate": dict(
        fusion="bottleneck",
        num_bottlenecks=3,
        share_encoder=False,
        pool_type="attention",
        pool_num_heads=2,
    ),
    "options": dict(rope=True, qk_norm=True, mlp_activation="swiglu", layer_scale=0.1),
}
SIZES = {"audio": 5, "vision": 7}
SLOTS = {"audio": packing.SlotSpec(13, 5), "vision": packing.SlotSpec(17, 7)}


def particles(rng: np.random.Generator, modality: str, number: int) -> Particles:
    place = rng.random((number, 3)).astype(np.float32)
    payload = rng.normal(size=(number, SIZES[modality])).astype(np.float32)
    return Particles(
        payload, place, np.full((number, 3), 0.2, np.float32), np.ones(number, np.int32)
    )


def clip(i: int, *modalities: str) -> packing.Clip:
    rng = np.random.default_rng(i)
    return packing.Clip({m: particles(rng, m, 4 + i) for m in modalities}, i, i)


CLIPS = [
    clip(0, "audio", "vision"),
    clip(1, "vision"),
    clip(2, "audio", "vision"),
    clip(3, "audio"),
]


def rows_of(clips: list[packing.Clip], per_row: int = 4) -> Batch:
    return jax.tree.map(jnp.asarray, packing.pack(clips, [0] * len(clips), SLOTS, 1, per_row))


@functools.cache
def built(name: str) -> tuple[models.Model, dict]:
    spec = dataclasses.replace(SPEC, **VARIANTS[name])
    model = models.build(
        spec,
        {m: ModalitySpec(size) for m, size in SIZES.items()},
        heads={"decoder": DecoderHead(), **classification(5)},
    )
    return model, jax.jit(model.init)(jax.random.key(0), rows_of(CLIPS[:3]))


def logits(model: models.Model, params: dict, batch: Batch) -> jax.Array:
    tokens, _ = model.apply(params, "encode", batch.particles, 4)
    return model.head(params, "head", tokens, 4)


@pytest.mark.parametrize(
    "name", ["early", "late", "cross separate", "bottleneck separate", "options"]
)  # which hold the others
def test_packed_equals_alone_no_clip_sees_another_and_every_parameter_counts(name: str) -> None:
    model, params = built(name)
    chosen = [CLIPS[i] for i in (0, 1, 3)]  # with both modalities, without sound, without sight
    batch = jax.tree.map(jnp.asarray, packing.pack(chosen * 2, [0, 0, 0, 1, 2, 3], SLOTS, 4, 4))

    def of_first_clip(params: dict, payloads: dict) -> tuple[jax.Array, jax.Array]:
        new = {m: dataclasses.replace(p, payload=payloads[m]) for m, p in batch.particles.items()}
        tokens, _ = model.apply(params, "encode", new, 4)
        found = model.head(params, "head", tokens, 4)
        total = jnp.sin(found[0, 0]).sum()
        for m, p in new.items():
            answer = model.head(params, "decoder", tokens, p, m)
            total += (jnp.sin(answer).sum(-1) * (p.segment == 1))[0].sum()
        return total, found

    payloads = {m: p.payload for m, p in batch.particles.items()}
    (grads, seen), found = jax.jit(jax.grad(of_first_clip, argnums=(0, 1), has_aux=True))(
        params, payloads
    )
    for i in range(3):
        np.testing.assert_allclose(found[0, i], found[1 + i, 0], atol=2e-5)
    for m, p in batch.particles.items():
        own = (p.segment == 1) & (jnp.arange(4) == 0)[:, None]
        read = jnp.abs(seen[m]).sum(-1)
        assert (read[own] > 0).all() and (read[~own] == 0).all(), "exactly zero"
    dead = [path for path, g in tree.flatten(grads).items() if not jnp.abs(g).max() > 0]
    assert all(path.endswith("key/bias") for path in dead), dead


@pytest.mark.parametrize("name", ["bottleneck", "cross separate"])
def test_a_modality_left_out_is_one_without_particles(name: str) -> None:
    model, params = built(name)
    batch = rows_of([CLIPS[1]])
    seen = dataclasses.replace(batch, particles={"vision": batch.particles["vision"]})
    found = [
        jax.jit(functools.partial(logits, model))(params, each)[0, 0] for each in (batch, seen)
    ]
    np.testing.assert_allclose(*found, atol=2e-5)


@pytest.mark.parametrize(
    "name, crosses",
    [
        ("early", (True, True, True)),
        ("late", (False, False, False)),
        ("cross", (False, True, True)),
        ("bottleneck", (False, False, True)),
    ],
)  # latents have read the other modality a block before they are read
def test_what_crosses_between_modalities_and_from_which_block_on(
    name: str, crosses: tuple[bool, ...]
) -> None:
    model, params = built(name)
    batch = rows_of(CLIPS[:1], 1)
    sight, sound = batch.particles["vision"], batch.particles["audio"]
    slots = slice(SLOTS["audio"].length, None)

    def heard(block: int, payload: jax.Array) -> jax.Array:
        new = {"vision": sight, "audio": dataclasses.replace(sound, payload=payload)}
        _, inner = model.apply(params, "encode", new, 1)
        return (
            jnp.sin(jnp.concatenate(inner["blocks"])[block, 0, slots]).sum(-1)
            * (sight.segment[0] > 0)
        ).sum()

    seen = jax.jit(
        lambda payload: [jax.grad(functools.partial(heard, block))(payload) for block in range(3)]
    )(sound.payload)
    found = [bool(jnp.abs(each).max() > 0) for each in seen]
    assert tuple(found) == crosses


def test_only_latents_carry_what_crosses_the_bottleneck() -> None:
    parts = fusion.Parts(
        ("class", "latents", "audio", "vision"), (1, 2, 3, 4), "bottleneck", 1, False
    )
    assert parts.attended_parts(True) == ((0, 1, 2, 3), (1, 2, 3), (1, 2), (1, 3))
    assert parts.attended_parts(False) == ((0, 1, 2, 3), (1,), (2,), (3,))


def test_class_tokens_read_and_are_never_read() -> None:
    model, params = built("token")
    plain, _ = built("early")
    batch = rows_of(CLIPS[:3])
    with_token, without = jax.jit(
        lambda b: [m.apply(params, "encode", b, 4)[0] for m in (model, plain)]
    )(batch.particles)
    np.testing.assert_allclose(with_token.x, without.x, atol=2e-5)
    assert with_token.cls.shape == (1, 4, 24)


def test_separate_blocks_that_are_alike_are_shared_ones() -> None:
    model, params = built("separate")
    shared, same = built("early")
    inner = {k: v for k, v in same["encoder"]["transformer"].items() if k != "blocks"}
    alike = inner | {f"blocks_{m}": same["encoder"]["transformer"]["blocks"] for m in SIZES}
    params = same | {"encoder": same["encoder"] | {"transformer": alike}}
    batch = rows_of(CLIPS[:3])
    apart, together = jax.jit(
        lambda b: (model.apply(params, "encode", b)[0].x, shared.apply(same, "encode", b)[0].x)
    )(batch.particles)
    np.testing.assert_allclose(apart, together, atol=2e-5)


def test_a_modality_is_hidden_now_and_then_and_never_the_last() -> None:
    sound = jnp.array([[1, 1, 2, 0], [1, 0, 0, 0]])
    sight = jnp.array([[1, 3, 3], [1, 2, 0]])
    hidden = jax.vmap(
        lambda key: jnp.concatenate(fusion.drop_modalities(key, [sound, sight], 3, 0.5), axis=1)
    )(jax.random.split(jax.random.key(0), 64))
    whole = jnp.concatenate([sound, sight], axis=1)
    assert ((hidden == whole[None]) | (hidden == 0)).all()
    for number, row in ((1, 0), (1, 1)):  # clips with both
        left = [
            np.asarray((hidden[:, row, part] == number).any(-1))
            for part in (slice(0, 4), slice(4, 7))
        ]
        assert (
            (left[0] | left[1]).all()
            and not left[0].all()
            and not left[1].all()
            and (left[0] & left[1]).any()
        )
    for number, row in ((2, 0), (3, 0), (2, 1)):  # clips with one
        assert ((hidden[:, row] == number).sum(-1) == (whole[row] == number).sum()).all()
    spec = dataclasses.replace(SPEC, modality_dropout=0.9)
    model = models.build(spec, {m: ModalitySpec(size) for m, size in SIZES.items()})
    particles = rows_of(CLIPS[:1]).particles
    segment = jax.jit(
        lambda p: [
            model.apply(p, "encode", particles, 4, key=key)[0].segment
            for key in (None, jax.random.key(1))
        ]
    )(built("early")[1])
    assert (segment[0] > 0).sum() == 8 and (segment[1] > 0).sum() == 4


def test_rotary_places_know_distances_alone() -> None:
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 2, 6, 14)), jnp.float32) for _ in range(2))
    place = jnp.asarray(rng.random((1, 6, 3)), jnp.float32)

    def logits(place: jax.Array) -> jax.Array:
        return jnp.einsum(
            "bhlk,bhmk->bhlm", rope.apply_rope(query, place), rope.apply_rope(key, place)
        )

    np.testing.assert_allclose(logits(place), logits(place + 0.37), atol=1e-4)
    assert jnp.abs(logits(place) - logits(place * 1.5)).max() > 0.1


def test_scan_equals_unroll_where_parts_fuse_late() -> None:
    _, params = built("bottleneck")
    spec = dataclasses.replace(SPEC, **VARIANTS["bottleneck"], unroll_layers=True)
    model = models.build(
        spec,
        {m: ModalitySpec(size) for m, size in SIZES.items()},
        heads={"decoder": DecoderHead(), **classification(5)},
    )
    batch = rows_of(CLIPS[:3])
    found = jax.jit(lambda p: [logits(each, p, batch) for each in (model, built("bottleneck")[0])])(
        params
    )
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.parametrize(
    "model, match",
    [
        (dict(fusion="middle"), "choose one of early"),
        (dict(fusion="bottleneck", depth=3, fusion_layer=2), "use 1 or less"),
        (dict(fusion="late", depth=3, token_reduction_layers=(1,)), "leave it empty"),
    ],
)
def test_what_does_not_go_together_is_refused(model: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Experiment.of(
            {
                "model": model,
                "stages": {"one": {"num_steps": 1, "objectives": {"masked_autoencoder": {}}}},
            }
        )
