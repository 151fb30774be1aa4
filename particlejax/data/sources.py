# SPDX-License-Identifier: Apache-2.0
"""Where clips come from: a folder, a TFDS data set or the toybox, each as a random-access sequence of records."""

import difflib
import importlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from particlejax.data.decode import Unreadable, raw_file
from particlejax.typing import UserError

_VIDEO_NAMES = ("video", "clip", "mp4", "avi", "webm", "mkv", "movie", "video_bytes", "bytes", "frames",
                "image_sequence")
_CAPTION_NAMES = ("caption", "text", "transcript", "sentence")
SPLIT_NAMES = {"valid": "val", "validation": "val"}  # other words for the same split


@dataclass(frozen=True)
class Record:
    """One clip, not yet decoded."""

    # How logs and predictions name it: the path in its folder (with @start-end where several clips are of one file), or the
    # example's name, else 'split/00012'.
    name: str
    video: str | bytes  # a path, or the encoded file itself
    label: int = -1  # index into Source.classes, -1: unlabelled
    caption: str = ""
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None: to the end of the file
    series: str | bytes = ""  # a CSV of numeric channels, as a path or as it is; '': none
    group: str = ""  # clips of one group (one source video, one person) never stand in two splits

    def until(self, duration: float) -> float:
        """Where the clip ends, in seconds, in a file that lasts so long. Raises Unreadable where it begins past its end."""
        if self.start >= duration:
            raise Unreadable(f"starts at {self.start:g} s but lasts {duration:g} s")
        return duration if self.end is None else min(duration, self.end)


