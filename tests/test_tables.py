# SPDX-License-Identifier: Apache-2.0
"""Tables and folders are read as they were meant, or refused with file, line and remedy."""

import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from particlejax.config.data import DataSpec, TimeseriesSpec
from particlejax.config.fields import make
from particlejax.config.objectives import ClassifySpec
from particlejax.core import csv_table
from particlejax.core.typing import UserError
from particlejax.data import label_subset, sources
from particlejax.data.modalities import timeseries
from particlejax.data.sources import ListSource, Record, open_source, open_split
from particlejax.data.video.decode import Unreadable
from particlejax.objectives import label_targets
from particlejax.reports import markdown
from particlejax.train import classification_metrics

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def touch(folder: Path, *paths: str) -> str:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return f"folder:{folder}"


def table(folder: Path, content: str | bytes) -> str:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "clips.csv").write_bytes(data)
    return f"folder:{folder}"


def labels(source: sources.Source) -> dict[str, str]:
    records = [source[i] for i in range(len(source))]
    return {r.name: source.classes[r.label] if r.label >= 0 else "" for r in records}


# -- tables

CLIPS = 'path,split,caption,label\na.mp4,train,"one,\r\ntwo ""3""",x\n\n,,,\nb.mp4,val,,y\n'


@pytest.mark.parametrize(
    "data",
    [
        CLIPS.encode(),
        CLIPS.encode("utf-8-sig"),
        CLIPS.encode("utf-16"),
        CLIPS.replace("path,split,", "Path, SPLIT ,").encode(),
        CLIPS.replace("\r\n", "\r").replace("\n", "\r").encode(),
        CLIPS.replace('"one,', '"one;').replace(",", ";").replace("one;", "one,").encode(),
        CLIPS.replace("one,", "one\v").replace(",", "\t").replace("one\v", "one,").encode(),
        CLIPS.replace("path,", ",path,")
        .replace("a.mp4", "0,a.mp4")
        .replace("b.mp4", "1,b.mp4")
        # the index column and the trailing cells of other programs
        .replace(",label", ",label,")
        .replace(",x\n", ",x,\n")
        .replace(",y\n", ",y,\n")
        .encode(),
    ],
)
def test_tables_as_programs_write_them(tmp_path: Path, data: bytes) -> None:
    train, val = (open_source(table(tmp_path, data), split, "") for split in ("train", "val"))
    assert train.classes == ("x", "y") and labels(train) == {"a.mp4": "x"}
    assert labels(val) == {"b.mp4": "y"} and train[0].caption == 'one,\ntwo "3"'
    rows = csv_table.read(data, "t", "path").rows
    assert [row.line for row in rows] == [2, 6], "lines of the file, not of the table"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        # a caption with a bare comma; a cell too few
        ("path,caption,label\na,b,c\na,b, d,c\n", "line 3: 4 cells for 3 columns: quote what ho"),
        ("path;label\na;b;c\n", "line 2: 3 cells for 2 columns: quote what holds a semicolon"),
        ("path,label,caption\na,b\n", "line 2: 2 cells for 3 columns: write a cell for each"),
        ("path,label,\na,b,c\n", "line 2: 'c' is in a column without a name: quote what"),
        # quotes: never closed; closed by the quote that opens the next; closed in the middle
        ('path,caption\n"a\nb",x\nc,"d\ne,f\n', "line 4: a quote opens and is never closed"),
        ('path,caption\na,"b\nc,"d" e\n', "line 2: a quote opens, and the next quote in line 3"),
        ('path,caption\na,"b\nc,d\ne,"\n', "line 2: a quote opens, and the next quote in line 4"),
        ('path,caption\na,"b" c\n', "line 2: a quote opens, and the next quote does not end"),
        # the header
        ("path,label,split,label\na,b,c,d\n", "line 1: column 'label' stands twice: rename"),
        ("path,Path\na,b\n", "line 1: column 'path' stands twice"),
        ("path,lable\na,b\n", "line 1: column 'lable' is not known: did you mean 'label'"),
        ("\n\nfile|label\na|b\n", r"has no column 'path' .it has file.label.: give the column"),
        # bytes
        ("path,label\na,b\nc,\u00e9\n".encode("latin-1"), "line 3: is not UTF-8 text .*: save it"),
        ("path,label\na,b\n".encode("utf-16-le"), "line 1: is not UTF-8 text .*: save it"),
        # values
        ("path,start\na,-1\n", "line 2: start is '-1': write seconds"),
        ("path,start\na,1_0\n", "line 2: start is '1_0': write seconds"),
        ("path,end\na,inf\n", "line 2: end is 'inf': write seconds"),
        ("path,start,end\na,2,2\n", "line 2: the end 2 is not after the start 2"),
        ("path,label\na,b\n\n,c\n", "line 4: the path is empty: fill it in"),
        ("path,split\na,train\nb,\n", "line 3: has no split for b, but for other clips: fill in"),
        ("path,split\na,train\nb,Training\n", "line 3: split 'Training' and 'train' .*line 2"),
    ],
)
def test_what_is_not_clear_is_refused_with_its_line(
    tmp_path: Path, content: str | bytes, sentence: str
) -> None:
    with pytest.raises(UserError, match=f"clips.csv,? ?{sentence}"):
        open_source(table(tmp_path, content), "train", "")


