# SPDX-License-Identifier: Apache-2.0
"""Head modules: pooling of a clip's tokens, classifiers, and projections to embeddings.

Legend: B rows, L slots, S clips of a row, D width, H heads, K width of a head, C outputs, E width
of an embedding, M query times, P numbers of a payload.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax import losses
from particlejax.nn import embed
from particlejax.nn.dense import Dense, DenseGeneral
from particlejax.nn.token_reduction import Tokens


class AttentivePool(nn.Module):
    """Attentive pooling: each head's weighted mean of a clip's tokens, float32 [B, S, D]
    (arXiv:1810.00825).

    The heads learn to weight the few relevant tokens, which a mean hides. A clip without tokens
    gives zeros.
    """

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array, segment_BL: Array, num_clips: int) -> Array:
        width = x_BLD.shape[-1]
        logits = Dense(self.num_heads, dtype=self.dtype, name="score")(x_BLD).astype(jnp.float32)
        value = DenseGeneral(
            (self.num_heads, width // self.num_heads), dtype=self.dtype, name="value"
        )(x_BLD)
        membership = losses.membership(segment_BL, num_clips).swapaxes(1, 2)[
            ..., None
        ]  # [B, S, L, 1]
        weights = (
            jax.nn.softmax(jnp.where(membership > 0, logits[:, None], -1e9), axis=2) * membership
        )
        pooled = jnp.einsum("bslh,blhk->bshk", weights, value.astype(jnp.float32))
        return pooled.reshape(*pooled.shape[:2], width)


class AttentiveProbe(nn.Module):
    """Attentive probe: logits float32 [B, C] of clips of one row each, from frozen tokens."""

    num_classes: int
    num_heads: int

    @nn.compact
    def __call__(self, x_BLD: Array, segment_BL: Array) -> Array:
        pooled = AttentivePool(self.num_heads, name="pool")(
            nn.LayerNorm(name="norm")(x_BLD), segment_BL, 1
        )
        return LinearHead(self.num_classes, name="question")(pooled)[:, 0]


class LinearHead(nn.Module):
    """Clip-level classifier: logits float32 [B, S, C]."""

    num_outputs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pooled_BSD: Array) -> Array:
        normalized = nn.LayerNorm(dtype=self.dtype, name="norm")(pooled_BSD)
        return Dense(self.num_outputs, kernel_init=nn.initializers.normal(0.02), name="out")(
            normalized
        ).astype(jnp.float32)


class Projection(nn.Module):
    """Projections [B, N, E] of clips or tokens, one per modality, with a learned logit scale and
    bias.

    normalize: normalize to unit length. init_bias: initial value, by default as in SigLIP.
    """

    embed_dim: int
    modalities: tuple[str, ...]
    dtype: Any = jnp.float32
    normalize: bool = True
    init_bias: float = -10.0

    @nn.compact
    def __call__(self, x_BND: Array, modality: str) -> tuple[Array, Array, Array]:
        # as in SigLIP (arXiv:2303.15343)
        log_sharpness = self.param("log_sharpness", nn.initializers.constant(np.log(10.0)), ())
        bias = self.param("bias", nn.initializers.constant(self.init_bias), ())
        normalized = nn.LayerNorm(dtype=self.dtype, name=f"norm_{modality}")(x_BND)
        x = Dense(self.embed_dim, dtype=jnp.float32, name=f"project_{modality}")(normalized)
        if self.normalize:
            x = x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)
        return x, jnp.exp(jnp.minimum(log_sharpness, np.log(100.0))), bias


class Codebook(nn.Module):
    """Index of the center nearest to a payload, int32 [B, L]. The centers come from k-means, not
    from gradients.
    """

    num_codes: int
    payload_size: int

    @nn.compact
    def __call__(self, payload_BLP: Array) -> Array:
        centers = jax.lax.stop_gradient(
            self.param("centres", nn.initializers.normal(0.02), (self.num_codes, self.payload_size))
        )
        similarity = (
            jnp.einsum("blp,cp->blc", payload_BLP.astype(jnp.float32), centers)
            - jnp.square(centers).sum(-1)[None, None] / 2
        )
        return similarity.argmax(axis=-1)


class FramewiseMlp(nn.Module):
    """Channels float32 [B, M, C] at each query time, from the mean of the tokens that cover it, and
    a mask bool [B, M].

    A token of several frames covers several times, which the query time's encoding distinguishes.
    """

    width: int
    num_channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        extent_BL3: Array,
        place_BM3: Array,
        query_extent_BM3: Array,
        segment_BM: Array,
    ) -> tuple[Array, Array]:
        time_distance = jnp.abs(place_BM3[..., None, 0] - tokens.place[:, None, :, 0])
        same_clip = (segment_BM[..., None] == tokens.segment[:, None]) & (segment_BM > 0)[..., None]
        covers = (same_clip & (time_distance <= extent_BL3[:, None, :, 0] / 2)).astype(
            jnp.float32
        )  # [B, M, L]
        num_covering = covers.sum(axis=-1)
        mean_token = (
            jnp.einsum("bml,bld->bmd", covers, tokens.x.astype(jnp.float32))
            / jnp.maximum(num_covering, 1.0)[..., None]
        )
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(mean_token)
        x += embed.PositionEmbed(self.width, self.dtype, name="place")(place_BM3, query_extent_BM3)
        x = jax.nn.gelu(Dense(self.width, dtype=self.dtype, name="hidden")(x))
        return Dense(self.num_channels, kernel_init=nn.initializers.normal(0.02), name="out")(
            x
        ).astype(jnp.float32), num_covering > 0