class Source(Protocol):
    """Random access to the records of one split; picklable, as Grain's workers need it."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record: ...


@dataclass(frozen=True)
class Listed:
    """A source whose records are all known beforehand."""

    classes: tuple[str, ...]
    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Record:
        return self.records[i]


@dataclass(frozen=True)
class TfdsSource:
    """A source over `tfds.data_source`; `fields` says which feature is the video, label, caption, name and group."""

    classes: tuple[str, ...]
    examples: Sequence[Mapping[str, Any]]
    fields: Mapping[str, str]
    labels: tuple[int, ...]  # of the data set's label, the index into `classes`
    split: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Record:
        try:
            example = self.examples[i]
        except ImportError as error:
            raise _needs_tensorflow(self.split, error) from error
        words = {k: _text(example[self.fields[k]]) for k in ("caption", "name", "group") if k in self.fields}
        if "series" in self.fields:
            words["series"] = example[self.fields["series"]]
        if "start" in self.fields and "end" in self.fields:
            start, end = (float(example[self.fields[k]]) for k in ("start", "end"))
            words |= {"start": start, "end": end if end >= 0 else None}
        label = int(example[self.fields["label"]]) if "label" in self.fields else -1
        words["name"] = words.get("name") or f"{self.split}/{i:05d}"
        label = self.labels[label] if label >= 0 else -1
        return Record(video=_file(example[self.fields["video"]]), label=label, **words)


@dataclass(frozen=True)
class Mixed:
    """Several sources one after the other; training draws from each by its weight. Their classes are joined by name."""

    classes: tuple[str, ...]
    parts: tuple[Source, ...]
    spans: tuple[tuple[int, int, float], ...]  # (first clip, clips, weight) of each

    def __len__(self) -> int:
        return sum(count for _, count, _ in self.spans)

    def __getitem__(self, i: int) -> Record:
        for part, (first, count, _) in zip(self.parts, self.spans, strict=True):
            if first <= i < first + count:
                return part[i - first]
        raise IndexError(i)


def open_source(source: str, split: str, cache_dir: str, classes: tuple[str, ...] | None = None) -> Source:
    """Opens one split of 'toybox', 'toybox:CONFIG', 'folder:PATH', 'tfds:NAME_OR_PATH' or 'mix:WEIGHT*SOURCE,...'.

    'folder:PATH#COLUMN' takes the labels from another column of its clips.csv.

    split: a name, or part of one as in TFDS: 'train[:90%]', 'val[10:20]'; in a folder a part is taken in an order that
    shuffles groups but keeps them together, so that parts are like the whole and share at most one group.
    cache_dir: prepared data sets live in its folder 'tfds'. classes: of the run that was trained, labels are mapped to
    them by name. Raises UserError when there is no such source, split or label.
    """
    kind, _, rest = source.partition(":")
    data_dir = os.path.join(os.path.expanduser(cache_dir), "tfds")
    if kind == "folder" and rest:
        from particlejax.data.folder import open_folder  # it builds on the records above

        return open_folder(rest, split, classes)
    if kind == "toybox":
        return _open_builder(_toybox(rest or "default", data_dir), source, split, classes)
    if kind == "tfds" and rest:
        try:
            return _open_builder(_find_builder(rest, data_dir), source, split, classes)
        except ImportError as error:
            raise _needs_tensorflow(source, error) from error
    if kind == "mix" and rest:
        return _open_mix(source, split, cache_dir, classes)
    raise _unknown(source)


def splits(source: str, cache_dir: str) -> tuple[str, ...]:
    """Names of the splits that a source has. Raises UserError as `open_source` does."""
    kind, _, rest = source.partition(":")
    data_dir = os.path.join(os.path.expanduser(cache_dir), "tfds")
    if kind == "folder" and rest:
        from particlejax.data.folder import folder_splits

        return folder_splits(rest)
    if kind == "mix" and rest:
        each = [set(splits(part, cache_dir)) for _, part in _mixture(source)]
        return tuple(sorted(set.intersection(*each)))
    if kind in ("toybox", "tfds"):
        builder = _toybox(rest or "default", data_dir) if kind == "toybox" else _find_builder(rest, data_dir)
        return tuple(SPLIT_NAMES.get(name, name) for name in builder.info.splits)
    raise _unknown(source)


def parts_of(source: "Source") -> tuple[tuple[int, int, float], ...]:
    """(first clip, clips, weight) of each part of a mixture; a source that is none is one part."""
    return source.spans if isinstance(source, Mixed) else ((0, len(source), 1.0),)


def _mixture(source: str) -> list[tuple[float, str]]:
    """(weight, source) of 'mix:0.7*folder:A,0.3*toybox'."""
    found = []
    for part in source.partition(":")[2].split(","):
        weight, star, name = part.strip().rpartition("*")
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = 0.0
        if not 0 < value < math.inf or not name:
            raise UserError(f"data source {source!r}: {part!r} is not WEIGHT*SOURCE with a weight above 0, so write it like "
                            "'mix:0.7*folder:A,0.3*folder:B'.")
        found.append((value, name))
    return found


def _open_mix(source: str, split: str, cache_dir: str, classes: tuple[str, ...] | None) -> "Mixed":
    mixture = _mixture(source)
    if classes is None:
        each = [open_source(name, split, cache_dir).classes for _, name in mixture]
        classes = each[0] if all(names == each[0] for names in each) else tuple(sorted({n for names in each for n in names}))
    parts = tuple(open_source(name, split, cache_dir, classes) for _, name in mixture)
    firsts = np.cumsum([0, *(len(part) for part in parts)])
    spans = tuple((int(first), len(part), weight) for first, part, (weight, _) in zip(firsts, parts, mixture, strict=False))
    return Mixed(classes, parts, spans)


def _unknown(source: str) -> UserError:
    return UserError(f"data source {source!r} is none of 'toybox' (or 'toybox:CONFIG'), 'folder:PATH', 'tfds:NAME' (or "
                     "'tfds:PATH' of a prepared data set) and 'mix:WEIGHT*SOURCE,...': write it as one of these.")


def match_classes(labels: Sequence[str], classes: tuple[str, ...], source: str) -> tuple[int, ...]:
    """For each label its index in `classes`; a label that is not among them is a UserError."""
    index = {name: i for i, name in enumerate(classes)}
    for label in labels:
        if label not in index:
            near = difflib.get_close_matches(label, classes, 3, 0.5)
            some = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
            hint = f"nearest: {', '.join(near)}" if near else f"known: {some}"
            raise UserError(f"label {label!r} of {source} is not a class of the trained run ({hint}): rename it to one "
                            "of its classes or leave these clips out.")
    return tuple(index[label] for label in labels)


def _toybox(config: str, data_dir: str) -> Any:
    from particlejax.data.toybox import builder

    known = [each.name for each in builder.Toybox.BUILDER_CONFIGS]
    if config not in known:
        raise UserError(f"'toybox:{config}' has no configuration {config!r}: name one of {', '.join(known)}.")
    return builder.prepare(config=config, data_dir=data_dir)


def _find_builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return tfds.builder_from_directory(_prepared_folder(path))
    if os.path.isabs(path):
        raise UserError(f"tfds:{name}: there is no such folder, so check the path of the prepared data set.")
    importlib.import_module("tensorflow_datasets.video")  # only this registers the builders of the video data sets
    places = (data_dir, os.path.expanduser(tfds.core.constants.DATA_DIR))
    known = False
    for place in places:
        try:
            builder = tfds.builder(name, data_dir=place)
        except tfds.core.registered.DatasetNotFoundError:
            continue
        known = True
        if builder.info.splits:
            return builder
    where = f"under {' or '.join(places)}"
    if known:
        raise UserError(f"tfds:{name} is not prepared {where}: run `tfds build {name} --data_dir {data_dir} "
                        "--file_format array_record` first.")
    raise UserError(f"tfds:{name} is neither a folder, nor known to TFDS, nor prepared {where}: correct the name or "
                    "give the path of a prepared data set.")


def _prepared_folder(path: str) -> str:
    """`path` itself, or the one folder below it (config, version) that holds a prepared data set."""
    found = [folder for folder, _, files in os.walk(path) if "dataset_info.json" in files]
    if len(found) == 1:
        return found[0]
    several = f"holds several prepared data sets ({', '.join(sorted(found)[:5])})"
    what = several if found else "holds no dataset_info.json"
    raise UserError(f"tfds:{path} {what}: give the folder of one prepared version, the one with dataset_info.json.")


def _open_builder(builder: Any, source: str, split: str, classes: tuple[str, ...] | None) -> TfdsSource:
    fields = _fields(builder.info.features, source)
    names = tuple(builder.info.features[fields["label"]].names) if "label" in fields else ()
    labels = tuple(range(len(names))) if classes is None else match_classes(names, classes, source)
    split = _known_split(split, list(builder.info.splits), source)
    try:
        examples = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(f"{source} in {builder.data_dir} is in a file format without random access: prepare it again "
                        "with `--file_format array_record`.") from error
    except ValueError as error:
        raise UserError(f"{source} cannot be split as {split!r}: write a split like 'train[:90%]'.") from error
    return TfdsSource(names if classes is None else classes, examples, fields, labels, split)


def _known_split(split: str, known: list[str], source: str) -> str:
    """`split` in the data set's own words for its splits."""
    own = {SPLIT_NAMES.get(name, name): name for name in known} | {name: name for name in known}

    def translate(match: re.Match[str]) -> str:
        name = SPLIT_NAMES.get(match[0], match[0]) if match[0] not in own else match[0]
        if name not in own:
            raise UserError(f"{source} has no split {match[0]!r}: name one of {', '.join(known)}.")
        return own[name]

    return re.sub(r"(?:(?<=^)|(?<=\+))\w+", translate, split.replace(" ", ""))


