# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: rotates queries and keys by position, so that their product depends on
distance (arXiv:2104.09864).

Legend: B rows, H heads, L slots, K width of a head, F frequencies of an axis.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

_MAX_WAVELENGTHS = (32.0, 2.0, 2.0)  # wavelength in seconds, and in frames for row and column
_MIN_WAVELENGTHS = (0.25, 0.125, 0.125)


def apply_rope(x_BHLK: Array, place_BL3: Array) -> Array:
    """Rotates pairs of x's channels by continuous position; one third per axis, the remainder is
    unchanged.
    """
    num_frequencies = x_BHLK.shape[-1] // 6
    exponents = np.linspace(0, 1, num_frequencies, dtype=np.float32)
    shortest, longest = (
        np.array(_MIN_WAVELENGTHS, np.float32)[:, None],
        np.array(_MAX_WAVELENGTHS, np.float32)[:, None],
    )
    wavelength = shortest * (longest / shortest) ** exponents  # [3, F]
    angle = (place_BL3[..., None] * (2 * np.pi / wavelength)[None, None]).reshape(
        *place_BL3.shape[:2], -1
    )[:, None]
    sin, cos = jnp.sin(angle).astype(x_BHLK.dtype), jnp.cos(angle).astype(x_BHLK.dtype)
    first, second, remainder = jnp.split(
        x_BHLK, [3 * num_frequencies, 6 * num_frequencies], axis=-1
    )
    return jnp.concatenate(
        [first * cos - second * sin, first * sin + second * cos, remainder], axis=-1
    )
