# SPDX-License-Identifier: Apache-2.0
"""The toy data set: its action is in the motion and nowhere else, its truth is true, its files are
whole.
"""

import collections
import concurrent.futures
import dataclasses
import io
import os
import pathlib
import subprocess
import sys

import av
import numpy as np
import pytest
from processes import DEADLINE, spawn
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from particlejax.data.sources.toybox import actions, builder, render, sound
from particlejax.data.sources.toybox.actions import ACTIONS, FRAME_TIMES, SIZE

TRAIN, TEST = 312, 156  # clips, a multiple of the twelve actions
SMALL = dict(train=12, val=0, test=12)
RADII = np.array([8.0, 7.0])


@pytest.fixture(scope="module")
def clips() -> list[render.Clip]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda i: render.render(0, 0, i), range(TRAIN + TEST)))


def _labels(clips: list[render.Clip]) -> np.ndarray:
    return np.array([clip.label for clip in clips])


def _decode(video: bytes) -> tuple[np.ndarray, np.ndarray]:
    with av.open(io.BytesIO(video)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(io.BytesIO(video)) as container:
        audio = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return frames, audio


# the action is in the motion, not in the looks


def _histogram(frame: np.ndarray) -> np.ndarray:
    joint = np.histogramdd(frame.reshape(-1, 3), bins=4, range=[(0, 256)] * 3)[0].ravel()
    return np.sqrt(joint / joint.sum())


@pytest.mark.parametrize("moment", ["first", "middle", "last"])
def test_colours_of_one_frame_do_not_tell_the_action(clips: list[render.Clip], moment: str) -> None:
    t = dict(first=0, middle=len(FRAME_TIMES) // 2, last=-1)[moment]
    x, y = np.stack([_histogram(clip.frames[t]) for clip in clips]), _labels(clips)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500)).fit(
        x[:TRAIN], y[:TRAIN]
    )
    assert probe.score(x[TRAIN:], y[TRAIN:]) < 0.2  # 0.08 to 0.12 measured, chance 0.083


def _motion(frames: np.ndarray) -> np.ndarray:
    # per step: how much changes and where the change is, the place counted from its mean and
    # without its sign
    change = np.abs(np.diff(frames.astype(np.float32).mean(-1), axis=0))
    # 30 of 255: more than the shaking camera changes in most places
    change = np.maximum(change - 30, 0)
    total = change.sum((1, 2)) + 1
    at = (
        np.stack([change.sum(2) @ np.arange(SIZE), change.sum(1) @ np.arange(SIZE)], -1)
        / total[:, None]
    )
    at = np.abs(at - np.median(at, 0))
    spread = np.sort(at, 0)[::4].ravel()
    return np.concatenate([np.log(total), np.sort(np.log(total)), at.ravel(), spread])


def test_motion_tells_the_action(clips: list[render.Clip]) -> None:
    x, y = np.stack([_motion(clip.frames) for clip in clips]), _labels(clips)
    forest = RandomForestClassifier(150, random_state=0).fit(x[:TRAIN], y[:TRAIN])
    # 0.75 measured, chance 0.083, from differences of grey alone
    assert forest.score(x[TRAIN:], y[TRAIN:]) > 0.5


def test_looks_and_numbers_of_objects_do_not_depend_on_the_action(clips: list[render.Clip]) -> None:
    seen = collections.defaultdict(list)
    for clip in clips:
        seen[ACTIONS[clip.label]].append(len(clip.tracks) - (ACTIONS[clip.label] == "split"))
    means = [np.mean(counts) for counts in seen.values()]
    assert (
        max(means) - min(means) < 0.8
        and 2 <= min(map(min, seen.values()))
        and max(map(max, seen.values())) <= 4
    )


# every motion keeps its promises


@pytest.mark.parametrize("action", ACTIONS)
def test_motion_is_visible_and_stays_in_the_frame(action: str) -> None:
    for seed in range(20):
        staged = actions.play(np.random.default_rng(seed), action, RADII)
        pose = staged.pose_at(FRAME_TIMES)
        reach = RADII[: len(pose.centers), None, None] * pose.scale[:, None]
        assert (pose.centers - reach).min() > -1.5 and (pose.centers + reach).max() < SIZE + 1.5
        way = np.linalg.norm(np.ptp(pose.centers[0], axis=0))
        assert max(way, 8 * np.ptp(pose.angle), 8 * np.ptp(pose.scale)) > 4
        assert 0 <= staged.moment <= actions.SECONDS
        assert bool(len(staged.contacts)) == (action in ("bounce", "collide", "drop", "split"))
        assert all(0 <= contact < actions.SECONDS for contact in staged.contacts)


