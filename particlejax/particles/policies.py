# SPDX-License-Identifier: Apache-2.0
"""Particle policies: pure functions that cut one clip into particles, for NumPy and JAX arrays.

`cut_clip` keeps a random subset if the spec has a budget that the policy does not use itself.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from particlejax.config import plugins
from particlejax.config.data import POLICIES, ParticleSpec
from particlejax.core.typing import Array
from particlejax.particles import adaptive, run_length
from particlejax.particles.cuboids import Tube, cut_cuboids, lattice
from particlejax.particles.types import Particles, array_namespace

Shape = tuple[int, int, int]
Cut = TypeVar("Cut", bound=Callable[..., Particles])


def grid(spec: ParticleSpec, size: Shape) -> tuple[Tube, ...]:
    """One cuboid size, tiled (ViViT, arXiv:2103.15691; VideoMAE, arXiv:2203.12602)."""
    del size
    return (Tube(spec.patch_size, spec.patch_size),)


def tubes(spec: ParticleSpec, size: Shape) -> tuple[Tube, ...]:
    """Several shapes and strides, overlapping or sparse (TubeViT, arXiv:2212.03229), from
    spec.tubes.
    """
    del size
    return tuple(Tube(*map(tuple, tube)) for tube in spec.tubes)


def pyramid(spec: ParticleSpec, size: Shape) -> tuple[Tube, ...]:
    """patch_size cuboids on every level of a pyramid: level k is level_factor ** k coarser per
    axis.
    """
    del size
    scales = [tuple(f**level for f in spec.level_factor) for level in range(spec.num_levels)]
    shapes = [tuple(b * s for b, s in zip(spec.patch_size, scale, strict=True)) for scale in scales]
    return tuple(Tube(shape, shape) for shape in shapes)


class Policy(NamedTuple):
    """A particle policy.

    cut: (video [T, H, W, C], times [T], spec) -> Particles with leading axis N. count: (size, spec)
    -> N for a clip of `size` (frames, rows, columns), ignoring the budget if `spends_budget`.
    check: raises ValueError for invalid clip sizes or settings. spends_budget: whether `cut` makes
    at most spec.budget particles; otherwise a random subset is kept.
    """

    cut: Callable[[Array, Array, ParticleSpec], Particles]
    count: Callable[[Shape, ParticleSpec], int]
    check: Callable[[Shape, ParticleSpec], None] = lambda size, spec: None
    spends_budget: bool = False


def _lattice_policy(tubes_of: Callable[[ParticleSpec, Shape], tuple[Tube, ...]]) -> Policy:
    """Returns the policy that cuts all cuboids of fixed lattices."""

    def cut_all(video_THWC: Array, times_T: Array, spec: ParticleSpec) -> Particles:
        tubes = tubes_of(spec, video_THWC.shape[:3])
        parts = [cut_cuboids(video_THWC, times_T, tube, spec.patch_size) for tube in tubes]
        if len(parts) == 1:
            return parts[0]
        xp = array_namespace(video_THWC)
        fields = ("payload", "place", "extent", "segment")
        return Particles(
            **{name: xp.concatenate([getattr(p, name) for p in parts]) for name in fields}
        )

    def count(size: Shape, spec: ParticleSpec) -> int:
        return sum(len(lattice(size, tube)) for tube in tubes_of(spec, size))

    def check_tubes(size: Shape, spec: ParticleSpec) -> None:
        _check_tubes(size, spec, tubes_of(spec, size))

    return Policy(cut_all, count, check_tubes)


def _adaptive_policy(cut: Callable[[Array, Array, ParticleSpec], Particles]) -> Policy:
    """Returns a policy that starts from the grid and uses the budget adaptively."""
    return Policy(cut, GRID.count, _check_adaptive, spends_budget=True)


def cut_clip(
    video_THWC: Array,
    times_T: Array,
    spec: ParticleSpec,
    rng: np.random.Generator | Array | None = None,
) -> Particles:
    """Returns the policy's particles of one clip: `particle_count` of them, or at most as many for
    adaptive policies, and at most spec.budget if it is not 0.

    rng: NumPy generator or JAX key for the random subset; None: a fixed subset.
    """
    policy = find_policy(spec.policy)
    particles = policy.cut(video_THWC, times_T, spec)
    if not spec.budget or policy.spends_budget:
        return particles
    count = len(particles.segment)
    if rng is None or isinstance(rng, np.random.Generator):
        scores = (rng or np.random.default_rng(0)).random(count)
        scores = array_namespace(video_THWC).asarray(scores)
    else:
        scores = jax.random.uniform(rng, (count,))
    return thin(particles, scores, spec.budget)


def thin(particles: Particles, scores: Array, budget: int) -> Particles:
    """Keeps the `budget` particles with the smallest scores [L], in order; random scores give a
    random subset.
    """
    xp = array_namespace(scores)
    return particles.take(xp.sort(xp.argsort(scores)[:budget]))


def required_multiple(spec: ParticleSpec) -> Shape:
    """Returns frames, rows and columns that a clip's size must be a multiple of."""
    if spec.policy == "adaptive":
        return adaptive.coarsest_shape(spec)
    return pyramid(spec, spec.patch_size)[-1].shape if spec.policy == "pyramid" else spec.patch_size