def test_the_other_tables_are_read_by_the_same_rules(tmp_path: Path) -> None:
    source = ListSource(("k",), tuple(Record(name, "", 0) for name in ("a,b.mp4", NFC)))
    lists = {
        f'Path;why\n"a,b.mp4";1\n{NFD};2\n': None,
        "path\na,b.mp4\n": "list.csv, line 2: 2 cells for 1 columns: quote what holds a comma",
        'path\n"a,b.mp4"\n\n"a,c.mp4"\n': "list.csv, line 4: .* has clip 'a,c.mp4'.* did you mean",
        "name\na\n": r"list.csv has no column 'path' .it has name.: add it",
    }
    file = tmp_path / "list.csv"
    for content, sentence in lists.items():
        file.write_text(content)
        data = DataSpec(labelled_csv=str(file))
        if sentence is None:
            assert len(label_subset.limit_labels(source, data, 0)) == 2
            continue
        with pytest.raises(UserError, match=sentence):
            label_subset.limit_labels(source, data, 0)
    maps = {
        "from,to\na,b\nc,d,e\n": "map.csv, line 3: 3 cells for 2 columns",
        "from,to\na,\n": "map.csv, line 2: a label is empty",
        "from,to\na,b\na,c\n": "map.csv, line 3: 'a' is renamed twice",
        "from,too\na,b\n": "map.csv, line 1: column 'too' is not known: did you mean 'to'",
    }
    file = tmp_path / "map.csv"
    for content, sentence in maps.items():
        file.write_text(content)
        with pytest.raises(UserError, match=sentence):
            make(DataSpec, {"label_map": (str(file),)}, "config.data")
    with pytest.raises(UserError, match=r"config.data.label_map is \('a', 'b'\): write pairs"):
        make(DataSpec, {"label_map": ("a", "b")}, "config.data")
    (tmp_path / "names.csv").write_text(f'id,name\n0,"a, b"\n1,{NFD}\n')
    (tmp_path / "names.txt").write_bytes(f"a, b\r\n\r\n{NFC}".encode("utf-8-sig"))
    for name in ("names.csv", "names.txt"):
        assert csv_table.read_names(tmp_path / name) == ("a, b", NFC)


