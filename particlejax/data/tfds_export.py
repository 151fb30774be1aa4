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

from particlejax.core.io import atomic_file, write_json
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
    def note_path(self) -> Path:
        """The note of a complete shard."""
        return Path(self.path + ".json")


@dataclass(frozen=True)
class ExportPlan:
    """All shards of a data set, and its folder."""

    folder: Path
    name: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def remaining(self) -> tuple[Shard, ...]:
        """Shards that are not written yet."""
        return tuple(shard for shard in self.shards if not shard.note_path.exists())


def make_plan(
    source: str, out: str, name: str, cache_dir: str, per_shard: int, time_limit: float
) -> ExportPlan:
    """Returns the plan for a source under OUT/NAME/1.0.0. Raises UserError if that folder belongs
    to another plan.
    """
    if not name.isidentifier():
        raise UserError(
            f"config.prepare.name={name!r} is not a valid data set name: use letters, digits and _."
        )
    folder = Path(os.path.expanduser(out)) / name / VERSION
    opened_sources = {
        split: sources.open_source(source, split, cache_dir)
        for split in sources.splits(source, cache_dir)
    }
    classes = next(iter(opened_sources.values())).classes
    shards, split_sizes = [], {}
    for split, opened_source in opened_sources.items():
        count = max(1, -(-len(opened_source) // per_shard))
        edges = np.linspace(0, len(opened_source), count + 1).round().astype(int)
        for i, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            path = folder / f"{name}-{split}.{_FORMAT}-{i:05d}-of-{count:05d}"
            shards.append(
                Shard(
                    source, split, cache_dir, int(first), int(last), str(path), classes, time_limit
                )
            )
        split_sizes[split] = [len(opened_source), count]
    _write_plan(folder, {"source": source, "splits": split_sizes, "classes": list(classes)})
    return ExportPlan(folder, name, classes, tuple(shards))


def _write_plan(folder: Path, contents: dict[str, Any]) -> None:
    path = folder / _PLAN
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != contents:
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
        write_json(path, contents)
    except OSError as error:
        raise _disk_error(folder, error) from error


def features(classes: Sequence[str]) -> tfds.features.FeaturesDict:
    """Returns the features of a record: the encoded file, and all columns of clips.csv."""
    text = tfds.features.Text
    features: dict[str, Any] = {
        "video": text(),
        "caption": text(),
        "name": text(),
        "group": text(),
        "series": text(),
        "start": text(),  # seconds, as text: TFDS records store floats in 32 bits
        "end": text(),  # seconds, -1: to the end of the file
    }
    if classes:
        features["label"] = tfds.features.ClassLabel(names=list(classes))
    return tfds.features.FeaturesDict(features)


def write_shard(shard: Shard) -> dict[str, Any]:
    """Writes one shard and its note, unless they exist: {'clips': n, 'bytes': n, 'bad': {name:
    reason}}.

    Clips without a decodable frame are left out and listed. Raises UserError if the disk is full.
    """
    if shard.note_path.exists():
        return json.loads(shard.note_path.read_text(encoding="utf-8"))
    source = sources.open_source(shard.source, shard.split, shard.cache_dir)
    feature_spec, note = features(shard.classes), {"clips": 0, "bytes": 0, "bad": {}}
    try:
        _check_disk_space(shard, source)
        with atomic_file(shard.path, sync=True) as temporary:  # a full disk may raise only on sync
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            try:
                for i in range(shard.first, shard.last):
                    _add(writer, feature_spec, source[i], shard, note)
            finally:
                writer.close()
        note["bytes"] = os.path.getsize(shard.path)
        write_json(shard.note_path, note)
    except (OSError, RuntimeError) as error:
        raise _disk_error(Path(shard.path).parent, error) from error
    return note


def _add(
    writer: ArrayRecordWriter,
    feature_spec: tfds.features.FeaturesDict,
    record: sources.Record,
    shard: Shard,
    note: dict[str, Any],
) -> None:
    try:
        timeout.run_with_timeout(
            shard.time_limit, lambda: Video(record.video).close(), record.video
        )
        example = _example(record, bool(shard.classes))
    except Unreadable as error:
        note["bad"][record.name] = error.reason
        return
    encoded = tf_example_pb2.Example.FromString(
        feature_spec.serialize_example(feature_spec.encode_example(example))
    )
    # otherwise the order of fields differs between processes
    writer.write(encoded.SerializeToString(deterministic=True))
    note["clips"] += 1


def _example(record: sources.Record, labeled: bool) -> dict[str, Any]:
    example = {
        "video": _bytes(record.video),
        "caption": record.caption,
        "name": record.name,
        "group": record.group,
        "series": _bytes(record.series) if record.series else b"",
        "start": repr(float(record.start)),
        "end": "-1" if record.end is None else repr(float(record.end)),
    }
    return example | ({"label": record.label} if labeled else {})


def _bytes(file: str | bytes) -> bytes:
    return file if isinstance(file, bytes) else Path(file).read_bytes()


def _check_disk_space(shard: Shard, source: sources.Source) -> None:
    """Raises OSError for a full disk before writing: the writer would abort the process."""
    videos = (source[i].video for i in range(shard.first, shard.last))
    needed = sum(
        len(v) if isinstance(v, bytes) else os.path.getsize(v)
        for v in videos
        if isinstance(v, bytes) or os.path.exists(v)
    )
    disk = os.statvfs(Path(shard.path).parent)
    if needed * 1.05 > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def finish(plan: ExportPlan) -> dict[str, Any]:
    """Writes the TFDS metadata, which makes the folder a data set. Returns clips, bytes and
    unreadable clips.

    Empty splits are left out; without any clip, nothing is written. Raises UserError if the disk is
    full.
    """
    notes = {
        shard: json.loads(shard.note_path.read_text(encoding="utf-8")) for shard in plan.shards
    }
    infos, num_clips = [], {}
    for split in dict.fromkeys(shard.split for shard in plan.shards):
        split_notes = [notes[shard] for shard in plan.shards if shard.split == split]
        num_clips[split] = sum(note["clips"] for note in split_notes)
        if not num_clips[split]:
            _remove(shard for shard in plan.shards if shard.split == split)
            continue
        template = tfds.core.ShardedFileTemplate(
            data_dir=plan.folder, dataset_name=plan.name, split=split, filetype_suffix=_FORMAT
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[note["clips"] for note in split_notes],
                num_bytes=sum(note["bytes"] for note in split_notes),
                filename_template=template,
            )
        )
    if infos:
        _write_metadata(plan, infos)
    unreadable = {
        f"{shard.split}: {name}": reason
        for shard, note in notes.items()
        for name, reason in note["bad"].items()
    }
    return {
        "num_clips": num_clips,
        "bytes": sum(info.num_bytes for info in infos),
        "shards": len(plan.shards),
        "bad": unreadable,
    }


def _remove(shards: Iterable[Shard]) -> None:
    """Deletes the files of an empty split: TFDS expects a split for every file. Notes stay."""
    for shard in shards:
        Path(shard.path).unlink(missing_ok=True)


def _write_metadata(plan: ExportPlan, infos: Sequence[tfds.core.SplitInfo]) -> None:
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
        raise _disk_error(plan.folder, error) from error


def _disk_error(folder: Path, error: Exception) -> UserError:
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    problem = "the disk is full" if is_full else f"{getattr(error, 'strerror', None) or error}"
    return UserError(
        f"{folder} cannot be written ({problem}): free disk space and run the same command again; "
        "complete shards are kept."
    )
