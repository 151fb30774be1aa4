# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets and the toybox as sources."""

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from particlejax.core import text
from particlejax.core.errors import UserError, install_line
from particlejax.data.sources import split_names
from particlejax.data.sources.records import Record, match_classes
from particlejax.data.video.decode import raw_file

_VIDEO_NAMES = (
    "video",
    "clip",
    "mp4",
    "avi",
    "webm",
    "mkv",
    "movie",
    "video_bytes",
    "bytes",
    "frames",
    "image_sequence",
)
_CAPTION_NAMES = ("caption", "text", "transcript", "sentence")


@dataclass(frozen=True)
class TfdsSource:
    """A source over `tfds.data_source`; `fields` maps video, label, caption, name and group to
    features.
    """

    classes: tuple[str, ...]
    examples: Sequence[Mapping[str, Any]]
    fields: Mapping[str, str]
    labels: tuple[int, ...]  # index into `classes` per label of the data set
    split: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Record:
        try:
            example = self.examples[i]
        except ImportError as error:
            raise needs_tensorflow(self.split, error) from error
        record_fields = {
            key: _text(example[self.fields[key]])
            for key in ("caption", "name", "group")
            if key in self.fields
        }
        if "series" in self.fields:
            record_fields["series"] = example[self.fields["series"]]
        if "start" in self.fields and "end" in self.fields:
            start, end = (float(example[self.fields[key]]) for key in ("start", "end"))
            record_fields |= {"start": start, "end": end if end >= 0 else None}
        label = int(example[self.fields["label"]]) if "label" in self.fields else -1
        record_fields["name"] = record_fields.get("name") or f"{self.split}/{i:05d}"
        label = self.labels[label] if label >= 0 else -1
        return Record(video=_file(example[self.fields["video"]]), label=label, **record_fields)

    def clip_labels(self) -> np.ndarray:
        """Labels int [N], -1 if unlabeled."""
        if "label" not in self.fields:
            return np.full(len(self), -1)
        return np.array([self[i].label for i in range(len(self))], int)


def toybox(config: str, data_dir: str) -> Any:
    from particlejax.data.sources.toybox import builder

    names = [builder_config.name for builder_config in builder.Toybox.BUILDER_CONFIGS]
    if config not in names:
        raise UserError(
            f"'toybox:{config}' has no configuration {config!r}: use one of {', '.join(names)}."
        )
    return builder.prepare(config=config, data_dir=data_dir)


def find_builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return tfds.builder_from_directory(_prepared_folder(path))
    if os.path.isabs(path):
        raise UserError(
            f"tfds:{name}: the folder does not exist: check the path of the prepared data set."
        )
    # this import registers the builders of video data sets
    importlib.import_module("tensorflow_datasets.video")
    data_dirs = (data_dir, os.path.expanduser(tfds.core.constants.DATA_DIR))
    is_known = False
    for candidate_dir in data_dirs:
        try:
            builder = tfds.builder(name, data_dir=candidate_dir)
        except tfds.core.registered.DatasetNotFoundError:
            continue
        is_known = True
        if builder.info.splits:
            return builder
    searched = f"under {' or '.join(data_dirs)}"
    if is_known:
        raise UserError(
            f"tfds:{name} is not prepared {searched}: run `tfds build {name} --data_dir {data_dir} "
            "--file_format array_record` first."
        )
    raise UserError(
        f"tfds:{name} is neither a folder, nor known to TFDS, nor prepared {searched}: correct the "
        "name, or use the path of a prepared data set."
    )


def _prepared_folder(path: str) -> str:
    """Returns `path` or the one folder below it (config, version) that holds a prepared data set.
    Raises UserError if there is none or several.
    """
    folders = [folder for folder, _, files in os.walk(path) if "dataset_info.json" in files]
    if len(folders) == 1:
        return folders[0]
    several_found = f"holds several prepared data sets ({', '.join(sorted(folders)[:5])})"
    problem = several_found if folders else "holds no dataset_info.json"
    raise UserError(
        f"tfds:{path} {problem}: use the folder of one prepared version, with dataset_info.json."
    )


