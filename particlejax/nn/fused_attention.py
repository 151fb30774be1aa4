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

from particlejax.distributed.sharding import BATCH_AXES

_LANE = 128  # block sizes are multiples of this
_MAX_BLOCK = 512  # largest block size
_MAX_KEYS_FOR_XLA = 256  # up to this many keys XLA is faster on TPUs
_CUDNN_WIDTH_MULTIPLE = 8  # cuDNN needs head widths that are multiples of this
_BACKENDS = {"tpu": "splash", "gpu": "cudnn"}


def select_implementation(attention_impl: str, dtype: jnp.dtype, num_keys: int) -> str:
    """'xla', 'splash' or 'cudnn': as given, or for 'auto' the best one for the mesh's (or default)
    devices.

    With few keys XLA is faster on a TPU: the logits are smaller than the padding of a kernel. In a
    plan for the 157 visible cubes of VideoMAE-B, a third of the step went into padding and layout
    changes for splash attention.
    """
    if attention_impl != "auto":
        return attention_impl
    device = jax.sharding.get_abstract_mesh().abstract_device
    best = _BACKENDS.get(device.platform if device else jax.default_backend(), "xla")
    # cuDNN has no float32 kernel
    if (
        best == "splash"
        and num_keys <= _MAX_KEYS_FOR_XLA
        or best == "cudnn"
        and dtype == jnp.float32
    ):
        return "xla"
    return best


def fold_bias_into_qk(
    query_BHLK: Array,
    key_BHMK: Array,
    places: tuple[Array, Array],
    sharpness_H3: Array | None,
    size_BM: Array | None,
) -> tuple[Array, Array]:
    """Augments queries and keys so that their product includes the distance bias and token-size
    terms.

    places: of queries [B, L, 3] and keys [B, M, 3]. These terms need more than bfloat16 precision,
    so each number is split into parts whose sum is exact to 16 bits.
    """
    dtype, num_heads = query_BHLK.dtype, query_BHLK.shape[1]
    query_terms, key_terms, key_bias = (
        [],
        [],
        jnp.zeros((key_BHMK.shape[0], num_heads, key_BHMK.shape[2]), jnp.float32),
    )
    if sharpness_H3 is not None:
        query_terms = _split_precision(
            2 * places[0][:, None] * sharpness_H3[None, :, None], dtype, 2
        )
        key_terms = _split_precision(
            jnp.broadcast_to(places[1][:, None], (*key_bias.shape, 3)), dtype, 2
        )
        query_terms, key_terms = (
            [query_terms[i] for i, _ in _SPLIT_PAIRS[len(query_terms)]],
            [key_terms[j] for _, j in _SPLIT_PAIRS[len(key_terms)]],
        )
        key_bias -= jnp.einsum("hk,bmk->bhm", sharpness_H3, places[1] ** 2)
    if size_BM is not None:
        key_bias += jnp.log(jnp.maximum(size_BM, 1.0))[:, None]
    if sharpness_H3 is None and size_BM is None:
        return query_BHLK, key_BHMK
    key_bias = _split_precision(key_bias[..., None], dtype, 3)
    ones = jnp.ones((*query_BHLK.shape[:3], len(key_bias)), dtype)
    return jnp.concatenate([query_BHLK, *query_terms, ones], axis=-1), jnp.concatenate(
        [key_BHMK, *key_terms, *key_bias], axis=-1
    )


# (query, key) pairs of split parts whose products matter
_SPLIT_PAIRS = {1: ((0, 0),), 2: ((0, 0), (1, 0), (0, 1))}


