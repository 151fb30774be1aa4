# SPDX-License-Identifier: Apache-2.0
"""Published video Transformers: VideoMAE, ViViT, TimeSformer, V-JEPA 2 and VideoPrism.

Each takes video [B, T, H, W, 3], normalized as its weights expect, and returns logits [B, classes]
and features by name: those of `vit.endpoints`. Legend as in `vit`; N tokens of a clip, P numbers of
a cuboid.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.core.typing import UserError
from particlejax.models.zoo.vit_blocks import (
    Attention,
    BlockStack,
    BlockStyle,
    Mlp,
    Norm,
    PatchEmbed,
    Rotation,
    StackSize,
    cuboids,
    endpoints,
    sinusoidal_positions,
)

Endpoints = dict[str, Array]
Triple = tuple[int, int, int]
Inputs = tuple[tuple[tuple[int, ...], str], ...]
# path of a position table: number of tokens before its grid, the grid, whether square
Grids = dict[str, tuple[int, Triple, bool]]
_INIT = nn.initializers.truncated_normal(0.02)
_BASE = StackSize(768, 12, 12, 3072)
_NO_KEY_BIAS = BlockStyle(1e-12, bias=(True, False, True))  # VideoMAE's


class VideoTransformer(nn.Module):
    """Common settings: classes, clip size and cuboid size."""

    classes: int
    frames: int = 16
    rows: int = 224
    columns: int = 224
    patch: Triple = (2, 16, 16)
    size: StackSize = _BASE
    style: BlockStyle = BlockStyle()
    dtype: Any = jnp.float32

    @property
    def grid(self) -> Triple:
        """Tokens along frames, rows and columns."""
        return (
            self.frames // self.patch[0],
            self.rows // self.patch[1],
            self.columns // self.patch[2],
        )

    @property
    def grids(self) -> Grids:
        """Learned position tables, for import at another size."""
        return {}

    @property
    def inputs(self) -> Inputs:
        """Shapes and dtypes of one clip's inputs."""
        return (((self.frames, self.rows, self.columns, 3), "float32"),)

    def with_size(self, frames: int, size: int) -> "VideoTransformer":
        """The same spec for other clip sizes; 0: unchanged. Raises UserError if they are not
        multiples of its cuboids.
        """
        net = self.clone(
            frames=frames or self.frames, rows=size or self.rows, columns=size or self.columns
        )
        if any(n % k for n, k in zip((net.frames, net.rows, net.columns), self.patch, strict=True)):
            raise UserError(
                f"clips of {net.frames} x {net.rows} x {net.columns} are no multiple of the "
                f"model's cuboids of {' x '.join(map(str, self.patch))}: choose another "
                "config.num_frames or config.image_size."
            )
        return net

    def tokens(self, x_BTHWC: Array) -> Array:
        """Cuboid embeddings [B, N, D] without positions, for `__call__` of the subclasses."""
        return _flatten_grid(
            PatchEmbed(self.size.width, self.patch, dtype=self.dtype, name="patches")(x_BTHWC)
        )

    def stack(self, name: str = "encoder") -> BlockStack:
        """The Transformer blocks."""
        return BlockStack(self.size, self.style, dtype=self.dtype, name=name)

    def logits(self, x_BD: Array) -> Array:
        """The classifier."""
        return nn.Dense(self.classes, kernel_init=_INIT, name="head")(x_BD.astype(jnp.float32))


def _flatten_grid(x_BTHWD: Array) -> Array:
    return x_BTHWD.reshape(x_BTHWD.shape[0], -1, x_BTHWD.shape[-1])


def _with_token(token_D: Array, x_BND: Array) -> Array:
    token = jnp.broadcast_to(token_D[None, None], (x_BND.shape[0], 1, token_D.shape[0])).astype(
        x_BND.dtype
    )
    return jnp.concatenate([token, x_BND], axis=1)


class VideoMAE(VideoTransformer):
    """arXiv:2203.12602, fine-tuned: fixed positions, classifies the mean token.

    Where not `mean_pool`, the tokens are normalized and the first one is classified.
    """

    style: BlockStyle = _NO_KEY_BIAS
    mean_pool: bool = True

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> tuple[Array, Endpoints]:
        x = self.tokens(x_BTHWC)
        x, blocks = self.stack()(x + sinusoidal_positions(x.shape[1], self.size.width)[None])
        if self.mean_pool:
            pooled = Norm(name="head_norm")(jnp.mean(x, axis=1))
        else:
            x = Norm(self.style.epsilon, name="norm")(x)
            pooled = x[:, 0]
        return self.logits(pooled), endpoints(blocks, x)


