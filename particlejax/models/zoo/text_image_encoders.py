# SPDX-License-Identifier: Apache-2.0
"""Published text, image and audio encoders: BERT, CLIP, SigLIP, VideoPrism's text encoder, AST.

Each returns one vector per example and features by name: those of `vit.endpoints`. Legend as in
`vit`; E width of the joint embedding space.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from particlejax.models.zoo.video_transformers import Grids, Inputs, VideoPrism, l2_normalize
from particlejax.models.zoo.vit_blocks import (
    Attention,
    BlockStack,
    BlockStyle,
    Mlp,
    Norm,
    PatchEmbed,
    StackSize,
    endpoints,
    sinusoidal_positions,
)

Endpoints = dict[str, Array]
_INIT = nn.initializers.truncated_normal(0.02)
_BASE = StackSize(768, 12, 12, 3072)
_CLIP = BlockStyle(1e-5, "quick_gelu")
_SIGLIP = BlockStyle(1e-6, "gelu_tanh")


class Bert(nn.Module):
    """arXiv:1810.04805: ids int32 [B, L], mask [B, L] (1 for a token, 0 for padding) -> sentence
    [B, D], features.

    The sentence embedding is the normalized mean over its tokens, as in sentence-transformers
    (arXiv:1908.10084); `pooled` [B, D] is BERT's own, from the first token.
    """

    vocab_size: int = 30522
    max_positions: int = 512
    num_segment_types: int = 2  # of segments; all tokens are in the first
    size: StackSize = _BASE
    style: BlockStyle = BlockStyle(1e-12, post_norm=True)
    dtype: Any = jnp.float32

    @property
    def inputs(self) -> Inputs:
        """Shapes and dtypes of one text's inputs."""
        return ((self.max_positions,), "int32"), ((self.max_positions,), "int32")

    @nn.compact
    def __call__(self, ids_BL: Array, mask_BL: Array) -> tuple[Array, Endpoints]:
        width, length = self.size.width, ids_BL.shape[1]
        x = nn.Embed(self.vocab_size, width, dtype=self.dtype, embedding_init=_INIT, name="table")(
            ids_BL
        )
        x += self.param("kinds", _INIT, (self.num_segment_types, width))[None, :1]
        x += self.param("positions", _INIT, (self.max_positions, width))[None, :length]
        x = Norm(self.style.epsilon, name="embed_norm")(x)
        x, blocks = BlockStack(self.size, self.style, dtype=self.dtype, name="encoder")(
            x, (mask_BL > 0)[:, None]
        )
        weight = (mask_BL > 0).astype(jnp.float32)[..., None]
        mean = jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
        pooled = jnp.tanh(
            nn.Dense(width, dtype=self.dtype, kernel_init=_INIT, name="pooler")(x[:, 0])
        )
        return l2_normalize(mean, 1e-24), endpoints(blocks, x, pooled=pooled)


class TextTower(nn.Module):
    """The text tower of CLIP (arXiv:2103.00020) or SigLIP (arXiv:2303.15343): ids int32 [B, L] ->
    [B, E], features.

    CLIP is causal and reads out its end token; SigLIP is bidirectional and reads out the last
    position, padding or not.
    """

    embed_dim: int = 512
    vocab_size: int = 49408
    max_positions: int = 77
    end_token_id: int = 49407  # id of the end token; -1: reads out the last position, bidirectional
    bias: bool = False  # of the projection
    size: StackSize = StackSize(512, 12, 8, 2048)
    style: BlockStyle = _CLIP
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids_BL: Array) -> tuple[Array, Endpoints]:
        width, length = self.size.width, ids_BL.shape[1]
        x = nn.Embed(self.vocab_size, width, dtype=self.dtype, embedding_init=_INIT, name="table")(
            ids_BL
        )
        x += self.param("positions", _INIT, (self.max_positions, width))[None, :length]
        mask = jnp.tril(jnp.ones((1, length, length), bool)) if self.end_token_id >= 0 else None
        x, blocks = BlockStack(self.size, self.style, dtype=self.dtype, name="encoder")(x, mask)
        x = Norm(self.style.epsilon, name="norm")(x)
        position = (
            jnp.argmax(ids_BL == self.end_token_id, axis=1)
            if self.end_token_id >= 0
            else jnp.full(ids_BL.shape[:1], length - 1)
        )
        pooled = jnp.take_along_axis(x, position[:, None, None], axis=1)[:, 0]
        y = nn.Dense(
            self.embed_dim, use_bias=self.bias, dtype=self.dtype, kernel_init=_INIT, name="project"
        )(pooled)
        return y, endpoints(blocks, x)


