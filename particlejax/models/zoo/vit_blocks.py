# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks of published models; the differences between papers are options.

Parameters have the names and axes of `transformer.Block`, stacked, so that shardings, adapters and
layer decay find them. Legend: B clips, L queries, M keys, D width, H heads, K width of a head, T
frames, S positions of a frame.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.nn import attention
from particlejax.nn.dense import Dense, DenseGeneral, matmul

Rotation = tuple[Array, Array]  # cosines and sines [B or 1, L, K] that rotate queries and keys
_INIT = nn.initializers.truncated_normal(0.02)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's approximation
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """Block settings of one architecture."""

    epsilon: float = 1e-6  # of norms
    activation: str = "gelu"  # of ACTIVATIONS
    bias: tuple[bool, bool, bool] = (True, True, True)  # of query, key and value
    post_norm: bool = False  # post-norm as in BERT: norm(x + f(x)) instead of x + f(norm(x))
    gain: bool = False  # norms scale by 1 + parameter instead of parameter
    softcap: float = 0.0  # tanh soft cap of logits; 0: none


@dataclasses.dataclass(frozen=True)
class StackSize:
    """Dimensions of a stack of blocks."""

    width: int
    depth: int
    heads: int
    mlp: int


class Norm(nn.Module):
    """Layer normalization in float32. Its variance is the mean squared deviation: references agree
    to 1e-6.
    """

    epsilon: float = 1e-5
    gain: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        shape, leading_axes = (x.shape[-1],), (None,) * (x.ndim - 1)
        scale = (
            1 + self.param("gain", nn.initializers.zeros, shape)
            if self.gain
            else (self.param("scale", nn.initializers.ones, shape))
        )
        bias = self.param("bias", nn.initializers.zeros, shape)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x * scale[leading_axes] + bias[leading_axes]


class Attention(nn.Module):
    """Multi-head attention of queries [B, L, D] to keys [B, M, D].

    may: attention mask, bool [B or 1, L, M]; None: all. turn: rotary positions of queries and keys
    alike.
    """

    heads: int
    style: BlockStyle = BlockStyle()
    inner: int = 0  # width of all heads together; 0: that of the tokens
    out: bool = True  # whether an output projection follows
    learned_scale: bool = False  # learned scale per head channel, as in VideoPrism's pooling
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        y_BMD: Array,
        mask: Array | None = None,
        rotation: Rotation | None = None,
    ) -> Array:
        inner = self.inner or x_BLD.shape[-1]
        head_shape = (self.heads, inner // self.heads)
        query, key, value = (
            DenseGeneral(head_shape, use_bias=bias, dtype=self.dtype, kernel_init=_INIT, name=name)(
                inputs
            ).swapaxes(1, 2)
            for name, inputs, bias in zip(
                ("query", "key", "value"), (x_BLD, y_BMD, y_BMD), self.style.bias, strict=True
            )
        )
        if rotation is not None:
            query, key = apply_rotation(query, rotation), apply_rotation(key, rotation)
        query *= head_shape[1] ** -0.5
        if self.learned_scale:
            factor = jax.nn.softplus(
                self.param("per_dim_scale", nn.initializers.zeros, head_shape[1:])
            ) / np.log(2)
            query *= factor.astype(self.dtype)[None, None, None]
        logits = jnp.einsum("bhlk,bhmk->bhlm", query, key, preferred_element_type=jnp.float32)
        if self.style.softcap:
            logits = self.style.softcap * jnp.tanh(logits / self.style.softcap)
        if mask is not None:
            logits = jnp.where(mask[:, None], logits, attention.MASK_VALUE)
        attended = attention.softmax_matmul(logits, value).swapaxes(1, 2)
        if not self.out:
            return attended.reshape(*attended.shape[:2], -1)
        return DenseGeneral(
            x_BLD.shape[-1], axis=(-2, -1), dtype=self.dtype, kernel_init=_INIT, name="out"
        )(attended)


def apply_rotation(x_BHLK: Array, rotation: Rotation) -> Array:
    """Rotates pairs of neighboring channels (arXiv:2104.09864)."""
    cos, sin = (table[:, None].astype(x_BHLK.dtype) for table in rotation)
    pairs = x_BHLK.reshape(*x_BHLK.shape[:-1], -1, 2)
    rotated_pairs = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x_BHLK.shape)
    return x_BHLK * cos + rotated_pairs * sin


class Mlp(nn.Module):
    """Two Dense layers with the style's activation between them."""

    hidden: int
    style: BlockStyle = BlockStyle()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        hidden = Dense(self.hidden, dtype=self.dtype, kernel_init=_INIT, name="up")(x_BLD)
        hidden = ACTIVATIONS[self.style.activation](hidden)
        return Dense(x_BLD.shape[-1], dtype=self.dtype, kernel_init=_INIT, name="down")(hidden)


class Block(nn.Module):
    """Attention and MLP with residual connections, pre-norm or post-norm."""

    heads: int
    mlp: int
    style: BlockStyle = BlockStyle()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask: Array | None = None, rotation: Rotation | None = None
    ) -> Array:
        style = self.style
        attention_norm = Norm(style.epsilon, style.gain, name="attention_norm")
        mlp_norm = Norm(style.epsilon, style.gain, name="mlp_norm")
        attention = Attention(self.heads, style, dtype=self.dtype, name="attention")
        mlp = Mlp(self.mlp, style, self.dtype, name="mlp")
        if style.post_norm:
            x_BLD = attention_norm(x_BLD + attention(x_BLD, x_BLD, mask, rotation))
            return mlp_norm(x_BLD + mlp(x_BLD))
        normalized = attention_norm(x_BLD)
        x_BLD += attention(normalized, normalized, mask, rotation)
        return x_BLD + mlp(mlp_norm(x_BLD))