def open_builder(
    builder: Any, source: str, split: str, classes: tuple[str, ...] | None
) -> TfdsSource:
    fields = _fields(builder.info.features, source)
    names = builder.info.features[fields["label"]].names if "label" in fields else ()
    names = tuple(map(text.nfc, names))
    labels = tuple(range(len(names))) if classes is None else match_classes(names, classes, source)
    split = _translate_split(split, builder, source)
    try:
        examples = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"{source} in {builder.data_dir} is in a file format without random access: prepare it "
            "again with `--file_format array_record`."
        ) from error
    except ValueError as error:
        raise split_names.UnknownSplit(
            f"{source} has no split {split!r}: write a split like 'train[:90%]'."
        ) from error
    return TfdsSource(names if classes is None else classes, examples, fields, labels, split)


def builder_splits(builder: Any) -> tuple[str, ...]:
    """Returns the splits of a data set; the words of train, val and test are written so."""
    words = split_names.of_names(builder.info.splits)
    ours = {name: split_names.canonical(name) for name in builder.info.splits}
    return tuple(split if words.get(split) == name else name for name, split in ours.items())


def _translate_split(split: str, builder: Any, source: str) -> str:
    """Translates `split` to the data set's own split names; 'all' becomes all of them."""
    names = list(builder.info.splits)
    words = split_names.of_names(names)

    def translate(part: str) -> str:
        name, bracket, bounds = part.partition("[")
        found = split_names.find(name, names, words, source)
        chosen = [found] if found in names else names
        return "+".join(f"{name}{bracket}{bounds}" for name in chosen)

    return "+".join(map(translate, split.replace(" ", "").split("+")))


def _fields(features: Mapping[str, Any], source: str) -> dict[str, str]:
    """Maps roles (video, label, ...) to features, by name and type."""
    videos = [name for name, feature in features.items() if _may_be_video(name, feature)]
    videos.sort(
        key=lambda name: _VIDEO_NAMES.index(name) if name in _VIDEO_NAMES else len(_VIDEO_NAMES)
    )
    if not videos:
        raise UserError(
            f"{source} has no video feature among {', '.join(features)}: name it 'video' and store "
            "the encoded file (Text, or a scalar Tensor of bytes) or frames (Tensor of uint8 "
            "[T, H, W, 3])."
        )
    labels = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    fields = {"video": videos[0]}
    if "label" in labels or len(labels) == 1:
        fields["label"] = "label" if "label" in labels else labels[0]
    texts = {name for name, feature in features.items() if type(feature).__name__ == "Text"} - {
        videos[0]
    }
    if caption := [name for name in _CAPTION_NAMES if name in texts]:
        fields["caption"] = caption[0]
    # a data set of job prepare_data
    export_fields = {"start", "end"} if {"start", "end", "series"} <= set(features) else set()
    return (
        fields
        | {name: name for name in ("name", "group", "series") if name in texts}
        | {name: name for name in export_fields}
    )


def _may_be_video(name: str, feature: Any) -> bool:
    kind, shape = type(feature).__name__, getattr(feature, "shape", None)
    if kind == "Video" or (shape is not None and len(shape) == 4 and shape[-1] in (1, 3)):
        return True
    is_scalar_bytes = shape == () and getattr(feature, "np_dtype", None) in (np.object_, object)
    return name in _VIDEO_NAMES and (kind == "Text" or is_scalar_bytes)


def _file(video: Any) -> bytes:
    if isinstance(video, bytes):
        return video
    frames = np.asarray(video, np.uint8)  # decoded frames, of unknown frame rate
    return raw_file(np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames)


def _text(value: Any) -> str:
    return text.escape(os.fsdecode(value) if isinstance(value, bytes) else str(value))


def needs_tensorflow(source: str, error: ImportError) -> UserError:
    # the last part of TFDS's error message
    missing = str(error).strip().splitlines()[-1].rsplit(": ")[-1]
    return UserError(
        f"{source} has a feature that TFDS only reads with TensorFlow ({missing}): run "
        f"`{install_line('tensorflow')}`."
    )
