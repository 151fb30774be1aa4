# SPDX-License-Identifier: Apache-2.0
"""Dense layers in bfloat16: what linen's give, and gradients that stay float32 sums, over devices
too.
"""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from particlejax.config.experiment import MeshSpec, ModelSpec
from particlejax.config.objectives import MaskedAutoencoderSpec, MaskedLmSpec
from particlejax.core import flops
from particlejax.distributed import sharding
from particlejax.models import particle_model as models
from particlejax.models.modality import ModalitySpec
from particlejax.nn import dense
from particlejax.objectives import registry
from particlejax.particles import packing
from particlejax.particles.types import Batch, Particles

LAYERS = {
    "one axis": ((24,), dict(features=12)),
    "to heads": ((24,), dict(features=(3, 5))),
    "to more": ((24,), dict(features=(4, 9))),
    "from heads": ((3, 8), dict(features=12, axis=(-2, -1))),
    "no bias": ((24,), dict(features=12, use_bias=False)),
}
REDUCED = re.compile(r" = \(?(\w+)\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter)(?:-start)?\(")


def gradients(
    layer: nn.Module, params: dict, x: jax.Array, t: jax.Array
) -> tuple[jax.Array, dict, jax.Array]:
    """What the layer answers, and its gradients by parameters and input when `t` is that by its
    answer.
    """
    answer, pull = jax.vjp(lambda p, x: layer.apply({"params": p}, x), params, x)
    return answer, *pull(t.astype(answer.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_linen(name: str, dtype: str) -> None:
    shape, settings = LAYERS[name]
    x = jax.random.normal(jax.random.key(0), (2, 6, *shape), dtype)
    pairs = (
        (nn.Dense, dense.Dense)
        if name in ("one axis", "no bias")
        else (nn.DenseGeneral, dense.DenseGeneral)
    )
    theirs, ours = (
        kind(**settings, dtype=jnp.dtype(dtype), bias_init=nn.initializers.normal(1.0))
        for kind in pairs
    )
    params = theirs.init(jax.random.key(1), x)["params"]
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), x)["params"], params)
    t = jax.random.normal(
        jax.random.key(2), jax.eval_shape(ours.apply, {"params": params}, x).shape
    )
    found, expected = gradients(ours, params, x, t), gradients(theirs, params, x, t)
    rounding = float(jnp.finfo(dtype).eps)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            *(np.asarray(each, np.float32) for each in (a, b)),
            atol=4 * rounding * float(jnp.abs(b).max()),
        )


def test_gradients_over_devices_lose_nothing_to_bfloat16() -> None:
    mesh = sharding.make_mesh(MeshSpec(data=8))
    x, t = (jax.random.normal(jax.random.key(i), (64, 4, 16), "bfloat16") for i in range(2))
    exact = np.einsum("rld,rle->de", *(np.asarray(each, np.float64) for each in (x, t)))
    params = nn.Dense(16).init(jax.random.key(2), x)["params"]
    x, t = (jax.device_put(each, NamedSharding(mesh, P("data"))) for each in (x, t))
    error = {}
    for kind in (nn.Dense, dense.Dense):
        _, grads, _ = jax.jit(gradients, static_argnums=0)(
            kind(16, dtype=jnp.bfloat16), params, x, t
        )
        error[kind] = np.abs(grads["kernel"] - exact).max() / np.abs(exact).max()
    assert error[dense.Dense] < 1e-6 and error[nn.Dense] > 1e-3


@pytest.mark.parametrize(("learns", "products"), [((0,), 2), ((1,), 2), ((0, 1), 3), ((), 1)])
def test_what_does_not_learn_costs_and_keeps_nothing(
    learns: tuple[int, ...], products: int
) -> None:
    x, params = jnp.ones((4, 6, 8)), {"kernel": jnp.ones((8, 10)), "bias": jnp.ones(10)}

    def loss(*args: object) -> jax.Array:
        return jnp.sum(jnp.sin(dense.affine(*args)))

    whole = jax.value_and_grad(loss, argnums=learns) if learns else loss
    assert flops.count(jax.make_jaxpr(whole)(x, params)) == products * 2 * 4 * 6 * 8 * 10


def batch() -> Batch:
    """Eight clips of 24 patches and eight words."""
    rng = np.random.default_rng(0)

    def some(number: int, payload: np.ndarray) -> Particles:
        return Particles(
            payload,
            rng.uniform(size=(number, 3)).astype(np.float32),
            np.ones((number, 3), np.float32),
            np.ones(number, np.int32),
        )

    clips = [
        packing.Clip(
            {
                "text": some(8, rng.integers(2, 20, (8, 1)).astype(np.int32)),
                "vision": some(24, rng.normal(size=(24, 96)).astype(np.float32)),
            },
            0,
            i,
        )
        for i in range(8)
    ]
    return packing.pack(
        clips,
        range(8),
        {"text": packing.SlotSpec(8, 1, "int32"), "vision": packing.SlotSpec(24, 96)},
        8,
        1,
    )


def reduced(spec: ModelSpec, mesh: jax.sharding.Mesh, folder: Path) -> list[tuple[str, str]]:
    """Type and shape of whatever the program of a model's gradients adds up over devices, as it was
    divided among them.

    Backends go on from there in their own ways: XLA's CPU, for one, sums bfloat16 in float32.
    """
    specs = {
        "masked_autoencoder": MaskedAutoencoderSpec(mask_ratio=0.5),
        "masked_lm": MaskedLmSpec(mask_ratio=0.5),
    }
    model = models.build(
        spec,
        {"text": ModalitySpec(1, 20), "vision": ModalitySpec(96)},
        heads=registry.heads(specs),
        unseen=registry.unseen(specs),
    )
    objective, key = registry.combine(specs), jax.random.key(0)
    shapes = models.parameter_shapes(model, batch())
    params = jax.tree.map(
        lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to),
        shapes,
        sharding.param_shardings(shapes, mesh),
    )
    told = sharding.with_mesh(
        mesh, jax.grad(lambda params, batch: objective(params, model, batch, key, True)[0])
    )
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    jax.jit(told).lower(params, sharding.shard_batch(batch(), mesh)).compile(dump)
    text = next(folder.glob("*.after_spmd-partitioning.*")).read_text()
    return REDUCED.findall(text)


def test_what_devices_add_up_for_parameters_is_float32(tmp_path: Path) -> None:
    """In bfloat16 come, over `tensor`, what layers answer alone, [rows, L, D]."""
    spec = ModelSpec(
        width=32,
        depth=1,
        num_heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_num_heads=2,
        unroll_layers=False,
        dtype="bfloat16",
        layer_scale=0.1,
        mlp_activation="swiglu",
        qk_norm=True,
    )
    found = reduced(spec, sharding.make_mesh(MeshSpec(data=2, fsdp=2, tensor=2)), tmp_path)
    small = [tuple(map(int, dims.split(","))) for kind, dims in found if kind == "bf16"]
    rows = batch().label.shape[0] // 4
    assert small and all(
        len(dims) == 3 and dims[0] == rows and dims[2] in (spec.width, spec.decoder_width)
        for dims in small
    )
    assert sum(kind == "f32" for kind, _ in found) > 20