class Pretraining(VideoTransformer):
    """Predicts masked cuboids from visible ones: takes the indices of both in addition to the
    clip.
    """

    classes: int = 0

    @property
    def inputs(self) -> Inputs:
        """As the base class; a tenth of the cuboids is visible."""
        number = int(np.prod(self.grid))
        visible = max(1, number // 10)
        return (*super().inputs, ((visible,), "int32"), ((number - visible,), "int32"))


class VideoMAEPretraining(Pretraining):
    """arXiv:2203.12602, pretraining: predicts the pixels of masked cuboids from visible ones.

    Takes the video and the indices of visible [B, V] and masked cuboids [B, M]; returns predictions
    [B, M, P] of `pixel_targets`, and the encoder's features of the visible cuboids.
    """

    style: BlockStyle = _NO_KEY_BIAS
    decoder_size: StackSize = StackSize(384, 4, 6, 1536)
    mean_pool: bool = False  # as VideoMAE's: whether the encoder has no final norm

    @nn.compact
    def __call__(
        self, x_BTHWC: Array, visible_BV: Array, hidden_BM: Array
    ) -> tuple[Array, Endpoints]:
        x = self.tokens(x_BTHWC)
        x = _take_tokens(x + sinusoidal_positions(x.shape[1], self.size.width)[None], visible_BV)
        x, blocks = self.stack()(x)
        if not self.mean_pool:
            x = Norm(self.style.epsilon, name="norm")(x)
        decoder_size, num_tokens = self.decoder_size, np.prod(self.grid)
        table = sinusoidal_positions(int(num_tokens), decoder_size.width)
        visible = nn.Dense(
            decoder_size.width,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_INIT,
            name="to_decoder",
        )(x)
        token = self.param("mask_token", _INIT, (decoder_size.width,))
        decoder_input = jnp.concatenate(
            [visible + table[visible_BV], token[None, None] + table[hidden_BM]], axis=1
        )
        y, _ = BlockStack(decoder_size, self.style, dtype=self.dtype, name="decoder")(decoder_input)
        y = Norm(name="decoder_norm")(y[:, visible_BV.shape[1] :])
        patch_dim = int(np.prod(self.patch)) * x_BTHWC.shape[-1]
        return nn.Dense(patch_dim, kernel_init=_INIT, name="decoder_head")(y), endpoints(blocks, x)


def pixel_targets(pixels_BTHWC: Array, patch: Triple) -> Array:
    """VideoMAE's targets for pixels in [0, 1], [B, N, P]: each cuboid normalized per channel."""
    patches = cuboids(pixels_BTHWC, patch)
    patches = patches.reshape(patches.shape[0], -1, int(np.prod(patch)), patches.shape[-1])
    std = jnp.std(patches, axis=2, keepdims=True, ddof=1) + 1e-6
    return ((patches - jnp.mean(patches, axis=2, keepdims=True)) / std).reshape(
        *patches.shape[:2], -1
    )


def _take_tokens(x_BND: Array, index_BL: Array) -> Array:
    return jnp.take_along_axis(x_BND, index_BL[..., None], axis=1)


class ViViT(VideoTransformer):
    """arXiv:2103.15691, model 1: joint attention of all tokens and a class token; learned
    positions.
    """

    frames: int = 32
    style: BlockStyle = BlockStyle(activation="gelu_tanh")

    @property
    def grids(self) -> Grids:
        """As the base class."""
        return {"positions": (1, self.grid, True)}

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> tuple[Array, Endpoints]:
        x = _with_token(self.param("class_token", _INIT, (self.size.width,)), self.tokens(x_BTHWC))
        positions = self.param("positions", _INIT, (1 + int(np.prod(self.grid)), self.size.width))
        x, blocks = self.stack()(x + positions[None])
        x = Norm(self.style.epsilon, name="norm")(x)
        return self.logits(x[:, 0]), endpoints(blocks, x)


class TimeSformer(VideoTransformer):
    """arXiv:2102.05095 with divided attention: in each block over time, then over space."""

    frames: int = 8
    patch: Triple = (1, 16, 16)

    @property
    def grids(self) -> Grids:
        """As the base class."""
        return {
            "positions": (1, (1, *self.grid[1:]), True),
            "time_positions": (0, (self.grid[0], 1, 1), True),
        }

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> tuple[Array, Endpoints]:
        width, (t, h, w) = self.size.width, self.grid
        x = self.tokens(x_BTHWC).reshape(-1, t, h * w, width)
        positions = self.param("positions", _INIT, (1 + h * w, width))
        x += (
            positions[None, None, 1:]
            + self.param("time_positions", _INIT, (t, width))[None, :, None]
        )
        token = self.param("class_token", _INIT, (width,)) + positions[0]
        x = _with_token(token, x.reshape(x.shape[0], -1, width))
        x, blocks = BlockStack(self.size, self.style, t, dtype=self.dtype, name="encoder")(x)
        x = Norm(self.style.epsilon, name="norm")(x)
        return self.logits(x[:, 0]), endpoints(blocks, x)


class VJEPA2(VideoTransformer):
    """arXiv:2506.09985 with its attentive classifier: rotary positions in time, rows and
    columns.
    """

    frames: int = 64
    rows: int = 256
    columns: int = 256
    size: StackSize = StackSize(1024, 24, 16, 4096)
    pooler_depth: int = 3

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> tuple[Array, Endpoints]:
        indices = np.arange(np.prod(self.grid))[None]
        x, blocks = self.stack()(
            self.tokens(x_BTHWC), None, _rotary_angles(indices, self.grid, self.size)
        )
        x = last = Norm(self.style.epsilon, name="norm")(x)
        width, heads = self.size.width, self.size.heads
        pooler = StackSize(width, self.pooler_depth, heads, 4 * width)
        style = dataclasses.replace(self.style, bias=(True, True, True))
        x, _ = BlockStack(pooler, style, dtype=self.dtype, name="pooler")(x)
        query = jnp.broadcast_to(
            self.param("pool_query", _INIT, (width,))[None, None], (x.shape[0], 1, width)
        )
        normalized = Norm(self.style.epsilon, name="pool_norm")(x)
        y = query + Attention(heads, style, out=False, dtype=self.dtype, name="pool")(
            query, normalized
        )
        y += Mlp(4 * width, self.style, self.dtype, name="pool_mlp")(
            Norm(self.style.epsilon, name="pool_mlp_norm")(y)
        )
        return self.logits(y[:, 0]), endpoints(blocks, last)


class VJEPA2Pretraining(Pretraining):
    """arXiv:2506.09985, pretraining: predicts the features of masked cuboids from visible ones.

    Takes the video and the indices of visible [B, V] and masked cuboids [B, M]; the encoder sees
    the whole video, as in the published action-free forward pass. Returns predicted features [B, M,
    D], and features by name.
    """

    frames: int = 64
    rows: int = 256
    columns: int = 256
    size: StackSize = StackSize(1024, 24, 16, 4096)
    predictor_size: StackSize = StackSize(384, 12, 12, 1536)
    mask_tokens: int = 10  # only the second is used

    @nn.compact
    def __call__(
        self, x_BTHWC: Array, visible_BV: Array, hidden_BM: Array
    ) -> tuple[Array, Endpoints]:
        indices = np.arange(np.prod(self.grid))[None]
        x, blocks = self.stack()(
            self.tokens(x_BTHWC), None, _rotary_angles(indices, self.grid, self.size)
        )
        x = Norm(self.style.epsilon, name="norm")(x)
        predictor_size = self.predictor_size
        visible = nn.Dense(
            predictor_size.width, dtype=self.dtype, kernel_init=_INIT, name="to_predictor"
        )(_take_tokens(x, visible_BV))
        token = self.param("mask_tokens", _INIT, (self.mask_tokens, predictor_size.width))[
            1 % self.mask_tokens
        ]
        hidden = jnp.broadcast_to(
            token[None, None], (*hidden_BM.shape, predictor_size.width)
        ).astype(visible.dtype)
        rotation = _rotary_angles(
            jnp.concatenate([visible_BV, hidden_BM], axis=1), self.grid, predictor_size
        )
        y, _ = BlockStack(predictor_size, self.style, dtype=self.dtype, name="predictor")(
            jnp.concatenate([visible, hidden], axis=1), None, rotation
        )
        y = Norm(self.style.epsilon, name="predictor_norm")(y)[:, visible_BV.shape[1] :]
        return nn.Dense(self.size.width, kernel_init=_INIT, name="predictor_head")(y), endpoints(
            blocks, x
        )


def _rotary_angles(index_BL: Array | np.ndarray, grid: Triple, size: StackSize) -> Rotation:
    """Rotary positions of cuboids by index: a third of each head for time, rows and columns, the
    rest unrotated.
    """
    _, h, w = grid
    head_dim = size.width // size.heads
    axis_dim = 2 * (head_dim // 3 // 2)
    # as published: tiled, not repeated
    rate = np.tile(10000.0 ** (-2 * np.arange(axis_dim // 2) / axis_dim), 2).astype(np.float32)
    position = jnp.stack([index_BL // (h * w), index_BL // w % h, index_BL % w], axis=-1).astype(
        jnp.float32
    )
    angle = (position[..., None] * rate[None, None, None]).reshape(*position.shape[:2], -1)
    angle = jnp.pad(angle, ((0, 0), (0, 0), (0, head_dim - 3 * axis_dim)))
    return jnp.cos(angle), jnp.sin(angle)


class VideoPrism(VideoTransformer):
    """arXiv:2402.13217: each frame alone, then each position over time; an attention pool
    classifies.

    `auxiliary` blocks before the pool are those of the video-text model, which without classes
    returns its video embedding of unit length instead of logits [B, D].
    """

    rows: int = 288
    columns: int = 288
    patch: Triple = (1, 18, 18)
    style: BlockStyle = BlockStyle(gain=True, softcap=50.0)
    time_depth: int = 4
    auxiliary: int = 0

    @property
    def grids(self) -> Grids:
        """As the base class."""
        return {
            "positions": (0, (1, *self.grid[1:]), True),
            "time_positions": (0, (self.grid[0], 1, 1), True),
        }

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> tuple[Array, Endpoints]:
        size, style, (t, h, w) = self.size, self.style, self.grid
        positions = self.param("positions", _INIT, (h * w, size.width))
        # frames as rows of the batch
        x = self.tokens(x_BTHWC).reshape(-1, h * w, size.width) + positions[None]
        x, blocks = self.stack()(x)
        blocks = blocks.reshape(size.depth, -1, t * h * w, size.width)
        x = Norm(style.epsilon, style.gain, name="norm")(x).reshape(-1, t, h * w, size.width)
        x += self.param("time_positions", _INIT, (t, size.width))[None, :, None]
        x = x.swapaxes(1, 2).reshape(-1, t, size.width)
        x, _ = BlockStack(
            dataclasses.replace(size, depth=self.time_depth), style, dtype=self.dtype, name="time"
        )(x)
        x = Norm(style.epsilon, style.gain, name="time_norm")(x)
        x = last = (
            x.reshape(-1, h * w, t, size.width).swapaxes(1, 2).reshape(-1, t * h * w, size.width)
        )
        if self.auxiliary:
            auxiliary_size = dataclasses.replace(size, depth=self.auxiliary)
            x, _ = BlockStack(auxiliary_size, style, dtype=self.dtype, name="auxiliary")(x)
        query = jnp.broadcast_to(
            self.param("pool_query", _INIT, (size.width,))[None, None], (x.shape[0], 1, size.width)
        )
        pool = Attention(
            size.heads,
            BlockStyle(style.epsilon),
            size.mlp,
            learned_scale=True,
            dtype=self.dtype,
            name="pool",
        )
        pooled = Norm(style.epsilon, style.gain, name="pool_norm")(pool(query, x))[:, 0]
        feature_maps = endpoints(blocks, last)
        return self.logits(pooled) if self.classes else l2_normalize(pooled), feature_maps


def l2_normalize(x_BD: Array, epsilon: float = 1e-6) -> Array:
    """Vectors normalized to unit length."""
    x_BD = x_BD.astype(jnp.float32)
    return x_BD / jnp.sqrt(jnp.sum(x_BD * x_BD, axis=-1, keepdims=True) + epsilon)
