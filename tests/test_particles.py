# SPDX-License-Identifier: Apache-2.0
"""Cutting, places, policies and packing: exact inverses, one result from numpy and jax, nothing
lost in a row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax import masks
from particlejax.config.experiment import ParticleSpec
from particlejax.particles import packing, policies
from particlejax.particles.cuboids import Tube, cut_cuboids, join_cuboids
from particlejax.particles.types import Particles

SIZE, BASE = (8, 16, 24), (2, 4, 8)
TIMES = (np.arange(8) / 4).astype(np.float32)
VIDEO = np.random.default_rng(0).normal(size=(*SIZE, 3)).astype(np.float32)
SPECS = {
    "grid": ParticleSpec("grid", BASE),
    "tubes": ParticleSpec(
        "tubes",
        BASE,
        tubes=(((2, 4, 8), (2, 4, 8)), ((4, 8, 8), (2, 8, 8), (1, 0, 4)), ((1, 8, 8), (4, 8, 8))),
    ),
    "pyramid": ParticleSpec("pyramid", BASE, num_levels=3, level_factor=(2, 2, 1)),
}


def test_grid_is_a_tiling_that_can_be_undone() -> None:
    particles = cut_cuboids(VIDEO, TIMES, Tube(BASE, BASE), BASE)
    np.testing.assert_array_equal(join_cuboids(particles.payload, SIZE, BASE), VIDEO)
    # 2 s x the whole frame
    np.testing.assert_allclose(np.prod(particles.extent, axis=-1).sum(), 2.0, rtol=1e-6)
    np.testing.assert_allclose(particles.place[0], [0.25, 2 / 16, 4 / 24])
    np.testing.assert_allclose(
        particles.extent, np.broadcast_to([0.5, 4 / 16, 8 / 24], particles.extent.shape), rtol=1e-6
    )


@pytest.mark.parametrize(
    "video",
    [VIDEO[:, :, ::-1], (99 * VIDEO).astype(np.uint8), VIDEO[:7, 1:, 3:, :1], VIDEO.swapaxes(1, 2)],
)
def test_tiles_are_the_same_however_pixels_lie_in_memory(video: np.ndarray) -> None:
    tube = Tube(BASE, BASE)
    host, device = (
        cut_cuboids(each, TIMES[: len(video)], tube, BASE).payload
        for each in (video, jnp.asarray(video))
    )
    assert host.dtype == video.dtype
    np.testing.assert_array_equal(host, device)


def test_places_follow_true_times() -> None:
    times = np.array([0, 0.1, 0.5, 0.6, 1.0, 1.1, 2.0, 2.5], np.float32)
    particles = cut_cuboids(VIDEO, times, Tube((2, 16, 24), (2, 16, 24)), BASE)
    np.testing.assert_allclose(particles.place[:, 0], [0.25, 0.75, 1.5, 2.5], rtol=1e-6)
    np.testing.assert_allclose(particles.extent[:, 0], [0.5, 0.5, 1.0, 1.0], rtol=1e-6)


def test_a_coarse_particle_is_the_mean_of_the_fine_ones() -> None:
    spec = SPECS["pyramid"]
    particles = policies.cut_clip(VIDEO, TIMES, spec)
    fine = VIDEO.reshape(4, 2, 8, 2, 24, 3).mean(axis=(1, 3))  # level 1 halves time and rows
    level1 = cut_cuboids(fine, TIMES[::2], Tube(BASE, BASE), BASE)
    at = len(cut_cuboids(VIDEO, TIMES, Tube(BASE, BASE), BASE).segment)
    np.testing.assert_allclose(
        particles.payload[at : at + len(level1.segment)], level1.payload, atol=1e-6
    )
    np.testing.assert_allclose(
        particles.place[at : at + len(level1.segment)], level1.place, atol=1e-6
    )


def test_a_fine_tube_repeats_its_pixels_up_to_the_base() -> None:
    particles = cut_cuboids(VIDEO, TIMES, Tube((1, 4, 8), (1, 4, 8)), BASE)
    payload = particles.payload.reshape(-1, *BASE, 3)
    np.testing.assert_array_equal(payload[:, 0], payload[:, 1])
    np.testing.assert_array_equal(payload[0, 0], VIDEO[0, :4, :8])


@pytest.mark.parametrize("name", SPECS)
def test_numpy_and_jax_agree(name: str) -> None:
    spec = SPECS[name]
    host = policies.cut_clip(VIDEO, TIMES, spec)
    device = jax.jit(lambda v, t: policies.cut_clip(v, t, spec))(VIDEO, TIMES)
    assert isinstance(host.payload, np.ndarray) and isinstance(device.payload, jax.Array)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), host, device)
    assert len(host.segment) == policies.particle_count(SIZE, spec)
    assert host.payload.shape[1] == np.prod(BASE) * 3, "one payload size for every granularity"


@pytest.mark.parametrize("xp", [np, jnp])
def test_thin_keeps_the_lowest_scores_in_order(xp: object) -> None:
    particles = jax.tree.map(xp.asarray, policies.cut_clip(VIDEO, TIMES, SPECS["grid"]))
    scores = xp.asarray(np.random.default_rng(1).random(len(particles.segment)))
    kept = policies.thin(particles, scores, 10)
    wanted = np.sort(np.argsort(np.asarray(scores))[:10])
    np.testing.assert_array_equal(kept.payload, np.asarray(particles.payload)[wanted])
    np.testing.assert_array_equal(kept.place, np.asarray(particles.place)[wanted])


@pytest.mark.parametrize(
    "spec, match",
    [
        (ParticleSpec("grid", (3, 4, 8)), "8 frames are not a multiple of particles of 3"),
        (ParticleSpec("grid", (16, 4, 8)), "do not fit"),
    ],
)
def test_sizes_that_leave_something_out_are_refused(spec: ParticleSpec, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        policies.check(SIZE, spec)


def some(n: int, seed: int) -> Particles:
    rng = np.random.default_rng(seed)
    return Particles(
        rng.normal(size=(n, 6)).astype(np.float32),
        rng.random((n, 3)).astype(np.float32),
        rng.random((n, 3)).astype(np.float32),
        np.ones(n, np.int32),
    )


def test_packing_loses_nothing_and_mixes_nothing() -> None:
    sizes = [5, 3, 8, 4, 1, 6]
    clips = [
        packing.Clip(
            {"vision": some(n, n), "audio": some(2, 9)} if n != 4 else {"vision": some(n, n)}, n, i
        )
        for i, n in enumerate(sizes)
    ]
    batch = packing.pack(
        clips,
        [0, 0, 1, 2, 1, 2],
        {"vision": packing.SlotSpec(10, 6), "audio": packing.SlotSpec(4, 6)},
        num_rows=4,
        clips_per_row=3,
    )
    for row in range(4):
        for slot in range(3):
            number = batch.clip_index[row, slot]
            vision = batch.particles["vision"]
            mine = vision.segment[row] == slot + 1
            if number < 0:
                assert not mine.any() and batch.label[row, slot] == -1
                continue
            np.testing.assert_array_equal(
                vision.payload[row][mine], clips[number].particles["vision"].payload
            )
            assert batch.label[row, slot] == clips[number].label
            audio = (batch.particles["audio"].segment[row] == slot + 1).sum()
            assert audio == (0 if sizes[number] == 4 else 2), (
                "a modality that a clip lacks has no particle"
            )
    assert sorted(batch.clip_index[batch.clip_index >= 0]) == list(range(6))


def test_a_row_is_never_given_more_than_it_holds() -> None:
    clips = [packing.Clip({"vision": some(5, 0)}, 0, 0)] * 3
    with pytest.raises(
        ValueError, match="row 0 has 10 vision slots, but its clips have 15 particles"
    ):
        packing.pack(clips, [0, 0, 0], {"vision": packing.SlotSpec(10, 6)}, 1, 3)
    with pytest.raises(ValueError, match="row 1 has more than 1 clips"):
        packing.pack(clips, [0, 1, 1], {"vision": packing.SlotSpec(10, 6)}, 2, 1)


def test_masks_give_every_clip_its_share() -> None:
    segment = jnp.array([[1] * 16 + [2] * 8 + [0] * 8, [1] * 32])
    place = jnp.asarray(np.random.default_rng(0).random((2, 32, 3)), jnp.float32)
    for name, scores in (("random", masks.random_scores), ("tube", masks.tube_scores)):
        visible, asked, shown = masks.split(scores(jax.random.key(0), place), segment, 0.25, 0.5)
        assert [int((shown[0] == s).sum()) for s in (1, 2)] == [4, 2], name
        assert int((shown[1] == 1).sum()) == 8, name
        for row in range(2):
            assert not set(visible[row].tolist()) & set(asked[row].tolist())


def test_tube_masks_hide_a_place_at_all_times() -> None:
    particles = cut_cuboids(VIDEO, TIMES, Tube(BASE, BASE), BASE)
    scores = np.asarray(masks.tube_scores(jax.random.key(1), jnp.asarray(particles.place)[None]))[0]
    by_time = scores.reshape(4, -1)
    np.testing.assert_array_equal(by_time, np.broadcast_to(by_time[:1], by_time.shape))
    assert len(set(by_time[0].tolist())) == by_time.shape[1]
