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
from particlejax.nn.dense import Dense, DenseGeneral, product

Turn = tuple[Array, Array]  # cosines and sines [B or 1, L, K] that rotate queries and keys
_SMALL = nn.initializers.truncated_normal(0.02)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's approximation
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Style:
    """Block settings of one architecture."""

    epsilon: float = 1e-6  # of norms
    activation: str = "gelu"  # of ACTIVATIONS
    bias: tuple[bool, bool, bool] = (True, True, True)  # of query, key and value
    norm_after: bool = False  # post-norm as in BERT: norm(x + f(x)) instead of x + f(norm(x))
    gain: bool = False  # norms scale by 1 + parameter instead of parameter
    softcap: float = 0.0  # tanh soft cap of logits; 0: none


@dataclasses.dataclass(frozen=True)
class Size:
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
        shape, lead = (x.shape[-1],), (None,) * (x.ndim - 1)
        scale = (
            1 + self.param("gain", nn.initializers.zeros, shape)
            if self.gain
            else (self.param("scale", nn.initializers.ones, shape))
        )
        bias = self.param("bias", nn.initializers.zeros, shape)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x * scale[lead] + bias[lead]


class Attention(nn.Module):
    """Multi-head attention of queries [B, L, D] to keys [B, M, D].

    may: attention mask, bool [B or 1, L, M]; None: all. turn: rotary positions of queries and keys
    alike.
    """

    heads: int
    style: Style = Style()
    inner: int = 0  # width of all heads together; 0: that of the tokens
    out: bool = True  # whether an output projection follows
    scaled: bool = False  # learned scale per head channel, as in VideoPrism's pooling
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BLD: Array, y_BMD: Array, may: Array | None = None, turn: Turn | None = None
    ) -> Array:
        inner = self.inner or x_BLD.shape[-1]
        split = (self.heads, inner // self.heads)
        query, key, value = (
            DenseGeneral(split, use_bias=bias, dtype=self.dtype, kernel_init=_SMALL, name=name)(
                of
            ).swapaxes(1, 2)
            for name, of, bias in zip(
                ("query", "key", "value"), (x_BLD, y_BMD, y_BMD), self.style.bias, strict=True
            )
        )
        if turn is not None:
            query, key = rotated(query, turn), rotated(key, turn)
        query *= split[1] ** -0.5
        if self.scaled:
            factor = jax.nn.softplus(
                self.param("per_dim_scale", nn.initializers.zeros, split[1:])
            ) / np.log(2)
            query *= factor.astype(self.dtype)[None, None, None]
        logits = jnp.einsum("bhlk,bhmk->bhlm", query, key, preferred_element_type=jnp.float32)
        if self.style.softcap:
            logits = self.style.softcap * jnp.tanh(logits / self.style.softcap)
        if may is not None:
            logits = jnp.where(may[:, None], logits, attention.FAR)
        read = attention.mixed(logits, value).swapaxes(1, 2)
        if not self.out:
            return read.reshape(*read.shape[:2], -1)
        return DenseGeneral(
            x_BLD.shape[-1], axis=(-2, -1), dtype=self.dtype, kernel_init=_SMALL, name="out"
        )(read)


def rotated(x_BHLK: Array, turn: Turn) -> Array:
    """Rotates pairs of neighboring channels (arXiv:2104.09864)."""
    cos, sin = (each[:, None].astype(x_BHLK.dtype) for each in turn)
    pairs = x_BHLK.reshape(*x_BHLK.shape[:-1], -1, 2)
    across = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x_BHLK.shape)
    return x_BHLK * cos + across * sin


class Mlp(nn.Module):
    """Two Dense layers with the style's activation between them."""

    hidden: int
    style: Style = Style()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        hidden = Dense(self.hidden, dtype=self.dtype, kernel_init=_SMALL, name="up")(x_BLD)
        hidden = ACTIVATIONS[self.style.activation](hidden)
        return Dense(x_BLD.shape[-1], dtype=self.dtype, kernel_init=_SMALL, name="down")(hidden)


class Block(nn.Module):
    """Attention and MLP with residual connections, pre-norm or post-norm."""

    heads: int
    mlp: int
    style: Style = Style()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array, may: Array | None = None, turn: Turn | None = None) -> Array:
        style = self.style
        attention_norm = Norm(style.epsilon, style.gain, name="attention_norm")
        mlp_norm = Norm(style.epsilon, style.gain, name="mlp_norm")
        attention = Attention(self.heads, style, dtype=self.dtype, name="attention")
        mlp = Mlp(self.mlp, style, self.dtype, name="mlp")
        if style.norm_after:
            x_BLD = attention_norm(x_BLD + attention(x_BLD, x_BLD, may, turn))
            return mlp_norm(x_BLD + mlp(x_BLD))
        read = attention_norm(x_BLD)
        x_BLD += attention(read, read, may, turn)
        return x_BLD + mlp(mlp_norm(x_BLD))


