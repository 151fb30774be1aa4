# SPDX-License-Identifier: Apache-2.0
"""Adaptive particles: split coarse cuboids where the split gains most, up to a budget.

A node is a cuboid of `patch_size` cells on a level (i, j): each cell averages factor^i frames by
factor^j pixels. Splitting a node in time, space or both replaces it by its children. Averages of
nested blocks are orthogonal, so the gain of a split is a difference of sums of squares, and the
order of a greedy search is a sort: a node comes no earlier than its parent (tree-structured
growing, Riskin and Gray 1991). NumPy and JAX select identical particles: cells are rounded so that
sums over a node are exact, and nodes are summed in a fixed order.

Legend: T frames, H rows, W columns, C channels; N nodes of all levels, from coarse to fine; the
nodes of a level are [t, h, w].
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int, Num

from particlejax.config.experiment import ParticleSpec
from particlejax.core.typing import Array
from particlejax.particles.cuboids import Shape, Tube, edges, lattice
from particlejax.particles.types import Particles, numpy_of

Level = tuple[int, int]  # number of coarsening steps in time and in space

_STEPS: dict[str, Level] = {"spacetime": (1, 1), "time": (1, 0), "space": (0, 1)}
_EXACT = 2**31  # integers below it fit in int32
_NOISE = 1e-5  # differences below this fraction of a node's energy are rounding errors
_LATER = 1e-3  # discount of gains more than one split away, to break ties


class Tree(NamedTuple):
    """The part that does not depend on pixels: levels from coarse to fine, and their nodes per
    axis.

    For all N nodes: cells [N, prod(patch_size)] index the cells of `_pyramid`; parents int32 [N,
    kinds] are the nodes whose split of each kind creates them, or -1; frames int32 [N, 2] are their
    first and last frame (exclusive); centre and size float32 [N, 2] are their position and size in
    the frame.
    """

    levels: tuple[Level, ...]
    counts: tuple[Shape, ...]
    cells: np.ndarray
    parents: np.ndarray
    frames: np.ndarray
    centre: np.ndarray
    size: np.ndarray


@functools.cache
def tree(size: Shape, spec: ParticleSpec) -> Tree:
    """Returns the tree for clips of `size`. Raises ValueError if the coarsest cuboids do not tile
    them.
    """
    steps = [_STEPS[kind] for kind in spec.split_axes]
    found, fresh = {_top(spec)}, {_top(spec)}
    while fresh:
        fresh = {(i - a, j - b) for i, j in fresh for a, b in steps if i >= a and j >= b} - found
        found |= fresh
    levels = tuple(sorted(found, key=lambda level: (-sum(level), level)))
    shapes = [_shape(level, spec) for level in levels]
    for length, cells in zip(size, shapes[0], strict=True):
        if length % cells:
            raise ValueError(
                f"clips of {tuple(size)} are not tiled by the coarsest particles of {shapes[0]}: "
                "change particles.num_levels or patch_size, or data.num_frames or image_size."
            )
    counts = tuple(tuple(n // s for n, s in zip(size, shape, strict=True)) for shape in shapes)
    corners = [lattice(size, Tube(shape, shape)) for shape in shapes]
    frames = np.concatenate(
        [at[:, :1] + (0, shape[0]) for at, shape in zip(corners, shapes, strict=True)]
    ).astype(np.int32)
    picture = np.array(size[1:], np.float32)
    wide = [
        np.broadcast_to(np.array(shape[1:], np.float32), (len(at), 2))
        for at, shape in zip(corners, shapes, strict=True)
    ]
    middle = [at[:, 1:] + each / 2 for at, each in zip(corners, wide, strict=True)]
    return Tree(
        levels,
        counts,
        _cells(size, levels, spec),
        _parents(levels, counts, spec),
        frames,
        (np.concatenate(middle) / picture).astype(np.float32),
        np.concatenate(wide) / picture,
    )


def _cells(size: Shape, levels: tuple[Level, ...], spec: ParticleSpec) -> np.ndarray:
    rows, start = [], 0
    for level in levels:
        shape = tuple(n // s for n, s in zip(size, _scale(level, spec), strict=True))
        index = start + np.arange(np.prod(shape)).reshape(shape)
        a, b, d = spec.patch_size
        rows.append(rearrange(index, "(t a) (h b) (w d) -> (t h w) (a b d)", a=a, b=b, d=d))
        start += index.size
    return np.concatenate(rows)


def _parents(
    levels: tuple[Level, ...], counts: tuple[Shape, ...], spec: ParticleSpec
) -> np.ndarray:
    starts = np.cumsum([0, *(np.prod(count) for count in counts)])
    numbers = {
        level: starts[i] + np.arange(np.prod(counts[i]), dtype=np.int32).reshape(counts[i])
        for i, level in enumerate(levels)
    }
    found = np.full((starts[-1], len(spec.split_axes)), -1, np.int32)
    for (i, level), (kind, split) in itertools.product(
        enumerate(levels), enumerate(spec.split_axes)
    ):
        step = _STEPS[split]
        parent = numbers.get((level[0] + step[0], level[1] + step[1]))
        if parent is not None:
            found[starts[i] : starts[i + 1], kind] = _spread(parent, _scale(step, spec)).reshape(-1)
    return found


def root(spec: ParticleSpec) -> Shape:
    """Returns the coarsest cuboid: frames, rows, columns."""
    return _shape(_top(spec), spec)


def _top(spec: ParticleSpec) -> Level:
    steps = [_STEPS[kind] for kind in spec.split_axes]
    return (spec.num_levels - 1) * max(i for i, _ in steps), (spec.num_levels - 1) * max(
        j for _, j in steps
    )


def _shape(level: Level, spec: ParticleSpec) -> Shape:
    return tuple(b * s for b, s in zip(spec.patch_size, _scale(level, spec), strict=True))


def adaptive(
    video_THWC: Num[Array, "T H W C"], times_T: Float[Array, " T"], spec: ParticleSpec
) -> Particles:
    """Returns at most `spec.budget` particles that tile the clip; fewer if no further split gains
    anything.

    Pixels are 0 to 255. In JAX, unused slots come last with segment 0; NumPy omits them.
    """
    plan = tree(video_THWC.shape[:3], spec)
    kept = choose(energies(video_THWC, plan, spec), plan, spec)
    order, segment = slots(kept, spec.budget)
    place, extent = _where(times_T, plan, order)
    cells, planes = _at(plan.cells, order), _pyramid(video_THWC, plan, spec)
    payload = numpy_of(planes).stack([plane[cells] for plane in planes], axis=-1)
    return Particles(payload.reshape(len(order), -1), place, extent, segment)


def slots(kept: Bool[Array, " N"], budget: int) -> tuple[Int[Array, " K"], Int[Array, " K"]]:
    """Returns indices of kept nodes in order, and segment 1. In JAX there are always `budget` of
    them; unused slots have segment 0.
    """
    xp = numpy_of(kept)
    if xp is np:
        chosen = np.flatnonzero(kept)
        return chosen, np.ones(len(chosen), np.int32)
    slot = xp.where(kept, xp.cumsum(kept) - 1, budget)  # out of range: dropped
    order = (
        xp.zeros(budget, np.int32).at[slot].set(xp.arange(len(kept), dtype=np.int32), mode="drop")
    )
    return order, (xp.arange(budget) < kept.sum()).astype(np.int32)


def _at(table: np.ndarray, order: Array) -> Array:
    return numpy_of(order).asarray(table)[order]


def _where(times: Array, plan: Tree, order: Array) -> tuple[Array, Array]:
    """Returns place and extent of nodes, as in `cut`."""
    xp, frames = numpy_of(times), _at(plan.frames, order)
    edge = edges(times)
    start, end = edge[frames[:, 0]], edge[frames[:, 1]]
    place = xp.concatenate([((start + end) / 2)[:, None], _at(plan.centre, order)], axis=-1)
    extent = xp.concatenate([(end - start)[:, None], _at(plan.size, order)], axis=-1)
    return place.astype(np.float32), extent.astype(np.float32)


def _pyramid(video: Array, plan: Tree, spec: ParticleSpec) -> Array:
    """Averages the clip to all levels, [C, cells], level by level; integer pixels are rounded."""
    most, whole = math.prod(_scale(plan.levels[0], spec)), np.issubdtype(video.dtype, np.integer)
    # the narrowest dtype that holds sums of uint8
    wide = np.float32 if not whole else np.uint16 if most <= 2**8 else np.uint32
    planes = numpy_of(video).moveaxis(video, -1, 0).astype(wide)
    if isinstance(planes, np.ndarray):
        # sums of neighbors are fast if channels are not interleaved
        planes = np.ascontiguousarray(planes)
    sums, rows = _all_sums(planes, plan, spec), []
    for level in plan.levels:
        count = math.prod(_scale(level, spec))
        mean = (
            (sums[level] + wide(count // 2)) // wide(count)
            if whole
            else sums[level] * np.float32(1 / count)
        )
        rows.append(mean.astype(video.dtype).reshape(video.shape[-1], -1))
    return numpy_of(video).concatenate(rows, axis=1)


def _all_sums(x: Array, plan: Tree, spec: ParticleSpec) -> dict[Level, Array]:
    """Sums [..., T, H, W] over the cells of all levels, each from the next finer level."""
    top, sums = plan.levels[0], {(0, 0): x}
    for level in sorted(itertools.product(range(top[0] + 1), range(top[1] + 1)), key=sum):
        if level != (0, 0):  # intermediate levels are cheap
            before = (level[0] - 1, level[1]) if level[0] else (0, level[1] - 1)
            sums[level] = _sums(
                sums[before], _scale((level[0] - before[0], level[1] - before[1]), spec)
            )
    return sums


# -- energy of nodes


def energies(video: Num[Array, "T H W C"], plan: Tree, spec: ParticleSpec) -> dict[Level, Array]:
    """Returns each node's energy relative to a reference: sums over its pixels, [t, h, w] per
    level.

    'squared_error': squared brightness relative to the root node, so differences are squared
    errors. 'absolute_error': absolute values, less dominated by bright edges. 'motion': squares
    relative to each pixel's mean over the clip, so static content has no energy.
    """
    top = plan.levels[0]
    grey = _grey(video)
    scale = _scale(top, spec)
    if spec.split_criterion == "motion":
        reference = _rounded(_sums(grey, (len(grey), 1, 1)), len(grey))
    else:
        reference = _spread(_rounded(_sums(grey, scale), int(np.prod(scale))), scale)
    sums = _all_sums(grey - reference, plan, spec)
    return (
        _together(sums, plan, spec)
        if numpy_of(grey) is np
        else {
            level: _sums(_powers(sums[level], level, spec), spec.patch_size).astype(np.float32)
            * _unit(level, spec)
            for level in plan.levels
        }
    )


def _grey(video: Array) -> Array:
    """Returns rounded brightness, float32 [T, H, W]."""
    total = video[..., 0].astype(np.float32)
    for channel in range(1, video.shape[-1]):
        total = total + video[..., channel].astype(np.float32)
    return _rounded(total, video.shape[-1])


def _together(
    sums: dict[Level, np.ndarray], plan: Tree, spec: ParticleSpec
) -> dict[Level, np.ndarray]:
    """Computes the energies of all levels in one NumPy call; integer sums do not depend on the
    order.
    """
    powers = np.concatenate(
        [_powers(sums[level], level, spec).reshape(-1) for level in plan.levels]
    )
    energy = powers[plan.cells].sum(axis=1, dtype=np.int32).astype(np.float32)
    ends = np.cumsum([np.prod(count) for count in plan.counts])
    return {
        level: each.reshape(count) * _unit(level, spec)
        for level, each, count in zip(
            plan.levels, np.split(energy, ends[:-1]), plan.counts, strict=True
        )
    }


def _powers(sums: Array, level: Level, spec: ParticleSpec) -> Array:
    """Returns deviations (or squares) of a level's cells as int32, in fixed-point steps."""
    steps = sums * np.float32(_fine(spec) / math.prod(_scale(level, spec)))
    value = abs(numpy_of(sums).round(steps)).astype(np.int32)
    return value if spec.split_criterion == "absolute_error" else value * value


