# SPDX-License-Identifier: Apache-2.0
"""Particles where the video happens: coarse cuboids are split where that tells most, until a budget is spent.

A node is a cuboid of `base` cells on a level (i, j): each cell is factor^i frames by factor^j pixels, averaged. Splitting a
node in time, in space or in both replaces it by its children. Averages of nested blocks are orthogonal, so what a
split explains is a difference of sums of squares, and the order in which a greedy search would split is a sort: a node
comes no earlier than its parent (tree-structured growing, Riskin and Gray 1991). Numpy and jax choose alike to the
last bit: cells are rounded so that sums over a node are exact, and nodes are summed in one order.

Legend: T frames, H rows, W columns, C channels; nodes of a level are arrays [t, h, w].
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from einops import reduce, repeat
from jaxtyping import Float, Num

from particlejax.particles.cut import Shape, Tube, cut, lattice, tiles, where
from particlejax.particles.types import Particles, numpy_of
from particlejax.spec import ParticleSpec
from particlejax.typing import Array

Level = tuple[int, int]  # how often cells were coarsened in time and in space

_STEPS: dict[str, Level] = {"both": (1, 1), "time": (1, 0), "space": (0, 1)}
_EXACT = 2**31  # below it int32 holds every whole number
_NOISE = 1e-5  # share of a node's own energy below which a difference is rounding
_LATER = 1e-3  # of gains that lead as far, the one that tells more at once is taken first


class Tree(NamedTuple):
    """What does not depend on pixels: the levels from coarse to fine, and each one's cuboids."""

    levels: tuple[Level, ...]
    tubes: tuple[Tube, ...]
    counts: tuple[Shape, ...]  # nodes along each axis


