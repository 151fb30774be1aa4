# SPDX-License-Identifier: Apache-2.0
"""Folders, TFDS data sets and the toybox as records; every mistake in them has its own sentence."""

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from particlejax.core.typing import UserError
from particlejax.data.sources import ListSource, Source, open_source
from particlejax.data.video.decode import Unreadable, Video, raw_file


def touch(folder: Path, *paths: str) -> str:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return f"folder:{folder}"


def table(folder: Path, text: str, encoding: str = "utf-8") -> str:
    (folder / "clips.csv").write_bytes(text.encode(encoding))
    return f"folder:{folder}"


def names(source: Source) -> list[str]:
    return [source[i].name for i in range(len(source))]


def test_split_folders(tmp_path: Path) -> None:
    source = touch(
        tmp_path,
        "train/run/b.mp4",
        "train/run/a.MKV",
        "train/jump/x/c.webm",
        "train/d.avi",
        "train/run/notes.txt",
        "validation/walk/e.mp4",
        "test/run/f.mp4",
        ".hidden/run/g.mp4",
        "train/run/._a.mp4",
    )
    train = open_source(source, "train", "")
    assert train.classes == ("jump", "run", "walk")  # over all splits
    assert [(r.name, r.label) for r in map(train.__getitem__, range(len(train)))] == [
        ("train/d.avi", -1),
        ("train/jump/x/c.webm", 0),
        ("train/run/a.MKV", 1),
        ("train/run/b.mp4", 1),
    ]
    assert train[3].video == str(tmp_path / "train/run/b.mp4")
    for split in ("val", "validation"):
        assert names(open_source(source, split, "")) == ["validation/walk/e.mp4"]
    with pytest.raises(UserError, match="no split 'dev': use one of test, train, val"):
        open_source(source, "dev", "")
    touch(tmp_path, "loose.mp4")
    with pytest.raises(UserError, match="holds loose.mp4 beside the splits .*: move it"):
        open_source(source, "train", "")


def test_class_folders_are_split_by_hash(tmp_path: Path) -> None:
    # a class called train
    source = touch(tmp_path, *(f"{c}/{i}.mp4" for c in ("bus", "train") for i in range(100)))
    train, val = (open_source(source, s, "") for s in ("train", "val"))
    assert train.classes == val.classes == ("bus", "train")
    assert (
        140 <= len(train) <= 180
        and len(train) + len(val) == 200
        and not set(names(train)) & set(names(val))
    )
    touch(tmp_path, "bus/new.mp4")
    # the others stay put
    assert set(names(open_source(source, "train", ""))) - {"bus/new.mp4"} == set(names(train))


def test_flat_files_are_unlabelled_and_both_splits_have_one(tmp_path: Path) -> None:
    source = touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    parts = [open_source(source, s, "") for s in ("train", "val")]
    assert min(map(len, parts)) >= 1 and sum(map(len, parts)) == 3
    assert parts[0].classes == () and {r.label for p in parts for r in p.records} == {-1}


def test_linked_folders_end(tmp_path: Path) -> None:
    source = touch(tmp_path, "run/a.mp4", "run/b.mp4")
    (tmp_path / "run" / "loop").symlink_to(tmp_path)
    assert len(open_source(source, "train+val", "")) == 2


def test_table(tmp_path: Path) -> None:
    source = table(
        tmp_path,
        "path, split,label,caption,start,end,group,score\n"
        'a.mp4,train,run,"fast, very",1.5,4,g1,9\nsub/b.mp4,train,,,,,,\n'
        "c.mp4,valid,walk,,,2,g2,\n",
        "utf-8-sig",
    )
    train = open_source(source, "train", "")
    first, second = train[0], train[1]
    assert train.classes == ("run", "walk") and len(train) == 2
    assert (first.name, first.label, first.caption, first.start, first.end, first.group) == (
        "a.mp4",
        0,
        "fast, very",
        1.5,
        4.0,
        "g1",
    )
    assert (second.video, second.label, second.caption, second.start, second.end) == (
        str(tmp_path / "sub/b.mp4"),
        -1,
        "",
        0.0,
        None,
    )
    assert open_source(source, "val", "")[0].end == 2.0
    assert pickle.loads(pickle.dumps(train)) == train
    with pytest.raises(Unreadable, match="missing"):  # not found out before it is decoded
        Video(first.video)


def test_rows_of_one_file_have_names_of_their_own_and_stay_together(tmp_path: Path) -> None:
    source = table(tmp_path, "path,start,end\na.mp4,0,2.5\na.mp4,2.5,\nb.mp4,1,2\na.mp4,2.5,\n")
    named = {
        r.name: (s, Path(r.video).name, r.start)
        for s in ("train", "val")
        for r in open_source(source, s, "").records
    }
    assert set(named) == {"a.mp4@0-2.5", "a.mp4@2.5-", "a.mp4@2.5-#2", "b.mp4"}
    assert len({split for split, file, _ in named.values() if file == "a.mp4"}) == 1, (
        "one file is never in two splits"
    )


