# SPDX-License-Identifier: Apache-2.0
"""Exports any source as a TFDS data set of array_record shards, written in parallel.

A shard is complete or absent: it is written under a temporary name and renamed, and its .json note
marks it complete. So an interrupted job resumes, and a process pool and Apache Beam write identical
files.
"""

import errno
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from particlejax.core.io import fresh_file, write_json
from particlejax.core.typing import UserError
from particlejax.data import sources
from particlejax.data.video import timeout
from particlejax.data.video.decode import Unreadable, Video

VERSION = "1.0.0"
_PLAN = "plan.json"
_INFO = "dataset_info.json"  # marks a TFDS data set
_FORMAT = "array_record"


@dataclass(frozen=True)
class Shard:
    """Clips first..last-1 of a split of a source, and their file."""

    source: str
    split: str
    cache_dir: str
    first: int
    last: int
    path: str
    classes: tuple[str, ...]
    time_limit: float

    @property
    def note(self) -> Path:
        """The note of a complete shard."""
        return Path(self.path + ".json")


@dataclass(frozen=True)
class Plan:
    """All shards of a data set, and its folder."""

    folder: Path
    name: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def left(self) -> tuple[Shard, ...]:
        """Shards that are not written yet."""
        return tuple(shard for shard in self.shards if not shard.note.exists())