def test_a_series_has_gaps_or_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "s.csv"
    spec = {
        gaps: TimeseriesSpec(channels=("x", "y"), sample_rate=1.0, gaps=gaps)
        for gaps in ("interpolate", "missing", "refuse")
    }
    file.write_text("Time;x;y\n0;0;1\n1;nan;1\n2;;1\n3;6;NA\n")
    made = timeseries.read(str(file), 0.0, 4.0, spec["interpolate"])
    np.testing.assert_allclose(made, [[0, 1], [2, 1], [4, 1], [6, 1]])
    made = timeseries.read(str(file), 0.0, 4.0, spec["missing"])
    assert np.isnan(made).tolist() == [[0, 0], [1, 0], [1, 0], [0, 1]]
    wrong = {
        "refuse": ("time,x,y\n0,0,0\n\n1,nan,0\n", "s.csv, line 4, column 'x': the value is mis"),
        "missing": ("time,x,y\n0,0,inf\n", "s.csv, line 2, column 'y': 'inf' is not a finite num"),
        "interpolate": ("time,x,y\n0,,0\n", "s.csv: column 'x' has no value to interpolate from"),
    }
    others = {
        "time,x,y\n0,1,two\n": "s.csv, line 2, column 'y': 'two' is not a number",
        "time,x,y\n,1,2\n": "s.csv, line 2, column 'time': the value is missing",
        "time,x,y\n0,1,2,3\n": "s.csv, line 2: 4 cells for 3 columns",
        "time,x,x\n0,1,2\n": "s.csv, line 1: column 'x' stands twice",
        "time,x\n0,1\n": "s.csv has no column 'y'",
    }
    for gaps, content, reason in (
        *((gaps, *case) for gaps, case in wrong.items()),
        *(("missing", *case) for case in others.items()),
    ):
        file.write_text(content)
        with pytest.raises(Unreadable, match=reason):
            timeseries.read(str(file), 0.0, 1.0, spec[gaps])


def test_a_number_that_is_none_is_found_in_the_table(tmp_path: Path) -> None:
    source = table(tmp_path, "path,split,label\na,train,1\nb,val,inf\n")
    mixed = f"mix:{source},{source}"
    for where, label, kind in ((source, "inf", "a finite number"), (mixed, "1e99", "a finite")):
        with pytest.raises(UserError, match=f"label '{label}' is not {kind}") as caught:
            label_targets.build_targets(ClassifySpec(loss="regression"), ("1", label), where)
        place = "clips.csv, line 3, column 'label': " if label == "inf" else "mix:"
        assert place in str(caught.value)


# -- splits


def test_split_words_are_splits_and_nothing_else_is_guessed(tmp_path: Path) -> None:
    words = {
        "training": "train",
        "Train": "train",
        "valid": "val",
        "Validation": "val",
        "dev": "val",
        "EVAL": "val",
        "Testing": "test",
    }
    for i, (word, split) in enumerate(words.items()):
        folder = touch(tmp_path / str(i), f"{word}/walk/a.mp4", f"{word}/run/b.mp4")
        listed = table(tmp_path, f"path,split,label\na,{word},walk\nb,{word},run\n")
        for source in (folder, listed):
            assert sources.splits(source, "") == (split,)
            for name in (split, word, "all"):
                found = open_source(source, name, "")
                assert found.classes == ("run", "walk") and len(found) == 2
    both = table(tmp_path, "path,split\na,val\nb,dev\nc,valid\n")
    assert [len(open_source(both, split, "")) for split in ("val", "dev", "all")] == [2, 1, 3]
    odd = table(tmp_path, "path,split\na,train\nb,tr ain\nc,train+x\nd,a[1]\n")
    for split in sources.splits(odd, ""):
        assert len(open_source(odd, split, "")) == 1, split
    assert len(open_source(odd, "train [ : 50% ] + tr ain", "")) == 1
    refused = {
        ("train/a/b.mp4", "val/a/c.mp4", "samples/d.mp4"): "folders train, val, which mean splits, "
        "beside samples, which would be classes: move the other folders out",
        ("train/a/b.mp4", "extra/d.mp4"): "folders train, which mean splits, beside extra",
        ("val/a/b.mp4", "valid/a/c.mp4"): "folders 'val' and 'valid', which both mean split 'val'",
        ("x/train/a/b.mp4", "x/val/a/b.mp4"): "other folders .x/train, x/val.: use folder:.*/x",
        ("a/train/b.mp4", "a/val/b.mp4", "c/train/d.mp4"): "below other folders .*: lay it out as",
    }
    for i, (paths, sentence) in enumerate(refused.items()):
        with pytest.raises(UserError, match=sentence):
            open_source(touch(tmp_path / f"r{i}", *paths), "train", "")


