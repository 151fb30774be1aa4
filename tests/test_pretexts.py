# SPDX-License-Identifier: Apache-2.0
"""What pretexts do to particles is what they would do to the video, and nothing but payloads tells
what was done.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax.config.experiment import ParticleSpec
from particlejax.models.particle_model import ModalitySpec, Model
from particlejax.objectives import masked, pretext, pretext_video, synchronization, time_utils
from particlejax.particles import packing, policies
from particlejax.particles.normalize import PixelScale
from particlejax.particles.types import Batch, Particles

BASE = (2, 4, 4)
CUTS = {"grid": ParticleSpec("grid", BASE), "pyramid": ParticleSpec("pyramid", BASE, (2, 2, 2), 2)}


def video(frames: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(frames, 8, 8, 3)).astype(np.float32)


def cut(frames: np.ndarray, policy: str = "grid") -> Particles:
    return policies.cut_clip(frames, np.arange(len(frames), dtype=np.float32) / 4, CUTS[policy])


def row(*clips: Particles, length: int = 0) -> Particles:
    """Clips packed into one row."""
    packed = packing.pack(
        [packing.Clip({"vision": each}, 0, i) for i, each in enumerate(clips)],
        [0] * len(clips),
        {
            "vision": packing.SlotSpec(
                length or sum(len(each.segment) for each in clips), clips[0].payload.shape[1]
            )
        },
        1,
        len(clips),
    )
    return jax.tree.map(jnp.asarray, packed.particles["vision"])


def table(particles: Particles, segment: int = 1, payload: bool = True) -> np.ndarray:
    """One line a particle: place, extent, payload, in the order of places."""
    here = np.asarray(particles.segment[0]) == segment
    fields = (particles.place, particles.extent, particles.payload)[: 2 + payload]
    lines = np.concatenate([np.asarray(x)[0][here] for x in fields], -1)
    return lines[np.lexsort(np.round(lines[:, :6], 3).T)]


@pytest.mark.parametrize("policy", CUTS)
def test_running_backward_is_the_reversed_video(policy: str) -> None:
    made = pretext_video.reverse(row(cut(video(), policy)), jnp.array([[True]]), BASE)
    np.testing.assert_allclose(
        table(made), table(row(cut(video()[::-1].copy(), policy))), atol=1e-5
    )


@pytest.mark.parametrize("label", range(8))
def test_turning_particles_is_turning_the_video(label: int) -> None:
    turned = np.rot90(video(), label % 4, axes=(1, 2))
    turned = turned[:, :, ::-1] if label >= 4 else turned
    made = pretext_video.rotate_flip(row(cut(video(), "pyramid")), jnp.array([[label]]), BASE)
    np.testing.assert_allclose(table(made), table(row(cut(turned.copy(), "pyramid"))), atol=1e-5)


def test_twice_as_fast_is_every_other_frame() -> None:
    whole = row(cut(video()))
    made, asked = pretext_video.speed_up(whole, jnp.array([[1]]), jnp.array([[0.3]]), 1, BASE)
    expected = table(row(cut(video()[::2].copy())))
    np.testing.assert_allclose(table(made), expected, atol=1e-5)
    slow, _ = pretext_video.speed_up(whole, jnp.array([[0]]), jnp.array([[0.0]]), 1, BASE)
    np.testing.assert_allclose(table(slow), table(row(cut(video()[:8].copy()))), atol=1e-5)
    assert asked.all()


@pytest.mark.parametrize("policy", CUTS)
def test_only_payloads_tell_the_speed(policy: str) -> None:
    whole = row(cut(video(32), policy))
    seen = [
        table(
            pretext_video.speed_up(whole, jnp.array([[label]]), jnp.array([[where]]), 2, BASE)[0],
            payload=False,
        )
        for label in range(3)
        for where in (0.0, 0.9)
    ]
    assert len(seen[0]) >= 4 * 4
    for each in seen:
        np.testing.assert_allclose(each, seen[0], atol=1e-4)


@pytest.mark.parametrize("policy, frames", [("grid", 16), ("grid", 14), ("pyramid", 32)])
def test_only_payloads_tell_the_order(policy: str, frames: int) -> None:
    whole = row(cut(video(frames), policy))
    made = [pretext_video.shuffle_thirds(whole, jnp.array([[label]])) for label in range(6)]
    assert all(asked.all() for _, asked in made)
    seen = [table(each, payload=False) for each, _ in made]
    for each in seen:
        np.testing.assert_allclose(each, seen[0], atol=1e-4)
    payloads = {np.round(table(each)[:, 6:], 4).tobytes() for each, _ in made}
    assert len(payloads) == 6, "each order is another"


def sound(patches: int, start: float = 0.0) -> Particles:
    t = start + 0.16 * np.arange(patches, dtype=np.float32)
    place = np.stack([t + 0.08, np.full(patches, 0.5), np.full(patches, 0.5)], -1).astype(
        np.float32
    )
    return Particles(
        np.arange(patches, dtype=np.float32)[:, None],
        place,
        np.full((patches, 3), [0.16, 1, 1], np.float32),
        np.ones(patches, np.int32),
    )


def test_only_payloads_tell_the_shift_of_sound() -> None:
    whole = row(sound(20))
    made = [synchronization.shift_in_time(whole, jnp.array([[by]]), 2, 3) for by in range(-2, 3)]
    assert all(asked.all() for _, asked in made)
    for by, (each, _) in zip(range(-2, 3), made, strict=True):
        lines = table(each)
        np.testing.assert_allclose(lines[:, :6], table(made[0][0])[:, :6], atol=1e-4)
        np.testing.assert_allclose(lines[:, 6], np.arange(8) + 6 + 3 * by)
    assert not synchronization.shift_in_time(row(sound(12)), jnp.array([[0]]), 2, 3)[1].any(), (
        "too short to be asked"
    )


def test_a_shift_is_where_two_series_vary_alike() -> None:
    """Whatever each is scaled by and stands at; each clip of a row has its own shift, and one that
    stands still has none.
    """
    whole = row(sound(20), sound(24), sound(20, 5.0), length=70)
    said = jnp.asarray(np.random.default_rng(0).normal(size=(25, 4)), jnp.float32)
    said = said[whole.payload[..., 0].astype(jnp.int32)] * (whole.segment < 3)[..., None]
    shifts = jnp.array([[-1, 2, 0]])
    moved, _ = synchronization.shift_in_time(whole, shifts, 2, 3)
    alike = jnp.stack(
        [
            synchronization.correlation(
                said, 2 - 3 * said, whole, moved, jnp.full((1, 3), by * 3 * 0.16)
            )
            for by in range(-2, 3)
        ]
    )
    assert (alike[:, 0, :2].argmin(axis=0) - 2 == shifts[0, :2]).all()
    np.testing.assert_allclose(alike.min(axis=0)[0, :2], -1, atol=1e-5)
    assert (jnp.abs(alike) < 0.8).sum() == alike.size - 2 and (alike[:, 0, 2] == 0).all()


def test_clips_of_a_packed_row_are_changed_each_by_itself() -> None:
    parts = [cut(video(16, 1)), cut(video(12, 2)), cut(video(24, 3), "pyramid")]
    packed, label = row(*parts, length=300), jnp.array([[1, 0, 1]])
    ways = {
        "arrow_of_time": lambda p, a: pretext_video.reverse(p, a > 0, BASE),
        "rotation_flip": lambda p, a: pretext_video.rotate_flip(p, 3 * a, BASE),
        "clip_order": lambda p, a: pretext_video.shuffle_thirds(p, 4 * a)[0],
        "playback_speed": lambda p, a: pretext_video.speed_up(
            p, a, 0.5 * jnp.ones(a.shape), 1, BASE
        )[0],
        "synchronization": lambda p, a: synchronization.shift_in_time(p, a, 1, 1)[0],
    }
    for name, way in ways.items():
        together = way(packed, label)
        for i, each in enumerate(parts):
            alone = way(row(each), label[:, i : i + 1])
            np.testing.assert_allclose(
                table(together, i + 1), table(alone), atol=1e-4, err_msg=name
            )
        assert (together.segment[packed.segment == 0] == 0).all()


def test_the_clock_of_a_row() -> None:
    packed = row(cut(video(16)), cut(video(8)), length=100)
    first, last = time_utils.span(packed, 3)
    np.testing.assert_allclose(first, [[0, 0, 0]])
    np.testing.assert_allclose(last, [[4, 2, 0]])
    np.testing.assert_array_equal(time_utils.present(packed, 3), [[True, True, False]])
    np.testing.assert_allclose(time_utils.longest_duration(packed, last), [[0.5, 0.5, 0]])


def test_a_film_that_stands_still_is_as_the_last_frame_of_its_place() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 2, 4, 4, 3), np.uint8)
    scale = PixelScale(0.5, 0.2, 0.4, 2)
    places = np.array([[[1, 0.5, 0.5], [3, 0.5, 0.5], [4, 0.5, 0.5], [4, 0.5, 0.25]]], np.float32)
    past = Particles(
        scale.to_payload(pixels.reshape(1, 4, -1)),
        places,
        np.ones_like(places),
        np.array([[1, 1, 2, 0]]),
    )
    places = np.array([[[5, 0.5, 0.5], [5, 0.5, 0.5], [5, 0.5, 0.25], [5, 0.25, 0.5]]], np.float32)
    # Of a clip that was there twice, of another clip, where only an empty slot stands, and where
    # nothing does.
    query = Particles(past.payload, places, np.ones_like(places), np.array([[1, 2, 1, 1]]))
    found = masked.copy_last_frame(
        past, query, ModalitySpec(96, patch_size=(2, 4, 4), pixels=scale)
    )
    still = np.broadcast_to(pixels[:, [1, 2], -1:], (1, 2, 2, 4, 4, 3))  # not the earlier one's
    np.testing.assert_allclose(found[:, :2], scale.to_payload(still.reshape(1, 2, -1)), atol=1e-5)
    assert (found[:, 2:] == 0).all()


def test_a_shift_told_within_a_step_counts_as_near() -> None:
    # of five shifts and another clip's
    said, label = (np.array([[0], [1], [3], [5], [4]]), np.array([[1], [1], [1], [4], [5]]))
    logits = jax.nn.one_hot(said, 6)
    model = Model(
        None,
        lambda params, method, *args, key=None: (None, None) if method == "encode" else logits,
        {},
    )
    number = jnp.arange(5)[:, None]
    batch = Batch({}, number, number, number, number)
    _, metrics = pretext.encode_and_score(
        "synchronization",
        {},
        model,
        {},
        batch,
        jnp.asarray(label),
        jnp.ones((5, 1), bool),
        None,
        num_ordered=5,
    )
    assert np.allclose(metrics["acc_within_1"], (2 / 4, 4)) and np.allclose(
        metrics["top1"], (1 / 5, 5)
    )