def plan(
    source: str, out: str, name: str, cache_dir: str, per_shard: int, time_limit: float
) -> Plan:
    """Returns the plan for a source under OUT/NAME/1.0.0. Raises UserError if that folder belongs
    to another plan.
    """
    if not name.isidentifier():
        raise UserError(
            f"config.prepare.name={name!r} is not a valid data set name: use letters, digits and _."
        )
    folder = Path(os.path.expanduser(out)) / name / VERSION
    opened = {
        split: sources.open_source(source, split, cache_dir)
        for split in sources.splits(source, cache_dir)
    }
    classes = next(iter(opened.values())).classes
    shards, said = [], {}
    for split, each in opened.items():
        count = max(1, -(-len(each) // per_shard))
        edges = np.linspace(0, len(each), count + 1).round().astype(int)
        for i, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            path = folder / f"{name}-{split}.{_FORMAT}-{i:05d}-of-{count:05d}"
            shards.append(
                Shard(
                    source, split, cache_dir, int(first), int(last), str(path), classes, time_limit
                )
            )
        said[split] = [len(each), count]
    _remember(folder, {"source": source, "splits": said, "classes": list(classes)})
    return Plan(folder, name, classes, tuple(shards))


def _remember(folder: Path, wanted: dict[str, Any]) -> None:
    path = folder / _PLAN
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != wanted:
            raise UserError(
                f"{folder} belongs to another source, other clips or other shards: set another "
                "config.prepare.data_dir or name, or remove that folder."
            )
        return
    if (folder / _INFO).exists():
        raise UserError(
            f"{folder} contains a data set of another program: set another config.prepare.name."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
    except OSError as error:
        raise _disk(folder, error) from error


def features(classes: Sequence[str]) -> tfds.features.FeaturesDict:
    """Returns the features of a record: the encoded file, and all columns of clips.csv."""
    text = tfds.features.Text
    known: dict[str, Any] = {
        "video": text(),
        "caption": text(),
        "name": text(),
        "group": text(),
        "series": text(),
        "start": text(),  # seconds, as text: TFDS records store floats in 32 bits
        "end": text(),  # seconds, -1: to the end of the file
    }
    if classes:
        known["label"] = tfds.features.ClassLabel(names=list(classes))
    return tfds.features.FeaturesDict(known)


def write(shard: Shard) -> dict[str, Any]:
    """Writes one shard and its note, unless they exist: {'clips': n, 'bytes': n, 'bad': {name:
    reason}}.

    Clips without a decodable frame are left out and listed. Raises UserError if the disk is full.
    """
    if shard.note.exists():
        return json.loads(shard.note.read_text(encoding="utf-8"))
    source = sources.open_source(shard.source, shard.split, shard.cache_dir)
    kind, note = features(shard.classes), {"clips": 0, "bytes": 0, "bad": {}}
    try:
        _check_room(shard, source)
        with fresh_file(shard.path, sync=True) as fresh:  # a full disk may raise only on sync
            writer = ArrayRecordWriter(str(fresh), "group_size:1")
            try:
                for i in range(shard.first, shard.last):
                    _add(writer, kind, source[i], shard, note)
            finally:
                writer.close()
        note["bytes"] = os.path.getsize(shard.path)
        write_json(shard.note, note)
    except (OSError, RuntimeError) as error:
        raise _disk(Path(shard.path).parent, error) from error
    return note


def _add(
    writer: ArrayRecordWriter,
    kind: tfds.features.FeaturesDict,
    record: sources.Record,
    shard: Shard,
    note: dict[str, Any],
) -> None:
    try:
        timeout.within(shard.time_limit, lambda: Video(record.video).close(), record.video)
        example = _example(record, bool(shard.classes))
    except Unreadable as error:
        note["bad"][record.name] = error.reason
        return
    whole = tf_example_pb2.Example.FromString(kind.serialize_example(kind.encode_example(example)))
    # otherwise the order of fields differs between processes
    writer.write(whole.SerializeToString(deterministic=True))
    note["clips"] += 1


def _example(record: sources.Record, labelled: bool) -> dict[str, Any]:
    example = {
        "video": _bytes(record.video),
        "caption": record.caption,
        "name": record.name,
        "group": record.group,
        "series": _bytes(record.series) if record.series else b"",
        "start": repr(float(record.start)),
        "end": "-1" if record.end is None else repr(float(record.end)),
    }
    return example | ({"label": record.label} if labelled else {})


def _bytes(file: str | bytes) -> bytes:
    return file if isinstance(file, bytes) else Path(file).read_bytes()


def _check_room(shard: Shard, source: sources.Source) -> None:
    """Raises OSError for a full disk before writing: the writer would abort the process."""
    videos = (source[i].video for i in range(shard.first, shard.last))
    needed = sum(
        len(v) if isinstance(v, bytes) else os.path.getsize(v)
        for v in videos
        if isinstance(v, bytes) or os.path.exists(v)
    )
    room = os.statvfs(Path(shard.path).parent)
    if needed * 1.05 > room.f_bavail * room.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def finish(plan: Plan) -> dict[str, Any]:
    """Writes the TFDS metadata, which makes the folder a data set. Returns clips, bytes and
    unreadable clips.

    Empty splits are left out; without any clip, nothing is written. Raises UserError if the disk is
    full.
    """
    notes = {shard: json.loads(shard.note.read_text(encoding="utf-8")) for shard in plan.shards}
    infos, clips = [], {}
    for split in dict.fromkeys(shard.split for shard in plan.shards):
        mine = [notes[shard] for shard in plan.shards if shard.split == split]
        clips[split] = sum(note["clips"] for note in mine)
        if not clips[split]:
            _remove(shard for shard in plan.shards if shard.split == split)
            continue
        template = tfds.core.ShardedFileTemplate(
            data_dir=plan.folder, dataset_name=plan.name, split=split, filetype_suffix=_FORMAT
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[note["clips"] for note in mine],
                num_bytes=sum(note["bytes"] for note in mine),
                filename_template=template,
            )
        )
    if infos:
        _describe(plan, infos)
    bad = {
        f"{shard.split}: {name}": why
        for shard, note in notes.items()
        for name, why in note["bad"].items()
    }
    return {
        "num_clips": clips,
        "bytes": sum(info.num_bytes for info in infos),
        "shards": len(plan.shards),
        "bad": bad,
    }


def _remove(shards: Iterable[Shard]) -> None:
    """Deletes the files of an empty split: TFDS expects a split for every file. Notes stay."""
    for shard in shards:
        Path(shard.path).unlink(missing_ok=True)


def _describe(plan: Plan, infos: Sequence[tfds.core.SplitInfo]) -> None:
    template = tfds.core.ShardedFileTemplate(
        data_dir=plan.folder, dataset_name=plan.name, filetype_suffix=_FORMAT
    )
    try:
        tfds.folder_dataset.write_metadata(
            data_dir=plan.folder,
            features=features(plan.classes),
            split_infos=infos,
            filename_template=template,
            check_data=False,
        )
    except OSError as error:
        (plan.folder / _INFO).unlink(missing_ok=True)  # incomplete metadata is no data set
        raise _disk(plan.folder, error) from error


def _disk(folder: Path, error: Exception) -> UserError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else f"{getattr(error, 'strerror', None) or error}"
    return UserError(
        f"{folder} cannot be written ({what}): free disk space and run the same command again; "
        "complete shards are kept."
    )