@pytest.mark.parametrize("action", ["bounce", "collide", "drop", "split"])
def test_contacts_are_where_the_velocity_breaks(action: str) -> None:
    motion = actions.MOTIONS[action](np.random.default_rng(3), RADII)
    times = np.linspace(0, actions.SECONDS, 2001)[:-1]
    force = np.linalg.norm(np.diff(motion.pose_at(times).centers[0], 2, axis=0), axis=-1)
    first = min(motion.contacts, key=lambda time: abs(time - times[force.argmax() + 1]))
    assert abs(first - times[force.argmax() + 1]) < 0.005


def test_quirks_happen_as_often_as_they_should_and_when_they_say(clips: list[render.Clip]) -> None:
    when = np.array([clip.abnormal_time for clip in clips])
    assert 0.08 < (when >= 0).mean() < 0.22 and set(when[when < 0]) == {-1.0}
    kinds = set()
    for seed in range(300):
        staged = actions.play(np.random.default_rng(seed), "slide", RADII)
        kinds.add(staged.quirk)
        steps = np.linalg.norm(np.diff(staged.pose_at(FRAME_TIMES).centers[0], axis=0), axis=-1)
        jumps = np.flatnonzero(steps > 4)
        assert bool(len(jumps)) == (staged.quirk == "teleport")
        assert all(FRAME_TIMES[t] < staged.quirk_time <= FRAME_TIMES[t + 1] for t in jumps)
        assert bool((steps < 1e-6).any()) == (staged.quirk == "freeze")
    assert kinds == {None, *actions.QUIRKS}


# the truth is true of what is seen and heard


def _inside(track: np.ndarray, t: int) -> np.ndarray:
    # bool [64, 64]: the box at frame t and a pixel around it, which soft edges and the codec's grid
    # may need
    low, high = (
        (track[t, :2] - track[t, 2:] / 2) * SIZE - 1,
        (track[t, :2] + track[t, 2:] / 2) * SIZE + 1,
    )
    at = np.arange(SIZE) + 0.5
    rows, cols = ((at > a) & (at < b) for a, b in zip(low, high, strict=True))
    return rows[:, None] & cols


def test_frames_change_inside_the_tracks(clips: list[render.Clip]) -> None:
    tried = 0
    for clip in clips[:120]:
        steps = np.linalg.norm(np.diff(clip.tracks[0, :, :2] * SIZE, axis=0), axis=-1)
        t = int(steps.argmax())
        if steps[t] < 3:
            continue  # too slow to tell from the shaking of the camera
        change = np.abs(np.diff(clip.frames[t : t + 2].astype(float).mean(-1), axis=0))[0]
        actor = _inside(clip.tracks[0], t) | _inside(clip.tracks[0], t + 1)
        bodies = np.any([_inside(track, u) for track in clip.tracks for u in (t, t + 1)], axis=0)
        assert change[actor].mean() > 4 * change[~bodies].mean(), clip.name
        tried += 1
    assert tried > 40


def test_boxes_are_tight() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        look, centre = render.draw_appearance(rng, 9.0), rng.uniform(28, 36, (1, 2))
        canvas = np.full((1, SIZE, SIZE, 3), -1.0, np.float32)  # no object has a negative colour
        render.paint(canvas, look, centre, np.ones(1), np.ones(1))
        rows, cols = np.nonzero(canvas[0].max(-1) > -0.5)
        row, col, high, wide = render.boxes(look, centre, np.ones(1), np.ones(1))[0]
        found = [rows.min(), rows.max() + 1, cols.min(), cols.max() + 1]
        np.testing.assert_allclose(
            found, [row - high / 2, row + high / 2, col - wide / 2, col + wide / 2], atol=1.3
        )


