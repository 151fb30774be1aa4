# SPDX-License-Identifier: Apache-2.0
"""The model: packed rows equal clips alone, empty slots change nothing, clips never see each other,
scan equals unroll.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax.config.experiment import ModelSpec, ParticleSpec
from particlejax.core import tree
from particlejax.models import particle_model as models
from particlejax.models.heads import DecoderHead, classification
from particlejax.models.modality import ModalitySpec
from particlejax.nn.embed import place_features
from particlejax.particles import packing, policies
from particlejax.particles.types import Batch, Particles

SPEC = ModelSpec(
    width=32,
    depth=2,
    num_heads=2,
    decoder_width=16,
    decoder_depth=1,
    decoder_num_heads=1,
    unroll_layers=False,
)
CUT = ParticleSpec("grid", (2, 4, 4))
# frames, rows, columns: clips of different lengths and shapes
SIZES = ((4, 8, 8), (8, 8, 12), (2, 16, 8))


def clip(number: int) -> packing.Clip:
    size = SIZES[number]
    rng = np.random.default_rng(number)
    video = rng.normal(size=(*size, 3)).astype(np.float32)
    times = (np.arange(size[0]) / (5 + number)).astype(np.float32)
    return packing.Clip({"vision": policies.cut_clip(video, times, CUT)}, number, number)


CLIPS = [clip(i) for i in range(3)]
PAYLOAD = CLIPS[0].particles["vision"].payload.shape[1]


def rows_of(clips: list[packing.Clip], rows: int, length: int, per_row: int) -> Batch:
    chosen = [i // per_row for i in range(len(clips))]
    return jax.tree.map(
        jnp.asarray,
        packing.pack(clips, chosen, {"vision": packing.SlotSpec(length, PAYLOAD)}, rows, per_row),
    )


@pytest.fixture(scope="module")
def built() -> tuple[models.Model, dict]:
    model = models.build(
        SPEC,
        {"vision": ModalitySpec(PAYLOAD)},
        heads={"decoder": DecoderHead(), **classification(5)},
    )
    return model, jax.jit(model.init)(jax.random.key(0), rows_of(CLIPS, 1, 40, 3))


def logits(model: models.Model, params: dict, batch: Batch) -> jax.Array:
    @jax.jit
    def found(params: dict, batch: Batch) -> jax.Array:
        tokens, _ = model.apply(params, "encode", batch.particles)
        return model.head(params, "head", tokens, batch.clip_index.shape[1])

    return found(params, batch)


def test_packed_equals_unpacked(built: tuple) -> None:
    model, params = built
    packed = logits(model, params, rows_of(CLIPS, 1, 48, 4))[0]
    for i, each in enumerate(CLIPS):
        alone = logits(model, params, rows_of([each], 1, len(each.particles["vision"].segment), 1))[
            0, 0
        ]
        np.testing.assert_allclose(packed[i], alone, atol=2e-5)


@pytest.mark.parametrize("how", ["prune", "merge"])
def test_fewer_tokens_in_depth_are_still_each_clip_s_own(how: str) -> None:
    spec = dataclasses.replace(
        SPEC, token_reduction=how, token_reduction_layers=(1,), token_keep_rate=0.5
    )
    model = models.build(
        spec,
        {"vision": ModalitySpec(PAYLOAD)},
        heads={"decoder": DecoderHead(), **classification(5)},
    )
    batch = rows_of(CLIPS, 1, 48, 4)
    params = jax.jit(model.init)(jax.random.key(0), batch)
    whole = models.build(
        dataclasses.replace(spec, token_reduction_layers=()),
        {"vision": ModalitySpec(PAYLOAD)},
        heads={"decoder": DecoderHead(), **classification(5)},
    )
    assert jax.tree.structure(models.parameter_shapes(whole, batch)) == jax.tree.structure(
        params
    ), "the same parameters"
    tokens, inner = jax.jit(lambda p: model.apply(params, "encode", p))(batch.particles)
    assert [each.shape[2] for each in inner["blocks"]] == [48, 24] and tokens.x.shape[1] == 24
    counts = [int((tokens.segment == s + 1).sum()) for s in range(3)]
    assert counts == [len(each.particles["vision"].segment) // 2 for each in CLIPS]
    packed = logits(model, params, batch)[0]
    for i, each in list(enumerate(CLIPS))[1:2]:
        alone = logits(model, params, rows_of([each], 1, len(each.particles["vision"].segment), 1))[
            0, 0
        ]
        np.testing.assert_allclose(packed[i], alone, atol=2e-5)


def test_merging_twins_changes_nothing(built: tuple) -> None:
    _, params = built
    vision = CLIPS[0].particles["vision"]
    twins = packing.Clip({"vision": vision.take(np.repeat(np.arange(8), 2))}, 0, 0)
    batch = rows_of([twins, CLIPS[1]], 1, 50, 2)
    model = models.build(
        SPEC,
        {"vision": ModalitySpec(PAYLOAD)},
        heads={"decoder": DecoderHead(), **classification(5)},
    )
    merged = models.build(
        dataclasses.replace(SPEC, token_reduction="merge", token_reduction_layers=(1,)),
        {"vision": ModalitySpec(PAYLOAD)},
        heads={"decoder": DecoderHead(), **classification(5)},
    )
    np.testing.assert_allclose(
        logits(model, params, batch)[0, 0], logits(merged, params, batch)[0, 0], atol=2e-5
    )
    assert (
        jnp.abs(logits(model, params, batch)[0, 1] - logits(merged, params, batch)[0, 1]).max()
        > 1e-4
    )


def test_what_stands_in_an_empty_slot_changes_nothing(built: tuple) -> None:
    model, params = built
    batch = rows_of(CLIPS[:1], 1, 20, 2)
    vision = batch.particles["vision"]
    empty = vision.segment == 0
    assert empty.any()
    noise = dataclasses.replace(
        vision,
        payload=jnp.where(empty[..., None], 7.0, vision.payload),
        place=jnp.where(empty[..., None], 3.0, vision.place),
    )
    np.testing.assert_array_equal(
        logits(model, params, batch)[0, 0],
        logits(model, params, dataclasses.replace(batch, particles={"vision": noise}))[0, 0],
    )


def test_no_clip_sees_another(built: tuple) -> None:
    model, params = built
    batch = rows_of(CLIPS, 1, 48, 3)
    vision = batch.particles["vision"]

    def first_clip(payload: jax.Array) -> jax.Array:
        particles = {"vision": dataclasses.replace(vision, payload=payload)}
        return logits(model, params, dataclasses.replace(batch, particles=particles))[0, 0].sum()

    seen = jnp.abs(jax.jit(jax.grad(first_clip))(vision.payload)).sum(-1)
    assert (seen[vision.segment == 1] > 0).all()
    assert (seen[vision.segment != 1] == 0).all(), "exactly zero"


def test_order_of_particles_is_of_no_account(built: tuple) -> None:
    model, params = built
    batch = rows_of(CLIPS[:1], 1, 8, 1)
    shuffled = batch.particles["vision"].take(jnp.array([[3, 1, 7, 0, 2, 6, 5, 4]]))
    moved = dataclasses.replace(batch, particles={"vision": shuffled})
    np.testing.assert_allclose(
        logits(model, params, batch), logits(model, params, moved), atol=1e-5
    )


def test_the_decoder_is_asked_by_place_and_never_reads_the_payload(built: tuple) -> None:
    model, params = built
    batch = rows_of(CLIPS[:1], 1, 8, 1)
    tokens, _ = jax.jit(lambda p: model.apply(params, "encode", p))(batch.particles)
    query = batch.particles["vision"]

    @jax.jit
    def decoded(query: Particles) -> jax.Array:
        return model.head(params, "decoder", tokens, query, "vision")

    grads = jax.grad(lambda payload: decoded(dataclasses.replace(query, payload=payload)).sum())(
        query.payload
    )
    assert (grads == 0).all()
    moved = dataclasses.replace(query, extent=query.extent * 2)
    assert (jnp.abs(decoded(query) - decoded(moved)).max(axis=(0, 2)) > 1e-4).all()


def test_a_clip_of_which_nothing_is_visible_is_told_of_no_other(built: tuple) -> None:
    model, params = built
    batch = rows_of(CLIPS[:2], 1, 36, 2)
    vision = batch.particles["vision"]
    seen = dataclasses.replace(vision, segment=jnp.where(vision.segment == 1, 1, 0))

    def second(payload: jax.Array) -> jax.Array:
        tokens, _ = model.apply(
            params, "encode", {"vision": dataclasses.replace(seen, payload=payload)}
        )
        return jnp.where(
            (vision.segment == 2)[..., None],
            model.head(params, "decoder", tokens, vision, "vision"),
            0,
        ).sum()

    assert (jax.jit(jax.grad(second))(vision.payload) == 0).all(), "exactly zero"


def test_scan_equals_unroll(built: tuple) -> None:
    model, params = built
    unrolled = models.build(
        dataclasses.replace(SPEC, unroll_layers=True),
        {"vision": ModalitySpec(PAYLOAD)},
        heads={"decoder": DecoderHead(), **classification(5)},
    )
    batch = rows_of(CLIPS, 1, 40, 3)
    np.testing.assert_allclose(
        logits(model, params, batch), logits(unrolled, params, batch), atol=1e-5
    )


def test_a_key_switches_dropout_on(built: tuple) -> None:
    _, params = built
    model = models.build(
        dataclasses.replace(SPEC, dropout=0.5, drop_path_rate=0.3),
        {"vision": ModalitySpec(PAYLOAD)},
        heads={"decoder": DecoderHead(), **classification(5)},
    )
    batch = rows_of(CLIPS[:1], 1, 8, 1)
    encode = jax.jit(lambda key: model.apply(params, "encode", batch.particles, key=key)[0].x)
    still, again, one, other = (
        encode(key) for key in (None, None, jax.random.key(1), jax.random.key(2))
    )
    assert (still == again).all() and not (still == one).all() and not (one == other).all()


def test_two_modalities_and_one_missing() -> None:
    payloads = {"vision": ModalitySpec(PAYLOAD), "text": ModalitySpec(1, vocabulary=50)}
    model = models.build(SPEC, payloads, heads=classification(3))
    words = Particles(
        np.arange(5, dtype=np.int32)[:, None],
        np.zeros((5, 3), np.float32),
        np.ones((5, 3), np.float32),
        np.ones(5, np.int32),
    )
    shapes = {"vision": packing.SlotSpec(48, PAYLOAD), "text": packing.SlotSpec(6, 1, "int32")}
    both = packing.Clip({**CLIPS[0].particles, "text": words}, 0, 0)
    batch = jax.tree.map(jnp.asarray, packing.pack([both, CLIPS[1]], [0, 0], shapes, 1, 2))
    params = jax.jit(model.init)(jax.random.key(0), batch)
    together = logits(model, params, batch)[0]
    alone = jax.tree.map(jnp.asarray, packing.pack([CLIPS[1]], [0], shapes, 1, 2))
    np.testing.assert_allclose(together[1], logits(model, params, alone)[0, 0], atol=2e-5)
    only = dataclasses.replace(alone, particles={"vision": alone.particles["vision"]})
    np.testing.assert_allclose(together[1], logits(model, params, only)[0, 0], atol=2e-5)
    names = tree.flatten(params)
    assert "encoder/payload_text/table/embedding" in names


def test_places_are_continuous() -> None:
    place = jnp.asarray(np.random.default_rng(0).random((1, 9, 3)), jnp.float32)
    extent = jnp.full((1, 9, 3), 0.25)
    near = place_features(place + 1e-4, extent) - place_features(place, extent)
    assert jnp.abs(near).max() < 0.05
    assert jnp.abs(place_features(place, 2 * extent) - place_features(place, extent)).max() > 0.2