class ImageTower(nn.Module):
    """The image tower of CLIP or SigLIP: images [B, H, W, 3] -> [B, E], features.

    CLIP projects its class token after a final norm; SigLIP has an attention pooling head (out =
    0).
    """

    embed_dim: int = 512
    rows: int = 224
    columns: int = 224
    patch: int = 32
    size: StackSize = _BASE
    style: BlockStyle = _CLIP
    dtype: Any = jnp.float32

    @property
    def grids(self) -> Grids:
        """Learned position tables, for import at another size."""
        return {
            "positions": (
                1 if self.embed_dim else 0,
                (1, self.rows // self.patch, self.columns // self.patch),
                True,
            )
        }

    @nn.compact
    def __call__(self, x_BHWC: Array) -> tuple[Array, Endpoints]:
        width, style, is_clip = self.size.width, self.style, self.embed_dim > 0
        num_patches = (self.rows // self.patch) * (self.columns // self.patch)
        patches = PatchEmbed(
            width, (1, self.patch, self.patch), bias=not is_clip, dtype=self.dtype, name="patches"
        )
        x = patches(x_BHWC[:, None]).reshape(x_BHWC.shape[0], -1, width)
        if is_clip:
            token = self.param("class_token", _INIT, (width,))
            x = jnp.concatenate(
                [jnp.broadcast_to(token[None, None], (x.shape[0], 1, width)).astype(x.dtype), x],
                axis=1,
            )
        x += self.param("positions", _INIT, (num_patches + is_clip, width))[None]
        if is_clip:
            x = Norm(style.epsilon, name="embed_norm")(x)
        x, blocks = BlockStack(self.size, style, dtype=self.dtype, name="encoder")(x)
        if is_clip:
            pooled = Norm(style.epsilon, name="norm")(x[:, 0])
            y = nn.Dense(
                self.embed_dim, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name="project"
            )(pooled)
            return y, endpoints(blocks, x)
        x = Norm(style.epsilon, name="norm")(x)
        query = jnp.broadcast_to(
            self.param("pool_query", _INIT, (width,))[None, None], (x.shape[0], 1, width)
        )
        y = Attention(self.size.heads, style, dtype=self.dtype, name="pool")(query, x)
        y += Mlp(self.size.mlp, style, self.dtype, name="pool_mlp")(
            Norm(style.epsilon, name="pool_norm")(y)
        )
        return y[:, 0], endpoints(blocks, x)


class ImageText(nn.Module):
    """Two towers and their image-text similarity: images [B, H, W, 3], ids [C, L] -> logits [B, C],
    embeddings.

    The embeddings, `image` [B, E] and `text` [C, E], have unit length. SigLIP's logits have a bias
    in addition to a scale.
    """

    image: ImageTower
    text: TextTower
    bias: bool = False

    @property
    def grids(self) -> Grids:
        """Learned position tables, for import at another size."""
        return {f"image/{path}": grid for path, grid in self.image.grids.items()}

    @property
    def inputs(self) -> Inputs:
        """Shapes and dtypes of the inputs for one image and one text."""
        return ((self.image.rows, self.image.columns, 3), "float32"), (
            (self.text.max_positions,),
            "int32",
        )

    def with_size(self, frames: int, size: int) -> "ImageText":
        """The same spec for another image size; 0: unchanged."""
        del frames
        return self.clone(
            image=self.image.clone(rows=size or self.image.rows, columns=size or self.image.columns)
        )

    @nn.compact
    def __call__(self, x_BHWC: Array, ids_CL: Array) -> tuple[Array, Endpoints]:
        image, text = (
            l2_normalize(self.image(x_BHWC)[0], 0.0),
            l2_normalize(self.text(ids_CL)[0], 0.0),
        )
        # 1 / 0.07, CLIP's initial value
        scale = self.param("logit_scale", nn.initializers.constant(2.66), ())
        logits = jnp.exp(scale) * (image @ text.T)
        if self.bias:
            logits += self.param("logit_bias", nn.initializers.constant(-10.0), ())
        return logits, {"image": image, "text": text}


class VideoText(nn.Module):
    """VideoPrism with text (arXiv:2402.13217): video [B, T, H, W, 3], ids and mask [C, L] ->
    similarity [B, C], embeddings.

    The similarity is the cosine; `video` [B, D] and `text` [C, D] have unit length. The text
    encoder is causal and reads out a token at the end.
    """

    video: VideoPrism
    vocab_size: int = 32000
    max_positions: int = 64  # text length in training
    size: StackSize = _BASE
    style: BlockStyle = BlockStyle(1e-6, "relu", gain=True, softcap=50.0)
    dtype: Any = jnp.float32

    @property
    def grids(self) -> Grids:
        """Learned position tables, for import at another size."""
        return {f"video/{path}": grid for path, grid in self.video.grids.items()}

    @property
    def inputs(self) -> Inputs:
        """Shapes and dtypes of the inputs for one video and one text."""
        return (
            *self.video.inputs,
            ((self.max_positions,), "int32"),
            ((self.max_positions,), "int32"),
        )

    def with_size(self, frames: int, size: int) -> "VideoText":
        """The same spec for other clip sizes; 0: unchanged."""
        return self.clone(video=self.video.with_size(frames, size))

    @nn.compact
    def __call__(self, x_BTHWC: Array, ids_CL: Array, mask_CL: Array) -> tuple[Array, Endpoints]:
        video, endpoints = self.video(x_BTHWC)
        width, (c, length) = self.size.width, ids_CL.shape
        x = (
            nn.Embed(self.vocab_size, width, dtype=self.dtype, embedding_init=_INIT, name="table")(
                ids_CL
            )
            * width**0.5
        )
        token = self.param("end_token", _INIT, (width,)) * width**0.5
        x = jnp.concatenate(
            [
                x + sinusoidal_positions(length, width, sines_first=True)[None],
                jnp.broadcast_to(token[None, None], (c, 1, width)),
            ],
            axis=1,
        )
        is_token = jnp.pad(mask_CL > 0, ((0, 0), (0, 1)), constant_values=True)
        mask = jnp.tril(jnp.ones((1, length + 1, length + 1), bool)) & is_token[:, None]
        x, _ = BlockStack(self.size, self.style, dtype=self.dtype, name="text")(x, mask)
        text = l2_normalize(Norm(self.style.epsilon, self.style.gain, name="text_norm")(x)[:, -1])
        return video @ text.T, {**endpoints, "video": video, "text": text}


class AST(nn.Module):
    """arXiv:2104.01778: log-mel spectrograms [B, frames, bands], normalized -> logits [B, classes],
    features.

    Patches overlap; the classifier uses the class token and the distillation token together.
    """

    classes: int = 527  # AudioSet
    num_frames: int = 1024  # of 10 ms
    num_bands: int = 128
    patch: int = 16
    stride: int = 10
    size: StackSize = _BASE
    style: BlockStyle = BlockStyle(1e-12)
    dtype: Any = jnp.float32

    @property
    def grids(self) -> Grids:
        """Learned position tables, for import at another length."""
        rows, columns = (
            (n - self.patch) // self.stride + 1 for n in (self.num_bands, self.num_frames)
        )
        return {"positions": (2, (1, rows, columns), False)}  # one row per band

    @property
    def inputs(self) -> Inputs:
        """Shapes and dtypes of one sound's inputs."""
        return (((self.num_frames, self.num_bands), "float32"),)

    def with_size(self, frames: int, size: int) -> "AST":
        """The same spec for another length and number of bands; 0: unchanged."""
        return self.clone(num_frames=frames or self.num_frames, num_bands=size or self.num_bands)

    @nn.compact
    def __call__(self, x_BTF: Array) -> tuple[Array, Endpoints]:
        width, step = self.size.width, (1, self.stride, self.stride)
        patches = PatchEmbed(
            width, (1, self.patch, self.patch), step, dtype=self.dtype, name="patches"
        )
        x = patches(x_BTF.swapaxes(1, 2)[:, None, ..., None]).reshape(x_BTF.shape[0], -1, width)
        special_tokens = jnp.stack(
            [self.param(name, _INIT, (width,)) for name in ("class_token", "distillation_token")]
        )
        x = jnp.concatenate(
            [jnp.broadcast_to(special_tokens[None], (x.shape[0], 2, width)).astype(x.dtype), x],
            axis=1,
        )
        x += self.param("positions", _INIT, (x.shape[1], width))[None]
        x, blocks = BlockStack(self.size, self.style, dtype=self.dtype, name="encoder")(x)
        x = Norm(self.style.epsilon, name="norm")(x)
        pooled = Norm(self.style.epsilon, name="head_norm")((x[:, 0] + x[:, 1]) / 2)
        return nn.Dense(self.classes, kernel_init=_INIT, name="head")(pooled), endpoints(blocks, x)