def _unit(level: Level, spec: ParticleSpec) -> np.float32:
    return np.float32(
        math.prod(_scale(level, spec))
        / _fine(spec) ** (1 if spec.split_criterion == "absolute_error" else 2)
    )


def _fine(spec: ParticleSpec) -> float:
    """Returns fixed-point steps per gray level, a power of two; deviations are below 2^8."""
    return 2.0 ** np.floor(
        np.log2(_EXACT / int(np.prod(spec.patch_size)))
        / (1 if spec.split_criterion == "absolute_error" else 2)
        - 8
    )


def _rounded(sums: Array, count: int) -> Array:
    return numpy_of(sums).round(sums * np.float32(1 / count))


def _sums(x: Array, by: Shape) -> Array:
    """Sums [..., t, h, w] over blocks; every partial sum is exact."""
    if numpy_of(x) is np:
        return _tree_sums(x, by)
    a, b, d = by
    return reduce(x, "... (t a) (h b) (w d) -> ... t h w", "sum", a=a, b=b, d=d)


def _tree_sums(x: Array, by: Shape) -> Array:
    """Sums [..., t, h, w] over blocks by halves, in the same order in NumPy and XLA."""
    for axis, count in enumerate(by):
        while count > 1:
            f = next((p for p in (2, 3, 5, 7) if count % p == 0), count)
            after = (slice(None),) * (2 - axis)
            x = functools.reduce(
                operator.add, [x[(..., slice(i, None, f), *after)] for i in range(f)]
            )
            count //= f
    return x


