# SPDX-License-Identifier: Apache-2.0
"""Attention by kernels that never write the logits: splash attention on TPUs, cuDNN's on GPUs.

They know products of queries and keys, and masks. What falls with distance is linear in features of
both (nn/attention.py), so it becomes part of the product: queries and keys are widened by a few
numbers. Legend: B rows, L queries, M keys, H heads, K width of a head.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from particlejax.distributed.sharding import ROWS

_LANE = 128  # slots of which a kernel's blocks are multiples
_BLOCK = 512  # slots of the largest one
_FEW = 256  # keys up to which TPUs write the logits
_EIGHT = 8  # what cuDNN wants a head's width to be a multiple of
_BACKENDS = {"tpu": "splash", "gpu": "cudnn"}


def chosen(attention: str, dtype: jnp.dtype, keys: int) -> str:
    """'xla', 'splash' or 'cudnn': what was asked for, or for 'auto' what the mesh's devices, or
    else those at hand, run best.

    With few keys a TPU does better to write the logits, which are then smaller than what a kernel
    wants padded: planned for VideoMAE-B's 157 visible cubes, a third of the step went into the
    surroundings of splash attention.
    """
    if attention != "auto":
        return attention
    device = jax.sharding.get_abstract_mesh().abstract_device
    best = _BACKENDS.get(device.platform if device else jax.default_backend(), "xla")
    # which cuDNN has no kernel for
    if best == "splash" and keys <= _FEW or best == "cudnn" and dtype == jnp.float32:
        return "xla"
    return best


def fold(
    query_BHLK: Array,
    key_BHMK: Array,
    places: tuple[Array, Array],
    sharpness_H3: Array | None,
    mass_BM: Array | None,
) -> tuple[Array, Array]:
    """Queries and keys whose product holds the terms of place and of mass, too.

    places: of queries [B, L, 3] and keys [B, M, 3]. In bfloat16 these terms would lose what tells
    near from nearer, so their numbers stand in parts whose sum is exact to 16 bits.
    """
    dtype, heads = query_BHLK.dtype, query_BHLK.shape[1]
    asked, told, alone = (
        [],
        [],
        jnp.zeros((key_BHMK.shape[0], heads, key_BHMK.shape[2]), jnp.float32),
    )
    if sharpness_H3 is not None:
        asked = _parts(2 * places[0][:, None] * sharpness_H3[None, :, None], dtype, 2)
        told = _parts(jnp.broadcast_to(places[1][:, None], (*alone.shape, 3)), dtype, 2)
        asked, told = (
            [asked[i] for i, _ in _PAIRS[len(asked)]],
            [told[j] for _, j in _PAIRS[len(told)]],
        )
        alone -= jnp.einsum("hk,bmk->bhm", sharpness_H3, places[1] ** 2)
    if mass_BM is not None:
        alone += jnp.log(jnp.maximum(mass_BM, 1.0))[:, None]
    if sharpness_H3 is None and mass_BM is None:
        return query_BHLK, key_BHMK
    alone = _parts(alone[..., None], dtype, 3)
    ones = jnp.ones((*query_BHLK.shape[:3], len(alone)), dtype)
    return jnp.concatenate([query_BHLK, *asked, ones], axis=-1), jnp.concatenate(
        [key_BHMK, *told, *alone], axis=-1
    )


# parts of queries and keys whose products count
_PAIRS = {1: ((0, 0),), 2: ((0, 0), (1, 0), (0, 1))}


def _parts(x: Array, dtype: jnp.dtype, number: int) -> list[Array]:
    """Arrays of `dtype` that sum to x: itself in float32, else its first bits, the next ones, and
    so on.
    """
    if dtype == jnp.float32:
        return [x]
    found = []
    for _ in range(number):
        info = jnp.finfo(dtype)
        # a cast there and back would be left out by XLA
        first = jax.lax.reduce_precision(x, info.nexp, info.nmant)
        found.append(first.astype(dtype))
        x = x - first
    return found


def splash(
    query_BHLK: Array,
    key_BHMK: Array,
    value_BHMK: Array,
    segments: tuple[Array, Array],
    interpret: bool = False,
) -> Array:
    """softmax(query key^T) value within segments, [B, H, L, K]; on every device its own rows, heads
    and part of the sequence.

    segments: of queries [B, L] and keys [B, M]. A query in a segment without keys reads anything.
    Along the sequence a device gathers the keys and values of all parts for its own queries.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _splash(query_BHLK, key_BHMK, value_BHMK, *segments, interpret=interpret)
    rows = ROWS if query_BHLK.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS) == 0 else None
    heads = "tensor" if query_BHLK.shape[1] % mesh.shape["tensor"] == 0 else None
    parts = mesh.shape["sequence"]
    along = (
        "sequence"
        if parts > 1 and query_BHLK.shape[2] % parts == key_BHMK.shape[2] % parts == 0
        else None
    )

    def local(query: Array, key: Array, value: Array, asking: Array, told: Array) -> Array:
        if along:
            key, value = (jax.lax.all_gather(x, along, axis=2, tiled=True) for x in (key, value))
            told = jax.lax.all_gather(told, along, axis=1, tiled=True)
        return _splash(query, key, value, asking, told, interpret=interpret)

    whole, ids = P(rows, heads, along), P(rows, along)
    return jax.shard_map(
        local, in_specs=(whole, whole, whole, ids, ids), out_specs=whole, check_vma=False
    )(query_BHLK, key_BHMK, value_BHMK, *segments)