def _split_precision(x: Array, dtype: jnp.dtype, num_parts: int) -> list[Array]:
    """Splits x into arrays of `dtype` that sum to x: one for float32, else from high to low
    bits.
    """
    if dtype == jnp.float32:
        return [x]
    parts = []
    for _ in range(num_parts):
        finfo = jnp.finfo(dtype)
        # XLA would remove a cast and its inverse
        first = jax.lax.reduce_precision(x, finfo.nexp, finfo.nmant)
        parts.append(first.astype(dtype))
        x = x - first
    return parts


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
    row_axes = (
        BATCH_AXES
        if query_BHLK.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0
        else None
    )
    head_axis = "tensor" if query_BHLK.shape[1] % mesh.shape["tensor"] == 0 else None
    num_shards = mesh.shape["sequence"]
    sequence_axis = (
        "sequence"
        if num_shards > 1
        and query_BHLK.shape[2] % num_shards == key_BHMK.shape[2] % num_shards == 0
        else None
    )

    def local(
        query: Array, key: Array, value: Array, query_segment: Array, key_segment: Array
    ) -> Array:
        if sequence_axis:
            key, value = (
                jax.lax.all_gather(x, sequence_axis, axis=2, tiled=True) for x in (key, value)
            )
            key_segment = jax.lax.all_gather(key_segment, sequence_axis, axis=1, tiled=True)
        return _splash(query, key, value, query_segment, key_segment, interpret=interpret)

    qkv_spec, segment_spec = P(row_axes, head_axis, sequence_axis), P(row_axes, sequence_axis)
    return jax.shard_map(
        local,
        in_specs=(qkv_spec, qkv_spec, qkv_spec, segment_spec, segment_spec),
        out_specs=qkv_spec,
        check_vma=False,
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

    length, (query_block, key_block) = (
        query.shape[2],
        (_block_size(x.shape[2]) for x in (query, key)),
    )
    query, key, value = (
        _pad_to_multiple(query, query_block, 2),
        _pad_to_multiple(key, key_block, 2),
        _pad_to_multiple(value, key_block, 2),
    )
    query_segment, key_segment = (
        _pad_to_multiple(query_segment, query_block, 1),
        _pad_to_multiple(key_segment, key_block, 1),
    )
    block_sizes = kernels.BlockSizes(
        block_q=query_block,
        block_kv=key_block,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        block_q_dq=query_block,
        block_kv_dq=key_block,
    )
    mask = kernels.MultiHeadMask(
        [kernels.FullMask((query.shape[2], key.shape[2]))] * query.shape[1]
    )
    kernel = kernels.make_splash_mha(
        mask, block_sizes=block_sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    attended = jax.vmap(kernel)(query, key, value, kernels.SegmentIds(query_segment, key_segment))
    return attended[:, :, :length].astype(value.dtype)


def _block_size(length: int) -> int:
    """Block size: as few blocks as possible with at most one lane of padding."""
    num_lanes = -(-length // _LANE)
    return _LANE * next(
        n for n in range(min(num_lanes, _MAX_BLOCK // _LANE), 0, -1) if num_lanes % n == 0
    )


def _pad_to_multiple(x: Array, multiple: int, axis: int) -> Array:
    """Pads x with zeros to a multiple of the block; zero is the empty segment."""
    pad_widths = [(0, 0)] * x.ndim
    pad_widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, pad_widths) if pad_widths[axis][1] else x


def cudnn(
    query_BHLK: Array,
    key_BHMK: Array,
    value_BHMK: Array,
    mask_BLM: Array,
    implementation: str = "cudnn",
) -> Array:
    """softmax(query key^T) value under the mask, [B, H, L, K]; bfloat16 or float16, head width up
    to 128.

    cuDNN needs equal widths of values and keys, in multiples of eight: pads all, slices the output.
    """
    width = value_BHMK.shape[3]
    padded_width = query_BHLK.shape[3] + -query_BHLK.shape[3] % _CUDNN_WIDTH_MULTIPLE
    padded = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padded_width - x.shape[3])))
        for x in (query_BHLK, key_BHMK, value_BHMK)
    )
    q, k, v = (x.swapaxes(1, 2) for x in padded)
    attended = jax.nn.dot_product_attention(
        q, k, v, mask=mask_BLM[:, None], scale=1.0, implementation=implementation
    )
    return attended[..., :width].swapaxes(1, 2)