def particle_count(size: Shape, spec: ParticleSpec) -> int:
    """Returns the maximum number of particles of a clip of `size` (frames, rows, columns)."""
    total = find_policy(spec.policy).count(size, spec)
    return min(total, spec.budget) if spec.budget else total


def check(size: Shape, spec: ParticleSpec) -> None:
    """Raises ValueError if the policy does not cover the whole clip."""
    find_policy(spec.policy).check(size, spec)


def _check_tubes(size: Shape, spec: ParticleSpec, tubes: tuple[Tube, ...]) -> None:
    for tube, axis in itertools.product(tubes, range(3)):
        if tube.shape[axis] > size[axis]:
            raise ValueError(
                f"particles of {tube.shape} do not fit into clips of {tuple(size)}: use smaller "
                "particles or larger clips."
            )
        if spec.policy != "tubes" and size[axis] % tube.shape[axis]:
            name = ("frames", "rows", "columns")[axis]
            raise ValueError(
                f"clips of {size[axis]} {name} are not a multiple of particles of "
                f"{tube.shape[axis]}: change data.num_frames, data.image_size or "
                "particles.patch_size."
            )


def _check_adaptive(size: Shape, spec: ParticleSpec) -> None:
    GRID.check(size, spec)
    if spec.policy == "adaptive":
        min_budget = int(np.prod(adaptive.build_tree(size, spec).counts[0]))
        if spec.budget < min_budget:
            raise ValueError(
                f"particles.budget={spec.budget} is less than the {min_budget} coarsest particles "
                "of a clip: raise it or particles.num_levels."
            )
        return
    min_budget = (size[1] // spec.patch_size[1]) * (size[2] // spec.patch_size[2])
    if not (spec.budget or spec.run_threshold):
        raise ValueError(
            "particles.policy is 'run_length' but budget and run_threshold are 0: set one of them."
        )
    if 0 < spec.budget < min_budget:
        raise ValueError(
            f"particles.budget={spec.budget} is less than the {min_budget} runs of the first "
            "frames: raise it."
        )


GRID = _lattice_policy(grid)
TABLE: dict[str, Policy] = {
    "grid": GRID,
    "tubes": _lattice_policy(tubes),
    "pyramid": _lattice_policy(pyramid),
    "adaptive": _adaptive_policy(adaptive.adaptive),
    "run_length": _adaptive_policy(run_length.run_length),
}


def find_policy(name: str) -> Policy:
    """Returns a policy by name; data workers import plugins only if it is not built in."""
    if name not in TABLE:
        plugins.load_inherited()
    return TABLE[name]


def register_policy(
    name: str,
    *,
    count: Callable[[Shape, ParticleSpec], int],
    check: Callable[[Shape, ParticleSpec], None] = lambda size, spec: None,
    spends_budget: bool = False,
) -> Callable[[Cut], Cut]:
    """Decorator that registers a particle policy as a value of `config.particles.policy`.

    The function maps (video [T, H, W, C], times [T] in seconds, ParticleSpec) to Particles with
    leading axis N, for NumPy arrays and, inside jit, for JAX arrays. See `Policy` for the
    arguments. Raises ValueError for a name that is taken.
    """

    def register(cut: Cut) -> Cut:
        plugins.add(TABLE, "policy", name, Policy(cut, count, check, spends_budget))
        POLICIES[name] = None
        return cut

    return register
