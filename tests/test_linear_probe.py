# SPDX-License-Identifier: Apache-2.0
"""A frozen network's features: computed once, by weights, clip and sampling, and again where
damaged; what they tell.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from particlejax import main as entry
from particlejax.config.job_specs import LinearProbeSpec
from particlejax.core.typing import UserError
from particlejax.data.modalities import feature_store
from particlejax.data.sources import Record
from particlejax.data.video.decode import raw_file
from particlejax.jobs import linear_probe as probe

NETWORK, SAMPLING = (
    {"model": "a", "weights": "b", "endpoint": "c"},
    {"frames": 4, "size": 16, "seconds": 0.0},
)


def clip(colour: int, i: int) -> bytes:
    """A raw video of noise about a shade of red or blue."""
    frames = np.random.default_rng(i).integers(0, 60, (6, 16, 16, 3)).astype(np.uint8)
    frames[..., colour] += 150
    return raw_file(frames, 10.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty videos of two classes in two splits, one of them damaged."""
    root = tmp_path_factory.mktemp("colours")
    for i in range(20):
        path = root / ("train" if i < 12 else "val") / ("red", "blue")[i % 2] / f"{i}.mkv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip((0, 2)[i % 2], i))
    (root / "val" / "red" / "broken.mkv").write_bytes(b"no video")
    return root


def run(folder: Path, keep: Path, workdir: Path, *more: str) -> dict:
    """The job's results, from random weights."""
    assert (
        entry.main(
            [
                "main",
                "--config=experiments/linear_probe.py:tiny",
                f"--config.source=folder:{folder}",
                "--config.test_split=val",
                f"--config.feature_cache_dir={keep}",
                f"--workdir={workdir}",
                *more,
            ]
        )
        == 0
    )
    return json.loads((workdir / "results.json").read_text())


def test_features_are_computed_once_and_again_where_damaged(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    keep = tmp_path / "keep"
    first = run(folder, keep, tmp_path / "a")
    assert (
        first["linear_probe"]["computed"] == 20
        and first["linear_probe"]["kept"] == 0
        and first["linear_probe"]["width"] == 32
    )
    # red and blue are easily told
    assert (
        first["linear_probe"]["val"]["top1"] == 1.0
        and first["linear_probe"]["val"]["num_clips"] == 8
    )
    assert [Path(each["path"]).name for each in first["unreadable"]] == ["broken.mkv"]
    assert "20" in (tmp_path / "a" / "report.md").read_text()
    files = sorted(keep.rglob("*.features"))
    assert len(files) == 20 and not list(keep.rglob("*.tmp"))
    content = bytearray(files[3].read_bytes())
    content[-5] ^= 1
    files[3].write_bytes(bytes(content))
    files[5].write_bytes(content[:20])
    second = run(folder, keep, tmp_path / "b")
    assert second["linear_probe"]["computed"] == 2 and second["linear_probe"]["kept"] == 18
    assert second["linear_probe"]["val"] == first["linear_probe"]["val"]
    assert capfd.readouterr().err.count("is damaged: its features are computed again.") == 2
    assert run(folder, keep, tmp_path / "c")["linear_probe"]["computed"] == 0
    assert (
        run(folder, keep, tmp_path / "d", "--config.clip_seconds=0.2")["linear_probe"]["computed"]
        == 20
    )


def test_keys_tell_weights_clips_and_samplings_apart(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.mkv"
    shutil.copy(folder / "train" / "red" / "0.mkv", path)
    record = Record("x", str(path))
    keys = [
        feature_store.key(record, NETWORK, SAMPLING),
        feature_store.key(record, NETWORK | {"weights": "d"}, SAMPLING),
        feature_store.key(record, NETWORK, SAMPLING | {"frames": 8}),
        feature_store.key(Record("x", clip(0, 0)), NETWORK, SAMPLING),
        feature_store.key(Record("x", str(path), start=0.1), NETWORK, SAMPLING),
    ]
    assert keys[0] == feature_store.key(Record("other", str(path), label=1), NETWORK, SAMPLING)
    path.write_bytes(clip(2, 7) + b"more")
    assert len({*keys, feature_store.key(record, NETWORK, SAMPLING)}) == 6


def test_what_is_kept_is_what_was_given(tmp_path: Path) -> None:
    vector = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert feature_store.load(tmp_path, "ab12") is None
    feature_store.save(tmp_path, "ab12", vector)
    np.testing.assert_array_equal(feature_store.load(tmp_path, "ab12"), vector)


def test_weights_are_known_by_what_features_see() -> None:
    params = {"head": {"kernel": np.ones(3)}, "patches": {"kernel": np.ones(3)}}
    assert probe.digest(params) == probe.digest(params | {"head": {"kernel": np.zeros(3)}})
    assert probe.digest(params) != probe.digest(params | {"patches": {"kernel": np.zeros(3)}})


def test_what_cannot_be_probed_gets_a_sentence() -> None:
    with pytest.raises(UserError, match="clip_tiny does not take video: choose a video model"):
        probe.load_backbone(LinearProbeSpec(model="clip_tiny"))
    with pytest.raises(UserError, match="no weights for vivit_base: add --config.weights=PATH"):
        probe.load_backbone(LinearProbeSpec(model="vivit_base"))
    one = probe.SplitFeatures(np.ones((2, 3), np.float32), np.zeros(2, int), 0)
    with pytest.raises(UserError, match="a single class"):
        probe.predict_probabilities(one, one.features, 2, 1.0)
