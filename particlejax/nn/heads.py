# SPDX-License-Identifier: Apache-2.0
"""From the tokens of a clip to one vector.

Legend: B rows, L slots, S clips of a row, D width, H heads, K width of a head.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses


class AttentivePool(nn.Module):
    """Each head's own weighted mean of a clip's tokens, float32 [B, S, D] (attentive pooling, arXiv:1810.00825).

    Where the mean drowns the few tokens that matter, the heads learn which do. A clip without tokens gives zeros.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array, segment_BL: Array, clips: int) -> Array:
        width = x_BLD.shape[-1]
        logits = nn.Dense(self.heads, dtype=self.dtype, name="score")(x_BLD).astype(jnp.float32)
        value = nn.DenseGeneral((self.heads, width // self.heads), dtype=self.dtype, name="value")(x_BLD)
        member = losses.membership(segment_BL, clips).swapaxes(1, 2)[..., None]  # [B, S, L, 1]
        weights = jax.nn.softmax(jnp.where(member > 0, logits[:, None], -1e9), axis=2) * member
        pooled = jnp.einsum("bslh,blhk->bshk", weights, value.astype(jnp.float32))
        return pooled.reshape(*pooled.shape[:2], width)
