# SPDX-License-Identifier: Apache-2.0
"""Attention by kernels equals the plain one on packed rows, forward and backward, alone and on a
mesh.

Splash attention runs in its interpret mode; of cuDNN's what is around the kernel, with XLA's in its
place.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AbstractDevice, AbstractMesh

from particlejax.config.experiment import MeshSpec, ModelSpec
from particlejax.config.fields import make
from particlejax.core import hlo_cost
from particlejax.core.typing import Params, UserError
from particlejax.distributed import sharding
from particlejax.nn import attention, fused_attention
from particlejax.nn.attention import Attention, BlockConfig
from particlejax.nn.token_reduction import Tokens
from particlejax.nn.transformer import Transformer

WIDTH, HEADS = 16, 2
VARIANTS = {
    "words": BlockConfig(distance_bias=False),
    "near": BlockConfig(),
    "rotary": BlockConfig(rope=True, qk_norm=True),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention, "splash", partial(fused_attention.splash, interpret=True))
    monkeypatch.setattr(
        fused_attention, "cudnn", partial(fused_attention.cudnn, implementation="xla")
    )


def tokens(rows: int, length: int, seed: int, mass: bool = False) -> Tokens:
    """Rows of two clips, of the second a single token, and of empty slots."""
    rng = np.random.default_rng(seed)
    segment = np.where(
        np.arange(length) < length // 2, 1, np.where(np.arange(length) < length // 2 + 1, 2, 0)
    )
    place = rng.uniform(0, 1, (rows, length, 3)) * np.array([8.0, 1, 1])
    return Tokens(
        jnp.asarray(rng.normal(size=(rows, length, WIDTH)), jnp.float32),
        jnp.asarray(place, jnp.float32),
        jnp.asarray(np.tile(segment, (rows, 1)), jnp.int32),
        jnp.asarray(rng.integers(1, 5, (rows, length)), jnp.float32) if mass else None,
    )


def close(found: Array, expected: Array) -> None:
    """Equal as far as float32 sums in another order are: gradients of sharpness are small
    differences of large terms.
    """
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=2e-5 + 1e-3 * float(jnp.abs(expected).max())
    )


def found(
    style: BlockConfig, query: Tokens, key: Tokens, params: Params | None = None
) -> tuple[Array, tuple]:
    """What is read, and the gradients of a sum of its squares by parameters and content."""
    module, where = Attention(WIDTH, HEADS, style), attention.make_attention_context(query, key)
    params = params or module.init(jax.random.key(0), query.x, key.x, where)

    def loss(params: Params, x: Array, y: Array) -> tuple[Array, Array]:
        read = module.apply(params, x, y, where)
        return jnp.sum(jnp.sin(read)), read

    grads, read = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(params, query.x, key.x)
    return read, grads


@pytest.mark.parametrize(
    ("kernel", "variant"),
    [("splash", "near"), ("splash", "words"), ("cudnn", "near"), ("cudnn", "rotary")],
)
def test_kernels_equal_the_plain_one_on_packed_rows(kernel: str, variant: str) -> None:
    style = VARIANTS[variant]
    query, key = tokens(2, 20, 0), tokens(2, 33, 1, mass=variant == "near")
    plain, kernels = (
        found(style._replace(attention_impl=how), query, key) for how in ("xla", kernel)
    )
    jax.tree.map(close, kernels, plain)
    moved = jax.tree.map(lambda x: float(jnp.abs(x).max()), plain[1][0])
    assert min(moved["params"]["query"].values()) > 0 and all(
        np.isfinite(x).all() for x in jax.tree.leaves(kernels)
    )
    if style.distance_bias:
        assert moved["params"]["nearness"]["log_sharpness"] > 1e-3


def test_on_a_mesh_each_device_runs_its_own_rows_and_heads() -> None:
    mesh = sharding.make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
    one = tokens(4, 20, 0)
    module, where = (
        Attention(WIDTH, HEADS, BlockConfig(attention_impl="splash")),
        attention.make_attention_context(one, one),
    )
    params = Attention(WIDTH, HEADS, BlockConfig()).init(jax.random.key(0), one.x, one.x, where)
    apply = lambda params, x: module.apply(params, x, x, where)  # noqa: E731
    rows = jax.device_put(one.x, sharding.batch_sharding(mesh))
    text = jax.jit(sharding.with_mesh(mesh, apply)).lower(params, rows)
    assert "manual_axes" in text.as_text() or "manual_computation" in text.as_text()
    plain = Attention(WIDTH, HEADS, BlockConfig()).apply(params, one.x, one.x, where)
    np.testing.assert_allclose(text.compile()(params, rows), plain, atol=2e-5)


def test_a_sequence_divided_over_devices_is_the_same_and_its_keys_are_gathered() -> None:
    mesh, one = sharding.make_mesh(MeshSpec(data=2, sequence=4)), tokens(4, 20, 0)
    plain, body = (
        Transformer(2, HEADS, 32, BlockConfig(attention_impl=how), unroll_layers=False)
        for how in ("xla", "splash")
    )
    params = plain.init(jax.random.key(0), one)

    def loss(body: Transformer, params: Params, one: Tokens) -> Array:
        return jnp.sum(jnp.sin(body.apply(params, one)[0].x))

    alone = jax.jit(jax.value_and_grad(partial(loss, plain)))(params, one)
    told = sharding.with_mesh(mesh, jax.value_and_grad(lambda params, one: loss(body, params, one)))
    program = (
        jax.jit(told, in_shardings=(None, sharding.batch_sharding(mesh)))
        .lower(params, one)
        .compile()
    )
    jax.tree.map(close, program(params, one), alone)
    gathered = [
        each
        for each in hlo_cost.cost(program.as_text(), dict(mesh.shape)).collectives
        if each.op == "all-gather" and each.axes == ("sequence",)
    ]
    # layers, keys and values, rows, slots of others
    assert sum(each.sent for each in gathered) >= 2 * 2 * 2 * 15 * WIDTH * 4


def test_rows_that_do_not_divide_stay_whole() -> None:
    mesh, one = sharding.make_mesh(MeshSpec(data=8)), tokens(3, 20, 0)
    module, where = (
        Attention(WIDTH, HEADS, BlockConfig(attention_impl="splash")),
        attention.make_attention_context(one, one),
    )
    plain = Attention(WIDTH, HEADS, BlockConfig())
    params = plain.init(jax.random.key(0), one.x, one.x, where)
    with jax.set_mesh(mesh):
        read = jax.jit(module.apply)(params, one.x, one.x, where)
    np.testing.assert_allclose(read, plain.apply(params, one.x, one.x, where), atol=2e-5)


def test_terms_of_place_keep_their_precision_in_bfloat16() -> None:
    one = tokens(1, 64, 3)
    sharpness = jnp.asarray([[5.0, 50.0, 50.0], [0.1, 0.5, 0.5]])
    nothing = jnp.zeros((1, HEADS, 64, 4), jnp.bfloat16)
    query, key = fused_attention.fold_bias_into_qk(
        nothing, nothing, (one.place, one.place), sharpness, None
    )
    logits = jnp.einsum("bhlk,bhmk->bhlm", query, key, preferred_element_type=jnp.float32)
    far = (one.place[:, None, :, None] - one.place[:, None, None]) ** 2
    exact = (
        -jnp.einsum("hk,bxlmk->bhlm", sharpness, far)
        + jnp.einsum("hk,blk->bhl", sharpness, one.place**2)[..., None]
    )
    assert query.dtype == jnp.bfloat16 and float(jnp.abs(exact).max()) > 100
    assert float(jnp.abs(logits - exact).max()) < 0.02


@pytest.mark.parametrize("length", [1, 128, 129, 640, 1568])
def test_blocks_divide_what_is_padded_least(length: int) -> None:
    block = fused_attention._block_size(length)
    padded = fused_attention._pad_to_multiple(jnp.zeros((1, length)), block, 1).shape[1]
    assert block % 128 == 0 and block <= 512 and padded % block == 0 and padded - length < 128


def test_auto_is_what_the_devices_run_best(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        fused_attention.select_implementation("auto", jnp.float32, 999) == "xla"
        and fused_attention.select_implementation("splash", jnp.float32, 9) == "splash"
    )
    ways = (
        ("tpu", jnp.float32, 512, "splash"),
        ("tpu", jnp.bfloat16, 157, "xla"),
        ("gpu", jnp.bfloat16, 157, "cudnn"),
        ("gpu", jnp.float32, 512, "xla"),
        ("cpu", jnp.bfloat16, 512, "xla"),
    )
    for platform, dtype, keys, best in ways:
        device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
        mesh = AbstractMesh((1,), ("data",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):  # a plan is made where its devices are not
            assert fused_attention.select_implementation("auto", jnp.dtype(dtype), keys) == best
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda name=platform: name)
            assert fused_attention.select_implementation("auto", jnp.dtype(dtype), keys) == best
    with pytest.raises(
        UserError, match="config.attention_impl is 'fast': choose one of auto, xla, splash, cudnn"
    ):
        make(ModelSpec, {"attention_impl": "fast"}, "config")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_is_softmax_and_a_product(dtype: str) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    logits = 8 * jax.random.normal(keys[0], (2, 3, 5, 7))
    logits = (
        jnp.where(jax.random.bernoulli(keys[1], 0.3, logits.shape), -1e9, logits)
        .at[0, 0, 0]
        .set(-1e9)
    )
    value = jax.random.normal(keys[2], (2, 3, 7, 4), dtype)

    def softmax(logits: Array, value: Array) -> Array:
        return jnp.einsum(
            "bhlm,bhmk->bhlk", jax.nn.softmax(logits), value.astype(jnp.float32)
        ).astype(value.dtype)

    pulled = jax.random.normal(keys[3], (2, 3, 5, 4), dtype)
    (out, back), (expected, expected_back) = (
        jax.vjp(each, logits, value) for each in (attention.softmax_matmul, softmax)
    )
    rounding = 16 * float(jnp.finfo(dtype).eps)
    for a, b in zip((out, *back(pulled)), (expected, *expected_back(pulled)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            *(np.asarray(each, np.float32) for each in (a, b)),
            atol=rounding * float(jnp.abs(b).max()),
        )
