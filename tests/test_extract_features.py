# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen network as particles: where they stand, what they say, that training on them
needs no video.
"""

import dataclasses
import gc
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from particlejax import main as entry
from particlejax.config.experiment import AugmentSpec, DataSpec, FeatureSpec, ParticleSpec
from particlejax.config.job_specs import ExtractFeaturesSpec
from particlejax.core.typing import UserError
from particlejax.data import clips, pipeline, sources
from particlejax.data.modalities import feature_reader
from particlejax.data.modalities import feature_store as files
from particlejax.data.video import decode
from particlejax.data.video.decode import Unreadable, raw_file
from particlejax.jobs import extract_features as job
from particlejax.jobs import linear_probe
from particlejax.models.zoo import backbones
from particlejax.particles import packing

RATE, CUT = 10.0, ParticleSpec("grid", (4, 16, 16))
SETTINGS = {
    "model": "c3d_tiny",
    "weights": "random",
    "endpoint": "conv5b",
    "pool_grid": (0, 2, 1),
    "num_frames": 16,
    "window_seconds": 1.0,
    "stride_seconds": 0.5,
}


def clip(colour: int, i: int, frames: int) -> bytes:
    """A raw video of noise about a shade of red or blue."""
    noise = np.random.default_rng(i).integers(0, 60, (frames, 32, 32, 3)).astype(np.uint8)
    noise[..., colour] += 150
    return raw_file(noise, RATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen videos of two classes and three lengths in two splits, one of them damaged."""
    root = tmp_path_factory.mktemp("colours")
    for i in range(16):
        path = root / ("train" if i < 10 else "val") / ("red", "blue")[i % 2] / f"{i}.mkv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip((0, 2)[i % 2], i, (6, 20, 23)[i % 3]))
    (root / "val" / "red" / "broken.mkv").write_bytes(b"no video")
    return root


def command(file: str, workdir: Path, *more: str) -> int:
    return entry.main(["main", f"--config=experiments/{file}", f"--workdir={workdir}", *more])


