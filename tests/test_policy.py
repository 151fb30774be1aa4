# SPDX-License-Identifier: Apache-2.0
"""Policies by name: remat changes what is remembered and nothing that comes out; in bfloat16
parameters and sums are float32.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from particlejax.config import jobs
from particlejax.config.experiment import ModelSpec, ParticleSpec
from particlejax.config.fields import make
from particlejax.core import flops, tree
from particlejax.core.typing import Params, UserError
from particlejax.distributed import sharding
from particlejax.models import particle_model as models
from particlejax.models.heads import classification
from particlejax.models.modality import ModalitySpec
from particlejax.nn import precision
from particlejax.particles import packing, policies
from particlejax.particles.types import Batch
from particlejax.train.setup import set_up


def batch() -> Batch:
    rng, clips = np.random.default_rng(0), []
    for i in range(4):
        cut = policies.cut_clip(
            rng.normal(size=(4, 8, 8, 3)).astype(np.float32),
            np.arange(4, dtype=np.float32),
            ParticleSpec("grid", (2, 4, 4)),
        )
        clips.append(packing.Clip({"vision": cut}, i % 3, i))
    return packing.pack(clips, range(4), {"vision": packing.SlotSpec(8, 96)}, 4, 1)


def built(**changes: Any) -> tuple[models.Model, Any]:
    spec = ModelSpec(
        **{
            "width": 16,
            "depth": 2,
            "num_heads": 2,
            "unroll_layers": False,
            "distance_bias": False,
            **changes,
        }
    )
    model = models.build(spec, {"vision": ModalitySpec(96)}, heads=classification(3))

    def loss(params: Params) -> jax.Array:
        tokens, _ = model.apply(params, "encode", batch().particles, key=jax.random.key(1))
        return jnp.mean(jax.nn.logsumexp(model.head(params, "head", tokens, 1), axis=-1))

    return model, loss


@pytest.fixture(scope="module")
def plain() -> tuple[Params, tuple[jax.Array, Params]]:
    model, loss = built()
    params = jax.jit(model.init)(jax.random.key(0), batch())
    return params, jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    ("name", "unroll"), [("full", False), ("full", True), ("dots_no_batch", False), ("dots", False)]
)
def test_remat_equals_no_remat_and_remembers_less(name: str, unroll: bool, plain: tuple) -> None:
    params, (_, expected) = plain
    _, loss = built(remat_policy=name, unroll_layers=unroll)
    for path, grad in tree.flatten(jax.jit(jax.grad(loss))(params)).items():
        np.testing.assert_allclose(grad, tree.flatten(expected)[path], atol=1e-6, err_msg=path)
    _, without = built(unroll_layers=unroll)
    assert remembered(loss, params) < 0.95 * remembered(without, params)


def test_what_is_made_twice_is_what_the_name_says(plain: tuple) -> None:
    """Two blocks of 32 slots, of width 16 in two heads: logits and what they mix are 4 * 8 * 8 * 16
    * 2 operations each.
    """
    made = {
        name: flops.count(jax.make_jaxpr(jax.grad(built(remat_policy=name)[1]))(plain[0]).jaxpr)
        for name in precision.REMAT_POLICIES
    }
    attention = 2 * 2 * 4 * 8 * 8 * 16 * 2
    assert made["dots"] == made["none"] and made["dots_no_batch"] - made["none"] == attention
    assert made["full"] > made["dots_no_batch"]


def test_what_is_made_twice_does_not_count_as_operations_of_a_step(cache_dir: str) -> None:
    def operations(policy: str) -> int:
        experiment = jobs.parse_job(
            {
                "data": {"source": "toybox:tiny", "cache_dir": cache_dir, "image_size": 16},
                "particles": {"patch_size": (4, 8, 8)},
                "model": {"width": 16, "depth": 1, "num_heads": 2},
                "stages": {
                    "finetune": {
                        "num_steps": 1,
                        "batch_size": 8,
                        "objectives": {"classify": {}},
                        "model": {"remat_policy": policy},
                    }
                },
            }
        )
        return set_up(experiment, "finetune", sharding.make_mesh(experiment.mesh)).operations()

    assert operations("full") == operations("none")


def remembered(loss: Any, params: Params) -> int:
    """Numbers that the forward pass leaves for the backward one."""
    _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    return tree.count(backward)


def test_a_table_of_names_and_the_spec_agree() -> None:
    for section in ("remat_policy", "dtype"):
        with pytest.raises(UserError) as error:
            make(ModelSpec, {section: "something else"}, "config.model")
        names = {"remat_policy": precision.REMAT_POLICIES, "dtype": precision.PRECISIONS}[section]
        assert str(error.value).endswith(f"choose one of {', '.join(names)}.")


def equations(jaxpr: Any) -> Iterator[Any]:
    for each in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield each
        for value in each.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, (core.Jaxpr, core.ClosedJaxpr)):
                    yield from equations(inner)


def test_in_bfloat16_products_are_and_parameters_and_sums_are_not(plain: tuple) -> None:
    (params, (value, _)), (_, loss) = plain, built(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    found = list(equations(jax.make_jaxpr(loss)(params)))
    products = [each for each in found if each.primitive.name == "dot_general"]
    small = [each for each in products if each.invars[0].aval.dtype == jnp.bfloat16]
    work = [sum(each.outvars[0].aval.size for each in which) for which in (small, products)]
    assert work[0] > 0.8 * work[1], "all but the codes of places, the means over clips and the head"
    found += equations(jax.make_jaxpr(jax.grad(loss))(params))
    sums = [
        each
        for each in found
        if each.primitive.name in ("reduce_sum", "reduce_max", "exp", "log", "rsqrt")
    ]
    assert sums and all(
        each.invars[0].aval.dtype == jnp.float32
        for each in sums
        if each.invars[0].aval.dtype.kind != "i"
    )
    rough, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(rough, value, rtol=2e-2)
