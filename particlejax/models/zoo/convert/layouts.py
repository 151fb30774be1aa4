# SPDX-License-Identifier: Apache-2.0
"""What stands between a parameter of ours and an array of a reference: its name, its axes, its
place in a stack.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Turn = Callable[[np.ndarray], np.ndarray]
Rules = tuple[tuple[str, str], ...]
# of positions: tokens before the grid, the grid, whether its frames were square
Grid = tuple[int, tuple[int, ...], bool]


class Layout(NamedTuple):
    """The reference's array to ours, and back."""

    ours: Turn
    theirs: Turn


class Entry(NamedTuple):
    """One array of the reference: our path, its name and how its axes turn."""

    ours: str
    theirs: str
    layout: Layout
    layer: int | None = None  # which of our stacked layers [depth, ...] it is
    # which of how many equal parts of its first axis is ours, as where it fuses q, k and v
    share: tuple[int, int] = (0, 1)
    grid: Grid | None = None  # where it is a table of positions


class Names(NamedTuple):
    """All parameters of an architecture, and the reference's counters of batches, which mean
    nothing to us.
    """

    entries: tuple[Entry, ...]
    counters: tuple[str, ...]
    # how the names of other files of this architecture become the reference's
    dialects: tuple[Rules, ...] = ()


SAME = Layout(lambda a: a, lambda a: a)
# [O, I, t, h, w]
CONV = Layout(lambda a: a.transpose(2, 3, 4, 1, 0), lambda a: a.transpose(4, 3, 0, 1, 2))
# [O, I, h, w]
IMAGE = Layout(lambda a: a.transpose(2, 3, 1, 0)[None], lambda a: a[0].transpose(3, 2, 0, 1))
DENSE = Layout(np.transpose, np.transpose)  # [O, I]


def leading(axes: int) -> Layout:
    """The reference's has so many axes of length one before ours."""
    return Layout(lambda a: a.reshape(a.shape[axes:]), lambda a: a.reshape((1,) * axes + a.shape))


def heads(shape: tuple[int, ...]) -> Layout:
    """Ours [D, H, K] or [H, K] has heads on an axis of their own behind the inputs: theirs is [H K,
    D] or [H K].
    """
    if len(shape) == 2:
        return Layout(lambda a: a.reshape(shape), lambda a: a.reshape(-1))
    return Layout(lambda a: a.T.reshape(shape), lambda a: a.reshape(a.shape[0], -1).T)


def mixed(shape: tuple[int, ...]) -> Layout:
    """Ours [H, K, D] takes heads in: theirs is [D, H K]."""
    return Layout(lambda a: a.T.reshape(shape), lambda a: a.reshape(-1, a.shape[-1]).T)
