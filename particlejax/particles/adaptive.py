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

from particlejax.config.data import ParticleSpec
from particlejax.core.typing import Array
from particlejax.particles.cuboids import Shape, Tube, edges, lattice
from particlejax.particles.types import Particles, array_namespace

Level = tuple[int, int]  # number of coarsening steps in time and in space

_SPLIT_STEPS: dict[str, Level] = {"spacetime": (1, 1), "time": (1, 0), "space": (0, 1)}
_INT32_LIMIT = 2**31  # integers below it fit in int32
_ROUNDING_TOLERANCE = 1e-5  # differences below this fraction of a node's energy are rounding errors
_TIE_BREAK = 1e-3  # discount of gains more than one split away, to break ties


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
    center: np.ndarray
    size: np.ndarray


@functools.cache
def build_tree(size: Shape, spec: ParticleSpec) -> Tree:
    """Returns the tree for clips of `size`. Raises ValueError if the coarsest cuboids do not tile
    them.
    """
    steps = [_SPLIT_STEPS[kind] for kind in spec.split_axes]
    known_levels, frontier = {_coarsest_level(spec)}, {_coarsest_level(spec)}
    while frontier:
        frontier = {
            (i - a, j - b) for i, j in frontier for a, b in steps if i >= a and j >= b
        } - known_levels
        known_levels |= frontier
    levels = tuple(sorted(known_levels, key=lambda level: (-sum(level), level)))
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
        [corner[:, :1] + (0, shape[0]) for corner, shape in zip(corners, shapes, strict=True)]
    ).astype(np.int32)
    frame_size = np.array(size[1:], np.float32)
    node_sizes = [
        np.broadcast_to(np.array(shape[1:], np.float32), (len(corner), 2))
        for corner, shape in zip(corners, shapes, strict=True)
    ]
    node_centers = [
        corner[:, 1:] + node_size / 2 for corner, node_size in zip(corners, node_sizes, strict=True)
    ]
    return Tree(
        levels,
        counts,
        _cells(size, levels, spec),
        _parents(levels, counts, spec),
        frames,
        (np.concatenate(node_centers) / frame_size).astype(np.float32),
        np.concatenate(node_sizes) / frame_size,
    )