def _spread(x: Array, by: Shape) -> Array:
    """Repeats [t, h, w] over blocks."""
    (t, h, w), (a, b, d) = x.shape, by
    return (
        numpy_of(x)
        .broadcast_to(x[:, None, :, None, :, None], (t, a, h, b, w, d))
        .reshape(t * a, h * b, w * d)
    )


def _scale(by: Level, spec: ParticleSpec) -> Shape:
    """Returns cells per axis of a cell that is coarser by so many levels."""
    return (
        spec.level_factor[0] ** by[0],
        spec.level_factor[1] ** by[1],
        spec.level_factor[2] ** by[1],
    )


# -- selection of splits


def choose(energy: dict[Level, Array], plan: Tree, spec: ParticleSpec) -> Bool[Array, " N"]:
    """Returns the mask of selected nodes, which tile the clip."""
    xp = numpy_of(energy[plan.levels[0]])
    told = _told(energy, plan, spec)
    gains = xp.concatenate(
        [
            _gains(told[level], level, spec).reshape(len(spec.split_axes), -1)
            for level in plan.levels
        ],
        axis=1,
    )
    kinds, gain = xp.argmax(gains, axis=0), gains.max(axis=0)
    made = (kinds[plan.parents] == np.arange(len(spec.split_axes))[None]) & (plan.parents >= 0)
    rank = _down(
        plan,
        gain,
        lambda mine, above, by: xp.minimum(mine, xp.where(by, above, -np.inf).max(axis=1)),
        made,
    )
    price = xp.asarray(
        [math.prod(_scale(_STEPS[kind], spec)) - 1 for kind in spec.split_axes], np.int32
    )
    order = xp.argsort(-rank, stable=True)
    worth = rank[order] > 0
    spent = int(np.prod(plan.counts[0])) + xp.cumsum(xp.where(worth, price[kinds][order], 0))
    splits = unsort((spent <= spec.budget) & worth, order)
    split = _down(plan, splits, lambda mine, above, by: mine & (by & above).any(axis=1), made)
    first = int(np.prod(plan.counts[0]))
    exists = xp.concatenate(
        [xp.ones(first, bool), (made & split[plan.parents])[first:].any(axis=1)]
    )
    return exists & ~split


