# SPDX-License-Identifier: Apache-2.0
"""From the tokens of a clip to one vector, and from that to answers and to embeddings.

Legend: B rows, L slots, S clips of a row, D width, H heads, K width of a head, C answers, E width of an embedding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax import losses
from particlejax.nn.dense import Dense, DenseGeneral


class AttentivePool(nn.Module):
    """Each head's own weighted mean of a clip's tokens, float32 [B, S, D] (attentive pooling, arXiv:1810.00825).

    Where the mean drowns the few tokens that matter, the heads learn which do. A clip without tokens gives zeros.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array, segment_BL: Array, clips: int) -> Array:
        width = x_BLD.shape[-1]
        logits = Dense(self.heads, dtype=self.dtype, name="score")(x_BLD).astype(jnp.float32)
        value = DenseGeneral((self.heads, width // self.heads), dtype=self.dtype, name="value")(x_BLD)
        member = losses.membership(segment_BL, clips).swapaxes(1, 2)[..., None]  # [B, S, L, 1]
        weights = jax.nn.softmax(jnp.where(member > 0, logits[:, None], -1e9), axis=2) * member
        pooled = jnp.einsum("bslh,blhk->bshk", weights, value.astype(jnp.float32))
        return pooled.reshape(*pooled.shape[:2], width)


class Question(nn.Module):
    """Logits float32 [B, S, C] of one question about each clip."""

    answers: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pooled_BSD: Array) -> Array:
        normed = nn.LayerNorm(dtype=self.dtype, name="norm")(pooled_BSD)
        return Dense(self.answers, kernel_init=nn.initializers.normal(0.02), name="out")(normed).astype(jnp.float32)


class Embed(nn.Module):
    """Unit vectors [B, S, E] that clips are compared by, one map for each modality, and how sharply: factor and bias."""

    width: int
    modalities: tuple[str, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pooled_BSD: Array, modality: str) -> tuple[Array, Array, Array]:
        log_sharpness = self.param("log_sharpness", nn.initializers.constant(np.log(10.0)), ())
        bias = self.param("bias", nn.initializers.constant(-10.0), ())  # both start as in SigLIP (arXiv:2303.15343)
        normed = nn.LayerNorm(dtype=self.dtype, name=f"norm_{modality}")(pooled_BSD)
        x = Dense(self.width, dtype=jnp.float32, name=f"project_{modality}")(normed)
        unit = x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)
        return unit, jnp.exp(jnp.minimum(log_sharpness, np.log(100.0))), bias
