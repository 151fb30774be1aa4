# SPDX-License-Identifier: Apache-2.0
"""From particles to tokens: the sum of payload, position, size and modality embeddings.

Legend: B rows, L slots, P numbers of a payload, D width, F frequencies.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.nn.dense import Dense

_TIME_WAVELENGTHS = (1 / 8, 32.0)  # shortest and longest wavelength of the time encoding
_SPACE_WAVELENGTHS = (1 / 16, 2.0)  # the same for row and column, in frames
_NUM_FREQUENCIES = 8  # per axis
_EXTENT_OCTAVES = 4.0  # log2 of extents is divided by this


def place_features(place_BL3: Array, extent_BL3: Array) -> Array:
    """Fourier features of positions and log2 of extents, float32 [B, L, 6 F + 3]: continuous in
    both.
    """
    shortest = np.array(
        [_TIME_WAVELENGTHS[0], _SPACE_WAVELENGTHS[0], _SPACE_WAVELENGTHS[0]], np.float32
    )
    longest = np.array(
        [_TIME_WAVELENGTHS[1], _SPACE_WAVELENGTHS[1], _SPACE_WAVELENGTHS[1]], np.float32
    )
    exponents = np.linspace(0, 1, _NUM_FREQUENCIES, dtype=np.float32)
    wavelength = shortest[:, None] * (longest / shortest)[:, None] ** exponents
    angle = (place_BL3[..., None] * (2 * np.pi / wavelength)[None, None]).reshape(
        *place_BL3.shape[:2], -1
    )
    log_extent = jnp.log2(jnp.maximum(extent_BL3, 1e-6)) / _EXTENT_OCTAVES
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle), log_extent], axis=-1)


class PositionEmbed(nn.Module):
    """Position and size embeddings: all resolutions, rates and patch sizes share the same
    parameters.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, place_BL3: Array, extent_BL3: Array) -> Array:
        features = place_features(place_BL3, extent_BL3)
        return Dense(self.width, dtype=self.dtype, name="project")(features)


class PayloadEmbed(nn.Module):
    """Payload embeddings: Dense for numbers, a table of `vocabulary` rows for token ids (int32, P =
    1).
    """

    width: int
    vocabulary: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, payload_BLP: Array) -> Array:
        if self.vocabulary:
            return nn.Embed(self.vocabulary, self.width, name="table")(payload_BLP[..., 0]).astype(
                self.dtype
            )
        return Dense(self.width, dtype=self.dtype, name="project")(payload_BLP)


class LearnedTokens(nn.Module):
    """Learned vectors [count, D] for bottleneck tokens, class tokens and modality embeddings."""

    width: int
    num_tokens: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("token", nn.initializers.normal(0.02), (self.num_tokens, self.width))