@functools.cache
def tree(size: Shape, spec: ParticleSpec) -> Tree:
    """The tree over clips of `size`. Raises ValueError where the coarsest cuboids do not tile them."""
    steps = [_STEPS[kind] for kind in spec.splits]
    found, fresh = {_top(spec)}, {_top(spec)}
    while fresh:
        fresh = {(i - a, j - b) for i, j in fresh for a, b in steps if i >= a and j >= b} - found
        found |= fresh
    levels = tuple(sorted(found, key=lambda level: (-sum(level), level)))
    shapes = [_shape(level, spec) for level in levels]
    for length, cells in zip(size, shapes[0], strict=True):
        if length % cells:
            raise ValueError(f"clips of {tuple(size)} are not tiled by the coarsest particles of {shapes[0]}: change "
                             "particles.levels or base, or data.frames or size.")
    counts = tuple(tuple(n // s for n, s in zip(size, shape, strict=True)) for shape in shapes)
    return Tree(levels, tuple(Tube(shape, shape) for shape in shapes), counts)


def root(spec: ParticleSpec) -> Shape:
    """The coarsest cuboid: frames, rows, columns."""
    return _shape(_top(spec), spec)


def _top(spec: ParticleSpec) -> Level:
    steps = [_STEPS[kind] for kind in spec.splits]
    return (spec.levels - 1) * max(i for i, _ in steps), (spec.levels - 1) * max(j for _, j in steps)


def _shape(level: Level, spec: ParticleSpec) -> Shape:
    return tuple(b * s for b, s in zip(spec.base, _scale(level, spec), strict=True))


def adaptive(video_THWC: Num[Array, "T H W C"], times_T: Float[Array, "T"], spec: ParticleSpec) -> Particles:
    """At most `spec.budget` particles that tile the clip, fewer where splitting would tell nothing more.

    Pixels are 0 to 255. Slots that stay free have segment 0 and come last; numpy gives only the others.
    """
    plan = tree(video_THWC.shape[:3], spec)
    kept = choose(energies(video_THWC, plan, spec), plan, spec)
    if numpy_of(video_THWC) is np:
        parts = [_some(video_THWC, times_T, tube, spec, np.flatnonzero(each)) for tube, each in zip(plan.tubes, kept, strict=True)]
        return Particles(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
    return first(_whole(video_THWC, times_T, plan, spec), kept, spec.budget)


def first(particles: Particles, kept: list[Array], budget: int) -> Particles:
    """Of all particles [N] (jax) those that are kept, in their order, in `budget` slots; free ones have segment 0."""
    xp = numpy_of(particles.segment)
    flat = xp.concatenate([each.reshape(-1) for each in kept])
    slot = xp.where(flat, xp.cumsum(flat) - 1, budget)  # the others fall off the end
    order = xp.zeros(budget, np.int32).at[slot].set(xp.arange(len(flat), dtype=np.int32), mode="drop")
    taken = particles.take(order)
    return Particles(taken.payload, taken.place, taken.extent, (xp.arange(budget) < flat.sum()).astype(np.int32))


def _some(video: np.ndarray, times: np.ndarray, tube: Tube, spec: ParticleSpec, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
    """Only what was kept is cut."""
    corners = lattice(video.shape[:3], tube)[chosen]
    place, extent = where(times, corners, tube, video.shape[:3])
    return tiles(video, tube, spec.base, chosen), place, extent, np.ones(len(chosen), np.int32)


def _whole(video: Array, times: Array, plan: Tree, spec: ParticleSpec) -> Particles:
    parts = [cut(video, times, tube, spec.base) for tube in plan.tubes]
    xp = numpy_of(video)
    return Particles(*(xp.concatenate([getattr(part, name) for part in parts])
                       for name in ("payload", "place", "extent", "segment")))


# -- what a node tells


def energies(video: Num[Array, "T H W C"], plan: Tree, spec: ParticleSpec) -> dict[Level, Array]:
    """What each node's payload tells of the clip beyond a reference: sums over its pixels, [t, h, w] for every level.

    'squared': squares of brightness around the root node's, so that differences are squared errors. 'absolute': absolute
    values, which bright edges dominate less. 'motion': squares around each pixel's mean over the clip, so that what
    stands still tells nothing.
    """
    top = plan.levels[0]
    grey = _grey(video)
    scale = _scale(top, spec)
    if spec.measure == "motion":
        reference = _rounded(_sums(grey, (len(grey), 1, 1)), len(grey))
    else:
        reference = _spread(_rounded(_sums(grey, scale), int(np.prod(scale))), scale)
    sums = {(0, 0): grey - reference}
    for level in sorted(itertools.product(range(top[0] + 1), range(top[1] + 1)), key=sum):
        if level != (0, 0):  # from the next finer one; levels that are only on the way cost little
            before = (level[0] - 1, level[1]) if level[0] else (0, level[1] - 1)
            step = (level[0] - before[0], level[1] - before[1])
            sums[level] = _sums(sums[before], _scale(step, spec))
    return {level: _energy(sums[level], level, spec) for level in plan.levels}


def _grey(video: Array) -> Array:
    """Brightness in whole grey levels, float32 [T, H, W]."""
    total = video[..., 0].astype(np.float32)
    for channel in range(1, video.shape[-1]):
        total = total + video[..., channel].astype(np.float32)
    return _rounded(total, video.shape[-1])


def _energy(sums: Array, level: Level, spec: ParticleSpec) -> Array:
    cells, payload = int(np.prod(_scale(level, spec))), int(np.prod(spec.base))
    power = 1 if spec.measure == "absolute" else 2
    fine = 2.0 ** np.floor(np.log2(_EXACT / payload) / power - 8)  # steps of a cell per grey level; deviations are below 2^8
    value = abs(_rounded(sums * np.float32(fine), cells)).astype(np.int32) ** power
    return _sums(value, spec.base).astype(np.float32) * np.float32(cells / fine**power)


def _rounded(sums: Array, count: int) -> Array:
    return numpy_of(sums).round(sums * np.float32(1 / count))


def _sums(x: Array, by: Shape) -> Array:
    """[t, h, w] summed over blocks, where every partial sum is exact."""
    if numpy_of(x) is np:
        return _tree_sums(x, by)
    a, b, d = by
    return reduce(x, "(t a) (h b) (w d) -> t h w", "sum", a=a, b=b, d=d)


def _tree_sums(x: Array, by: Shape) -> Array:
    """[t, h, w] summed over blocks by halves: an order that numpy and XLA share, and fast in numpy."""
    for axis, count in enumerate(by):
        while count > 1:
            f = next((p for p in (2, 3, 5, 7) if count % p == 0), count)
            parts = x.reshape(*x.shape[:axis], x.shape[axis] // f, f, *x.shape[axis + 1 :])
            index = (slice(None),) * (axis + 1)
            x = functools.reduce(lambda a, b: a + b, [parts[(*index, i)] for i in range(f)])
            count //= f
    return x


def _spread(x: Array, by: Shape) -> Array:
    """[t, h, w] repeated over blocks."""
    a, b, d = by
    return repeat(x, "t h w -> (t a) (h b) (w d)", a=a, b=b, d=d)


def _scale(by: Level, spec: ParticleSpec) -> Shape:
    """Cells along each axis of one that is coarser by so many levels."""
    return spec.factor[0] ** by[0], spec.factor[1] ** by[1], spec.factor[2] ** by[1]


# -- which nodes are split


def choose(energy: dict[Level, Array], plan: Tree, spec: ParticleSpec) -> list[Array]:
    """Which nodes stand in the end, bool [t, h, w] for each level of the plan; they tile the clip."""
    xp = numpy_of(energy[plan.levels[0]])
    gains = {level: _gains(told, level, spec) for level, told in _told(energy, plan, spec).items()}
    kinds = {level: xp.argmax(each, axis=0) for level, each in gains.items()}
    rank: dict[Level, Array] = {}
    for level, counts in zip(plan.levels, plan.counts, strict=True):
        reach = _from_parents(level, counts, kinds, rank, spec, xp, -np.inf, np.inf)
        rank[level] = xp.minimum(gains[level].max(axis=0), reach)
    flat = xp.concatenate([rank[level].reshape(-1) for level in plan.levels])
    price = xp.asarray([int(np.prod(_scale(_STEPS[kind], spec))) - 1 for kind in spec.splits], np.int32)
    cost = xp.concatenate([price[kinds[level]].reshape(-1) for level in plan.levels])
    order = xp.argsort(-flat, stable=True)
    worth = flat[order] > 0
    spent = int(np.prod(plan.counts[0])) + xp.cumsum(xp.where(worth, cost[order], 0))
    taken = (spent <= spec.budget) & worth
    return _leaves(unsort(taken, order), kinds, plan, spec, xp)


def unsort(values: Array, order: Array) -> Array:
    """What stands at place `order[i]` is value i."""
    if numpy_of(values) is np:
        found = np.empty_like(values)
        found[order] = values
        return found
    return numpy_of(values).zeros_like(values).at[order].set(values)


def _gains(told: dict[Level, Array], level: Level, spec: ParticleSpec) -> Array:
    """What a split of each kind tells for each particle that it adds, [kinds, t, h, w]; -inf where there is none.

    told: of `_told`. The best over all levels below that begin with such a split: texture may only show two levels down.
    """
    best = [[] for _ in spec.splits]
    for by, more in told.items():
        number = int(np.prod(_scale(by, spec))) - 1
        for kind, gains in zip(spec.splits, best, strict=True):
            step = _STEPS[kind]
            if by[0] >= step[0] and by[1] >= step[1]:
                gains.append(more * np.float32((1 if by == step else 1 - _LATER) / number))
    xp, own = numpy_of(told[0, 0]), told[0, 0]
    nothing = xp.full(own.shape, -np.inf, np.float32)
    return xp.stack([functools.reduce(xp.maximum, gains, nothing) for gains in best])


def _told(energy: dict[Level, Array], plan: Tree, spec: ParticleSpec) -> dict[Level, dict[Level, Array]]:
    """For each level, by how much finer another one is: what the nodes of that one tell more than those of the level."""
    found: dict[Level, dict[Level, Array]] = {}
    sums: dict[Level, dict[Level, Array]] = {}
    for level in reversed(plan.levels):
        own, mine = energy[level], {level: energy[level]}
        for kind in spec.splits:
            step = _STEPS[kind]
            for below, each in sums.get((level[0] - step[0], level[1] - step[1]), {}).items():
                if below not in mine:
                    mine[below] = _tree_sums(each, _scale(step, spec))
        xp, sums[level] = numpy_of(own), mine
        more = {(level[0] - i, level[1] - j): each for (i, j), each in mine.items()}
        found[level] = {by: xp.where(each - own > np.float32(_NOISE) * each, each - own, np.float32(0))
                        for by, each in more.items()}
    return found


def _from_parents(level: Level, counts: Shape, kinds: dict[Level, Array], value: dict[Level, Array], spec: ParticleSpec,
                  xp: object, nothing: float | bool, root: float | bool) -> Array:
    """Each node's `value` of the parent whose kind of split makes it; `nothing` where no parent does."""
    parents = [(k, (level[0] + _STEPS[kind][0], level[1] + _STEPS[kind][1])) for k, kind in enumerate(spec.splits)]
    found = [_spread(xp.where(kinds[parent] == k, value[parent], nothing), _scale(_STEPS[spec.splits[k]], spec))
             for k, parent in parents if parent in value]
    return functools.reduce(xp.maximum, found) if found else xp.full(counts, root)


def _leaves(splits: Array, kinds: dict[Level, Array], plan: Tree, spec: ParticleSpec, xp: object) -> list[Array]:
    split: dict[Level, Array] = {}
    leaves, start = [], 0
    for level, counts in zip(plan.levels, plan.counts, strict=True):
        number = int(np.prod(counts))
        exists = _from_parents(level, counts, kinds, split, spec, xp, False, True)
        split[level] = splits[start : start + number].reshape(counts) & exists
        leaves.append(exists & ~split[level])
        start += number
    return leaves
