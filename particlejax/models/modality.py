# SPDX-License-Identifier: Apache-2.0
"""What the model knows about each modality."""

from typing import NamedTuple

import numpy as np

from particlejax.core.typing import Array
from particlejax.particles.normalize import PixelScale


class ModalitySpec(NamedTuple):
    """Payloads of a modality: `payload_size` numbers, or token ids below `vocabulary` if that is
    not 0.

    patch_size: frames, rows and columns of the cuboid behind the numbers, in the order (t, h, w,
    channel); () if there is none. pixels: normalization of uint8 pixels; None without pixels.
    """

    payload_size: int
    vocabulary: int = 0
    patch_size: tuple[int, ...] = ()
    pixels: PixelScale | None = None

    @property
    def temporal_mean_scale(self) -> float:
        """Factor of the mean over a cuboid's frames."""
        return self.pixels.temporal_mean_scale if self.pixels else 1.0

    def normalize(self, payload: Array) -> Array:
        """Normalizes uint8 pixels to float32 and leaves other payloads unchanged.

        Raises ValueError for uint8 if `pixels` is None.
        """
        if payload.dtype != np.uint8:
            return payload
        if self.pixels is None:
            raise ValueError(
                "these payloads are uint8 pixels but the model does not know their mean and "
                "deviation: give the modality's Payload `pixels`, a PixelScale."
            )
        return self.pixels.to_payload(payload)
