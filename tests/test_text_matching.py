# SPDX-License-Identifier: Apache-2.0
"""Whose text is shown instead: another clip's in other words, over packed rows and where modalities
lack, alike ones first.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import BASES, CLASSES, MODEL, SLOTS, WORDS, clip

from particlejax.config.objectives import TextMatchingSpec
from particlejax.models import particle_model as models
from particlejax.models.modality import ModalitySpec
from particlejax.objectives import pretext, registry, text_matching, time_utils
from particlejax.particles import packing
from particlejax.particles.types import Batch

PAIR = ("text", "vision")
SILENT, BLIND = 1, 6  # the clip without a text, and the one without a picture


def packed(rows: int = 4, per_row: int = 2, lacking: bool = True) -> Batch:
    """Eight clips of four captions; texts of odd clips are a word shorter and last another time."""
    made = []
    for i in range(rows * per_row):
        each = clip(i, PAIR)
        if i % 2:
            short = jax.tree.map(lambda x: x[:5], each.particles["text"])
            each.particles["text"] = dataclasses.replace(
                short,
                place=short.place * np.float32([2, 1, 1]),
                extent=short.extent * np.float32([2, 1, 1]),
            )
        if lacking and i in (SILENT, BLIND):
            del each.particles["text" if i == SILENT else "vision"]
        made.append(each)
    slots = {name: SLOTS[name]._replace(length=SLOTS[name].length * per_row) for name in PAIR}
    return jax.tree.map(
        jnp.asarray,
        packing.pack(made, [i // per_row for i in range(len(made))], slots, rows, per_row),
    )


def words(text: text_matching.Particles, row: int, segment: int) -> list[int]:
    return text.payload[row][text.segment[row] == segment][:, 0].tolist()


@pytest.fixture(scope="module")
def built() -> tuple[models.Model, dict]:
    payloads = {
        name: ModalitySpec(SLOTS[name].payload_size, WORDS * (name == "text"), BASES.get(name, ()))
        for name in PAIR
    }
    spec = dataclasses.replace(MODEL, width=16, depth=1, num_heads=1)
    model = models.build(
        spec,
        payloads,
        heads=registry.heads({"text_matching": TextMatchingSpec()}),
        unseen=registry.unseen({"text_matching": TextMatchingSpec()}),
    )
    return model, jax.jit(model.init)(jax.random.key(0), packed())


@pytest.mark.parametrize("negatives", ["shifted", "hard"])
def test_another_clips_words_stand_in_the_time_of_its_own(
    negatives: str, built: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = built
    batch, heard = packed(), {}

    def answer(*args: object) -> tuple:
        heard.update(shown=args[3], label=args[5], asked=args[6])
        return jnp.zeros(()), {}

    monkeypatch.setattr(pretext, "encode_and_score", answer)
    objective, seen = (
        text_matching.text_matching(TextMatchingSpec(mismatch_prob=0.6, negatives=negatives)),
        set(),
    )
    text, run = (
        batch.particles["text"],
        jax.jit(lambda key: (objective(params, model, batch, key, False), heard)[1]),
    )
    for seed in range(4):
        told = run(jax.random.key(seed))
        shown = told["shown"]["text"]
        np.testing.assert_array_equal(
            told["shown"]["vision"].payload, batch.particles["vision"].payload
        )
        for i in range(8):
            at, own = (i // 2, i % 2), words(text, i // 2, i % 2 + 1)
            assert bool(told["asked"][at]) == (i not in (SILENT, BLIND))
            if not told["asked"][at]:
                continue
            given = words(shown, i // 2, i % 2 + 1)
            assert (given == own) == bool(told["label"][at]), "the same words are never another's"
            assert given in [words(text, j // 2, j % 2 + 1) for j in range(8)], (
                "whole, whatever its length"
            )
            np.testing.assert_allclose(
                np.array(time_utils.span(shown, 2))[:, *at],
                np.array(time_utils.span(text, 2))[:, *at],
                atol=1e-5,
            )
            seen |= {(bool(told["label"][at]), i)}
    assert {own for own, _ in seen} == {False, True} and len(seen) > 8


def test_what_may_be_shown() -> None:
    batch = packed()
    others = jax.jit(
        lambda b: text_matching.valid_negatives(
            text_matching.unpack_clips(b.particles["text"], 2), b
        )
    )
    may = np.asarray(others(batch))
    for i in range(8):
        for j in range(8):  # captions repeat after CLASSES clips
            assert may[i, j] == (i % CLASSES != j % CLASSES and SILENT not in (i, j))
    assert not others(
        dataclasses.replace(batch, clip_index=jnp.full_like(batch.clip_index, -1))
    ).any(), "no clip, no negative"


def test_hard_negatives_are_more_alike_than_random_ones_and_never_of_equal_words(
    built: tuple,
) -> None:
    model, params = built
    batch = packed()

    @jax.jit
    def draws(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        may = text_matching.valid_negatives(
            text_matching.unpack_clips(batch.particles["text"], 2), batch
        )
        alike = text_matching.similarity(params, model, batch, "text")
        return (
            alike,
            may,
            jax.vmap(lambda key: text_matching.sample_hard_negatives(key, alike, may))(
                jax.random.split(jax.random.key(0), 200)
            ),
        )

    alike, may, drawn = (np.asarray(x) for x in draws(batch))
    asked = may.any(axis=1)
    assert may[np.arange(8)[None], drawn][:, asked].all()
    mean = (alike * may).sum() / may.sum()
    assert alike[np.arange(8)[None], drawn][:, asked].mean() > mean + 0.05
    often = np.array([np.bincount(drawn[:, i], minlength=8).argmax() for i in range(8)])
    # of two clips alike either may be drawn more often
    nearest = np.where(may, alike, -9).max(axis=1)
    np.testing.assert_allclose(alike[np.arange(8), often][asked], nearest[asked], atol=0.05)


def test_likeness_is_of_clips_not_of_rows(built: tuple) -> None:
    model, params = built
    together = jax.jit(lambda p, b: text_matching.similarity(p, model, b, "text"))
    alone = together(params, packed(8, 1))
    np.testing.assert_allclose(together(params, packed()), alone, atol=1e-4)
    assert (
        np.linalg.eigvalsh(np.asarray(alone))[0] > -1e-3 and float(jnp.abs(alone).max()) < 2 + 1e-3
    )
