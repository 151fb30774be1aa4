# SPDX-License-Identifier: Apache-2.0
"""Resizing of weights: image kernels to video, position tables to other grids.

Legend: H rows, W columns, I channels in, O channels out, N positions, D width.
"""

import math

import numpy as np

from particlejax.core.typing import UserError


def inflate(kernel_HWIO: np.ndarray, frames: int) -> np.ndarray:
    """Inflates an image kernel over frames: a still clip gives the image's output
    (arXiv:1705.07750, section 2.4).
    """
    return np.repeat(kernel_HWIO[None], frames, axis=0) / np.asarray(frames, kernel_HWIO.dtype)


def resize_positions(
    table_ND: np.ndarray, old: tuple[int, ...], new: tuple[int, ...]
) -> np.ndarray:
    """Interpolates a position table linearly from one grid (frames, rows, columns, or fewer axes)
    to another.

    Cells are aligned by their centers, as in PyTorch with align_corners=False, and clamped at the
    border. The caller handles tokens before the grid, such as a class token. Raises UserError if
    the table does not have the old grid's size.
    """
    if len(table_ND) != math.prod(old) or len(old) != len(new):
        raise UserError(
            f"a table of {len(table_ND)} positions does not fit the grid "
            f"{' x '.join(map(str, old))} to be resized to {' x '.join(map(str, new))}: give "
            "the grid that the weights were trained on."
        )
    grid = table_ND.reshape(*old, -1)
    for axis, (n, m) in enumerate(zip(old, new, strict=True)):
        grid = np.moveaxis(
            np.tensordot(_interpolation_weights(n, m).astype(table_ND.dtype), grid, (1, axis)),
            0,
            axis,
        )
    return grid.reshape(math.prod(new), -1)


def old_grid(
    num_positions: int, new: tuple[int, ...], square: bool = True, source_grid: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Infers the grid (frames, rows, columns) of so many positions from the model's grid.

    Candidates have equal frames and a square image, or equal rows if not `square`; or other frames
    and equal rows and columns. source_grid: the model's grid; a table may cover time or space
    alone. Raises UserError if no candidate fits, or two do.
    """
    frames, rows, columns = new
    num_columns = (
        num_positions // (frames * rows) if not square else math.isqrt(num_positions // frames)
    )
    num_rows = num_columns if square else rows
    candidates = {(frames, num_rows, num_columns)} if rows * columns > 1 else set()
    if frames > 1 or rows * columns == 1:
        candidates.add((num_positions // (rows * columns), rows, columns))
    if source_grid:
        candidates = (
            {(1, *source_grid[1:])}
            if frames == 1 and rows * columns > 1
            else {(source_grid[0], 1, 1)}
            if rows * columns == 1
            else {source_grid}
        )
    candidates = {candidate for candidate in candidates if math.prod(candidate) == num_positions}
    if len(candidates) != 1:
        raise UserError(
            f"cannot infer the grid of {num_positions} positions to be resized to {frames} x "
            f"{rows} x {columns}: give the grid that the weights were trained on with "
            "config.source_grid, such as (8,14,14)."
        )
    return candidates.pop()


def _interpolation_weights(n: int, m: int) -> np.ndarray:
    """Interpolation weights of n values for m outputs, [m, n]."""
    source_position = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return np.maximum(1 - np.abs(source_position[:, None] - np.arange(n)[None]), 0)
