# SPDX-License-Identifier: Apache-2.0
"""What the model knows of each modality."""

from typing import NamedTuple

import numpy as np

from particlejax.core.typing import Array
from particlejax.particles.normalize import PixelScale


class Payload(NamedTuple):
    """What a modality's payloads are: `size` numbers, or ids below `vocabulary` where that is not
    0.

    base: frames, rows and columns of the cuboid that the numbers are of, in the order (t, h, w,
    channel); () for no cuboid. pixels: how uint8 pixels become those numbers; None where there are
    no pixels.
    """

    size: int
    vocabulary: int = 0
    base: tuple[int, ...] = ()
    pixels: PixelScale | None = None

    @property
    def still(self) -> float:
        """What the mean over a cuboid's frames is multiplied by."""
        return self.pixels.still if self.pixels else 1.0

    def normalize(self, payload: Array) -> Array:
        """Payloads as the model computes with them: uint8 pixels become float32, all else stays.

        Raises ValueError for uint8 where `pixels` is None.
        """
        if payload.dtype != np.uint8:
            return payload
        if self.pixels is None:
            raise ValueError(
                "these payloads are uint8 pixels and the model does not know their mean and "
                "deviation: give the modality's Payload `pixels`, a PixelScale."
            )
        return self.pixels.to_payload(payload)
