# SPDX-License-Identifier: Apache-2.0
"""Prepared data sets hold what their source holds, whatever interrupts them; mixtures keep weights;
checks find faults.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from particlejax import main as entry
from particlejax.config.experiment import DataSpec, ParticleSpec
from particlejax.core.typing import UserError
from particlejax.data import inspect, inspect_source, pipeline, sources, tfds_export
from particlejax.data.fingerprint import fingerprint, small_frame
from particlejax.data.sources.toybox import builder
from particlejax.data.video import timeout
from particlejax.data.video.decode import Video

LINES = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> Path:
    """Ten toybox clips with everything that clips.csv can say, one of them damaged."""
    folder = tmp_path_factory.mktemp("folder")
    examples = builder.prepare("tiny", Path(cache_dir) / "tfds").as_data_source(split="train")
    lines = ["path,split,label,caption,start,end,group"]
    for i in range(LINES):
        (folder / f"{i}.mp4").write_bytes(examples[i]["video"])
        split, when = ("train", ",") if i < 7 else ("val", "0.3,1.3")
        lines.append(f"{i}.mp4,{split},{'ab'[i % 2]},clip {i},{when},g{i // 2}")
    (folder / "3.mp4").write_bytes(b"not a video")
    (folder / "1.csv").write_text("time,x\n0,1\n")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder


def command(folder: Path, out: Path, workdir: Path, *more: str) -> int:
    return entry.main(
        [
            "main",
            "--config=experiments/prepare_data.py",
            f"--config.data.source=folder:{folder}",
            f"--config.prepare.data_dir={out}",
            "--config.prepare.clips_per_shard=3",
            "--config.prepare.num_workers=1",
            f"--workdir={workdir}",
            *more,
        ]
    )


def planned(folder: Path, out: Path) -> tfds_export.ExportPlan:
    return tfds_export.make_plan(f"folder:{folder}", str(out), "mine", "unused", 3, 60.0)


def as_bytes(record: sources.Record) -> sources.Record:
    read = {
        key: Path(value).read_bytes()
        if isinstance(value := getattr(record, key), str) and value
        else value or b""
        for key in ("video", "series")
    }
    return dataclasses.replace(record, **read)


def test_a_prepared_folder_is_the_folder_also_when_it_was_interrupted(
    folder: Path, tmp_path: Path
) -> None:
    plan = planned(folder, tmp_path)
    assert len(plan.shards) == 4
    first = plan.shards[0]
    tfds_export.write_shard(first)
    # what a kill leaves
    (plan.folder / "mine-train.array_record-00001-of-00003.99.tmp").write_bytes(b"half a shard")
    written = os.stat(first.path).st_mtime_ns
    with pytest.raises(UserError, match="no dataset_info.json"):
        sources.open_source(f"tfds:{plan.folder}", "train", "unused")  # nobody takes it for whole
    assert command(folder, tmp_path, tmp_path / "run") == 0
    assert os.stat(first.path).st_mtime_ns == written, "what was written is left alone"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["prepare_data"]["num_clips"] == {"train": 6, "val": 3}
    assert [bad["path"] for bad in results["unreadable"]] == ["train: 3.mp4"]
    for split in ("train", "val"):
        made = sources.open_source(f"tfds:{tmp_path}/mine", split, "unused")
        plain = sources.open_source(f"folder:{folder}", split, "unused")
        assert made.classes == plain.classes == ("a", "b")
        wanted = [as_bytes(plain[i]) for i in range(len(plain)) if plain[i].name != "3.mp4"]
        assert [made[i] for i in range(len(made))] == wanted
    for shard, other in zip(plan.shards, planned(folder, tmp_path / "again").shards, strict=True):
        tfds_export.write_shard(other)
        assert Path(other.path).read_bytes() == Path(shard.path).read_bytes(), (
            "whichever process wrote it"
        )


def test_what_holds_no_clip_is_left_out_with_a_sentence(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    for i in (0, 1, 2, 3, 7, 8, 9):  # a whole shard of train, and all of val
        (copy / f"{i}.mp4").write_text("not a film")
    assert command(copy, tmp_path, tmp_path / "run") == 0
    assert "split val has no readable clips: skipped." in capfd.readouterr().err
    made = sources.open_source(f"tfds:{tmp_path}/mine", "train", "unused")
    assert [made[i].name for i in range(len(made))] == ["4.mp4", "5.mp4", "6.mp4"]
    assert sources.splits(f"tfds:{tmp_path}/mine/1.0.0", "unused") == ("train",)
    for i in (4, 5, 6):
        (copy / f"{i}.mp4").write_text("not a film")
    assert command(copy, tmp_path / "none", tmp_path / "run2") == 2
    assert "no clip of folder:" in (said := capfd.readouterr().err) and "Traceback" not in said


def test_another_source_in_the_same_place_is_refused(folder: Path, tmp_path: Path) -> None:
    planned(folder, tmp_path)
    with pytest.raises(UserError, match="belongs to another source"):
        tfds_export.make_plan("toybox:tiny", str(tmp_path), "mine", str(tmp_path), 3, 60.0)


def test_a_full_disk_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(folder, tmp_path)
    tfds_export.write_shard(plan.shards[0])
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 9, 0, 0, 9, 9, 9, 0, 255))
        )
        with pytest.raises(UserError, match="the disk is full.: free disk space"):
            tfds_export.write_shard(plan.shards[1])
    assert planned(folder, tmp_path).remaining == plan.shards[1:]
    for shard in plan.remaining:
        tfds_export.write_shard(shard)
    assert tfds_export.finish(plan)["num_clips"] == {"train": 6, "val": 3}


@contextmanager
def no_room() -> Iterator[None]:
    """Files of this process cannot grow: what is opened for writing stays empty, as on a full
    disk.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_plan_and_description_are_whole_or_absent(folder: Path, tmp_path: Path) -> None:
    with (
        no_room(),
        pytest.raises(UserError, match="mine/1.0.0 cannot be written .*: free disk space"),
    ):
        planned(folder, tmp_path)
    plan = planned(folder, tmp_path)
    for shard in plan.shards:
        tfds_export.write_shard(shard)
    with (
        no_room(),
        pytest.raises(UserError, match="mine/1.0.0 cannot be written .*: free disk space"),
    ):
        tfds_export.finish(plan)
    with pytest.raises(UserError, match="no dataset_info.json"):
        sources.open_source(f"tfds:{plan.folder}", "train", "unused")
    assert tfds_export.finish(planned(folder, tmp_path))["num_clips"] == {"train": 6, "val": 3}