def _splash(
    query: Array,
    key: Array,
    value: Array,
    query_segment: Array,
    key_segment: Array,
    *,
    interpret: bool,
) -> Array:
    from jax.experimental.pallas.ops.tpu import (
        splash_attention as kernels,  # seconds to import, for TPUs alone
    )

    length, (q, k) = query.shape[2], (_block(x.shape[2]) for x in (query, key))
    query, key, value = _padded(query, q, 2), _padded(key, k, 2), _padded(value, k, 2)
    query_segment, key_segment = _padded(query_segment, q, 1), _padded(key_segment, k, 1)
    sizes = kernels.BlockSizes(
        block_q=q, block_kv=k, block_q_dkv=q, block_kv_dkv=k, block_q_dq=q, block_kv_dq=k
    )
    mask = kernels.MultiHeadMask(
        [kernels.FullMask((query.shape[2], key.shape[2]))] * query.shape[1]
    )
    kernel = kernels.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    read = jax.vmap(kernel)(query, key, value, kernels.SegmentIds(query_segment, key_segment))
    return read[:, :, :length].astype(value.dtype)


def _block(length: int) -> int:
    """The size of blocks: as few as possible without more padding than a lane's worth."""
    lanes = -(-length // _LANE)
    return _LANE * next(n for n in range(min(lanes, _BLOCK // _LANE), 0, -1) if lanes % n == 0)


def _padded(x: Array, block: int, axis: int) -> Array:
    """x up to a multiple of the block; what is added is zero, which is the segment of nothing."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths) if widths[axis][1] else x


def cudnn(
    query_BHLK: Array,
    key_BHMK: Array,
    value_BHMK: Array,
    may_BLM: Array,
    implementation: str = "cudnn",
) -> Array:
    """softmax(query key^T) value where it may, [B, H, L, K]; in bfloat16 or float16, heads at most
    128 wide.

    cuDNN wants values as wide as keys, and widths that are multiples of eight: all are padded, the
    answer is cut.
    """
    width = value_BHMK.shape[3]
    wide = query_BHLK.shape[3] + -query_BHLK.shape[3] % _EIGHT
    each = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, wide - x.shape[3])))
        for x in (query_BHLK, key_BHMK, value_BHMK)
    )
    q, k, v = (x.swapaxes(1, 2) for x in each)
    read = jax.nn.dot_product_attention(
        q, k, v, mask=may_BLM[:, None], scale=1.0, implementation=implementation
    )
    return read[..., :width].swapaxes(1, 2)
