# SPDX-License-Identifier: Apache-2.0
"""Attention over packed rows: within segments, with a bias from continuous positions.

Legend: B rows, L queries, M keys, D width, H heads, K width of a head.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.nn import fused_attention, peft_hooks, rope
from particlejax.nn.dense import DenseGeneral
from particlejax.nn.token_reduction import Tokens

MASK_VALUE = -1e9  # masked logit; finite, so that an empty slot's softmax stays finite


def same_segment(query_segment_BL: Array, key_segment_BM: Array) -> Array:
    """Attention mask, bool [B, L, M]: keys of the query's clip; a query in an empty slot attends to
    nothing.
    """
    return (query_segment_BL[:, :, None] == key_segment_BM[:, None, :]) & (
        key_segment_BM[:, None, :] > 0
    )


class AttentionContext(NamedTuple):
    """Positions of queries [B, L, 3] and keys [B, M, 3], and the mask between them."""

    query_place: Array
    key_place: Array
    mask: Array  # bool [B, L, M]
    key_size: Array | None = (
        None  # float32 [B, M], number of particles merged into a key; None: one each
    )
    segments: tuple[Array, Array] | None = (
        None  # of queries [B, L] and keys [B, M], for kernels that compute `may` from them
    )


def make_attention_context(query: Tokens, key: Tokens) -> AttentionContext:
    """The context of attention from queries to keys within segments."""
    return AttentionContext(
        query.place,
        key.place,
        same_segment(query.segment, key.segment),
        key.size,
        (query.segment, key.segment),
    )


class DistanceBias(nn.Module):
    """Distance bias: logits [B, H, L, M] that fall with squared distance at a learned rate per head
    and axis.

    A locality prior in continuous time and space, which a Transformer otherwise learns from many
    clips. Heads are initialized from narrow to wide, alternating in time. The bias is linear in
    features of query and key, so no pairwise distances are formed.
    """

    num_heads: int

    def setup(self) -> None:
        self.log_sharpness = self.param("log_sharpness", _init_log_sharpness, (self.num_heads, 3))

    def sharpness(self) -> Array:
        """Decay rate of each head's logits along each axis, [H, 3]."""
        return jnp.exp(self.log_sharpness)

    def __call__(self, context: AttentionContext) -> Array:
        sharpness = self.sharpness()
        # -s (q - k)^2 without the query-only term, which cancels in the softmax
        query = 2 * context.query_place[:, None] * sharpness[None, :, None]
        cross = jnp.einsum("bhlk,bmk->bhlm", query, context.key_place)
        return cross - jnp.einsum("hk,bmk->bhm", sharpness, context.key_place**2)[:, :, None]


def _init_log_sharpness(key: Array, shape: tuple[int, int]) -> Array:
    del key
    head_index = np.arange(shape[0])
    space = np.geomspace(0.1, 1.0, shape[0]) if shape[0] > 1 else np.array([0.3])  # frames
    time = np.where(head_index % 2, 2.0, 0.3)  # seconds
    return jnp.asarray(-np.log(2 * np.stack([time, space, space], axis=-1) ** 2), jnp.float32)


class BlockConfig(NamedTuple):
    """Settings of a block; each default disables its option."""

    distance_bias: bool = True
    rope: bool = False
    qk_norm: bool = False  # QK normalization keeps logits bounded (arXiv:2302.05442)
    gated_mlp: bool = False  # SwiGLU (arXiv:2002.05202) instead of GELU
    layer_scale: float = 0.0  # initial LayerScale of branches (arXiv:2103.17239); 0: none
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attention_impl: str = "xla"  # or auto, splash, cudnn (nn/fused_attention.py)


