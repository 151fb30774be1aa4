# SPDX-License-Identifier: Apache-2.0
"""Paints particles as a video.

Legend: T frames, H rows, W columns, N particles, P values of a payload.
"""

import numpy as np

TIME_EPS = 1e-4  # tolerance in seconds between a frame and the start of its cuboid


def paint(
    payload: np.ndarray,
    place: np.ndarray,
    extent: np.ndarray,
    times: np.ndarray,
    size: tuple[int, int],
    patch_size: tuple[int, int, int],
    canvas: np.ndarray,
) -> np.ndarray:
    """Returns a copy of canvas [T, H, W, 3] with payloads [N, P] drawn in their cuboids, by nearest
    neighbor.
    """
    canvas = canvas.copy()
    for pixels, center, cuboid_extent in zip(payload, place, extent, strict=True):
        block = pixels.reshape(*patch_size, 3)
        frames = inside(times, center[0], cuboid_extent[0], TIME_EPS)
        rows, columns = (
            inside((np.arange(n) + 0.5) / n, center[i], cuboid_extent[i], 0.0)
            for i, n in ((1, size[0]), (2, size[1]))
        )
        index = [
            (np.arange(len(covered)) * n // max(len(covered), 1))
            for covered, n in zip((frames, rows, columns), patch_size, strict=True)
        ]
        canvas[np.ix_(frames, rows, columns)] = block[np.ix_(*index)]
    return canvas


def inside(
    positions: np.ndarray, center: float | np.floating, width: float | np.floating, tolerance: float
) -> np.ndarray:
    """Returns indices of the positions within a width around a center."""
    return np.flatnonzero(
        (positions >= center - width / 2 - tolerance) & (positions < center + width / 2 - tolerance)
    )