def _cells(size: Shape, levels: tuple[Level, ...], spec: ParticleSpec) -> np.ndarray:
    levels_cells, start = [], 0
    for level in levels:
        shape = tuple(n // s for n, s in zip(size, _level_scale(level, spec), strict=True))
        index = start + np.arange(np.prod(shape)).reshape(shape)
        a, b, d = spec.patch_size
        levels_cells.append(rearrange(index, "(t a) (h b) (w d) -> (t h w) (a b d)", a=a, b=b, d=d))
        start += index.size
    return np.concatenate(levels_cells)


def _parents(
    levels: tuple[Level, ...], counts: tuple[Shape, ...], spec: ParticleSpec
) -> np.ndarray:
    starts = np.cumsum([0, *(np.prod(count) for count in counts)])
    node_ids = {
        level: starts[i] + np.arange(np.prod(counts[i]), dtype=np.int32).reshape(counts[i])
        for i, level in enumerate(levels)
    }
    parents = np.full((starts[-1], len(spec.split_axes)), -1, np.int32)
    for (i, level), (kind, split) in itertools.product(
        enumerate(levels), enumerate(spec.split_axes)
    ):
        step = _SPLIT_STEPS[split]
        parent = node_ids.get((level[0] + step[0], level[1] + step[1]))
        if parent is not None:
            parents[starts[i] : starts[i + 1], kind] = _repeat_blocks(
                parent, _level_scale(step, spec)
            ).reshape(-1)
    return parents


def coarsest_shape(spec: ParticleSpec) -> Shape:
    """Returns the coarsest cuboid: frames, rows, columns."""
    return _shape(_coarsest_level(spec), spec)


def _coarsest_level(spec: ParticleSpec) -> Level:
    steps = [_SPLIT_STEPS[kind] for kind in spec.split_axes]
    return (spec.num_levels - 1) * max(i for i, _ in steps), (spec.num_levels - 1) * max(
        j for _, j in steps
    )


def _shape(level: Level, spec: ParticleSpec) -> Shape:
    return tuple(b * s for b, s in zip(spec.patch_size, _level_scale(level, spec), strict=True))


def adaptive(
    video_THWC: Num[Array, "T H W C"], times_T: Float[Array, " T"], spec: ParticleSpec
) -> Particles:
    """Returns at most `spec.budget` particles that tile the clip; fewer if no further split gains
    anything.

    Pixels are 0 to 255. In JAX, unused slots come last with segment 0; NumPy omits them.
    """
    plan = build_tree(video_THWC.shape[:3], spec)
    selected = select_nodes(energies(video_THWC, plan, spec), plan, spec)
    order, segment = compact_slots(selected, spec.budget)
    place, extent = _place_and_extent(times_T, plan, order)
    cells, planes = _take_rows(plan.cells, order), _pyramid(video_THWC, plan, spec)
    payload = array_namespace(planes).stack([plane[cells] for plane in planes], axis=-1)
    return Particles(payload.reshape(len(order), -1), place, extent, segment)


def compact_slots(
    selected: Bool[Array, " N"], budget: int
) -> tuple[Int[Array, " K"], Int[Array, " K"]]:
    """Returns indices of kept nodes in order, and segment 1. In JAX there are always `budget` of
    them; unused slots have segment 0.
    """
    xp = array_namespace(selected)
    if xp is np:
        indices = np.flatnonzero(selected)
        return indices, np.ones(len(indices), np.int32)
    slot = xp.where(selected, xp.cumsum(selected) - 1, budget)  # out of range: dropped
    order = (
        xp.zeros(budget, np.int32)
        .at[slot]
        .set(xp.arange(len(selected), dtype=np.int32), mode="drop")
    )
    return order, (xp.arange(budget) < selected.sum()).astype(np.int32)


def _take_rows(table: np.ndarray, order: Array) -> Array:
    return array_namespace(order).asarray(table)[order]


def _place_and_extent(times: Array, plan: Tree, order: Array) -> tuple[Array, Array]:
    """Returns place and extent of nodes, as in `cut`."""
    xp, frames = array_namespace(times), _take_rows(plan.frames, order)
    edge = edges(times)
    start, end = edge[frames[:, 0]], edge[frames[:, 1]]
    place = xp.concatenate([((start + end) / 2)[:, None], _take_rows(plan.center, order)], axis=-1)
    extent = xp.concatenate([(end - start)[:, None], _take_rows(plan.size, order)], axis=-1)
    return place.astype(np.float32), extent.astype(np.float32)


def _pyramid(video: Array, plan: Tree, spec: ParticleSpec) -> Array:
    """Averages the clip to all levels, [C, cells], level by level; integer pixels are rounded."""
    max_cells, is_integer = (
        math.prod(_level_scale(plan.levels[0], spec)),
        np.issubdtype(video.dtype, np.integer),
    )
    # the narrowest dtype that holds sums of uint8
    sum_dtype = np.float32 if not is_integer else np.uint16 if max_cells <= 2**8 else np.uint32
    planes = array_namespace(video).moveaxis(video, -1, 0).astype(sum_dtype)
    if isinstance(planes, np.ndarray):
        # sums of neighbors are fast if channels are not interleaved
        planes = np.ascontiguousarray(planes)
    sums, level_means = _all_sums(planes, plan, spec), []
    for level in plan.levels:
        count = math.prod(_level_scale(level, spec))
        mean = (
            (sums[level] + sum_dtype(count // 2)) // sum_dtype(count)
            if is_integer
            else sums[level] * np.float32(1 / count)
        )
        level_means.append(mean.astype(video.dtype).reshape(video.shape[-1], -1))
    return array_namespace(video).concatenate(level_means, axis=1)


def _all_sums(x: Array, plan: Tree, spec: ParticleSpec) -> dict[Level, Array]:
    """Sums [..., T, H, W] over the cells of all levels, each from the next finer level."""
    top, sums = plan.levels[0], {(0, 0): x}
    for level in sorted(itertools.product(range(top[0] + 1), range(top[1] + 1)), key=sum):
        if level != (0, 0):  # intermediate levels are cheap
            finer = (level[0] - 1, level[1]) if level[0] else (0, level[1] - 1)
            sums[level] = _block_sums(
                sums[finer], _level_scale((level[0] - finer[0], level[1] - finer[1]), spec)
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
    gray = _gray(video)
    scale = _level_scale(top, spec)
    if spec.split_criterion == "motion":
        reference = _rounded_mean(_block_sums(gray, (len(gray), 1, 1)), len(gray))
    else:
        reference = _repeat_blocks(
            _rounded_mean(_block_sums(gray, scale), int(np.prod(scale))), scale
        )
    sums = _all_sums(gray - reference, plan, spec)
    return (
        _numpy_energies(sums, plan, spec)
        if array_namespace(gray) is np
        else {
            level: _block_sums(_quantized_powers(sums[level], level, spec), spec.patch_size).astype(
                np.float32
            )
            * _energy_unit(level, spec)
            for level in plan.levels
        }
    )


def _gray(video: Array) -> Array:
    """Returns rounded brightness, float32 [T, H, W]."""
    total = video[..., 0].astype(np.float32)
    for channel in range(1, video.shape[-1]):
        total = total + video[..., channel].astype(np.float32)
    return _rounded_mean(total, video.shape[-1])


def _numpy_energies(
    sums: dict[Level, np.ndarray], plan: Tree, spec: ParticleSpec
) -> dict[Level, np.ndarray]:
    """Computes the energies of all levels in one NumPy call; integer sums do not depend on the
    order.
    """
    powers = np.concatenate(
        [_quantized_powers(sums[level], level, spec).reshape(-1) for level in plan.levels]
    )
    energy = powers[plan.cells].sum(axis=1, dtype=np.int32).astype(np.float32)
    ends = np.cumsum([np.prod(count) for count in plan.counts])
    return {
        level: level_energy.reshape(count) * _energy_unit(level, spec)
        for level, level_energy, count in zip(
            plan.levels, np.split(energy, ends[:-1]), plan.counts, strict=True
        )
    }


def _quantized_powers(sums: Array, level: Level, spec: ParticleSpec) -> Array:
    """Returns deviations (or squares) of a level's cells as int32, in fixed-point steps."""
    steps = sums * np.float32(_quantization_steps(spec) / math.prod(_level_scale(level, spec)))
    value = abs(array_namespace(sums).round(steps)).astype(np.int32)
    return value if spec.split_criterion == "absolute_error" else value * value


def _energy_unit(level: Level, spec: ParticleSpec) -> np.float32:
    return np.float32(
        math.prod(_level_scale(level, spec))
        / _quantization_steps(spec) ** (1 if spec.split_criterion == "absolute_error" else 2)
    )


def _quantization_steps(spec: ParticleSpec) -> float:
    """Returns fixed-point steps per gray level, a power of two; deviations are below 2^8."""
    return 2.0 ** np.floor(
        np.log2(_INT32_LIMIT / int(np.prod(spec.patch_size)))
        / (1 if spec.split_criterion == "absolute_error" else 2)
        - 8
    )


def _rounded_mean(sums: Array, count: int) -> Array:
    return array_namespace(sums).round(sums * np.float32(1 / count))


def _block_sums(x: Array, block: Shape) -> Array:
    """Sums [..., t, h, w] over blocks; every partial sum is exact."""
    if array_namespace(x) is np:
        return _pairwise_block_sums(x, block)
    a, b, d = block
    return reduce(x, "... (t a) (h b) (w d) -> ... t h w", "sum", a=a, b=b, d=d)


def _pairwise_block_sums(x: Array, block: Shape) -> Array:
    """Sums [..., t, h, w] over blocks by halves, in the same order in NumPy and XLA."""
    for axis, count in enumerate(block):
        while count > 1:
            factor = next((p for p in (2, 3, 5, 7) if count % p == 0), count)
            trailing = (slice(None),) * (2 - axis)
            x = functools.reduce(
                operator.add, [x[(..., slice(i, None, factor), *trailing)] for i in range(factor)]
            )
            count //= factor
    return x


def _repeat_blocks(x: Array, block: Shape) -> Array:
    """Repeats [t, h, w] over blocks."""
    (t, h, w), (a, b, d) = x.shape, block
    return (
        array_namespace(x)
        .broadcast_to(x[:, None, :, None, :, None], (t, a, h, b, w, d))
        .reshape(t * a, h * b, w * d)
    )


def _level_scale(level: Level, spec: ParticleSpec) -> Shape:
    """Returns cells per axis of a cell that is coarser by so many levels."""
    return (
        spec.level_factor[0] ** level[0],
        spec.level_factor[1] ** level[1],
        spec.level_factor[2] ** level[1],
    )


# -- selection of splits


def select_nodes(energy: dict[Level, Array], plan: Tree, spec: ParticleSpec) -> Bool[Array, " N"]:
    """Returns the mask of selected nodes, which tile the clip."""
    xp = array_namespace(energy[plan.levels[0]])
    improvements = _improvements(energy, plan, spec)
    gains = xp.concatenate(
        [
            _gains(improvements[level], level, spec).reshape(len(spec.split_axes), -1)
            for level in plan.levels
        ],
        axis=1,
    )
    kinds, gain = xp.argmax(gains, axis=0), gains.max(axis=0)
    made_by_parent = (kinds[plan.parents] == np.arange(len(spec.split_axes))[None]) & (
        plan.parents >= 0
    )
    rank = _propagate_down(
        plan,
        gain,
        lambda own, parent_values, from_parent: xp.minimum(
            own, xp.where(from_parent, parent_values, -np.inf).max(axis=1)
        ),
        made_by_parent,
    )
    cost = xp.asarray(
        [math.prod(_level_scale(_SPLIT_STEPS[kind], spec)) - 1 for kind in spec.split_axes],
        np.int32,
    )
    order = xp.argsort(-rank, stable=True)
    worthwhile = rank[order] > 0
    spent = int(np.prod(plan.counts[0])) + xp.cumsum(xp.where(worthwhile, cost[kinds][order], 0))
    splits = unsort((spent <= spec.budget) & worthwhile, order)
    split = _propagate_down(
        plan,
        splits,
        lambda own, parent_values, from_parent: own & (from_parent & parent_values).any(axis=1),
        made_by_parent,
    )
    num_coarsest = int(np.prod(plan.counts[0]))
    exists = xp.concatenate(
        [
            xp.ones(num_coarsest, bool),
            (made_by_parent & split[plan.parents])[num_coarsest:].any(axis=1),
        ]
    )
    return exists & ~split


def _propagate_down(
    plan: Tree,
    values: Array,
    combine: Callable[[Array, Array, Array], Array],
    made_by_parent: Array,
) -> Array:
    """Combines each node's value with its parents', from the coarsest level to the finest: [N]."""
    ends = np.cumsum([np.prod(count) for count in plan.counts])
    propagated = values[: ends[0]]
    for start, stop in itertools.pairwise(ends):
        parent_values = propagated[np.maximum(plan.parents[start:stop], 0)]
        propagated = array_namespace(values).concatenate(
            [propagated, combine(values[start:stop], parent_values, made_by_parent[start:stop])]
        )
    return propagated


def unsort(values: Array, order: Array) -> Array:
    """Returns an array with values[i] at index `order[i]`."""
    if array_namespace(values) is np:
        unsorted = np.empty_like(values)
        unsorted[order] = values
        return unsorted
    return array_namespace(values).zeros_like(values).at[order].set(values)


def _gains(improvements: dict[Level, Array], level: Level, spec: ParticleSpec) -> Array:
    """Returns the gain per added particle for each kind of split, [kinds, t, h, w]; -inf if
    impossible.

    improvements: from `_improvements`. The gain is the maximum over all finer levels that begin
    with this split, because texture may only appear two levels down.
    """
    best = [[] for _ in spec.split_axes]
    for depth, improvement in improvements.items():
        num_added = math.prod(_level_scale(depth, spec)) - 1
        for kind, gains in zip(spec.split_axes, best, strict=True):
            step = _SPLIT_STEPS[kind]
            if depth[0] >= step[0] and depth[1] >= step[1]:
                gains.append(
                    improvement * np.float32((1 if depth == step else 1 - _TIE_BREAK) / num_added)
                )
    xp, base = array_namespace(improvements[0, 0]), improvements[0, 0]
    no_gain = xp.full(base.shape, -np.inf, np.float32)
    return xp.stack([functools.reduce(xp.maximum, gains, no_gain) for gains in best])


def _improvements(
    energy: dict[Level, Array], plan: Tree, spec: ParticleSpec
) -> dict[Level, dict[Level, Array]]:
    """Returns, per level and level difference, the energy gain of the finer nodes."""
    improvements: dict[Level, dict[Level, Array]] = {}
    sums: dict[Level, dict[Level, Array]] = {}
    for level in reversed(plan.levels):
        level_energy, finer_energies = energy[level], {level: energy[level]}
        for kind in spec.split_axes:
            step = _SPLIT_STEPS[kind]
            for finer_level, energy_below in sums.get(
                (level[0] - step[0], level[1] - step[1]), {}
            ).items():
                if finer_level not in finer_energies:
                    finer_energies[finer_level] = _pairwise_block_sums(
                        energy_below, _level_scale(step, spec)
                    )
        xp, sums[level] = array_namespace(level_energy), finer_energies
        energies_by_depth = {
            (level[0] - i, level[1] - j): energy_below
            for (i, j), energy_below in finer_energies.items()
        }
        improvements[level] = {
            depth: xp.where(
                energy_below - level_energy > np.float32(_ROUNDING_TOLERANCE) * energy_below,
                energy_below - level_energy,
                np.float32(0),
            )
            for depth, energy_below in energies_by_depth.items()
        }
    return improvements