def _down(
    plan: Tree, own: Array, combine: Callable[[Array, Array, Array], Array], made: Array
) -> Array:
    """Combines each node's value with its parents', from the coarsest level to the finest: [N]."""
    ends = np.cumsum([np.prod(count) for count in plan.counts])
    found = own[: ends[0]]
    for start, stop in itertools.pairwise(ends):
        above = found[np.maximum(plan.parents[start:stop], 0)]
        found = numpy_of(own).concatenate(
            [found, combine(own[start:stop], above, made[start:stop])]
        )
    return found


def unsort(values: Array, order: Array) -> Array:
    """Returns an array with values[i] at index `order[i]`."""
    if numpy_of(values) is np:
        found = np.empty_like(values)
        found[order] = values
        return found
    return numpy_of(values).zeros_like(values).at[order].set(values)


def _gains(told: dict[Level, Array], level: Level, spec: ParticleSpec) -> Array:
    """Returns the gain per added particle for each kind of split, [kinds, t, h, w]; -inf if
    impossible.

    told: from `_told`. The gain is the maximum over all finer levels that begin with this split,
    because texture may only appear two levels down.
    """
    best = [[] for _ in spec.split_axes]
    for by, more in told.items():
        number = math.prod(_scale(by, spec)) - 1
        for kind, gains in zip(spec.split_axes, best, strict=True):
            step = _STEPS[kind]
            if by[0] >= step[0] and by[1] >= step[1]:
                gains.append(more * np.float32((1 if by == step else 1 - _LATER) / number))
    xp, own = numpy_of(told[0, 0]), told[0, 0]
    nothing = xp.full(own.shape, -np.inf, np.float32)
    return xp.stack([functools.reduce(xp.maximum, gains, nothing) for gains in best])


def _told(
    energy: dict[Level, Array], plan: Tree, spec: ParticleSpec
) -> dict[Level, dict[Level, Array]]:
    """Returns, per level and level difference, the energy gain of the finer nodes."""
    found: dict[Level, dict[Level, Array]] = {}
    sums: dict[Level, dict[Level, Array]] = {}
    for level in reversed(plan.levels):
        own, mine = energy[level], {level: energy[level]}
        for kind in spec.split_axes:
            step = _STEPS[kind]
            for below, each in sums.get((level[0] - step[0], level[1] - step[1]), {}).items():
                if below not in mine:
                    mine[below] = _tree_sums(each, _scale(step, spec))
        xp, sums[level] = numpy_of(own), mine
        more = {(level[0] - i, level[1] - j): each for (i, j), each in mine.items()}
        found[level] = {
            by: xp.where(each - own > np.float32(_NOISE) * each, each - own, np.float32(0))
            for by, each in more.items()
        }
    return found
