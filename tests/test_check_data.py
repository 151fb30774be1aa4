# SPDX-License-Identifier: Apache-2.0
"""A check finds clips that are the same, overlap, look alike or do not fit, and no others."""

import csv
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
from PIL import Image

from particlejax import main as entry
from particlejax.config.data import DataSpec
from particlejax.data import duplicates, fingerprint, inspect, inspect_source, sources
from particlejax.data.duplicates import SplitClip
from particlejax.data.fingerprint import Fingerprint

FPS, ROWS, COLUMNS = 10, 96, 128


def scene(
    seed: int, num_frames: int, levels: tuple[int, int] = (20, 235), speed: float = 1.0
) -> np.ndarray:
    """A camera pans over a random picture, uint8 [T, H, W, 3], of gray levels in a range."""
    rng = np.random.default_rng(seed)
    grid = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    picture = np.asarray(grid.resize((4 * COLUMNS, 4 * ROWS), Image.Resampling.BICUBIC))
    (low, high), steps = levels, speed * np.arange(num_frames)[:, None] * rng.uniform(1, 5, 2)
    frames = [picture[y : y + ROWS, x : x + COLUMNS] for y, x in steps.astype(int)]
    return (low + (high - low) / 255 * np.stack(frames)).astype(np.uint8)


def ball(seed: int, num_frames: int) -> np.ndarray:
    """A ball on a random path, before the picture that every such clip has."""
    frames = np.repeat(scene(0, 1), num_frames, axis=0)
    for frame, place in zip(
        frames, np.random.default_rng(seed).random((num_frames, 2)), strict=True
    ):
        y, x = (place * (ROWS - 30, COLUMNS - 30)).astype(int)
        frame[y : y + 30, x : x + 30] = 255
    return frames


def recolored(frames: np.ndarray) -> np.ndarray:
    """The same brightness in the opposite colors."""
    brightness = frames @ np.array([0.299, 0.587, 0.114])
    return np.clip(2 * brightness[..., None] - frames, 0, 255).astype(np.uint8)