def test_made_splits_are_stratified_and_keep_groups(tmp_path: Path) -> None:
    for group in (False, True):
        # persons of six clips, two of each class, and a class of two clips
        rows = [f"{i}.mp4,{'abc'[i % 3]},p{i // 6 if group else i}" for i in range(120)]
        rows += ["x.mp4,rare,", "y.mp4,rare,"]
        sizes = {}
        for order in (rows, rows[::-1]):
            source = table(tmp_path, "path,label,group\n" + "\n".join(order))
            parts = {split: open_source(source, split, "") for split in ("train", "val")}
            sizes = {s: Counter(labels(part).values()) for s, part in parts.items()}
            assert sizes["val"] == {"a": 8, "b": 8, "c": 8, "rare": 1}
            assert sizes["train"] == {"a": 32, "b": 32, "c": 32, "rare": 1}
            groups = [{r.group for r in part.records} - {""} for part in parts.values()]
            assert not groups[0] & groups[1]
        note = parts["val"].notes[0]
        assert "a fifth becomes val" in note and "a 32 + 8, b 32 + 8, c 32 + 8, rare 1 + 1" in note
    assert len(open_source(source, "all", "")) == 122
    # measured values are no classes, and the combinations of classes are none either
    for label in (lambda i: f"{i / 7}", lambda i: f"{i // 2}", lambda i: f"{'abcd'[i % 4]}|e{i}"):
        rows = [f"{i}.mp4,{label(i)}" for i in range(40)]
        source = table(tmp_path, "path,label\n" + "\n".join(rows))
        assert len(open_source(source, "val", "")) == 8


