# SPDX-License-Identifier: Apache-2.0
"""One battery for every objective of the table: finite, gradients where they belong, nothing leaks, it learns."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from particlejax import losses, tree
from particlejax.models import model as models
from particlejax.objectives import objectives
from particlejax.particles import pack, policies
from particlejax.particles.types import Batch
from particlejax.spec import ClassifySpec, MaskedSpec, ModelSpec, ParticleSpec
from particlejax.tunespec import PseudoSpec

MODEL = ModelSpec(width=32, depth=2, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=1,
                  unroll=False)  # compiles sooner
SPECS = {"masked": MaskedSpec(keep=0.5, predict=0.5, mask="random"), "classify": ClassifySpec(label_smoothing=0.1),
         "pseudo": PseudoSpec(threshold=0.0)}
CLASSES = 4
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles in half the time


def make_batch(seed: int, empty_rows: int = 0) -> Batch:
    """Smooth moving ramps whose direction is the label; the last rows hold no clip."""
    rng, clips = np.random.default_rng(seed), []
    for i in range(8 - empty_rows):
        t, y, x = np.meshgrid(np.arange(4), np.arange(8), np.arange(8), indexing="ij")
        way = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])[i % CLASSES]
        video = np.sin((y - 1.5 * way[0] * t + x - 1.5 * way[1] * t + rng.uniform(0, 6)) * 0.6)
        video = np.repeat(video[..., None], 3, -1).astype(np.float32)
        cut = policies.cut_clip(video, np.arange(4, dtype=np.float32), ParticleSpec("grid", (2, 4, 4)))
        clips.append(pack.Clip({"vision": cut}, i % CLASSES, i))
    return jax.tree.map(jnp.asarray, pack.pack(clips, range(len(clips)), {"vision": pack.Slots(8, 96)}, 8, 1))


def batch_of(name: str, empty_rows: int = 0) -> Batch:
    """A batch that the objective learns from."""
    batch = make_batch(0, empty_rows)
    return dataclasses.replace(batch, label=jnp.full_like(batch.label, -1)) if name == "pseudo" else batch


def setup(name: str) -> tuple[objectives.Objective, models.Model, dict]:
    parts = objectives.parts({name: None})
    model = models.build(MODEL, {"vision": models.Payload(96)}, classes=CLASSES if parts["head"] else 0,
                         decoder=parts["decoder"])
    return objectives.combine({name: SPECS[name]}), model, jax.jit(model.init)(jax.random.key(0), make_batch(0))


def test_the_battery_knows_every_objective() -> None:
    assert set(SPECS) == set(objectives.TABLE)


@pytest.mark.parametrize("name", SPECS)
def test_finite_and_gradients_reach_every_parameter(name: str) -> None:
    objective, model, params = setup(name)
    batch = batch_of(name)
    gradient = jax.value_and_grad(lambda p: objective(p, model, batch, jax.random.key(1), True), has_aux=True)
    (loss, metrics), grads = jax.jit(gradient, compiler_options=QUICK)(params)
    assert np.isfinite(float(loss)) and all(np.isfinite(float(v)) for v in metrics.values())
    dead = [path for path, g in tree.flatten(grads).items() if not jnp.abs(g).max() > 0]
    # A bias of the keys shifts all of a query's logits alike, so softmax takes no notice of it.
    assert all(path.endswith("key/bias") for path in dead), dead


@pytest.mark.parametrize("name", SPECS)
def test_rows_without_a_clip_count_for_nothing(name: str) -> None:
    objective, model, params = setup(name)
    partly = make_batch(0, empty_rows=3)
    held = jax.tree.map(lambda x: x[:5], partly)
    if name != "classify":
        pytest.skip("masks are drawn for the whole batch: fewer rows draw others")
    loss = [objective(params, model, b, jax.random.key(1), False)[0] for b in (partly, held)]
    np.testing.assert_allclose(*loss, rtol=1e-5)
    nothing = make_batch(0, empty_rows=8)
    assert objective(params, model, nothing, jax.random.key(1), False)[0] == 0


@pytest.mark.parametrize("name", SPECS)
def test_it_learns_what_can_be_learnt(name: str) -> None:
    objective, model, params = setup(name)
    batch, optimizer = batch_of(name), optax.adam(3e-3)

    @partial(jax.jit, compiler_options=QUICK)
    def step(params: dict, state: tuple, key: jax.Array) -> tuple:
        loss, grads = jax.value_and_grad(lambda p: objective(p, model, batch, key, True)[0])(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, seen = optimizer.init(params), []
    for i in range(60):
        params, state, loss = step(params, state, jax.random.key(i))
        seen.append(float(loss))
    assert np.mean(seen[-5:]) < 0.6 * np.mean(seen[:3]), seen


def test_masked_never_sees_what_it_is_asked_for() -> None:
    spec = SPECS["masked"]
    _, model, params = setup("masked")
    batch = make_batch(0)
    vision = batch.particles["vision"]

    def predicted(payload: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = dataclasses.replace(batch, particles={"vision": dataclasses.replace(vision, payload=payload)})
        found = objectives.predict_masked(spec, params, model, new, jax.random.key(3), False)
        return found.predicted.sum(), found.visible.place

    grads, places = jax.jit(jax.grad(predicted, has_aux=True))(vision.payload)
    seen = jnp.abs(grads).sum(-1) > 0
    for row in range(8):
        shown = {tuple(p) for p in places[row].tolist()}
        assert shown == {tuple(p) for p in vision.place[row][seen[row]].tolist()}, "exactly the visible ones matter"


def test_masked_cannot_learn_noise() -> None:
    """Independent noise has nothing to predict: with normalised targets the best loss is 1."""
    objective, model, params = setup("masked")
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params: dict, state: tuple, key: jax.Array) -> tuple:
        noise_key, key = jax.random.split(key)
        batch = make_batch(0)
        vision = batch.particles["vision"]
        noise = dataclasses.replace(vision, payload=jax.random.normal(noise_key, vision.payload.shape))
        batch = dataclasses.replace(batch, particles={"vision": noise})
        loss, grads = jax.value_and_grad(lambda p: objective(p, model, batch, key, True)[0])(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    seen = []
    for i in range(60):
        params, state, loss = step(params, state, jax.random.key(i))
        seen.append(float(loss))
    assert min(seen) > 0.97


def test_losses_are_means_over_clips_not_rows() -> None:
    values = jnp.array([[1.0, 1.0, 3.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    segment = jnp.array([[1, 1, 2, 0], [1, 1, 1, 1]])
    each = losses.clip_mean(values, segment, 2)
    np.testing.assert_allclose(each, [[1, 3], [5, 0]])
    np.testing.assert_allclose(losses.mean(each, jnp.array([[True, True], [True, False]])), 3.0)


def test_cross_entropy_against_hand_computation() -> None:
    logits = jnp.array([[2.0, 0.0, -1.0]])
    log_p = np.log(np.exp([2.0, 0, -1]) / np.exp([2.0, 0, -1]).sum())
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array([0]), 0.3), [-(0.8 * log_p[0] + 0.1 * log_p[1:].sum())],
                               rtol=1e-5)
