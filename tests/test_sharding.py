# SPDX-License-Identifier: Apache-2.0
"""Eight forced host devices give one device's losses; accumulation gives the whole batch's; errors
name the key.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_fewshot

from particlejax.config.experiment import MeshSpec, ModelSpec, OptimSpec, ParticleSpec
from particlejax.config.objectives import ClassifySpec, MaskedAutoencoderSpec, PseudoLabelSpec
from particlejax.core import flops, tree
from particlejax.core.typing import UserError
from particlejax.distributed import sharding
from particlejax.models import particle_model as models
from particlejax.models.heads import DecoderHead, classification
from particlejax.models.modality import ModalitySpec
from particlejax.objectives import registry
from particlejax.particles import packing, policies
from particlejax.particles.types import Batch
from particlejax.train import optim
from particlejax.train.train_state import (
    TrainState,
    abstract_state,
    initialize,
    jit_step,
    make_step,
)

# compiles sooner
MODEL = ModelSpec(
    width=32,
    depth=2,
    num_heads=2,
    decoder_width=16,
    decoder_depth=1,
    decoder_num_heads=2,
    unroll_layers=False,
)
BOTH = {
    "masked_autoencoder": MaskedAutoencoderSpec(mask_ratio=0.5, weight=0.5),
    "classify": ClassifySpec(),
}
MESHES = {
    "data and fsdp": MeshSpec(data=2, fsdp=4),
    "sequence": MeshSpec(data=2, sequence=4),
    "tensor and sequence": MeshSpec(fsdp=2, tensor=2, sequence=2),
}


def batch() -> Batch:
    rng, clips = np.random.default_rng(0), []
    for i in range(16):
        video = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
        cut = policies.cut_clip(
            video, np.arange(4, dtype=np.float32), ParticleSpec("grid", (2, 4, 4))
        )
        clips.append(packing.Clip({"vision": cut}, i % 3, i))
    return packing.pack(clips, range(len(clips)), {"vision": packing.SlotSpec(8, 96)}, 16, 1)


def one_device() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), sharding.AXES)


def losses(mesh: jax.sharding.Mesh) -> tuple[list[float], TrainState]:
    model = models.build(
        MODEL, {"vision": ModalitySpec(96)}, heads={"decoder": DecoderHead(), **classification(3)}
    )
    optimizer = optim.build_optimizer(OptimSpec(learning_rate=1e-2, warmup_ratio=0), 10)
    state = initialize(model, optimizer, jax.tree.map(lambda x: x[:1], batch()), 0, 0.9, mesh)
    step = make_step(model, registry.combine(BOTH), optimizer, ema=0.9, accumulate=1)
    found = []
    with jax.set_mesh(mesh):
        jitted = jit_step(step, state, mesh)
        for _ in range(3):
            state, metrics = jitted(state, sharding.shard_batch(batch(), mesh))
            found.append(float(metrics["loss"]))
    assert jitted._cache_size() == 1
    return found, state


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], TrainState]:
    return losses(one_device())


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(name: str, alone: tuple) -> None:
    assert jax.device_count() == 8
    seen, state = losses(sharding.make_mesh(MESHES[name]))
    np.testing.assert_allclose(seen, alone[0], rtol=2e-5)
    expected = tree.flatten(alone[1].params)
    for path, found in tree.flatten(state.params).items():
        # gradients near rounding noise, which Adam makes large
        if not path.endswith(("key/bias", "log_sharpness")):
            # of three steps of 1e-2
            np.testing.assert_allclose(found, expected[path], atol=2e-3, err_msg=path)
    split = [x for x in jax.tree.leaves(state.opt_state) if not x.sharding.is_fully_replicated]
    assert bool(split) == (name != "sequence"), "moments are divided like their parameters"


def test_an_axis_that_divides_next_to_nothing_is_told() -> None:
    mesh = sharding.make_mesh(MeshSpec(fsdp=8))

    def parts(width: int) -> tuple[int, ...]:
        shape = (2, width, 20)
        found = sharding.param_shardings(
            {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct(shape, "float32")}}}, mesh
        )
        return found["mlp"]["up"]["kernel"].shard_shape(shape)

    assert parts(24) == (2, 3, 20)
    with pytest.warns(UserWarning, match="fsdp=8 divides no axis of 100% of the parameters"):
        assert parts(12) == (2, 12, 20)


def test_objectives_that_apply_to_some_clips_accumulate_over_devices() -> None:
    """The micro-batches have 2, 0, 1 and 0 of the labeled clips, and one is of no clip at all."""
    label = [2, -1, -1, -1, 1, -1, 0, -1]
    rows = test_fewshot.batch(label, [*range(7), -1])
    pseudo = PseudoLabelSpec(0.5, threshold=0.0, mask_ratio=0.0, noise_std=0.0)
    specs = {"classify": ClassifySpec(label_smoothing=0.0), "pseudo_label": pseudo}
    optimizer, params = optax.sgd(1.0), test_fewshot.PARAMS
    state = TrainState(jnp.zeros((), int), jnp.uint32(0), params, optimizer.init(params), ())
    objective, model = registry.combine(specs), test_fewshot.Linear()

    def found(mesh: jax.sharding.Mesh, accumulate: int, *batches: Batch) -> list:
        step = jax.jit(make_step(model, objective, optimizer, ema=0, accumulate=accumulate))
        with jax.set_mesh(mesh):
            return [step(state, sharding.shard_batch(batch, mesh)) for batch in batches]

    [expected] = found(one_device(), 1, rows)
    logits = jnp.einsum("blp,pc->bc", rows.particles["vision"].payload, params["w"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, np.array(label) % 4)
    labeled, unlabeled = np.array([0, 4, 6]), np.array([1, 2, 3, 5])
    own = optax.softmax_cross_entropy_with_integer_labels(logits, logits.argmax(-1))
    total = loss[labeled].mean() + 0.5 * own[unlabeled].mean()
    np.testing.assert_allclose(expected[1]["loss"], total, rtol=1e-5)
    two = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(2, 1, 1, 1), sharding.AXES)
    none = dataclasses.replace(rows, label=jnp.full_like(rows.label, -1))
    whole, (_, without) = found(two, 4, rows, none)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), whole, expected)
    assert np.isnan(without["classify/top1"]) and without["finite"] == 1
    np.testing.assert_allclose(without["loss"], 0.5 * own[:7].mean(), rtol=1e-5)


def test_the_weights_of_micro_batches_cost_no_operations() -> None:
    specs = {"classify": ClassifySpec()}
    model = models.build(MODEL, {"vision": ModalitySpec(96)}, registry.heads(specs, 3))
    optimizer = optim.build_optimizer(OptimSpec(), 10)
    state = abstract_state(model, optimizer, batch(), 0, one_device())
    counts = [
        flops.count(
            jax.make_jaxpr(
                make_step(model, registry.combine(specs), optimizer, ema=0, accumulate=accumulate)
            )(state, batch())
        )
        for accumulate in (1, 4)
    ]
    assert counts[0] == counts[1] > 1e6


def test_weight_decay_spares_norms_biases_and_tokens() -> None:
    model = models.build(MODEL, {"vision": ModalitySpec(96)}, heads=classification(3))
    mask = tree.flatten(optim.decay_mask(models.parameter_shapes(model, batch())))
    spared = {name.split("/")[-1] for name, decayed in mask.items() if not decayed}
    assert spared == {"bias", "scale", "token", "log_sharpness"}
    assert {name.split("/")[-1] for name, decayed in mask.items() if decayed} == {"kernel"}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimisers_follow_their_schedule(name: str) -> None:
    spec = OptimSpec(
        name=name,
        learning_rate=0.1,
        warmup_ratio=0.2,
        final_lr_ratio=0.1,
        weight_decay=0.5,
        grad_clip_norm=0.0,
    )
    rate = optim.learning_rate_schedule(spec, 100)
    assert (
        float(rate(0)) == 0
        and np.isclose(float(rate(20)), 0.1)
        and np.isclose(float(rate(100)), 0.01)
    )
    optimizer = optim.build_optimizer(spec, 100)
    params = {"kernel": np.full(3, 2.0, np.float32), "bias": np.full(3, 2.0, np.float32)}
    state = optimizer.init(params)
    zero = jax.tree.map(np.zeros_like, params)
    for _ in range(10):
        updates, state = optimizer.update(zero, state, params)
    assert (np.asarray(updates["bias"]) == 0).all() and (np.asarray(updates["kernel"]) < 0).all()


@pytest.mark.parametrize("spec, match", [(MeshSpec(data=3), "there are 8 devices")])
def test_a_mesh_that_does_not_fit_is_refused(spec: MeshSpec, match: str) -> None:
    with pytest.raises(UserError, match=match):
        sharding.make_mesh(spec)
