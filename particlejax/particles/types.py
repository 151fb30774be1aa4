# SPDX-License-Identifier: Apache-2.0
"""The data types shared by all modules: particles, and a batch of them.

Legend: B rows, L slots of a row, P values of a payload, S clips of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from particlejax.core.typing import Array

Leaf = Any  # a NumPy or JAX array, or a jax.tree leaf in its place (shape, sharding)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Particles:
    """Pieces of clips with position, size and clip index; one type for all modalities.

    payload: [..., L, P] float32 (mel patch, features, normalized pixels), uint8 (raw pixels) or
    int32 (token ids, P = 1). place: [..., L, 3] float32, the center: seconds from the clip's start,
    row and column as fractions of the frame. extent: [..., L, 3] float32, the size along the same
    axes. segment: [..., L] int32, 0 for an empty slot, else the clip's number in the row, from 1.
    """

    payload: Leaf
    place: Leaf
    extent: Leaf
    segment: Leaf

    def take(self, index: Array) -> "Particles":
        """Returns the particles at `index` [..., K] of each row."""
        xp = array_namespace(index)
        fields = {
            name: xp.take_along_axis(getattr(self, name), index[..., None], axis=-2)
            for name in ("payload", "place", "extent")
        }
        return replace(self, **fields, segment=xp.take_along_axis(self.segment, index, axis=-1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """The input of one step: `particles` by modality, and data per clip [B, S].

    label: int32, -1 if unlabeled. clip_index: int32 index in the source, -1 for an empty position.
    label_weight, second_label: float32 and int32, for mixed clips: `label` has the weight
    `label_weight` and `second_label` the rest; else 1 and -1.
    """

    particles: Mapping[str, Particles]
    label: Leaf
    clip_index: Leaf
    label_weight: Leaf
    second_label: Leaf


def array_namespace(x: Array) -> object:
    """Returns numpy for host arrays, jax.numpy for device arrays and tracers."""
    return np if isinstance(x, (np.ndarray, np.generic)) else jnp
