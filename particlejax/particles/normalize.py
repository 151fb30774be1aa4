# SPDX-License-Identifier: Apache-2.0
"""Pixel normalization: pixels are stored as uint8 and normalized on the device; NumPy and JAX.

Legend: P values of a payload in the order (t, h, w, c).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from particlejax.core.typing import Array
from particlejax.particles.types import array_namespace


@dataclass(frozen=True)
class PixelScale:
    """mean, std: of pixels in [0, 1]. temporal_mean_scale: factor in (0, 1] of a cuboid's mean over
    time.
    """

    mean: float
    std: float
    temporal_mean_scale: float
    num_frames: int

    def to_payload(self, pixels: UInt8[Array, "... P"]) -> Float[Array, "... P"]:
        """Normalizes pixels to float32 and scales each cuboid's mean over time by
        `temporal_mean_scale`.
        """
        payload = pixels.astype(np.float32) * np.float32(1 / (255 * self.std)) - np.float32(
            self.mean / self.std
        )
        return self._scale_temporal_mean(payload, self.temporal_mean_scale)

    def to_pixels(self, payload: Float[Array, "... P"]) -> Float[Array, "... P"]:
        """Inverts `to_payload`: float32 in [0, 1]."""
        return self._scale_temporal_mean(payload, 1 / self.temporal_mean_scale) * np.float32(
            self.std
        ) + np.float32(self.mean)

    def _scale_temporal_mean(self, payload: Array, scale: float) -> Array:
        if scale == 1:
            return payload
        cuboid = payload.reshape(*payload.shape[:-1], self.num_frames, -1)
        mean = array_namespace(payload).mean(cuboid, axis=-2, keepdims=True)
        return (cuboid + np.float32(scale - 1) * mean).reshape(payload.shape)