class DividedBlock(nn.Module):
    """Divided attention: over time at each position, then over each frame and the class token
    (arXiv:2102.05095).

    x is the class token and T x S tokens, time outermost. The class token's output is averaged over
    frames.
    """

    frames: int
    heads: int
    mlp: int
    style: BlockStyle = BlockStyle()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        (b, _, d), t, style = x_BLD.shape, self.frames, self.style
        token, grid = x_BLD[:, :1], x_BLD[:, 1:].reshape(b, t, -1, d)
        s = grid.shape[2]
        normalized = Norm(style.epsilon, name="time_norm")(grid.swapaxes(1, 2).reshape(b * s, t, d))
        attended = Attention(self.heads, style, dtype=self.dtype, name="time_attention")(
            normalized, normalized
        )
        attended = Dense(d, dtype=self.dtype, kernel_init=_INIT, name="time_project")(attended)
        grid += attended.reshape(b, s, t, d).swapaxes(1, 2)
        frame = jnp.concatenate([jnp.repeat(token, t, axis=1)[:, :, None], grid], axis=2).reshape(
            b * t, s + 1, d
        )
        normalized = Norm(style.epsilon, name="attention_norm")(frame)
        attended = Attention(self.heads, style, dtype=self.dtype, name="attention")(
            normalized, normalized
        ).reshape(b, t, s + 1, d)
        token += jnp.mean(attended[:, :, 0], axis=1, keepdims=True)
        x_BLD = jnp.concatenate([token, (grid + attended[:, :, 1:]).reshape(b, t * s, d)], axis=1)
        return x_BLD + Mlp(self.mlp, style, self.dtype, name="mlp")(
            Norm(style.epsilon, name="mlp_norm")(x_BLD)
        )


class BlockStack(nn.Module):
    """Blocks with stacked parameters [depth, ...], run by a scan; divided attention if `frames` is
    given.

    Returns the tokens and every block's output [depth, B, L, D].
    """

    size: StackSize
    style: BlockStyle = BlockStyle()
    frames: int = 0
    unroll: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask: Array | None = None, rotation: Rotation | None = None
    ) -> tuple[Array, Array]:
        size = self.size
        options = {"style": self.style, "dtype": self.dtype, "parent": None}
        block = (
            DividedBlock(self.frames, size.heads, size.mlp, **options)
            if self.frames
            else Block(size.heads, size.mlp, **options)
        )
        inputs = () if self.frames else (mask, rotation)
        stacked = self.param(
            "blocks",
            lambda key: jax.vmap(lambda k: block.init(k, x_BLD, *inputs)["params"])(
                jax.random.split(key, size.depth)
            ),
        )

        def step(x: Array, params: Any) -> tuple[Array, Array]:
            x = block.apply({"params": params}, x, *inputs)
            return x, x

        return jax.lax.scan(
            step, x_BLD.astype(jnp.float32), stacked, unroll=size.depth if self.unroll else 1
        )


def endpoints(blocks: Array, last: Array, **extra: Array) -> dict[str, Array]:
    """Features by name: `block0`, ... [B, L, D] after each block, `last` after the final norm, if
    any.
    """
    return {f"block{i}": block for i, block in enumerate(blocks)} | {"last": last} | extra


def cuboids(
    x_BTHWC: Array, size: tuple[int, int, int], stride: tuple[int, int, int] | None = None
) -> Array:
    """Cuboids of t x h x w cells, [B, frames, rows, columns, t, h, w, C]; they overlap if the
    stride is smaller.
    """
    if stride is None or stride == size:
        (b, *input_size, c), (t, h, w) = x_BTHWC.shape, size
        grid = [n // s for n, s in zip(input_size, size, strict=True)]
        x = x_BTHWC[:, : grid[0] * t, : grid[1] * h, : grid[2] * w]
        return x.reshape(b, grid[0], t, grid[1], h, grid[2], w, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    indices = [
        np.arange(0, n - k + 1, s)[:, None] + np.arange(k)
        for n, k, s in zip(x_BTHWC.shape[1:4], size, stride, strict=True)
    ]
    return x_BTHWC[
        :,
        indices[0][:, None, None, :, None, None],
        indices[1][None, :, None, None, :, None],
        indices[2][None, None, :, None, None, :],
    ]


class PatchEmbed(nn.Module):
    """Cuboid embeddings [B, frames, rows, columns, D]: the product with a kernel [t, h, w, C,
    D].
    """

    width: int
    size: tuple[int, int, int]
    stride: tuple[int, int, int] | None = None
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> Array:
        kernel = self.param("kernel", _INIT, (*self.size, x_BTHWC.shape[-1], self.width))
        patches = cuboids(x_BTHWC.astype(self.dtype), self.size, self.stride)
        y = matmul(patches.reshape(*patches.shape[:4], -1), kernel.reshape(-1, self.width), 1)
        if self.bias:
            y += self.param("bias", nn.initializers.zeros, (self.width,))[(None,) * 4]
        return y.astype(self.dtype)


def sinusoidal_positions(num_positions: int, width: int, sines_first: bool = False) -> Array:
    """Sinusoidal positions 0, 1, ... [number, width]: sines and cosines alternate, or all sines
    precede all cosines.
    """
    rate = 10000.0 ** (-2 * np.arange((width + 1) // 2) / width)
    angle = np.arange(num_positions)[:, None] * rate
    table = np.stack([np.sin(angle), np.cos(angle)], axis=1 if sines_first else 2).reshape(
        num_positions, -1
    )
    return jnp.asarray(table[:, :width], jnp.float32)