def test_a_split_that_is_not_there_names_its_key_and_all_is_every_clip(
    tmp_path: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4")
    for split, key in (("test", "config.eval.splits"), ("train[:0]", "config.data.split")):
        sentence = f"{key}='{re.escape(split)}': .*(has no split 'test': use|selects no clip)"
        with pytest.raises(UserError, match=sentence):
            open_split(DataSpec(source=source), split, key=key)
    everything = open_source("toybox:tiny", "all", cache_dir)
    names = sources.splits("toybox:tiny", cache_dir)
    assert len(everything) == sum(len(open_source("toybox:tiny", s, cache_dir)) for s in names)

    def own(rest: str, split: str) -> ListSource:
        return ListSource((split, "z"), (Record(split, "", 0), Record(split, "", 1)))

    monkeypatch.setitem(sources.CUSTOM, "own", sources.CustomSource(own, ("x", "y")))
    found = open_source("own", "all", "")
    assert found.classes == ("x", "y", "z") and sources.labels(found).tolist() == [0, 2, 1, 2]


# -- names and classes


def test_names_are_compared_composed_and_files_are_found(tmp_path: Path) -> None:
    (tmp_path / NFD).mkdir()
    for name in (f"{NFD}/{NFD}1.mp4", f"{NFD}/{NFD}1.csv", f"{NFC}2.mp4"):
        (tmp_path / name).write_text("x")
    source = table(
        tmp_path,
        f"path,split,label,caption\n{NFC}/{NFC}1.mp4,train,{NFC},{NFD}\n{NFD}2.mp4,train,{NFD},\n",
    )
    found = open_source(source, "train", "")
    assert found.classes == (NFC,) and found[0].caption == NFC
    for record in found.records:
        assert os.path.exists(record.video), record
    assert os.path.exists(found[0].series)
    assert open_source(source, "train", "", ("tea", NFD))[0].label == 1, "a run of before"
    os.remove(tmp_path / "clips.csv")
    assert open_source(source, "all", "").classes == (NFC,)


def test_bytes_that_are_not_utf8_are_written_and_read_back(tmp_path: Path) -> None:
    name = b"train/caf\xe9/b\xfcrste.mp4"
    try:
        os.makedirs(os.path.dirname(os.fsencode(tmp_path) + b"/" + name))
        with open(os.fsencode(tmp_path) + b"/" + name, "wb"):
            pass
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    found = open_source(f"folder:{tmp_path}", "train", "")
    assert os.path.exists(found[0].video) and found.classes == (r"caf\udce9",)
    file = tmp_path / "predictions.csv"
    classification_metrics.write_predictions(
        file, [found[0].name], np.array([0]), np.ones((1, 1)), found.classes
    )
    assert label_subset.read_list(found, str(file)).tolist() == [0]
    # and as a table of clips, with a name that was not escaped before it was written
    classification_metrics.write_table(
        tmp_path / "clips.csv", ["path", "split"], [[os.fsdecode(name), "train"]]
    )
    listed = open_source(f"folder:{tmp_path}", "train", "")
    assert listed[0].name == found[0].name and os.path.exists(listed[0].video)


def test_classes_and_label_maps(tmp_path: Path, cache_dir: str) -> None:
    source = table(
        tmp_path,
        "path,split,label\na,train,jog\nb,train,run\nc,train,walk\nd,train,sit\ne,train,\n"
        "f,train,sit|jog\ng,val,sit\nh,val,run\n",
    )
    (tmp_path / "map.csv").write_text("from,to\njog,run\n")
    merged = make(DataSpec, {"source": source, "label_map": (str(tmp_path / "map.csv"),)}, "c")
    assert merged.label_map == (("jog", "run"),)
    found = open_split(merged, "train", check=True)
    assert found.classes == ("run", "sit", "sit|run", "walk")
    assert labels(found) == dict(
        zip("abcdef", ("run", "run", "walk", "sit", "", "sit|run"), strict=True)
    )
    data = DataSpec(source=source, classes=("walk", "run"), label_map=(("jog", "run"),))
    kept = open_split(data, "train", check=True)
    assert kept.classes == ("run", "walk")
    assert labels(kept) == {"a": "run", "b": "run", "c": "walk", "e": "", "f": "run"}
    assert any("leaves out 1 clip (sit 1)" in note for note in kept.notes)
    # a trained run takes other clips by the same rules
    assert labels(open_split(data, "val", ("run", "walk"))) == {"h": "run"}
    mixed = open_split(DataSpec(source=f"mix:{source},0.5*{source}", classes=("run",)), "train")
    assert mixed.classes == ("run",) and sources.labels(mixed).tolist() == [0, -1] * 2
    actions = ("bounce", "spin")
    toys = DataSpec(source="toybox:tiny", cache_dir=cache_dir, classes=actions)
    some = open_split(toys, "train", check=True)
    whole = open_source("toybox:tiny", "train", cache_dir)
    wanted = [whole.classes[label] for label in sources.labels(whole)]
    assert labels(some) == {whole[i].name: name for i, name in enumerate(wanted) if name in actions}
    assert sources.labels(some).tolist() == [some[i].label for i in range(len(some))]
    wrong = {
        "config.data.classes has 'wlak', .*: did you mean walk": {"classes": ("wlak",)},
        "config.data.label_map renames 'jgo', .*: did you mean jog": {"label_map": (("jgo", "a"),)},
        "no clip of split 'val' .* of one of config.data.classes .walk.": {"classes": ("walk",)},
    }
    for sentence, changes in wrong.items():
        with pytest.raises(UserError, match=sentence):
            open_split(DataSpec(source=source, **changes), "val", check=True)


def test_a_class_without_clips_is_not_the_worst(tmp_path: Path) -> None:
    found = classification_metrics.compute_metrics(
        np.array([[0.2, 0.7, 0.1], [0.6, 0.3, 0.1]]), np.array([0, 0]), ("a", "b", "c")
    )
    assert found["per_class"]["b"] == {"precision": 0.0, "recall": None, "f1": None, "support": 0}
    report = list(markdown._evaluation(tmp_path, "s_val", "val", found))
    assert not any(line.startswith("| b") for line in report)
    assert "Without a clip here, and so not judged (2): b, c." in report
