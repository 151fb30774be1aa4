# SPDX-License-Identifier: Apache-2.0
"""Particles that adapt: they tile the clip, hold the budget, go where things happen, and numpy and
jax choose alike.
"""

import dataclasses

import jax
import numpy as np
import pytest

from particlejax.config.experiment import ParticleSpec
from particlejax.particles import policies
from particlejax.particles.types import Particles

SIZE, BASE = (16, 32, 48), (2, 4, 4)
FULL = 8 * 8 * 12
# of a variable rate
TIMES = (np.cumsum(np.random.default_rng(9).uniform(0.02, 0.06, 16)) - 0.02).astype(np.float32)
SPECS = {
    "time or space": ParticleSpec("adaptive", BASE, budget=FULL // 4),
    "at once": ParticleSpec("adaptive", BASE, budget=FULL // 4, split_axes=("spacetime",)),
    "any": ParticleSpec(
        "adaptive", BASE, budget=FULL // 10, split_axes=("spacetime", "time", "space"), num_levels=3
    ),
    "only space": ParticleSpec("adaptive", BASE, budget=FULL // 2, split_axes=("space",)),
    "four levels in time": ParticleSpec(
        "adaptive", (2, 16, 16), budget=30, split_axes=("time",), num_levels=4
    ),
    "absolute": ParticleSpec("adaptive", BASE, budget=FULL // 4, split_criterion="absolute_error"),
    "motion": ParticleSpec("adaptive", BASE, budget=FULL // 4, split_criterion="motion"),
    "everything": ParticleSpec("adaptive", BASE, budget=FULL),
    "runs of a budget": ParticleSpec("run_length", BASE, budget=FULL // 3),
    "runs of a threshold": ParticleSpec("run_length", BASE, run_threshold=4.0),
}


def textured(seed: int) -> np.ndarray:
    """A still picture uint8 [T, H, W, 3] of blocks and noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 200, (SIZE[1] // 8, SIZE[2] // 8, 3)).repeat(8, 0).repeat(8, 1)
    picture = blocks + rng.integers(0, 50, (*SIZE[1:], 3))
    return np.broadcast_to(picture.astype(np.uint8), (*SIZE, 3)).copy()


def moving(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same with a patch that moves, and where the patch ever is, bool [H, W]."""
    video, path = textured(seed), np.zeros(SIZE[1:], bool)
    patch = np.random.default_rng(seed + 1).integers(0, 255, (8, 8, 3), np.uint8)
    for t in range(SIZE[0]):
        video[t, 12:20, t : t + 8] = patch
        path[12:20, t : t + 8] = True
    return video, path


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)


VIDEOS = {
    "still": textured(0),
    "moving": moving(1)[0],
    "noise": noise(2),
    "flat": np.full((*SIZE, 3), 77, np.uint8),
}


def cover(particles: Particles) -> np.ndarray:
    """How many particles each pixel of each frame belongs to, [T, H, W]."""
    count = np.zeros(SIZE, int)
    last = TIMES[-1] - TIMES[-2]
    middle = (TIMES + np.append(TIMES[1:], TIMES[-1] + last)) / 2
    for place, extent in zip(particles.place, particles.extent, strict=True):
        low, high = place - extent / 2, place + extent / 2
        inside = [
            (at >= a) & (at < b)
            for at, a, b in zip(
                (
                    middle,
                    (np.arange(SIZE[1]) + 0.5) / SIZE[1],
                    (np.arange(SIZE[2]) + 0.5) / SIZE[2],
                ),
                low,
                high,
                strict=True,
            )
        ]
        count += inside[0][:, None, None] & inside[1][None, :, None] & inside[2][None, None]
    return count


@pytest.mark.parametrize("name", SPECS)
def test_particles_tile_the_clip_within_the_budget_and_jax_chooses_the_same(name: str) -> None:
    spec = SPECS[name]
    policies.check(SIZE, spec)
    on_device = jax.jit(lambda v, t: policies.cut_clip(v, t, spec))
    for kind, video in VIDEOS.items():
        host = policies.cut_clip(video, TIMES, spec)
        number = len(host.segment)
        assert (cover(host) == 1).all(), (kind, "no hole, no overlap")
        assert number <= policies.particle_count(SIZE, spec) and (host.segment == 1).all()
        device = jax.tree.map(np.asarray, on_device(video, TIMES))
        assert len(device.segment) == policies.particle_count(SIZE, spec), (
            "a shape that does not depend on the pixels"
        )
        assert (device.segment == (np.arange(len(device.segment)) < number)).all()
        for field in ("payload", "place", "extent"):
            np.testing.assert_array_equal(
                getattr(device, field)[:number], getattr(host, field), f"{kind}: {field}"
            )


@pytest.mark.parametrize("budget", [FULL // 10, FULL // 8, FULL // 4, FULL // 3, FULL // 2, FULL])
def test_at_most_one_split_is_missing(budget: int) -> None:
    for splits, dearest in (
        (("time", "space"), 3),
        (("spacetime",), 7),
        (("spacetime", "time", "space"), 7),
    ):
        spec = ParticleSpec("adaptive", BASE, budget=budget, split_axes=splits)
        number = len(policies.cut_clip(noise(3), TIMES, spec).segment)
        assert budget - dearest < number <= budget


def test_what_stands_still_stays_coarse() -> None:
    def extents(spec: ParticleSpec, video: np.ndarray) -> np.ndarray:
        return policies.cut_clip(video, TIMES, dataclasses.replace(spec, budget=FULL)).extent

    coarsest = (16 // 8) * (32 // 16) * (48 // 16)
    for spec in (SPECS["time or space"], SPECS["at once"], SPECS["absolute"], SPECS["motion"]):
        assert len(extents(spec, VIDEOS["flat"])) == coarsest
    assert len(extents(SPECS["motion"], VIDEOS["still"])) == coarsest, (
        "texture that does not move tells nothing of motion"
    )
    found = extents(SPECS["time or space"], VIDEOS["still"])
    assert len(found) > coarsest and found[:, 1].min() < 16 / 32, "texture is split in space"
    whole = np.diff(np.append(TIMES, 2 * TIMES[-1] - TIMES[-2])).reshape(2, 8).sum(axis=1)
    np.testing.assert_allclose(
        np.sort(np.unique(found[:, 0])), np.sort(whole), rtol=1e-5, err_msg="and never in time"
    )
    assert (
        len(policies.cut_clip(VIDEOS["still"], TIMES, SPECS["runs of a threshold"]).segment)
        == 8 * 12
    ), "one run a place"


@pytest.mark.parametrize("name", ["time or space", "at once", "motion", "runs of a threshold"])
def test_the_fine_ones_go_to_what_moves(name: str) -> None:
    video, path = moving(1)
    if name != "motion":  # on a plain ground, as texture is worth splits too
        video = np.where(path[None, :, :, None], video, 90).astype(np.uint8)
    spec = dataclasses.replace(SPECS[name], budget=200 if name.startswith("runs") else 150)
    particles = policies.cut_clip(video, TIMES, spec)
    finest = particles.extent[:, 0] <= np.partition(np.unique(particles.extent[:, 0]), 0)[0] * 2.5
    finest &= (particles.extent[:, 1] <= 4 / 32 + 1e-6) if not name.startswith("runs") else finest
    rows = (particles.place[finest, 1] * SIZE[1]).astype(int)
    columns = (particles.place[finest, 2] * SIZE[2]).astype(int)
    near = np.array(
        [
            path[max(r - 4, 0) : r + 4, max(c - 4, 0) : c + 4].any()
            for r, c in zip(rows, columns, strict=True)
        ]
    )
    assert finest.sum() >= 20 and near.mean() > 0.95
    right = particles.place[:, 2] > 32 / 48  # the patch never comes here
    assert right.sum() == (8 * 4 if name.startswith("runs") else 2 * 2), "the ground stays coarse"


@pytest.mark.parametrize(
    "spec, match",
    [
        (ParticleSpec("adaptive", BASE, budget=5), "less than the 12 coarsest particles"),
        (
            ParticleSpec("adaptive", BASE, budget=50, num_levels=4),
            "not tiled by the coarsest particles",
        ),
        (ParticleSpec("run_length", BASE), "budget and run_threshold are 0"),
        (ParticleSpec("run_length", BASE, budget=50), "less than the 96 runs"),
        (ParticleSpec("adaptive", (3, 4, 4), budget=99), "16 frames are not a multiple"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(spec: ParticleSpec, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        policies.check(SIZE, spec)