def test_groups_stay_together(tmp_path: Path) -> None:
    rows = "".join(f"{i}.mp4,g{i % 30}\n" for i in range(300))
    source = table(tmp_path, "path,group\n" + rows)
    splits = ("train", "val", "train[:50%]", "train[50%:]")
    groups = {s: [r.group for r in open_source(source, s, "").records] for s in splits}
    assert 180 <= len(groups["train"]) <= 290 and not set(groups["train"]) & set(groups["val"])
    assert sorted(groups["train[:50%]"] + groups["train[50%:]"]) == sorted(groups["train"])
    assert len(set(groups["train[:50%]"]) & set(groups["train[50%:]"])) <= 1


def test_slices(tmp_path: Path) -> None:
    source = touch(tmp_path, *(f"train/run/{i:02d}.mp4" for i in range(20)), "val/run/a.mp4")
    whole = set(names(open_source(source, "train", "")))
    sizes = {
        "train[:25%]": 5,
        "train[25%:]": 15,
        "train[3:7]": 4,
        "train[-2:]": 2,
        "train[:]": 20,
        "train + val": 21,
    }
    assert {s: len(open_source(source, s, "")) for s in sizes} == sizes
    head, tail = (
        names(open_source(source, "train[:25%]", "")),
        names(open_source(source, "train[25%:]", "")),
    )
    # like the whole, not its beginning
    assert set(head) | set(tail) == whole and head != sorted(whole)[:5]
    with pytest.raises(UserError, match=r"'train\[:0\]' of folder:.* selects no clip"):
        open_source(source, "train[:0]", "")
    with pytest.raises(UserError, match=r"'train\[1\]' of .* is malformed: write"):
        open_source(source, "train[1]", "")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "file,label\na.mp4,run\n",
            r"clips.csv has no column 'path' \(it has file, label\): give the column",
        ),
        ("", r"clips.csv has no column 'path' \(it has none\)"),
        ("path\n", "clips.csv lists no clip"),
        ("path,start\na.mp4,1\nb.mp4,0:30\n", "clips.csv, line 3: start is '0:30': write seconds"),
        ("path,end\na.mp4,nan\n", "line 2: end is 'nan'"),
        ("path,start,end\na.mp4,5,2\n", "line 2: the end 2 is not after the start 5"),
        ("path,label\na.mp4,x\n,y\n", "line 3: the path is empty"),
        ("path,split\na.mp4,train\nb.mp4,\n", "has no split for b.mp4, but for other"),
    ],
)
def test_table_mistakes(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_source(table(tmp_path, text), "train", "")


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match="unknown data source 'video.mp4': use 'toybox' .*, 'folder:PATH', 'tfds:NAME'",
    ):
        open_source("video.mp4", "train", "")
    with pytest.raises(UserError, match="folder:.*/no does not exist: check the path"):
        open_source(f"folder:{tmp_path}/no", "train", "")
    with pytest.raises(UserError, match="holds no clips.csv and no video .*: add videos"):
        open_source(touch(tmp_path, "train/run/a.txt"), "train", "")
    with pytest.raises(UserError, match="is not UTF-8 text .*: save it as UTF-8"):
        open_source(table(tmp_path, "path,caption\na.mp4,caf\u00e9\n", "latin-1"), "train", "")


def test_labels_follow_the_trained_run(tmp_path: Path) -> None:
    source = touch(tmp_path, "train/walk/a.mp4", "train/run/b.mp4", "val/jumping/c.mp4")
    train = open_source(source, "train", "", ("run", "sit", "walk"))
    assert train.classes == ("run", "sit", "walk") and [r.label for r in train.records] == [0, 2]
    with pytest.raises(
        UserError, match=r"label 'jumping' of folder:.*: did you mean jump. Rename it"
    ):
        open_source(source, "val", "", ("run", "jump"))
    with pytest.raises(UserError, match=r"label 'jumping' .*: choose one of run, sit"):
        open_source(source, "val", "", ("run", "sit"))


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Three clips as files and as frames."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "caption": tfds.features.Text(),
                    "view": tfds.features.ClassLabel(names=["far", "near"]),
                    "video": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=["walk", "run"]),
                }
            ),
        )

    def _split_generators(self, dl_manager: object) -> dict[str, object]:
        del dl_manager
        return {"train": self._generate_examples(3), "validation": self._generate_examples(1)}

    def _generate_examples(self, count: int) -> object:
        for i in range(count):
            frames = np.full((i + 1, 8, 8, 3), 10 * i, np.uint8)
            yield (
                i,
                {"caption": f"clip {i} \u00e9", "view": 0, "video": raw_file(frames), "label": 1},
            )