def test_contacts_are_heard_when_they_happen(clips: list[render.Clip]) -> None:
    for clip in [clip for clip in clips if len(clip.contacts)][:24]:
        power = np.square(_decode(sound.encode(clip.frames, clip.audio))[1])
        near = np.zeros(len(power), bool)
        for contact in clip.contacts[clip.contacts < 1.95]:
            start = int(contact * sound.RATE)
            near[start : start + sound.RATE // 5] = True
            # 20, 40 ms
            struck, before = (
                power[start : start + 320].mean(),
                power[max(start - 960, 0) : start - 320],
            )
            assert contact < 0.06 or struck > 10 * before.mean(), (clip.name, contact)
        # a contact at the very end rings beyond the clip
        last = int(clip.contacts[-1] * sound.RATE) - 320
        assert power[near].mean() > 10 * power[~near][:last].mean(), clip.name


def test_codecs_keep_the_clip(clips: list[render.Clip]) -> None:
    frames, audio = _decode(sound.encode(clips[0].frames, clips[0].audio))
    assert frames.shape == clips[0].frames.shape == (24, SIZE, SIZE, 3)
    assert np.abs(frames.astype(float) - clips[0].frames).mean() < 8
    assert abs(len(audio) - len(clips[0].audio)) <= 1024  # AAC packs 1024 samples


# pure in seed, split and index


def test_clips_are_pure_in_seed_split_and_index() -> None:
    config, other = builder.ToyboxConfig(), builder.ToyboxConfig(seed=1)
    one, again = (builder.make_example(config, "train", 5) for _ in range(2))
    assert one["video"] == again["video"] and one["name"] == "train/00005"
    assert all(np.array_equal(one[key], again[key]) for key in one)
    others = [
        builder.make_example(*key)["video"]
        for key in [(config, "train", 17), (config, "val", 5), (other, "train", 5)]
    ]
    assert len({one["video"], *others}) == 4


def test_apart_hides_who_acts_in_the_first_half_and_what_sounds_in_the_second() -> None:
    config = builder.ToyboxConfig(train=96, apart=True)
    for index, mute in ((1, False), (59, True)):  # bounces, splits: both with contacts
        video = builder.make_example(config, "train", index)["video"]
        without = render.render(0, 0, index, omit="sight" if index < 48 else "sound")
        whole = render.render(0, 0, index)
        frames, audio = _decode(video)
        assert np.abs(frames.astype(float) - without.frames).mean() < 8
        loudness = np.array([part.std() for part in np.split(audio[:32000], 20)])
        row, col, high, wide = whole.tracks[0, 0] * SIZE  # the actor in the first frame
        box = tuple(
            slice(max(int(at - size / 2), 0), int(at + size / 2) + 1)
            for at, size in ((row, high), (col, wide))
        )
        gone = np.abs(without.frames[0].astype(float) - whole.frames[0])
        assert (gone[box].max() > 30) != mute
        assert (loudness[1:-1].max() < 1.5 * loudness[1:-1].min()) == mute


def test_captions_say_what_happens(clips: list[render.Clip]) -> None:
    for clip in clips:
        assert any(verb in clip.caption for verb in render.VERBS[ACTIONS[clip.label]])
        assert (
            sum(
                shape in clip.caption.split()
                for shape in [s + e for s in render.SHAPES for e in ("", ":")]
            )
            == 1
        )


# the files


def test_builder_reads_back_without_tensorflow(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = builder.prepare("tiny", tmp_path)
    source = data.as_data_source(split="train")
    examples = [source[i] for i in range(len(source))]
    assert collections.Counter(x["label"] for x in examples) == dict.fromkeys(range(12), 4)
    assert [x["name"].decode() for x in examples] == [f"train/{i:05d}" for i in range(48)]
    wanted = builder.make_example(builder.ToyboxConfig("tiny", 48, 24, 24), "train", 7)
    assert (
        examples[7]["video"] == wanted["video"]
        and examples[7]["caption"].decode() == wanted["caption"]
    )
    for key in ("tracks", "contacts", "moment", "abnormal", "abnormal_time", "label"):
        np.testing.assert_allclose(examples[7][key], wanted[key], rtol=1e-6)
    assert len(data.as_data_source(split="val")) == len(data.as_data_source(split="test")) == 24
    monkeypatch.setattr(builder, "make_example", lambda *key: pytest.fail("rendered again"))
    assert builder.prepare("tiny", tmp_path).data_path == data.data_path
    assert "tensorflow" not in sys.modules


def test_another_content_under_the_same_name_is_refused(tmp_path: pathlib.Path) -> None:
    config = builder.ToyboxConfig(name="mine", **SMALL)
    builder.prepare(config, tmp_path)
    with pytest.raises(ValueError, match="another name"):
        builder.prepare(dataclasses.replace(config, seed=1), tmp_path)
    assert dataclasses.replace(config, name="", seed=1).name == "train12-val0-test12-seed1"


def test_two_processes_prepare_at_once_after_a_third_was_killed(tmp_path: pathlib.Path) -> None:
    home = tmp_path / "toybox" / "train12-val0-test12-seed0"
    left = home / "incomplete.AAAAAA_1.0.1"  # as TFDS names it
    left.mkdir(parents=True)
    code = (
        "from particlejax.data.sources.toybox.builder import *; "
        f"prepare(ToyboxConfig(**{SMALL}), {os.fspath(tmp_path)!r})"
    )
    both = [spawn([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=DEADLINE)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sorted(os.listdir(home)) == [".lock", "1.0.1"]
    assert (
        len(builder.prepare(builder.ToyboxConfig(**SMALL), tmp_path).as_data_source(split="test"))
        == 12
    )
