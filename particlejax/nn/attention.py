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

FAR = -1e9  # masked logit; finite, so that an empty slot's softmax stays finite


def same_segment(query_BL: Array, key_BM: Array) -> Array:
    """Attention mask, bool [B, L, M]: keys of the query's clip; a query in an empty slot attends to
    nothing.
    """
    return (query_BL[:, :, None] == key_BM[:, None, :]) & (key_BM[:, None, :] > 0)


class Between(NamedTuple):
    """Positions of queries [B, L, 3] and keys [B, M, 3], and the mask between them."""

    query: Array
    key: Array
    may: Array  # bool [B, L, M]
    mass: Array | None = (
        None  # float32 [B, M], number of particles merged into a key; None: one each
    )
    segments: tuple[Array, Array] | None = (
        None  # of queries [B, L] and keys [B, M], for kernels that compute `may` from them
    )


def between(query: Tokens, key: Tokens) -> Between:
    """The context of attention from queries to keys within segments."""
    return Between(
        query.place,
        key.place,
        same_segment(query.segment, key.segment),
        key.mass,
        (query.segment, key.segment),
    )


class Nearness(nn.Module):
    """Distance bias: logits [B, H, L, M] that fall with squared distance at a learned rate per head
    and axis.

    A locality prior in continuous time and space, which a Transformer otherwise learns from many
    clips. Heads are initialized from narrow to wide, alternating in time. The bias is linear in
    features of query and key, so no pairwise distances are formed.
    """

    heads: int

    def setup(self) -> None:
        self.log_sharpness = self.param("log_sharpness", _spread, (self.heads, 3))

    def sharpness(self) -> Array:
        """Decay rate of each head's logits along each axis, [H, 3]."""
        return jnp.exp(self.log_sharpness)

    def __call__(self, where: Between) -> Array:
        sharpness = self.sharpness()
        # -s (q - k)^2 without the query-only term, which cancels in the softmax
        query = 2 * where.query[:, None] * sharpness[None, :, None]
        cross = jnp.einsum("bhlk,bmk->bhlm", query, where.key)
        return cross - jnp.einsum("hk,bmk->bhm", sharpness, where.key**2)[:, :, None]


def _spread(key: Array, shape: tuple[int, int]) -> Array:
    del key
    heads = np.arange(shape[0])
    space = np.geomspace(0.1, 1.0, shape[0]) if shape[0] > 1 else np.array([0.3])  # frames
    time = np.where(heads % 2, 2.0, 0.3)  # seconds
    return jnp.asarray(-np.log(2 * np.stack([time, space, space], axis=-1) ** 2), jnp.float32)


class Style(NamedTuple):
    """Settings of a block; each default disables its option."""

    near: bool = True
    rotary: bool = False
    qk_norm: bool = False  # QK normalization keeps logits bounded (arXiv:2302.05442)
    gated: bool = False  # SwiGLU (arXiv:2002.05202) instead of GELU
    layer_scale: float = 0.0  # initial LayerScale of branches (arXiv:2103.17239); 0: none
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attention: str = "xla"  # or auto, splash, cudnn (nn/fused_attention.py)


