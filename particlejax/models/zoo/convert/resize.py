# SPDX-License-Identifier: Apache-2.0
"""Weights made for another size: kernels of images for video, tables of positions for other grids.

Legend: H rows, W columns, I channels in, O channels out, N positions, D width.
"""

import math

import numpy as np

from particlejax.core.typing import UserError


def inflate(kernel_HWIO: np.ndarray, frames: int) -> np.ndarray:
    """A kernel of images repeated over frames: a still clip gets what the image got
    (arXiv:1705.07750, section 2.4).
    """
    return np.repeat(kernel_HWIO[None], frames, axis=0) / np.asarray(frames, kernel_HWIO.dtype)


def positions(table_ND: np.ndarray, old: tuple[int, ...], new: tuple[int, ...]) -> np.ndarray:
    """A table of positions on a grid (frames, rows, columns, as many axes as it has), read off
    linearly on another.

    Cells are compared by their centres, as PyTorch does with align_corners=False; beyond the
    outermost centres their values go on. Tokens that stand before the grid, such as a class token,
    are the caller's. Raises UserError where the table is not of the old grid.
    """
    if len(table_ND) != math.prod(old) or len(old) != len(new):
        raise UserError(
            f"a table of {len(table_ND)} positions is not a grid of {' x '.join(map(str, old))} "
            "that "
            f"becomes {' x '.join(map(str, new))}: give the grid that the weights were trained on."
        )
    grid = table_ND.reshape(*old, -1)
    for axis, (n, m) in enumerate(zip(old, new, strict=True)):
        grid = np.moveaxis(
            np.tensordot(_weights(n, m).astype(table_ND.dtype), grid, (1, axis)), 0, axis
        )
    return grid.reshape(math.prod(new), -1)


def old_grid(
    number: int, new: tuple[int, ...], square: bool = True, told: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """The grid (frames, rows, columns) that so many positions have, going by the one that they
    shall have.

    As many frames of square images, or of as many rows where they are not `square`; where there are
    frames, other frames of the same rows and columns as well. told: the model's, of which a table
    may cover time or space alone. Raises UserError where none fits, or two do.
    """
    frames, rows, columns = new
    wide = number // (frames * rows) if not square else math.isqrt(number // frames)
    tall = wide if square else rows
    found = {(frames, tall, wide)} if rows * columns > 1 else set()
    if frames > 1 or rows * columns == 1:
        found.add((number // (rows * columns), rows, columns))
    if told:
        found = (
            {(1, *told[1:])}
            if frames == 1 and rows * columns > 1
            else {(told[0], 1, 1)}
            if rows * columns == 1
            else {told}
        )
    found = {each for each in found if math.prod(each) == number}
    if len(found) != 1:
        raise UserError(
            f"it cannot be told which frames, rows and columns {number} positions are that become "
            f"{frames} x {rows} x {columns}: give the grid that the weights were trained on with "
            "config.source_grid, "
            "such as (8,14,14)."
        )
    return found.pop()


def _weights(n: int, m: int) -> np.ndarray:
    """How much each of n values counts for each of m, [m, n]."""
    at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(n)[None]), 0)