def test_a_worker_of_prepare_that_is_killed_ends_in_a_sentence(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    first = planned(folder, tmp_path).shards[0]
    tfds_export.write_shard(first)
    written = os.stat(first.path).st_mtime_ns

    def kill() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.01)
        for child in multiprocessing.active_children():
            child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    assert command(folder, tmp_path, tmp_path / "run") == 2
    killer.join()
    said = capfd.readouterr().err
    assert (
        "a worker process was killed" in said
        and "run the same command again" in said
        and "Traceback" not in said
    )
    assert (
        command(folder, tmp_path, tmp_path / "run") == 0
        and os.stat(first.path).st_mtime_ns == written
    )


@pytest.fixture
def hanging(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Three clips, the second of which keeps its decoder busy for ever."""
    data, never, plain = tmp_path / "data", threading.Event(), Video.__init__
    data.mkdir()
    for name in ("a.mp4", "hangs.mp4", "z.mp4"):
        shutil.copy(folder / "0.mp4", data / name)
    (data / "clips.csv").write_text("path,split\na.mp4,train\nhangs.mp4,train\nz.mp4,train\n")

    def opened(self: Video, source: str | bytes) -> None:
        if source == str(data / "hangs.mp4"):
            never.wait()
        plain(self, source)

    monkeypatch.setattr(Video, "__init__", opened)
    yield data
    never.set()


def test_prepare_leaves_a_hanging_decoder_behind(hanging: Path, tmp_path: Path) -> None:
    shard = tfds_export.make_plan(
        f"folder:{hanging}", str(tmp_path), "mine", "unused", 3, 0.5
    ).shards[0]
    note = tfds_export.write_shard(shard)
    assert note["clips"] == 2 and note["bad"] == {"hangs.mp4": "not decoded after 0.5 s"}


def test_check_data_leaves_a_hanging_decoder_behind(hanging: Path, tmp_path: Path) -> None:
    assert (
        entry.main(
            [
                "main",
                "--config=experiments/check_data.py",
                f"--config.data.source=folder:{hanging}",
                "--config.data.decode_timeout_seconds=0.5",
                f"--workdir={tmp_path / 'run'}",
            ]
        )
        == 0
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["unreadable"] == [{"path": "hangs.mp4", "reason": "not decoded after 0.5 s"}]
    assert results["check"]["train"]["num_clips"] == 2


def test_beam_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    try:
        import apache_beam  # noqa: F401
    except ImportError:
        assert command(folder, tmp_path, tmp_path / "run", "--config.prepare.beam=True") == 2
        return
    assert command(folder, tmp_path / "beam", tmp_path / "run", "--config.prepare.beam=True") == 0
    assert command(folder, tmp_path / "pool", tmp_path / "run2") == 0
    files = sorted(p.name for p in (tmp_path / "pool" / "mine" / "1.0.0").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "beam" / "mine" / "1.0.0").iterdir())
    for name in files:
        if "array_record" in name:
            assert (tmp_path / "pool/mine/1.0.0" / name).read_bytes() == (
                tmp_path / "beam/mine/1.0.0" / name
            ).read_bytes()


def test_a_mixture_draws_by_weight_and_each_part_once_an_epoch(
    folder: Path, cache_dir: str
) -> None:
    mixed = sources.open_source(f"mix:1*folder:{folder},3*toybox:tiny", "train", cache_dir)
    assert len(mixed) == 7 + 48 and mixed.classes == tuple(sorted({"a", "b", *builder.ACTIONS}))
    assert mixed.classes[mixed[0].label] == "a" and mixed.classes[mixed[7].label] in builder.ACTIONS
    order = pipeline.TrainBatches(mixed, DataSpec(), ParticleSpec(), seed=0, num_rows=1).order
    drawn = [int(order[i]) for i in range(7 * 4 * 8)]
    mine = [i for i in drawn if i < 7]
    assert len(mine) == len(drawn) / 4
    assert all(sorted(mine[e : e + 7]) == list(range(7)) for e in range(0, len(mine), 7))
    theirs = [i for i in drawn if i >= 7][: 48 * 3]
    assert set(Counter(theirs).values()) == {3}
    for text in ("mix:0*toybox", "mix:x*toybox", "mix:1*"):
        with pytest.raises(UserError, match="WEIGHT.SOURCE"):
            sources.open_source(text, "train", cache_dir)


def test_a_check_finds_damage_and_what_stands_on_both_sides(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    shutil.copy(copy / "0.mp4", copy / "9.mp4")  # a train clip as a val clip, cut otherwise
    table = (
        (copy / "clips.csv")
        .read_text()
        .replace("9.mp4,val,b,clip 9,0.3,1.3", "9.mp4,val,b,clip 9,,")
    )
    (copy / "clips.csv").write_text(table + "none.mp4,val,a,,,,\n")
    assert (
        entry.main(
            [
                "main",
                "--config=experiments/check_data.py",
                f"--config.data.source=folder:{copy}",
                f"--workdir={tmp_path / 'run'}",
            ]
        )
        == 0
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {bad["path"]: bad["reason"] for bad in results["unreadable"]} == {
        "3.mp4": "not a media file",
        "none.mp4": "missing",
    }
    assert results["check"]["near_duplicates"] == [["train: 0.mp4", "val: 9.mp4"]]
    train = results["check"]["train"]
    assert (
        train["num_clips"] == 6
        and train["labels"] == {"a": 4, "b": 2}
        and train["audio"] == 6
        and train["sizes"] == {"64x64": 6}
    )
    assert np.isclose(train["seconds"]["median"], 2.0, atol=0.1) and np.isclose(
        results["check"]["val"]["seconds"]["least"], 1.0
    )
    report = (tmp_path / "run" / "report.md").read_text()
    assert (
        "Across splits: 2 (1 same file, 1 same group" in report
        and (tmp_path / "run" / "report" / "classes.png").exists()
    )


def slow_film(path: Path) -> str:
    """Ten minutes in forty frames of one number each, which stand for 1 to 30 seconds."""
    gaps = np.random.default_rng(0).choice([1, 5, 30], 40)
    ticks = (100 * np.cumsum(gaps) * 600 / gaps.sum()).astype(int)
    rng = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for at in ticks:
            picture = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(at), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def test_clips_of_one_file_are_looked_at_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = slow_film(tmp_path / "a.mp4")
    spans = ((0.0, None), (300.0, 420.0), (10.0, 200.0), (999.0, None))
    clips = [sources.Record(f"{start}", file, 0, start=start, end=end) for start, end in spans]
    monkeypatch.setattr(Video, "read_all", lambda *more: pytest.fail("it holds the whole film"))
    decoded, plain = [], Video.iter_frames
    monkeypatch.setattr(
        Video, "iter_frames", lambda self, side: decoded.append(1) or plain(self, side)
    )
    *seen, late = inspect.inspect_file(clips)
    assert inspect.inspect_file(clips[3:]) == [late] and len(decoded) == 2
    assert late[0] == "999.0" and late[1].startswith("starts at 999 s but lasts ")
    with Video(file) as video:
        small, times = zip(*((small_frame(f), time) for f, time in plain(video, 64)), strict=True)
        small, times, length = np.stack(small), np.array(times), video.duration
    for found, (start, end) in zip(seen, spans, strict=False):
        end = end or length
        moments = np.linspace(start, end, 9)
        means = []
        for first, last in itertools.pairwise(moments):
            inside = (times >= first) & (times < last)
            # where no frame starts, the one before is shown
            means.append(
                small[inside].mean(0) if inside.any() else small[(times <= first).nonzero()[0][-1]]
            )
        wanted = fingerprint(np.stack(means))
        assert found.fingerprint.gain == pytest.approx(wanted.gain, rel=1e-5)
        assert np.abs(found.fingerprint.frames - wanted.frames.astype(int)).max() <= 1
        assert (
            found.seconds == pytest.approx(end - start)
            and found.frames == ((times >= start) & (times < end)).sum()
        )
    assert len({found.digest for found in seen}) == 3 and len({f.file for f in seen}) == 1


def test_a_long_film_has_the_time_of_a_clip_for_each_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = sources.Record("a", slow_film(tmp_path / "a.mp4"))
    limits, plain = [], timeout.run_with_timeout
    monkeypatch.setattr(
        timeout,
        "run_with_timeout",
        lambda limit, *more: limits.append(limit) or plain(limit, *more),
    )
    assert isinstance(inspect_source._inspect_clips_of_file([clip], 60.0)[0], inspect.ClipInfo)
    assert limits == [60.0, pytest.approx(600, rel=0.1)]


def test_a_source_of_which_nothing_can_be_read_ends_in_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "data" / name).write_text("not a film")
    assert (
        entry.main(
            [
                "main",
                "--config=experiments/check_data.py",
                f"--config.data.source=folder:{tmp_path}/data",
                f"--workdir={tmp_path / 'run'}",
            ]
        )
        == 2
    )
    said = capfd.readouterr().err
    assert (
        "none of the 2 clips of folder:" in said
        and "(not a media file, ...)" in said
        and "Traceback" not in said
    )
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["unreadable"]) == 2
    assert "## 2 unreadable clips" in (tmp_path / "run" / "report.md").read_text()