def encode(
    path: Path,
    frames: np.ndarray,
    scale: int = 1,
    crf: int = 18,
    times: Sequence[int] | None = None,
    sound: int = 0,
    **options: str,
) -> None:
    """Writes H.264. times: in ticks of a tenth of a second. sound: its sample rate, 0 for none."""
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream("libx264", rate=FPS)
        video.height, video.width, video.pix_fmt = ROWS // scale, COLUMNS // scale, "yuv420p"
        video.options = {"crf": str(crf), "preset": "ultrafast"}
        video.codec_context.time_base = Fraction(1, FPS)
        audio = container.add_stream("mp2", rate=sound) if sound else None
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i if times is None else times[i], Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio:
            tone = np.zeros((1, 2 * sound * len(frames) // FPS), np.int16)
            frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="stereo")
            frame.rate = sound
            container.mux([*audio.encode(frame), *audio.encode(None)])


def remux(source: Path, path: Path) -> None:
    """Copies the packets into another container."""
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(read.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)


class Row(NamedTuple):
    """A line of clips.csv."""

    path: str
    split: str
    label: str = "walk"
    start: str = ""
    end: str = ""
    group: str = ""


TABLE = (
    Row("a.mp4", "train"),
    Row("a.mkv", "val"),
    Row("a_half.mp4", "test"),
    Row("a_mirrored.mp4", "test"),
    Row("a_colored.mp4", "test"),
    Row("b.mp4", "train"),
    Row("b_copy.mp4", "val", "run"),
    Row("c.mp4", "train", "jump"),
    Row("c_copy.mp4", "train", "jump"),
    Row("film.mp4", "train", "walk", "0", "1"),
    Row("film.mp4", "val", "run", "0.4", "1.4"),
    Row("film.mp4", "test", "run", "1.4", "2"),
    Row("film_half.mkv", "test", "walk", "1.1", "99"),
    Row("black.mp4", "train"),
    Row("black.mkv", "val"),
    Row("black_longer.mp4", "val"),
    Row("gray.mp4", "test"),
    Row("dark.mp4", "train"),
    Row("dark_half.mp4", "val"),
    Row("dark_other.mp4", "val"),
    Row("still.mp4", "train"),
    Row("still_half.mp4", "train", "run"),
    Row("still_other.mp4", "test"),
    Row("ball.mp4", "train"),
    Row("ball_other.mp4", "val"),
    Row("g1.mp4", "train", group="one person"),
    Row("g2.mp4", "val", group="one person"),
    Row("uneven.mp4", "train", ""),
    Row("cut.mp4", "train", ""),
    Row("change.ts", "train", ""),
    Row("broken.mp4", "val"),
    Row("missing.mp4", "val"),
)
PAIRS = {  # one, other, contradictory labels: kind
    ("train: b.mp4", "val: b_copy.mp4", True): "same file",
    ("train: a.mp4", "val: a.mkv", False): "same frames",
    ("train: a.mp4", "test: a_half.mp4", False): "look alike",
    ("val: a.mkv", "test: a_half.mp4", False): "look alike",
    ("train: film.mp4@0-1", "val: film.mp4@0.4-1.4", True): "overlap",
    ("train: film.mp4@0-1", "test: film.mp4@1.4-2", False): "same film",
    ("val: film.mp4@0.4-1.4", "test: film.mp4@1.4-2", False): "same film",
    ("val: film.mp4@0.4-1.4", "test: film_half.mkv", False): "look alike",
    ("test: film.mp4@1.4-2", "test: film_half.mkv", True): "look alike",
    ("train: black.mp4", "val: black.mkv", False): "same frames",
    ("train: dark.mp4", "val: dark_half.mp4", False): "look alike",
    ("train: g1.mp4", "val: g2.mp4", False): "same group",
    ("train: c.mp4", "train: c_copy.mp4", False): "same file",
    ("train: still.mp4", "train: still_half.mp4", True): "look alike",
}
PROBLEMS = {  # of a clip: kinds
    "black.mp4": {"no content"},
    "black.mkv": {"no content"},
    "black_longer.mp4": {"no content"},
    "gray.mp4": {"no content"},
    "film_half.mkv": {"span"},
    "uneven.mp4": {"rate", "gap"},
    "cut.mp4": {"duration"},
    "change.ts": {"size", "sound"},
    "broken.mp4": {"unreadable"},
    "missing.mp4": {"unreadable"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One clip in several containers and sizes, segments of films, dark, still and black clips,
    groups, and files that do not fit.
    """
    folder = tmp_path_factory.mktemp("twins")
    for seed, name in enumerate(("a", "b", "c", "film", "g1", "g2", "cut"), 1):
        faststart = {"movflags": "faststart"} if name == "cut" else {}
        encode(folder / f"{name}.mp4", scene(seed, 20), **faststart)
    encode(folder / "a_half.mp4", scene(1, 20), scale=2, crf=30)
    encode(folder / "a_mirrored.mp4", scene(1, 20)[:, :, ::-1])
    encode(folder / "a_colored.mp4", recolored(scene(1, 20)))
    encode(folder / "film_half.mkv", scene(4, 20), scale=2, crf=30)
    dark, half_dark = scene(8, 14, (16, 24)), scene(8, 14, (16, 24))
    encode(folder / "dark.mp4", dark)
    encode(folder / "dark_half.mp4", half_dark, scale=2)
    encode(folder / "dark_other.mp4", scene(9, 14, (16, 24)))
    for name, seed in (("still", 10), ("still_other", 11)):
        encode(folder / f"{name}.mp4", scene(seed, 13, speed=0))
    encode(folder / "still_half.mp4", scene(10, 13, speed=0), scale=2)
    for name, length in (("black", 10), ("black_longer", 11)):
        encode(folder / f"{name}.mp4", np.zeros((length, ROWS, COLUMNS, 3), np.uint8))
    encode(folder / "gray.mp4", np.full((10, ROWS, COLUMNS, 3), 128, np.uint8))
    encode(folder / "ball.mp4", ball(1, 12))
    encode(folder / "ball_other.mp4", ball(2, 12))
    encode(folder / "uneven.mp4", scene(12, 9), times=(0, 1, 2, 5, 6, 9, 10, 30, 31))
    for name in ("b", "c"):
        shutil.copy(folder / f"{name}.mp4", folder / f"{name}_copy.mp4")
    for name in ("a", "black"):
        remux(folder / f"{name}.mp4", folder / f"{name}.mkv")
    cut = folder / "cut.mp4"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    parts = [folder / "1.ts", folder / "2.ts"]
    encode(parts[0], scene(13, 10), sound=44100)
    encode(parts[1], scene(14, 10), scale=2, sound=48000)
    (folder / "change.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    (folder / "broken.mp4").write_text("not a film")
    with open(folder / "clips.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Row._fields, *TABLE])
    return folder


def check(source: Path, workdir: Path, *more: str) -> dict[str, Any]:
    """Runs the job; returns results.json."""
    command = ["--config=experiments/check_data.py", f"--config.data.source=folder:{source}"]
    assert entry.main(["main", *command, f"--workdir={workdir}", *more]) == 0
    return json.loads((workdir / "results.json").read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[Mapping[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_check_names_pairs_and_what_does_not_fit(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    settings = ("--config.data.num_frames=11", "--config.data.clip_seconds=1.9")
    results = check(folder, tmp_path, *settings)
    lines = capfd.readouterr().err.splitlines()
    pairs = rows_of(tmp_path / "pairs.csv")
    found = {
        frozenset(f"{row[f'{side}split']}: {row[f'{side}path']}" for side in ("", "other_")): (
            row["kind"],
            row["contradictory_labels"] == "yes",
        )
        for row in pairs
    }
    assert found == {frozenset(key[:2]): (kind, key[2]) for key, kind in PAIRS.items()}
    assert len(pairs) == len(PAIRS) and all(row["remedy"] for row in pairs)
    # over splits before within one, contradictory labels first
    order = [(row["place"], row["contradictory_labels"]) for row in pairs]
    assert order == sorted(order, key=lambda key: (key[0] != "across splits", key[1] != "yes"))
    kinds: dict[str, set[str]] = {}
    for row in rows_of(tmp_path / "problems.csv"):
        kinds.setdefault(row["path"], set()).add(row["kind"])
    kinds["change.ts"] -= {"clock", "rate"}  # its clock restarts
    assert kinds == PROBLEMS
    counts = results["check"]["pairs"]
    assert counts["across_splits"]["contradictory labels"] == 2
    assert counts["within_one_split"]["same file"] == 1
    assert results["check"]["train"]["no_content"] == 1
    assert [bad["path"] for bad in results["unreadable"]] == ["broken.mp4", "missing.mp4"]
    train, val = results["check"]["train"], results["check"]["val"]
    assert val["missing"] == ["jump"] and train["missing"] == []
    assert val["few_clips"] == {"run": 2, "walk": 7}
    assert train["few_clips"] == {}, "nothing is measured on it"
    few_frames, short = results["check"]["notes"]
    assert few_frames.startswith("9 of 30 clips have fewer than config.data.num_frames=11 frames")
    assert re.match(r"config.data.clip_seconds=1.9 is longer than most clips \(1\d of 30, ", short)
    assert lines[-1].startswith("check failed: pairs across splits: 11, ")
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    first = "| same file, contradictory labels | train: b.mp4 (walk) | val: b_copy.mp4 (run) |"
    assert first in report and "| run | 2 | 1 of 2: 9% to 91% |" in report


def test_a_check_is_run_again_in_its_folder_also_for_other_data(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    for split, names in {"train": ("b", "g1"), "val": ("b_copy", "broken")}.items():
        (data / split / "walk").mkdir(parents=True)
        for name in names:
            shutil.copy(folder / f"{name}.mp4", data / split / "walk")
    workdir = tmp_path / "run"
    assert len(check(data, workdir)["unreadable"]) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("check failed")
    shutil.rmtree(data / "val")
    (data / "train" / "walk").rename(data / "train" / "run")
    (data / "train").rename(tmp_path / "other")
    results = check(tmp_path / "other", workdir)
    assert results["unreadable"] == [] and set(results["check"]["train"]["labels"]) == {"run"}
    assert "b_copy" not in (workdir / "pairs.csv").read_text()
    assert capfd.readouterr().err.splitlines()[-1].startswith("check passed")
    # a folder with something trained is not a check's to replace
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({"format": config["format"], "job": "train"}))
    assert entry.main(["main", "--config=experiments/check_data.py:tiny", f"--workdir={workdir}"])
    assert "holds a run with other settings" in capfd.readouterr().err


class Deadly(str):
    """The path of a file that ends the process that reads it, as some damaged files do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def test_a_file_that_ends_its_process_is_named(folder: Path) -> None:
    records = [sources.Record(name, str(folder / f"{name}.mp4")) for name in ("a", "b", "c")]
    records[1] = sources.Record("b", Deadly(records[1].video))
    source = sources.ListSource((), tuple(records))
    first, deadly, last = inspect_source.inspect_clips(source, DataSpec(num_workers=1))
    assert deadly == ("b", "its decoder ended the process")
    assert first.name == "a" and last.name == "c"


def clip(seed: int, split: str, still: bool = False, **known: Any) -> SplitClip:
    """A clip that was never decoded; equal seeds give equal content."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(-100, 100, (1 if still else 8, 16, 16)).repeat(8 if still else 1, 0)
    print_ = Fingerprint(frames.astype(np.int8), 1.0, np.zeros((2, 8, 8), np.int8))
    file = inspect.FileInfo(f"{seed}", 10.0, print_, ())
    info = inspect.ClipInfo(
        f"{seed}", 0, "", 64, 64, 0.0, 10.0, 10.0, 100, False, False, b"%d" % seed, print_, file
    )
    label = known.pop("label", "a")
    return SplitClip(split, dataclasses.replace(info, **known), label)


def test_many_clips_that_are_all_the_same_cost_no_square() -> None:
    count = 400
    copies = [clip(0, "train") for _ in range(count)] + [clip(0, "val", label="b")]
    segments = [
        clip(1, "train", start=i / count, seconds=9.0, digest=b"s%d" % i) for i in range(count)
    ]
    segments.append(clip(1, "val", start=9.5, seconds=0.4, digest=b"s"))
    still = [clip(2, "train", still=True, digest=b"p%d" % i) for i in range(count)]
    pairs = duplicates.find_pairs([*copies, *segments, *still])
    assert len(pairs) < 3 * count * 2 * duplicates.MAX_LISTED
    assert {found for pair in pairs for found in pair[1:3]} == {*copies, *segments, *still}
    # the one in the other split is never lost among the others
    across = [pair for pair in pairs if pair.is_across]
    assert pairs[: len(across)] == across and across[0].is_contradictory
    assert {pair[1:3] for pair in across if pair.kind == "same file"} == {
        (copy, copies[-1]) for copy in copies[:-1]
    }
    assert {pair.other for pair in across if pair.kind == "overlap"} == {segments[-1]}


@pytest.mark.parametrize("one_scene", [False, True])
def test_like_clips_are_found_among_many(one_scene: bool) -> None:
    rng = np.random.default_rng(0)
    count, num_twins = 1500, 20
    picture = rng.normal(0, 30, (1 if one_scene else count, 1, 16, 16))
    frames = picture + rng.normal(0, 6, (count, 8, 16, 16))
    twins = frames[:num_twins] + rng.normal(0, 0.7, (num_twins, 8, 16, 16))
    gray = np.zeros((8, 2 * 8 * 8))
    prints = [
        fingerprint.fingerprint(np.concatenate([clip.reshape(8, -1), gray], axis=1))
        for clip in np.concatenate([frames, twins])
    ]
    found = fingerprint.like_pairs(prints, np.ones(len(prints)))
    assert found.tolist() == [[i, count + i] for i in range(num_twins)]
