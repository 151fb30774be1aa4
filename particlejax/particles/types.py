# SPDX-License-Identifier: Apache-2.0
"""The one type that everything downstream of the data reads: particles, and a batch of them.

Legend: B rows, L slots of a row, P numbers of a payload, S clips of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from particlejax.core.typing import Array

Leaf = Any  # an array of numpy or jax, or whatever jax.tree puts in its place (shapes, shardings)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Particles:
    """Pieces of clips, each with where it is, how large it is and whose it is (design: one type for
    every modality).

    payload: [..., L, P] float32 (mel patch, features, pixels as the model reads them), uint8
    (pixels on their way there) or int32 (token ids, P = 1). place: [..., L, 3] float32, the centre:
    seconds from the clip's start, row and column as fractions of the frame. extent: [..., L, 3]
    float32, the size along the same axes. segment: [..., L] int32, 0 for an empty slot, else 1..
    for the clip of this row that the particle belongs to.
    """

    payload: Leaf
    place: Leaf
    extent: Leaf
    segment: Leaf

    def take(self, index: Array) -> "Particles":
        """The particles at `index` [..., K] of each row."""
        xp = numpy_of(index)
        rows = {
            name: xp.take_along_axis(getattr(self, name), index[..., None], axis=-2)
            for name in ("payload", "place", "extent")
        }
        return replace(self, **rows, segment=xp.take_along_axis(self.segment, index, axis=-1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What one step reads: `particles` by modality, and per clip [B, S] what is known of it.

    label: int32, -1 where there is none. clip: int32, the clip's number in its source, -1 where the
    row holds no clip. share, other: float32 and int32, the label counts `share` and `other` the
    rest, where two clips were mixed; else 1 and -1.
    """

    particles: Mapping[str, Particles]
    label: Leaf
    clip: Leaf
    share: Leaf
    other: Leaf


def numpy_of(x: Array) -> object:
    """numpy for host arrays, jax.numpy for device arrays and tracers: one implementation serves
    both.
    """
    return np if isinstance(x, (np.ndarray, np.generic)) else jnp