class Attention(nn.Module):
    """Multi-head attention of queries [B, L, D] to keys [B, M, D], split into steps so that parts
    of a row can attend separately.
    """

    width: int
    heads: int
    style: Style

    def setup(self) -> None:
        split, dtype = (self.heads, self.width // self.heads), self.style.dtype
        self.query, self.key, self.value = (DenseGeneral(split, dtype=dtype) for _ in range(3))
        if self.style.qk_norm:
            self.query_norm, self.key_norm = nn.RMSNorm(dtype=dtype), nn.RMSNorm(dtype=dtype)
        if self.style.near:
            self.nearness = Nearness(self.heads)
        self.out = DenseGeneral(self.width, axis=(-2, -1), dtype=dtype)

    def __call__(self, x_BLD: Array, y_BMD: Array, where: Between) -> Array:
        return self.answer(self.ask(x_BLD, where.query), *self.tell(y_BMD, where.key), where)

    def ask(self, x_BLD: Array, place: Array) -> Array:
        """Queries [B, H, L, K]: heads first, which makes XLA's batched product on CPU several times
        faster.
        """
        query = self.query(x_BLD).swapaxes(1, 2)
        if self.style.qk_norm:
            query = self.query_norm(query)
        return rope.turn(query, place) if self.style.rotary else query

    def tell(self, y_BMD: Array, place: Array) -> tuple[Array, Array]:
        """Keys and values [B, H, M, K]."""
        key, value = self.key(y_BMD).swapaxes(1, 2), self.value(y_BMD).swapaxes(1, 2)
        if self.style.qk_norm:
            key = self.key_norm(key)
        return rope.turn(key, place) if self.style.rotary else key, value

    def answer(self, query: Array, key: Array, value: Array, where: Between) -> Array:
        """The attention output, [B, L, D]."""
        scaled = query * query.shape[-1] ** -0.5
        prefix = self.get_variable("params", "prefix")  # present only if fine-tuning added it
        how = (
            "xla"
            if prefix is not None
            else fused_attention.chosen(self.style.attention, scaled.dtype, key.shape[2])
        )
        read = (
            self._plain(scaled, key, value, where, prefix)
            if how == "xla"
            else self._flash(how, scaled, key, value, where)
        )
        # a query without keys would otherwise average the whole row
        some = where.may.any(axis=-1)[:, None, :, None]
        return self.out(jnp.where(some, read, 0).swapaxes(1, 2))

    def _flash(self, how: str, scaled: Array, key: Array, value: Array, where: Between) -> Array:
        sharpness = self.nearness.sharpness() if self.style.near else None
        scaled, key = fused_attention.fold(
            scaled, key, (where.query, where.key), sharpness, where.mass
        )
        return (
            fused_attention.splash(scaled, key, value, where.segments)
            if how == "splash"
            else fused_attention.cudnn(scaled, key, value, where.may)
        )

    def _plain(self, scaled: Array, key: Array, value: Array, where: Between, prefix: Any) -> Array:
        logits = jnp.einsum("bhlk,bhmk->bhlm", scaled, key, preferred_element_type=jnp.float32)
        if self.style.near:
            logits += self.nearness(where)
        # proportional attention for merged tokens (arXiv:2210.09461, section 3)
        if where.mass is not None:
            logits += jnp.log(jnp.maximum(where.mass, 1.0))[:, None, None]
        logits = jnp.where(where.may[:, None], logits, FAR)
        if prefix is not None:
            sharpness = self.nearness.sharpness() if self.style.near else None
            logits = jnp.concatenate(
                [logits, peft_hooks.prefix_logits(scaled, prefix, sharpness, where.query)], axis=-1
            )
            value = _append(value, prefix["value"])
        return mixed(logits, value)


@jax.custom_vjp
def mixed(logits_BHLM: Array, value_BHMK: Array) -> Array:
    """softmax(logits) value, [B, H, L, K] in the dtype of the values; logits and sums are float32.

    Normalizes the output instead of the weights; the backward pass gets the weights' mean gradient
    from the output's product with its gradient (arXiv:2205.14135, section 3.1), so fewer arrays of
    the logits' size are read and written.
    """
    return _mix(logits_BHLM, value_BHMK)[0]


def _mix(logits: Array, value: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    heights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = heights.sum(axis=-1, keepdims=True)
    weights = heights.astype(value.dtype)
    out = jnp.einsum("bhlm,bhmk->bhlk", weights, value, preferred_element_type=jnp.float32) / total
    return out.astype(value.dtype), (weights, total, out.astype(value.dtype), value)


def _unmix(kept: tuple[Array, Array, Array, Array], grad: Array) -> tuple[Array, Array]:
    weights, total, out, value = kept
    mean = (grad.astype(jnp.float32) * out).sum(axis=-1, keepdims=True) / total
    grad = (grad / total).astype(value.dtype)
    dvalue = jnp.einsum("bhlm,bhlk->bhmk", weights, grad, preferred_element_type=jnp.float32)
    dlogits = weights * (
        jnp.einsum("bhlk,bhmk->bhlm", grad, value, preferred_element_type=jnp.float32) - mean
    )
    return dlogits, dvalue.astype(value.dtype)


mixed.defvjp(_mix, _unmix)


def _append(value_BHMK: Array, more_ZHK: Array) -> Array:
    """Appends values that every row may read."""
    more = jnp.broadcast_to(
        more_ZHK.swapaxes(0, 1)[None], (*value_BHMK.shape[:2], *more_ZHK.shape[::2])
    )
    # cast last: the gradient is a float32 sum
    return jnp.concatenate([value_BHMK, more.astype(value_BHMK.dtype)], axis=2)
