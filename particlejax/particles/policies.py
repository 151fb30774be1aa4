# SPDX-License-Identifier: Apache-2.0
"""Which particles a clip becomes: the policies. Each is a pure function of one clip, numpy and jax
arrays alike.

`cut_clip` keeps a random part where the spec has a budget that the policy does not spend itself.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from particlejax.config import plugins
from particlejax.config.experiment import POLICIES, ParticleSpec
from particlejax.core.typing import Array
from particlejax.particles import adaptive, run_length
from particlejax.particles.cuboids import Tube, cut, lattice
from particlejax.particles.types import Particles, numpy_of

Shape = tuple[int, int, int]
Cut = TypeVar("Cut", bound=Callable[..., Particles])


def grid(spec: ParticleSpec, size: Shape) -> tuple[Tube, ...]:
    """One granularity, every cuboid (ViViT, arXiv:2103.15691; VideoMAE, arXiv:2203.12602)."""
    del size
    return (Tube(spec.patch_size, spec.patch_size),)


def tubes(spec: ParticleSpec, size: Shape) -> tuple[Tube, ...]:
    """Several shapes and strides, overlapping or sparse (TubeViT, arXiv:2212.03229); given as
    spec.tubes.
    """
    del size
    return tuple(Tube(*map(tuple, tube)) for tube in spec.tubes)


def pyramid(spec: ParticleSpec, size: Shape) -> tuple[Tube, ...]:
    """The base cuboid on every level of the clip averaged down: level k is spec.factor ** k coarser
    on every axis.
    """
    del size
    scales = [tuple(f**level for f in spec.level_factor) for level in range(spec.num_levels)]
    shapes = [tuple(b * s for b, s in zip(spec.patch_size, scale, strict=True)) for scale in scales]
    return tuple(Tube(shape, shape) for shape in shapes)


class Policy(NamedTuple):
    """How a clip becomes particles.

    cut: (video [T, H, W, C], times [T], spec) -> Particles with leading axis N. count: (size, spec)
    -> N for a clip of `size` (frames, rows, columns); of a policy that spends the budget, N without
    one. check: raises ValueError for clips or settings that it cannot take. spends_budget: whether
    it makes at most spec.budget particles itself; of the others a random part is kept.
    """

    cut: Callable[[Array, Array, ParticleSpec], Particles]
    count: Callable[[Shape, ParticleSpec], int]
    check: Callable[[Shape, ParticleSpec], None] = lambda size, spec: None
    spends_budget: bool = False


def _of_tubes(tubes_of: Callable[[ParticleSpec, Shape], tuple[Tube, ...]]) -> Policy:
    """The policy that cuts every cuboid of fixed lattices."""

    def cut_all(video_THWC: Array, times_T: Array, spec: ParticleSpec) -> Particles:
        tubes = tubes_of(spec, video_THWC.shape[:3])
        parts = [cut(video_THWC, times_T, tube, spec.patch_size) for tube in tubes]
        if len(parts) == 1:
            return parts[0]
        xp = numpy_of(video_THWC)
        fields = ("payload", "place", "extent", "segment")
        return Particles(
            **{name: xp.concatenate([getattr(p, name) for p in parts]) for name in fields}
        )

    def count(size: Shape, spec: ParticleSpec) -> int:
        return sum(len(lattice(size, tube)) for tube in tubes_of(spec, size))

    def check_tubes(size: Shape, spec: ParticleSpec) -> None:
        _check_tubes(size, spec, tubes_of(spec, size))

    return Policy(cut_all, count, check_tubes)


def _adapting(cut: Callable[[Array, Array, ParticleSpec], Particles]) -> Policy:
    """A policy that starts from the grid and spends the budget where that tells most."""
    return Policy(cut, GRID.count, _check_adapting, spends_budget=True)


def cut_clip(
    video_THWC: Array,
    times_T: Array,
    spec: ParticleSpec,
    rng: np.random.Generator | Array | None = None,
) -> Particles:
    """The particles that the policy makes of one clip: `particle_count` of them, or at most so many
    where it adapts. None but those of spec.budget, where that is not 0.

    rng: a generator (numpy) or a key (jax) that decides which particles stay where the policy does
    not spend the budget itself; None: always the same ones.
    """
    policy = find(spec.policy)
    particles = policy.cut(video_THWC, times_T, spec)
    if not spec.budget or policy.spends_budget:
        return particles
    count = len(particles.segment)
    if rng is None or isinstance(rng, np.random.Generator):
        scores = (rng or np.random.default_rng(0)).random(count)
        scores = numpy_of(video_THWC).asarray(scores)
    else:
        scores = jax.random.uniform(rng, (count,))
    return thin(particles, scores, spec.budget)


def thin(particles: Particles, scores: Array, budget: int) -> Particles:
    """The `budget` particles [L] of smallest score, in their order: `random` when the scores are
    random numbers.
    """
    xp = numpy_of(scores)
    return particles.take(xp.sort(xp.argsort(scores)[:budget]))


def coarsest(spec: ParticleSpec) -> Shape:
    """Frames, rows and columns that a clip's must be multiples of."""
    if spec.policy == "adaptive":
        return adaptive.root(spec)
    return pyramid(spec, spec.patch_size)[-1].shape if spec.policy == "pyramid" else spec.patch_size