class Divided(nn.Module):
    """Divided attention: over time at each position, then over each frame and the class token
    (arXiv:2102.05095).

    x is the class token and T x S tokens, time outermost. The class token's output is averaged over
    frames.
    """

    frames: int
    heads: int
    mlp: int
    style: Style = Style()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        (b, _, d), t, style = x_BLD.shape, self.frames, self.style
        token, grid = x_BLD[:, :1], x_BLD[:, 1:].reshape(b, t, -1, d)
        s = grid.shape[2]
        read = Norm(style.epsilon, name="time_norm")(grid.swapaxes(1, 2).reshape(b * s, t, d))
        seen = Attention(self.heads, style, dtype=self.dtype, name="time_attention")(read, read)
        seen = Dense(d, dtype=self.dtype, kernel_init=_SMALL, name="time_project")(seen)
        grid += seen.reshape(b, s, t, d).swapaxes(1, 2)
        frame = jnp.concatenate([jnp.repeat(token, t, axis=1)[:, :, None], grid], axis=2).reshape(
            b * t, s + 1, d
        )
        read = Norm(style.epsilon, name="attention_norm")(frame)
        seen = Attention(self.heads, style, dtype=self.dtype, name="attention")(read, read).reshape(
            b, t, s + 1, d
        )
        token += jnp.mean(seen[:, :, 0], axis=1, keepdims=True)
        x_BLD = jnp.concatenate([token, (grid + seen[:, :, 1:]).reshape(b, t * s, d)], axis=1)
        return x_BLD + Mlp(self.mlp, style, self.dtype, name="mlp")(
            Norm(style.epsilon, name="mlp_norm")(x_BLD)
        )


class Stack(nn.Module):
    """Blocks with stacked parameters [depth, ...], run by a scan; divided attention if `frames` is
    given.

    Returns the tokens and every block's output [depth, B, L, D].
    """

    size: Size
    style: Style = Style()
    frames: int = 0
    unroll: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BLD: Array, may: Array | None = None, turn: Turn | None = None
    ) -> tuple[Array, Array]:
        size = self.size
        more = {"style": self.style, "dtype": self.dtype, "parent": None}
        block = (
            Divided(self.frames, size.heads, size.mlp, **more)
            if self.frames
            else Block(size.heads, size.mlp, **more)
        )
        inputs = () if self.frames else (may, turn)
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


def endpoints(blocks: Array, last: Array, **more: Array) -> dict[str, Array]:
    """Features by name: `block0`, ... [B, L, D] after each block, `last` after the final norm, if
    any.
    """
    return {f"block{i}": block for i, block in enumerate(blocks)} | {"last": last} | more


def cuboids(
    x_BTHWC: Array, size: tuple[int, int, int], stride: tuple[int, int, int] | None = None
) -> Array:
    """Cuboids of t x h x w cells, [B, frames, rows, columns, t, h, w, C]; they overlap if the
    stride is smaller.
    """
    if stride is None or stride == size:
        (b, *whole, c), (t, h, w) = x_BTHWC.shape, size
        grid = [n // s for n, s in zip(whole, size, strict=True)]
        x = x_BTHWC[:, : grid[0] * t, : grid[1] * h, : grid[2] * w]
        return x.reshape(b, grid[0], t, grid[1], h, grid[2], w, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    at = [
        np.arange(0, n - k + 1, s)[:, None] + np.arange(k)
        for n, k, s in zip(x_BTHWC.shape[1:4], size, stride, strict=True)
    ]
    return x_BTHWC[
        :,
        at[0][:, None, None, :, None, None],
        at[1][None, :, None, None, :, None],
        at[2][None, None, :, None, None, :],
    ]


class Patches(nn.Module):
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
        kernel = self.param("kernel", _SMALL, (*self.size, x_BTHWC.shape[-1], self.width))
        cut = cuboids(x_BTHWC.astype(self.dtype), self.size, self.stride)
        y = product(cut.reshape(*cut.shape[:4], -1), kernel.reshape(-1, self.width), 1)
        if self.bias:
            y += self.param("bias", nn.initializers.zeros, (self.width,))[(None,) * 4]
        return y.astype(self.dtype)


def sinusoids(number: int, width: int, halves: bool = False) -> Array:
    """Sinusoidal positions 0, 1, ... [number, width]: sines and cosines alternate, or all sines
    precede all cosines.
    """
    rate = 10000.0 ** (-2 * np.arange((width + 1) // 2) / width)
    angle = np.arange(number)[:, None] * rate
    table = np.stack([np.sin(angle), np.cos(angle)], axis=1 if halves else 2).reshape(number, -1)
    return jnp.asarray(table[:, :width], jnp.float32)