class Frames(Tiny):
    """Decoded frames, and nothing that says what they are."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "x": tfds.features.Tensor(shape=(None, 8, 8, 1), dtype=np.uint8),
                    "name": tfds.features.Text(),
                }
            ),
        )

    def _generate_examples(self, count: int) -> object:
        for i in range(count):
            yield i, {"x": np.full((i + 1, 8, 8, 1), 10 * i, np.uint8), "name": f"n{i}"}


def prepare(
    kind: type, folder: Path, file_format: str = "array_record"
) -> tfds.core.DatasetBuilder:
    builder = kind(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=1))
    return builder


def test_tfds_files(tmp_path: Path) -> None:
    builder = prepare(Tiny, tmp_path / "tfds")
    for where in (
        f"tfds:{builder.data_dir}",
        f"tfds:{tmp_path / 'tfds'}",
        "tfds:tiny",
        "tfds:tiny:1.0.0",
    ):
        train = open_source(where, "train", str(tmp_path))
        assert len(train) == 3 and train.classes == ("walk", "run")
    assert {train[i].caption for i in range(3)} == {f"clip {i} \u00e9" for i in range(3)}
    record = pickle.loads(pickle.dumps(train))[2]
    assert record.name == "train/00002" and record.label == 1
    with Video(record.video) as video:
        assert video.read_all()[0].shape[1:] == (8, 8, 3)
    assert len(open_source(where, "train[:67%]", str(tmp_path))) == 2
    assert open_source(where, "val", str(tmp_path))[0].name == "validation/00000"
    assert open_source(where, "train[1:]+val", str(tmp_path), ("sit", "run", "walk"))[0].label == 1
    with pytest.raises(
        UserError, match="tfds:tiny:1.0.0 has no split 'test': use one of train, validation"
    ):
        open_source(where, "test", str(tmp_path))
    with pytest.raises(UserError, match=r"label 'walk' of tfds:tiny:1.0.0 .*: choose one of run"):
        open_source(where, "train", str(tmp_path), ("run",))
    with pytest.raises(UserError, match=r"has no split 'train\[x\]'"):
        open_source(where, "train[x]", str(tmp_path))


def test_tfds_frames(tmp_path: Path) -> None:
    source = open_source(f"tfds:{prepare(Frames, tmp_path).data_dir}", "train", "")
    record = next(source[i] for i in range(3) if source[i].name == "n2")
    with Video(record.video) as video:
        np.testing.assert_array_equal(video.read_all()[0], np.full((3, 8, 8, 3), 20))
    assert record.label == -1 and source.classes == ()


def test_tfds_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError,
        match="tfds:no_such_set is neither a folder, nor known to TFDS, nor prepared under "
        f"{tmp_path}/tfds or ",
    ):
        open_source("tfds:no_such_set", "train", str(tmp_path))
    with pytest.raises(
        UserError, match="tfds:tiny is not prepared under .*: run `tfds build tiny --data_dir"
    ):
        open_source("tfds:tiny", "train", str(tmp_path))
    with pytest.raises(UserError, match="the folder does not exist"):
        open_source("tfds:/no/such", "train", str(tmp_path))
    with pytest.raises(UserError, match="holds no dataset_info.json: use the folder"):
        open_source(f"tfds:{tmp_path}", "train", str(tmp_path))
    monkeypatch.setattr("particlejax.data.sources.tfds._VIDEO_NAMES", ())
    with pytest.raises(UserError, match="has no video feature among .*: name it 'video'"):
        open_source(f"tfds:{prepare(Tiny, tmp_path).data_dir}", "train", "")


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is here")
def test_tfds_that_needs_tensorflow(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"tfds:ucf101.* only reads with TensorFlow .*pip install -e .*tensorflow"
    ):
        open_source("tfds:ucf101:2.0.0", "train", str(tmp_path))


def test_listed_takes_numpy_indices() -> None:
    assert ListSource((), ("a", "b"))[np.int64(1)] == "b"


@pytest.mark.skipif(
    importlib.util.find_spec("particlejax.data.sources.toybox.builder") is None,
    reason="no toybox yet",
)
def test_toybox_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stand_in(config: str, data_dir: str) -> tfds.core.DatasetBuilder:
        asked.append((config, data_dir))
        return prepare(Tiny, tmp_path)

    monkeypatch.setattr("particlejax.data.sources.toybox.builder.prepare", stand_in)
    for source in ("toybox:tiny", "toybox"):
        assert len(open_source(source, "train", str(tmp_path))) == 3
    with pytest.raises(
        UserError, match="'toybox:big' has no configuration 'big': use one of default, tiny"
    ):
        open_source("toybox:big", "train", str(tmp_path))
    assert asked == [(config, str(tmp_path / "tfds")) for config in ("tiny", "default")]