def particle_count(size: Shape, spec: ParticleSpec) -> int:
    """How many particles a clip of `size` (frames, rows, columns) becomes, at most."""
    whole = find(spec.policy).count(size, spec)
    return min(whole, spec.budget) if spec.budget else whole


def check(size: Shape, spec: ParticleSpec) -> None:
    """Raises ValueError when the policy leaves a part of the clip out."""
    find(spec.policy).check(size, spec)


def _check_tubes(size: Shape, spec: ParticleSpec, tubes: tuple[Tube, ...]) -> None:
    for tube, axis in itertools.product(tubes, range(3)):
        if tube.shape[axis] > size[axis]:
            raise ValueError(
                f"particles of {tube.shape} do not fit into clips of {tuple(size)}: use smaller "
                "ones or larger clips."
            )
        if spec.policy != "tubes" and size[axis] % tube.shape[axis]:
            name = ("frames", "rows", "columns")[axis]
            raise ValueError(
                f"clips of {size[axis]} {name} are not a multiple of particles of "
                f"{tube.shape[axis]}: change data.num_frames, data.image_size or "
                "particles.patch_size."
            )


def _check_adapting(size: Shape, spec: ParticleSpec) -> None:
    GRID.check(size, spec)
    if spec.policy == "adaptive":
        least = int(np.prod(adaptive.tree(size, spec).counts[0]))
        if spec.budget < least:
            raise ValueError(
                f"particles.budget={spec.budget} is less than the {least} coarsest particles of a "
                "clip: raise it, "
                "or particles.num_levels."
            )
        return
    least = (size[1] // spec.patch_size[1]) * (size[2] // spec.patch_size[2])
    if not (spec.budget or spec.run_threshold):
        raise ValueError(
            "particles.policy is 'runs' but budget and threshold are 0: set one of them."
        )
    if 0 < spec.budget < least:
        raise ValueError(
            f"particles.budget={spec.budget} is less than the {least} runs that begin with a clip: "
            "raise it."
        )


GRID = _of_tubes(grid)
TABLE: dict[str, Policy] = {
    "grid": GRID,
    "tubes": _of_tubes(tubes),
    "pyramid": _of_tubes(pyramid),
    "adaptive": _adapting(adaptive.adaptive),
    "runs": _adapting(run_length.runs),
}


def find(name: str) -> Policy:
    """The policy of this name; data workers import plugins only when one of theirs is asked for."""
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
    """Adds a particle policy by a decorator: `config.particles.policy` may then be `name`.

    The function is (video [T, H, W, C], times [T] in seconds, ParticleSpec) -> Particles with
    leading axis N, for numpy and, where it is used inside jit, jax arrays. See `Policy` for the
    others. Raises ValueError for a name that is taken.
    """

    def register(cut: Cut) -> Cut:
        plugins.add(TABLE, "policy", name, Policy(cut, count, check, spends_budget))
        POLICIES[name] = None
        return cut

    return register