def _fields(features: Mapping[str, Any], source: str) -> dict[str, str]:
    """Which feature plays which part, by its name and its type."""
    videos = [name for name, feature in features.items() if _may_be_video(name, feature)]
    videos.sort(key=lambda name: _VIDEO_NAMES.index(name) if name in _VIDEO_NAMES else len(_VIDEO_NAMES))
    if not videos:
        raise UserError(f"{source} has no video feature among {', '.join(features)}: name it 'video' and store the "
                        "encoded file (Text, or a scalar Tensor of bytes) or frames (Tensor of uint8 [T, H, W, 3]).")
    labels = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    fields = {"video": videos[0]}
    if "label" in labels or len(labels) == 1:
        fields["label"] = "label" if "label" in labels else labels[0]
    texts = {name for name, feature in features.items() if type(feature).__name__ == "Text"} - {videos[0]}
    if caption := [name for name in _CAPTION_NAMES if name in texts]:
        fields["caption"] = caption[0]
    ours = {"start", "end"} if {"start", "end", "series"} <= set(features) else set()  # a data set made by `prepare`
    return fields | {name: name for name in ("name", "group", "series") if name in texts} | {name: name for name in ours}


def _may_be_video(name: str, feature: Any) -> bool:
    kind, shape = type(feature).__name__, getattr(feature, "shape", None)
    if kind == "Video" or (shape is not None and len(shape) == 4 and shape[-1] in (1, 3)):
        return True
    scalar = shape == () and getattr(feature, "np_dtype", None) in (np.object_, object)
    return name in _VIDEO_NAMES and (kind == "Text" or scalar)


def _file(video: Any) -> bytes:
    if isinstance(video, bytes):
        return video
    frames = np.asarray(video, np.uint8)  # decoded already; its rate is not known
    return raw_file(np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _needs_tensorflow(source: str, error: ImportError) -> UserError:
    missing = str(error).strip().splitlines()[-1].rsplit(": ")[-1]  # TFDS puts what it was doing before it
    return UserError(f"{source} has a feature that TFDS reads with TensorFlow only ({missing}): run "
                     "`pip install particlejax[tensorflow]`.")