def compute(folder: Path, keep: Path, workdir: Path, *more: str) -> dict:
    """The job's results."""
    settings = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    where = [f"--config.source=folder:{folder}", f"--config.out_dir={keep}"]
    assert command("extract_features.py:tiny", workdir, *where, *settings, *more) == 0
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def kept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of the folder."""
    keep = tmp_path_factory.mktemp("keep")
    results = compute(folder, keep, keep.with_name("job"))
    # see `starts`
    assert results["extract_features"]["train"] == {
        "num_clips": 10,
        "computed": 10,
        "particles": 4 * (4 * 1 + 3 * 3 + 3 * 4),
    }
    assert [Path(each["path"]).name for each in results["unreadable"]] == ["broken.mkv"]
    return keep


def data_of(kept: Path, **more: object) -> DataSpec:
    return DataSpec(
        modalities=("video_features",),
        video_features=FeatureSpec(str(kept)),
        **{"clip_seconds": 2.0, "image_size": 32, **more},
    )


def test_sub_clips_cover_the_clip_and_cells_the_sub_clip() -> None:
    np.testing.assert_allclose(feature_reader.subclip_starts(2.0, 1.0, 0.5), [0, 0.5, 1.0])
    # the last one shows its last frame for a while
    np.testing.assert_allclose(feature_reader.subclip_starts(2.3, 1.0, 0.5), [0, 0.5, 1.0, 1.5])
    np.testing.assert_allclose(feature_reader.subclip_starts(0.6, 1.0, 0.5), [0])
    # they may stand apart, but not beyond the end
    np.testing.assert_allclose(feature_reader.subclip_starts(2.0, 0.5, 2.0), [0])
    about = feature_reader.subclip_geometry(np.array([0.0, 0.5]), 1.0, (2, 2, 1))
    np.testing.assert_allclose(about[:, 0], [0.25, 0.25, 0.75, 0.75, 0.75, 0.75, 1.25, 1.25])
    np.testing.assert_allclose(about[:2, 1], [0.25, 0.75])
    assert (about[:, 2] == 0.5).all() and (about[:, 3:] == [0.5, 0.5, 1]).all()


@pytest.mark.parametrize("cells", [(4, 7, 7), (1, 1, 1), (2, 3, 2), (3, 2, 5)])
def test_cells_are_means_and_their_mean_is_the_map_s(cells: tuple[int, int, int]) -> None:
    maps = np.random.default_rng(0).normal(size=(2, 4, 7, 7, 3)).astype(np.float32)
    found = np.asarray(job.average_cells(jax.numpy.asarray(maps), cells))
    np.testing.assert_allclose(found.mean(axis=1), maps.mean(axis=(1, 2, 3)), atol=1e-5)
    if cells == (4, 7, 7):
        np.testing.assert_allclose(found, maps.reshape(2, -1, 3), atol=1e-6)
    ones = np.asarray(job.average_cells(jax.numpy.ones((1, 4, 7, 7, 1)), cells))
    np.testing.assert_allclose(ones, 1, atol=1e-6)


def test_particles_are_what_the_network_says_of_that_part(folder: Path, kept: Path) -> None:
    record = next(each for each in _records(folder, "train") if "/5." in each.name)  # 23 frames
    found, what = (
        feature_reader.read(record, FeatureSpec(str(kept))),
        feature_reader.open_features(FeatureSpec(str(kept))),
    )
    frozen = linear_probe.load_backbone(ExtractFeaturesSpec(**SETTINGS))
    part = dataclasses.replace(record, start=0.5, end=1.5)
    pixels = clips.load(
        part, DataSpec(num_frames=16, image_size=32, clip_seconds=1.0), clips.CENTER_VIEW
    ).frames
    map_THWD = np.asarray(
        jax.jit(lambda p, x: backbones.features(frozen.backbone, p, x, "conv5b", pool=False))(
            frozen.params, pixels[None]
        )
    )[0]
    assert map_THWD.shape == (2, 2, 2, 8) and what.particles_per_subclip == 4
    wanted = map_THWD.mean(axis=2).reshape(4, 8)
    np.testing.assert_allclose(
        found.features[4:8] * what.deviation + what.mean, wanted, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        found.geometry[4:8, :2], [[0.75, 0.25], [0.75, 0.75], [1.25, 0.25], [1.25, 0.75]], atol=1e-6
    )


def _records(folder: Path, split: str) -> list[sources.Record]:
    source = sources.open_source(f"folder:{folder}", split, "")
    return [source[i] for i in range(len(source))]


def test_features_are_standardised_by_the_first_split(folder: Path, kept: Path) -> None:
    values = np.concatenate(
        [
            feature_reader.read(each, FeatureSpec(str(kept))).features
            for each in _records(folder, "train")
        ]
    )
    moving = values.std(axis=0) > 0.5  # the others hardly ever change
    assert moving.any()
    np.testing.assert_allclose(values.mean(axis=0)[moving], 0, atol=1e-3)
    np.testing.assert_allclose(values.std(axis=0)[moving], 1, atol=1e-3)
    each, what = _records(folder, "train")[0], feature_reader.open_features(FeatureSpec(str(kept)))
    raw = feature_reader.read(each, FeatureSpec(str(kept))).features * np.float32(
        what.deviation
    ) + np.float32(what.mean)
    equal = feature_reader.read(each, FeatureSpec(str(kept), normalization="rms")).features
    np.testing.assert_allclose(np.square(equal).mean(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(
        equal * np.sqrt(np.square(raw).mean(axis=1, keepdims=True)), raw, rtol=1e-3, atol=1e-4
    )


def test_no_frame_is_decoded_and_rows_have_room(
    folder: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        decode.Video, "__init__", lambda self, source: pytest.fail("a video was opened")
    )
    for seconds in (0.4, 1.0, 1.2, 1.5, 1.9, 2.0, 5.0):
        data = data_of(kept, clip_seconds=seconds, augment=AugmentSpec(speed_range=(0.5, 2.0)))
        row = pipeline.row_shape(data, CUT)
        assert row.slots["video_features"].payload_size == 8
        for record in _records(folder, "train"):
            for look in (clips.CENTER_VIEW, *map(np.random.default_rng, range(4))):
                seen = clips.make_particles(
                    clips.load(record, data, look), data, CUT, np.random.default_rng(0)
                )["video_features"]
                # raises where it does not fit
                packing.pack([packing.Clip({"video_features": seen}, 0, 0)], [0], row.slots, 1, 1)
                assert len(seen.segment) % 4 == 0 and len(seen.segment) >= 4


def test_spans_are_drawn_and_share_the_clock_of_the_frames(folder: Path, kept: Path) -> None:
    # its sub-clips end at 2.5 s
    record = next(each for each in _records(folder, "train") if "/5." in each.name)
    whole = feature_reader.read(record, FeatureSpec(str(kept)))
    part = whole.slice_time(0.4, 1.7)
    # of those from 0.5 and from 1.0 on
    np.testing.assert_allclose(sorted(set(part.place[:, 0].round(4))), [0.35, 0.85, 1.35])
    np.testing.assert_array_equal(part.payload, whole.features[4:12])
    near = whole.slice_time(0.6, 0.2)  # no sub-clip lies in it
    assert len(near.segment) == 4 and abs(near.place[:, 0].mean() - 0.1) <= 0.25
    both = dataclasses.replace(
        data_of(kept, num_frames=8),
        modalities=("vision", "video_features"),
        video_features=FeatureSpec(str(kept), 1.5),
    )
    seen = clips.load(record, both, clips.CENTER_VIEW)
    offset = (2.3 - 2.0) / 2
    np.testing.assert_allclose(
        seen.features["video_features"].place, whole.slice_time(offset, 1.5).place, atol=1e-3
    )
    assert len(seen.frames) == 8
    drawn = [
        clips.load(record, data_of(kept, clip_seconds=1.0), np.random.default_rng(i)).features[
            "video_features"
        ]
        for i in range(8)
    ]
    assert len({float(each.payload[0, 0]) for each in drawn}) > 1, (
        "another draw sees another sub-clip"
    )


def test_what_is_not_there_names_the_command(folder: Path, kept: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="features.folder is empty: set it to the output"):
        pipeline.row_shape(DataSpec(modalities=("video_features",)), CUT)
    with pytest.raises(
        UserError,
        match="holds no features .*run `python -m particlejax.main --config "
        "experiments/extract_features.py",
    ):
        pipeline.row_shape(data_of(tmp_path), CUT)
    with pytest.raises(
        UserError, match="config.data.video_features.max_seconds and config.data.clip_seconds are 0"
    ):
        pipeline.row_shape(data_of(kept, clip_seconds=0.0), CUT)
    with pytest.raises(UserError, match="augment.mixup_alpha needs frames"):
        pipeline.row_shape(data_of(kept, augment=AugmentSpec(mixup_alpha=0.2)), CUT)
    strange = sources.Record("strange", clip(0, 99, 20))
    with pytest.raises(
        Unreadable,
        match=r"no features in .* run `python -m particlejax.main .*--config.pool_grid=\(0, 2, 1\)",
    ):
        feature_reader.read(strange, FeatureSpec(str(kept)))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "network.json").write_text("{")
    with pytest.raises(UserError, match="network.json is damaged"):
        pipeline.row_shape(data_of(broken), CUT)
    with pytest.raises(UserError, match=r"another network or sampling \(stride differs\)"):
        job.prepare_extraction(ExtractFeaturesSpec(**(SETTINGS | {"stride_seconds": 0.25})), kept)
    with pytest.raises(
        UserError,
        match=r"config.pool_grid=\(5, 1, 1\) has more cells than .* c3d_tiny, \(2, 2, 2\)",
    ):
        job.prepare_extraction(
            ExtractFeaturesSpec(**(SETTINGS | {"pool_grid": (5, 1, 1)})), tmp_path
        )


def test_the_damaged_are_named_and_computed_again_and_a_run_learns(
    folder: Path, kept: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    keep = tmp_path / "keep"
    shutil.copytree(kept, keep)
    paths = sorted(keep.rglob("*.features"))
    assert len(paths) == 16 and not list(keep.rglob("*.tmp"))
    content = paths[3].read_bytes()
    paths[3].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = (keep / "network.json").read_bytes()
    reasons = []
    for record in (*_records(folder, "train"), *_records(folder, "val")):
        try:
            feature_reader.read(record, FeatureSpec(str(keep)))
        except Unreadable as error:
            reasons.append(error.reason)
    assert sum("is damaged, run `python -m particlejax.main" in reason for reason in reasons) == 1
    assert sum("it has no features" in reason for reason in reasons) == 1  # of the broken video
    results = compute(folder, keep, tmp_path / "again", "--config.batch_size=3")
    assert (
        results["extract_features"]["train"]["computed"]
        + results["extract_features"]["val"]["computed"]
        == 1
    )
    assert "is damaged: its features are computed again" in capfd.readouterr().err
    assert (keep / "network.json").read_bytes() == before
    command(
        "finetune_features.py:tiny",
        tmp_path / "run",
        f"--config.data.source=folder:{folder}",
        "--config.data.clip_seconds=2.0",
        f"--config.data.video_features.folder={keep}",
        "--config.stages.finetune.num_steps=40",
        "--config.stages.finetune.val_every_steps=40",
        "--config.stages.finetune.ema_decay=0.0",
        "--config.data.video_features.normalization=standardize",
        "--config.stages.finetune.optim.learning_rate=0.003",
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["finetune"]["val"]["top1"] == 1.0, "red and blue are easily told"
    assert [Path(each["path"]).name for each in results["unreadable"]] == ["broken.mkv"]
    assert results["finetune"]["train"]["compilations"] == 1


def test_threads_read_features_beside_each_other(tmp_path: Path) -> None:
    """Numpy's headers go through `ast`, of which CPython 3.11 has one state for all threads."""
    files.save(tmp_path, "abcdef", np.ones((3, 4), np.float32))
    before, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(5)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(
                found.sum() == 12
                for found in pool.map(lambda _: files.load(tmp_path, "abcdef"), range(1500))
            )
    finally:
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)
