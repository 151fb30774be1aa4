# SPDX-License-Identifier: Apache-2.0
"""Which particles a clip becomes: the policies. Each is a pure function of one clip, numpy and jax
arrays alike.

A policy is `(video [T, H, W, C], times [T], ParticleSpec) -> Particles` with leading axis N, a
number that depends on the shapes alone. `cut_clip` keeps a random part where the spec has a budget
that the policy does not spend itself.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import numpy as np

from particlejax.config.experiment import ParticleSpec
from particlejax.core.typing import Array
from particlejax.particles import adaptive, run_length
from particlejax.particles.patchify import Tube, cut, lattice
from particlejax.particles.types import Particles, numpy_of

Shape = tuple[int, int, int]


def grid(spec: ParticleSpec, size: Shape) -> tuple[Tube, ...]:
    """One granularity, every cuboid (ViViT, arXiv:2103.15691; VideoMAE, arXiv:2203.12602)."""
    del size
    return (Tube(spec.base, spec.base),)


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
    scales = [tuple(f**level for f in spec.factor) for level in range(spec.levels)]
    shapes = [tuple(b * s for b, s in zip(spec.base, scale, strict=True)) for scale in scales]
    return tuple(Tube(shape, shape) for shape in shapes)


LATTICES: dict[str, Callable[[ParticleSpec, Shape], tuple[Tube, ...]]] = {
    "grid": grid,
    "tubes": tubes,
    "pyramid": pyramid,
}
ADAPTING: dict[str, Callable[[Array, Array, ParticleSpec], Particles]] = {
    "adaptive": adaptive.adaptive,
    "runs": run_length.runs,
}


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
    particles = _cut(video_THWC, times_T, spec)
    if not spec.budget or spec.policy in ADAPTING:
        return particles
    count = len(particles.segment)
    if rng is None or isinstance(rng, np.random.Generator):
        scores = (rng or np.random.default_rng(0)).random(count)
        scores = numpy_of(video_THWC).asarray(scores)
    else:
        scores = jax.random.uniform(rng, (count,))
    return thin(particles, scores, spec.budget)


def _cut(video_THWC: Array, times_T: Array, spec: ParticleSpec) -> Particles:
    if spec.policy in ADAPTING:
        return ADAPTING[spec.policy](video_THWC, times_T, spec)
    size = video_THWC.shape[:3]
    parts = [
        cut(video_THWC, times_T, tube, spec.base) for tube in LATTICES[spec.policy](spec, size)
    ]
    if len(parts) == 1:
        return parts[0]
    xp = numpy_of(video_THWC)
    fields = ("payload", "place", "extent", "segment")
    return Particles(**{name: xp.concatenate([getattr(p, name) for p in parts]) for name in fields})


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
    return pyramid(spec, spec.base)[-1].shape if spec.policy == "pyramid" else spec.base


def particle_count(size: Shape, spec: ParticleSpec) -> int:
    """How many particles a clip of `size` (frames, rows, columns) becomes."""
    tubes = (
        (Tube(spec.base, spec.base),)
        if spec.policy in ADAPTING
        else LATTICES[spec.policy](spec, size)
    )
    whole = sum(len(lattice(size, tube)) for tube in tubes)
    return min(whole, spec.budget) if spec.budget else whole


def check(size: Shape, spec: ParticleSpec) -> None:
    """Raises ValueError when the policy leaves a part of the clip out."""
    if spec.policy in ADAPTING:
        _check_adapting(size, spec)
        return
    for tube, axis in itertools.product(LATTICES[spec.policy](spec, size), range(3)):
        if tube.shape[axis] > size[axis]:
            raise ValueError(
                f"particles of {tube.shape} do not fit into clips of {tuple(size)}: use smaller "
                "ones or "
                "larger clips."
            )
        if spec.policy != "tubes" and size[axis] % tube.shape[axis]:
            name = ("frames", "rows", "columns")[axis]
            raise ValueError(
                f"clips of {size[axis]} {name} are not a multiple of particles of "
                f"{tube.shape[axis]}: "
                "change data.frames, data.size or particles.base."
            )


def _check_adapting(size: Shape, spec: ParticleSpec) -> None:
    check(size, dataclasses.replace(spec, policy="grid"))
    if spec.policy == "adaptive":
        least = int(np.prod(adaptive.tree(size, spec).counts[0]))
        if spec.budget < least:
            raise ValueError(
                f"particles.budget={spec.budget} is less than the {least} coarsest particles of a "
                "clip: raise it, "
                "or particles.levels."
            )
        return
    least = (size[1] // spec.base[1]) * (size[2] // spec.base[2])
    if not (spec.budget or spec.threshold):
        raise ValueError(
            "particles.policy is 'runs' but budget and threshold are 0: set one of them."
        )
    if 0 < spec.budget < least:
        raise ValueError(
            f"particles.budget={spec.budget} is less than the {least} runs that begin with a clip: "
            "raise it."
        )
