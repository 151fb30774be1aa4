# SPDX-License-Identifier: Apache-2.0
"""What is told of each moment comes from what covers it, never from the series itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import MODEL, SLOTS, clip, make_batch, setup

from particlejax.config.experiment import Experiment
from particlejax.config.objectives import FramewiseSpec
from particlejax.core.typing import UserError
from particlejax.models import particle_model as models
from particlejax.nn.token_reduction import Tokens
from particlejax.objectives import framewise, registry
from particlejax.particles import packing
from particlejax.particles.types import Batch

PAIR = ("timeseries", "vision")


@functools.cache
def begun(loss: str = "mse") -> tuple[registry.Objective, models.Model, dict]:
    """The objective, the model and its parameters before any step."""
    objective, model = setup("framewise", loss=loss)
    return objective, model, jax.jit(model.init)(jax.random.key(0), make_batch(PAIR))


def lacking(batch: Batch, modality: str, row: int) -> Batch:
    gone = batch.particles[modality]
    gone = dataclasses.replace(gone, segment=gone.segment.at[row].set(0))
    return dataclasses.replace(batch, particles={**batch.particles, modality: gone})


def test_moments_are_the_values_of_the_series_where_they_were_read() -> None:
    batch = make_batch(PAIR)
    each, target = framewise.to_frames(batch.particles["timeseries"], 2)
    np.testing.assert_allclose(each.place[0, :, 0], np.arange(12) / 2 + 0.25, atol=1e-5)
    np.testing.assert_allclose(each.extent[0, :, 0], 0.5, atol=1e-5)
    for i in range(len(target)):
        np.testing.assert_array_equal(target[i, :, 0] > 0, np.arange(12) // 2 == 1 + i % 4)
        np.testing.assert_array_equal(target[i, :, 1], np.full(12, 0.5 * (i % 4)))


def test_a_moment_reads_the_tokens_that_cover_it_and_no_others() -> None:
    _, model, params = begun()
    batch = make_batch(PAIR)
    rest = {"vision": batch.particles["vision"]}
    each, _ = framewise.to_frames(batch.particles["timeseries"], 2)
    x = jax.random.normal(jax.random.key(1), (*rest["vision"].segment.shape, MODEL.width))
    tokens = Tokens(x, rest["vision"].place, rest["vision"].segment)
    told = jax.jit(
        lambda x, m: model.head(
            params, "framewise_head_timeseries", tokens._replace(x=x), rest, each
        )[0][0, m].sum()
    )
    middle, half = rest["vision"].place[0, :, 0], rest["vision"].extent[0, :, 0] / 2
    for m in (0, 5, 11):
        seen = jnp.abs(jax.grad(told)(tokens.x, m)[0]).sum(-1) > 0
        np.testing.assert_array_equal(
            seen, (jnp.abs(middle - each.place[0, m, 0]) <= half) & (rest["vision"].segment[0] > 0)
        )
        assert seen.sum() == 4


def test_the_series_itself_is_never_seen_and_lacking_ones_count_for_nothing() -> None:
    objective, model, params = begun()
    batch = make_batch(PAIR)
    loss = jax.jit(lambda b: objective(params, model, b, jax.random.key(0), False)[0])

    def told(payloads: dict) -> jax.Array:
        new = {
            name: dataclasses.replace(p, payload=payloads[name])
            for name, p in batch.particles.items()
        }
        return jnp.sin(
            framewise.predict_framewise(
                FramewiseSpec(), params, model, dataclasses.replace(batch, particles=new), None
            )[0]
        ).sum()

    grads = jax.jit(jax.grad(told))({name: p.payload for name, p in batch.particles.items()})
    assert (grads["timeseries"] == 0).all() and (jnp.abs(grads["vision"]).sum((1, 2)) > 0).all()
    alone = jax.tree.map(lambda x: x[1:], batch)
    for modality in PAIR:  # nothing to tell, or nothing to tell it from
        np.testing.assert_allclose(loss(lacking(batch, modality, 0)), loss(alone), rtol=1e-5)
    with pytest.raises(UserError, match="has none: add one there"):
        framewise.predict_framewise(
            FramewiseSpec(), params, model, make_batch(("timeseries",)), None
        )


def test_packed_clips_are_told_as_alone_and_binary_channels_are_classes() -> None:
    objective, model, params = begun("sigmoid")
    slots = {name: SLOTS[name]._replace(length=2 * SLOTS[name].length) for name in PAIR}
    two = jax.tree.map(
        jnp.asarray,
        packing.pack([clip(i, PAIR) for i in range(8)], [i // 2 for i in range(8)], slots, 4, 2),
    )
    measure = jax.jit(lambda batch: objective(params, model, batch, jax.random.key(0), False))
    (loss, metrics), (alone, _) = measure(two), measure(make_batch(PAIR))
    np.testing.assert_allclose(loss, alone, rtol=1e-4)
    assert 0 <= metrics["framewise/accuracy"] <= 1


@pytest.mark.parametrize(
    ("name", "spec"),
    [("framewise", {}), ("temporal_alignment", {}), ("synchronization", {"method": "correlation"})],
)
def test_tokens_that_are_fewer_stand_at_no_moment(name: str, spec: dict) -> None:
    with pytest.raises(UserError, match=f"{name} predicts for every particle"):
        Experiment.of(
            {
                "model": dataclasses.asdict(
                    dataclasses.replace(MODEL, token_reduction_layers=(1,))
                ),
                "particles": {"patch_size": (2, 4, 4)},
                "stages": {"one": {"num_steps": 1, "objectives": {name: spec}}},
            }
        )


def test_cuboids_as_long_as_the_clip_have_no_moments_to_lay_over_each_other() -> None:
    config = {
        "data": {"num_frames": 8},
        "stages": {
            "one": {"num_steps": 1, "objectives": {"synchronization": {"method": "correlation"}}}
        },
    }
    with pytest.raises(UserError, match=r"particles.patch_size\[0\]=8 covers all 8 frames"):
        Experiment.of({**config, "particles": {"patch_size": (8, 4, 4)}})
    Experiment.of({**config, "particles": {"patch_size": (4, 4, 4)}})
