# SPDX-License-Identifier: Apache-2.0
"""Layouts: how a parameter relates to a reference's array: name, axes, position in a stack."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]
Rules = tuple[tuple[str, str], ...]
# of positions: number of tokens before the grid, the grid, whether its frames are square
Grid = tuple[int, tuple[int, ...], bool]


class Layout(NamedTuple):
    """Converts the reference's array to ours, and back."""

    from_reference: Transform
    to_reference: Transform


class Entry(NamedTuple):
    """One array of the reference: our path, its name and its axis conversion."""

    path: str
    reference_name: str
    layout: Layout
    layer: int | None = None  # index in our stacked layers [depth, ...]
    # (index, count): our part of its first axis, such as of fused q, k and v
    part: tuple[int, int] = (0, 1)
    grid: Grid | None = None  # set for a position table


class Names(NamedTuple):
    """All parameters of an architecture, and the reference's batch counters, which we ignore."""

    entries: tuple[Entry, ...]
    counters: tuple[str, ...]
    # converts the names of other files of this architecture to the reference's
    dialects: tuple[Rules, ...] = ()


SAME = Layout(lambda a: a, lambda a: a)
# [O, I, t, h, w]
CONV = Layout(lambda a: a.transpose(2, 3, 4, 1, 0), lambda a: a.transpose(4, 3, 0, 1, 2))
# [O, I, h, w]
IMAGE = Layout(lambda a: a.transpose(2, 3, 1, 0)[None], lambda a: a[0].transpose(3, 2, 0, 1))
DENSE = Layout(np.transpose, np.transpose)  # [O, I]


def leading_axes(axes: int) -> Layout:
    """The reference's array has that many leading axes of length one."""
    return Layout(lambda a: a.reshape(a.shape[axes:]), lambda a: a.reshape((1,) * axes + a.shape))


def split_heads(shape: tuple[int, ...]) -> Layout:
    """Ours [D, H, K] or [H, K] has a separate head axis after the inputs: theirs is [H K, D] or [H
    K].
    """
    if len(shape) == 2:
        return Layout(lambda a: a.reshape(shape), lambda a: a.reshape(-1))
    return Layout(lambda a: a.T.reshape(shape), lambda a: a.reshape(a.shape[0], -1).T)


def merge_heads(shape: tuple[int, ...]) -> Layout:
    """Ours [H, K, D] has heads as inputs: theirs is [D, H K]."""
    return Layout(lambda a: a.T.reshape(shape), lambda a: a.reshape(-1, a.shape[-1]).T)
