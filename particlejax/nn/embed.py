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

_SECONDS = (1 / 8, 32.0)  # shortest and longest wavelength of the time encoding
_FRACTION = (1 / 16, 2.0)  # the same for row and column, in frames
_FREQUENCIES = 8  # per axis
_OCTAVES = 4.0  # log2 of extents is divided by this


def place_features(place_BL3: Array, extent_BL3: Array) -> Array:
    """Fourier features of positions and log2 of extents, float32 [B, L, 6 F + 3]: continuous in
    both.
    """
    shortest = np.array([_SECONDS[0], _FRACTION[0], _FRACTION[0]], np.float32)
    longest = np.array([_SECONDS[1], _FRACTION[1], _FRACTION[1]], np.float32)
    steps = np.linspace(0, 1, _FREQUENCIES, dtype=np.float32)
    wavelength = shortest[:, None] * (longest / shortest)[:, None] ** steps
    angle = (place_BL3[..., None] * (2 * np.pi / wavelength)[None, None]).reshape(
        *place_BL3.shape[:2], -1
    )
    size = jnp.log2(jnp.maximum(extent_BL3, 1e-6)) / _OCTAVES
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle), size], axis=-1)


class Place(nn.Module):
    """Position and size embeddings: all resolutions, rates and patch sizes share the same
    parameters.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, place_BL3: Array, extent_BL3: Array) -> Array:
        features = place_features(place_BL3, extent_BL3)
        return Dense(self.width, dtype=self.dtype, name="project")(features)


class Payload(nn.Module):
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


class Learned(nn.Module):
    """Learned vectors [count, D] for bottleneck tokens, class tokens and modality embeddings."""

    width: int
    count: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("token", nn.initializers.normal(0.02), (self.count, self.width))
