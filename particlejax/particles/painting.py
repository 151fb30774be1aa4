# SPDX-License-Identifier: Apache-2.0
"""Paints particles as a video.

Legend: T frames, H rows, W columns, N particles, P values of a payload.
"""

import numpy as np

TICK = 1e-4  # tolerance in seconds between a frame and the start of its cuboid


def paint(
    payload: np.ndarray,
    place: np.ndarray,
    extent: np.ndarray,
    times: np.ndarray,
    size: tuple[int, int],
    base: tuple[int, int, int],
    canvas: np.ndarray,
) -> np.ndarray:
    """Returns a copy of canvas [T, H, W, 3] with payloads [N, P] drawn in their cuboids, by nearest
    neighbor.
    """
    canvas = canvas.copy()
    for pixels, here, wide in zip(payload, place, extent, strict=True):
        block = pixels.reshape(*base, 3)
        frames = inside(times, here[0], wide[0], TICK)
        rows, columns = (
            inside((np.arange(n) + 0.5) / n, here[i], wide[i], 0.0)
            for i, n in ((1, size[0]), (2, size[1]))
        )
        pick = [
            (np.arange(len(at)) * n // max(len(at), 1))
            for at, n in zip((frames, rows, columns), base, strict=True)
        ]
        canvas[np.ix_(frames, rows, columns)] = block[np.ix_(*pick)]
    return canvas


def inside(
    at: np.ndarray, centre: float | np.floating, width: float | np.floating, slack: float
) -> np.ndarray:
    """Returns indices of the positions within a width around a center."""
    return np.flatnonzero((at >= centre - width / 2 - slack) & (at < centre + width / 2 - slack))
