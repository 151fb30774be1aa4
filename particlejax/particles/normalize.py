# SPDX-License-Identifier: Apache-2.0
"""Pixels travel as uint8, a quarter of the bytes, and become what the model reads on its device;
numpy and jax alike.

Legend: P numbers of a payload in the order (t, h, w, c).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from particlejax.core.typing import Array
from particlejax.particles.types import numpy_of


@dataclass(frozen=True)
class PixelScale:
    """mean, std: of pixels in [0, 1]. still: share of a cuboid's mean over its `frames` that stays,
    in (0, 1].
    """

    mean: float
    std: float
    still: float
    frames: int

    def to_payload(self, pixels: UInt8[Array, "... P"]) -> Float[Array, "... P"]:
        """What the model reads, float32: normalised, with the part of a cuboid that does not move
        made small.
        """
        payload = pixels.astype(np.float32) * np.float32(1 / (255 * self.std)) - np.float32(
            self.mean / self.std
        )
        return self._scale_still(payload, self.still)

    def to_pixels(self, payload: Float[Array, "... P"]) -> Float[Array, "... P"]:
        """The inverse, float32 in [0, 1] where `payload` is what pixels became."""
        return self._scale_still(payload, 1 / self.still) * np.float32(self.std) + np.float32(
            self.mean
        )

    def _scale_still(self, payload: Array, still: float) -> Array:
        if still == 1:
            return payload
        cuboid = payload.reshape(*payload.shape[:-1], self.frames, -1)
        mean = numpy_of(payload).mean(cuboid, axis=-2, keepdims=True)
        return (cuboid + np.float32(still - 1) * mean).reshape(payload.shape)