class Attention(nn.Module):
    """Multi-head attention of queries [B, L, D] to keys [B, M, D], split into steps so that parts
    of a row can attend separately.
    """

    width: int
    num_heads: int
    config: BlockConfig

    def setup(self) -> None:
        head_shape, dtype = (self.num_heads, self.width // self.num_heads), self.config.dtype
        self.query, self.key, self.value = (DenseGeneral(head_shape, dtype=dtype) for _ in range(3))
        if self.config.qk_norm:
            self.query_norm, self.key_norm = nn.RMSNorm(dtype=dtype), nn.RMSNorm(dtype=dtype)
        if self.config.distance_bias:
            self.nearness = DistanceBias(self.num_heads)
        self.out = DenseGeneral(self.width, axis=(-2, -1), dtype=dtype)

    def __call__(self, x_BLD: Array, y_BMD: Array, context: AttentionContext) -> Array:
        return self.attend(
            self.project_q(x_BLD, context.query_place),
            *self.project_kv(y_BMD, context.key_place),
            context,
        )

    def project_q(self, x_BLD: Array, place: Array) -> Array:
        """Queries [B, H, L, K]: heads first, which makes XLA's batched product on CPU several times
        faster.
        """
        query = self.query(x_BLD).swapaxes(1, 2)
        if self.config.qk_norm:
            query = self.query_norm(query)
        return rope.apply_rope(query, place) if self.config.rope else query

    def project_kv(self, y_BMD: Array, place: Array) -> tuple[Array, Array]:
        """Keys and values [B, H, M, K]."""
        key, value = self.key(y_BMD).swapaxes(1, 2), self.value(y_BMD).swapaxes(1, 2)
        if self.config.qk_norm:
            key = self.key_norm(key)
        return rope.apply_rope(key, place) if self.config.rope else key, value

    def attend(self, query: Array, key: Array, value: Array, context: AttentionContext) -> Array:
        """The attention output, [B, L, D]."""
        scaled_query = query * query.shape[-1] ** -0.5
        prefix = self.get_variable("params", "prefix")  # present only if fine-tuning added it
        implementation = (
            "xla"
            if prefix is not None
            else fused_attention.select_implementation(
                self.config.attention_impl, scaled_query.dtype, key.shape[2]
            )
        )
        attended = (
            self._attend_xla(scaled_query, key, value, context, prefix)
            if implementation == "xla"
            else self._attend_fused(implementation, scaled_query, key, value, context)
        )
        # a query without keys would otherwise average the whole row
        can_attend = context.mask.any(axis=-1)[:, None, :, None]
        return self.out(jnp.where(can_attend, attended, 0).swapaxes(1, 2))

    def _attend_fused(
        self,
        implementation: str,
        scaled_query: Array,
        key: Array,
        value: Array,
        context: AttentionContext,
    ) -> Array:
        sharpness = self.nearness.sharpness() if self.config.distance_bias else None
        scaled_query, key = fused_attention.fold_bias_into_qk(
            scaled_query, key, (context.query_place, context.key_place), sharpness, context.key_size
        )
        return (
            fused_attention.splash(scaled_query, key, value, context.segments)
            if implementation == "splash"
            else fused_attention.cudnn(scaled_query, key, value, context.mask)
        )

    def _attend_xla(
        self, scaled_query: Array, key: Array, value: Array, context: AttentionContext, prefix: Any
    ) -> Array:
        logits = jnp.einsum(
            "bhlk,bhmk->bhlm", scaled_query, key, preferred_element_type=jnp.float32
        )
        if self.config.distance_bias:
            logits += self.nearness(context)
        # proportional attention for merged tokens (arXiv:2210.09461, section 3)
        if context.key_size is not None:
            logits += jnp.log(jnp.maximum(context.key_size, 1.0))[:, None, None]
        logits = jnp.where(context.mask[:, None], logits, MASK_VALUE)
        if prefix is not None:
            sharpness = self.nearness.sharpness() if self.config.distance_bias else None
            logits = jnp.concatenate(
                [
                    logits,
                    peft_hooks.prefix_logits(scaled_query, prefix, sharpness, context.query_place),
                ],
                axis=-1,
            )
            value = _append_prefix_values(value, prefix["value"])
        return softmax_matmul(logits, value)


@jax.custom_vjp
def softmax_matmul(logits_BHLM: Array, value_BHMK: Array) -> Array:
    """softmax(logits) value, [B, H, L, K] in the dtype of the values; logits and sums are float32.

    Normalizes the output instead of the weights; the backward pass gets the weights' mean gradient
    from the output's product with its gradient (arXiv:2205.14135, section 3.1), so fewer arrays of
    the logits' size are read and written.
    """
    return _softmax_matmul_fwd(logits_BHLM, value_BHMK)[0]


def _softmax_matmul_fwd(
    logits: Array, value: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    exp_logits = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    normalizer = exp_logits.sum(axis=-1, keepdims=True)
    weights = exp_logits.astype(value.dtype)
    out = (
        jnp.einsum("bhlm,bhmk->bhlk", weights, value, preferred_element_type=jnp.float32)
        / normalizer
    )
    return out.astype(value.dtype), (weights, normalizer, out.astype(value.dtype), value)


def _softmax_matmul_bwd(
    residuals: tuple[Array, Array, Array, Array], grad: Array
) -> tuple[Array, Array]:
    weights, normalizer, out, value = residuals
    mean_grad = (grad.astype(jnp.float32) * out).sum(axis=-1, keepdims=True) / normalizer
    grad = (grad / normalizer).astype(value.dtype)
    dvalue = jnp.einsum("bhlm,bhlk->bhmk", weights, grad, preferred_element_type=jnp.float32)
    dlogits = weights * (
        jnp.einsum("bhlk,bhmk->bhlm", grad, value, preferred_element_type=jnp.float32) - mean_grad
    )
    return dlogits, dvalue.astype(value.dtype)


softmax_matmul.defvjp(_softmax_matmul_fwd, _softmax_matmul_bwd)


def _append_prefix_values(value_BHMK: Array, prefix_ZHK: Array) -> Array:
    """Appends values that every row may read."""
    prefix = jnp.broadcast_to(
        prefix_ZHK.swapaxes(0, 1)[None], (*value_BHMK.shape[:2], *prefix_ZHK.shape[::2])
    )
    # cast last: the gradient is a float32 sum
    return jnp.concatenate([value_BHMK, prefix.astype(value_BHMK.dtype)], axis=2)
