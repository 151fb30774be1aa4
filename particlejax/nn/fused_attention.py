# SPDX-License-Identifier: Apache-2.0
"""Fused attention kernels that never write the logits: splash attention on TPUs, cuDNN on GPUs.

They support only dot products and masks. The distance bias is linear in features of query and key
(nn/attention.py), so it is folded into the product: queries and keys get a few more numbers.
Legend: B rows, L queries, M keys, H heads, K width of a head.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from particlejax.distributed.sharding import ROWS

_LANE = 128  # block sizes are multiples of this
_BLOCK = 512  # largest block size
_FEW = 256  # up to this many keys XLA is faster on TPUs
_EIGHT = 8  # cuDNN needs head widths that are multiples of this
_BACKENDS = {"tpu": "splash", "gpu": "cudnn"}


def chosen(attention: str, dtype: jnp.dtype, keys: int) -> str:
    """'xla', 'splash' or 'cudnn': as given, or for 'auto' the best one for the mesh's (or default)
    devices.

    With few keys XLA is faster on a TPU: the logits are smaller than the padding of a kernel. In a
    plan for the 157 visible cubes of VideoMAE-B, a third of the step went into padding and layout
    changes for splash attention.
    """
    if attention != "auto":
        return attention
    device = jax.sharding.get_abstract_mesh().abstract_device
    best = _BACKENDS.get(device.platform if device else jax.default_backend(), "xla")
    # cuDNN has no float32 kernel
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
    """Augments queries and keys so that their product includes the distance bias and token-size
    terms.

    places: of queries [B, L, 3] and keys [B, M, 3]. These terms need more than bfloat16 precision,
    so each number is split into parts whose sum is exact to 16 bits.
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


# (query, key) pairs of split parts whose products matter
_PAIRS = {1: ((0, 0),), 2: ((0, 0), (1, 0), (0, 1))}


def _parts(x: Array, dtype: jnp.dtype, number: int) -> list[Array]:
    """Splits x into arrays of `dtype` that sum to x: one for float32, else from high to low
    bits.
    """
    if dtype == jnp.float32:
        return [x]
    found = []
    for _ in range(number):
        info = jnp.finfo(dtype)
        # XLA would remove a cast and its inverse
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
    """softmax(query key^T) value within segments, [B, H, L, K]; sharded by row, head, sequence.

    segments: of queries [B, L] and keys [B, M]. The output is undefined for a query in a segment
    without keys. With a sharded sequence each device gathers all keys and values.
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
        splash_attention as kernels,  # takes seconds to import, needed on TPUs only
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
    """Block size: as few blocks as possible with at most one lane of padding."""
    lanes = -(-length // _LANE)
    return _LANE * next(n for n in range(min(lanes, _BLOCK // _LANE), 0, -1) if lanes % n == 0)


def _padded(x: Array, block: int, axis: int) -> Array:
    """Pads x with zeros to a multiple of the block; zero is the empty segment."""
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
    """softmax(query key^T) value under the mask, [B, H, L, K]; bfloat16 or float16, head width up
    to 128.

    cuDNN needs equal widths of values and keys, in multiples of eight: pads all, slices the output.
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
