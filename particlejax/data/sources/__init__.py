# SPDX-License-Identifier: Apache-2.0
"""Data sources: a folder, a TFDS data set, the toybox or a mixture, each a random-access sequence
of records.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from particlejax.config import plugins
from particlejax.core.typing import UserError
from particlejax.data.sources import folder, mixture, tfds
from particlejax.data.sources.mixture import MixtureSource, parts_of
from particlejax.data.sources.records import SPLIT_NAMES, ListSource, Record, Source, match_classes
from particlejax.data.sources.tfds import TfdsSource

__all__ = (
    "ListSource",
    MixtureSource,
    "Record",
    "Source",
    "TfdsSource",
    "open_source",
    "parts_of",
    "splits",
)


def open_source(
    source: str, split: str, cache_dir: str, classes: tuple[str, ...] | None = None
) -> Source:
    """Opens one split of 'toybox', 'toybox:CONFIG', 'folder:PATH', 'tfds:NAME_OR_PATH' or
    'mix:WEIGHT*SOURCE,...'.

    'folder:PATH#COLUMN' reads labels from another column of clips.csv.

    split: a name, or part of one as in TFDS: 'train[:90%]', 'val[10:20]'. In a folder, parts follow
    a fixed shuffled order that keeps groups together, so two parts share at most one group.
    cache_dir: its folder 'tfds' holds prepared data sets. classes: of a trained run; labels are
    mapped to them by name. Raises UserError for an unknown source, split or label.
    """
    kind, _, location = source.partition(":")
    data_dir = os.path.join(os.path.expanduser(cache_dir), "tfds")
    if kind == "folder" and location:
        return folder.open_folder(location, split, classes)
    if kind == "toybox":
        return tfds.open_builder(
            tfds.toybox(location or "default", data_dir), source, split, classes
        )
    if kind == "tfds" and location:
        try:
            return tfds.open_builder(tfds.find_builder(location, data_dir), source, split, classes)
        except ImportError as error:
            raise tfds.needs_tensorflow(source, error) from error
    if kind == "mix" and location:
        return _open_mix(source, split, cache_dir, classes)
    if kind in CUSTOM:
        return _with_classes(CUSTOM[kind].open(location, split), classes, source)
    raise _unknown(source)


def _with_classes(own_source: Source, classes: tuple[str, ...] | None, source: str) -> Source:
    """Maps a source's labels to the classes of a trained run, if given."""
    if classes is None or not own_source.classes or own_source.classes == classes:
        return own_source
    index = match_classes(own_source.classes, classes, source)
    records = (own_source[i] for i in range(len(own_source)))
    return ListSource(
        classes,
        tuple(
            replace(record, label=index[record.label]) if record.label >= 0 else record
            for record in records
        ),
    )


class CustomSource(NamedTuple):
    """open: (rest of the name, split) -> Source. splits: their names; () for any."""

    open: Callable[[str, str], Source]
    splits: tuple[str, ...]


CUSTOM: dict[str, CustomSource] = {}
Open = TypeVar("Open", bound=Callable[[str, str], Source])


def register_source(
    kind: str, splits: tuple[str, ...] = ("train", "val")
) -> Callable[[Open], Open]:
    """Decorator that registers a source: `config.data.source` may then be 'KIND' or 'KIND:REST'.

    The function maps (REST, split) to a `Source`, such as `ListSource(classes, records)`, and
    raises UserError for an unknown split. Raises ValueError for a kind that is taken.
    """
    if kind in ("toybox", "folder", "tfds", "mix"):
        raise ValueError(f"source {kind!r} exists already: register yours under another name.")

    def register(fn: Open) -> Open:
        plugins.add(CUSTOM, "source", kind, CustomSource(fn, splits))
        return fn

    return register


def splits(source: str, cache_dir: str) -> tuple[str, ...]:
    """Returns the names of a source's splits. Raises UserError as `open_source` does."""
    kind, _, location = source.partition(":")
    data_dir = os.path.join(os.path.expanduser(cache_dir), "tfds")
    if kind == "folder" and location:
        return folder.folder_splits(location)
    if kind == "mix" and location:
        split_sets = [set(splits(part, cache_dir)) for _, part in mixture.parse(source)]
        return tuple(sorted(set.intersection(*split_sets)))
    if kind in ("toybox", "tfds"):
        builder = (
            tfds.toybox(location or "default", data_dir)
            if kind == "toybox"
            else tfds.find_builder(location, data_dir)
        )
        return tuple(SPLIT_NAMES.get(name, name) for name in builder.info.splits)
    if kind in CUSTOM:
        return CUSTOM[kind].splits
    raise _unknown(source)


def _open_mix(
    source: str, split: str, cache_dir: str, classes: tuple[str, ...] | None
) -> MixtureSource:
    weighted_sources = mixture.parse(source)
    if classes is None:
        class_lists = [open_source(name, split, cache_dir).classes for _, name in weighted_sources]
        classes = (
            class_lists[0]
            if all(names == class_lists[0] for names in class_lists)
            else tuple(sorted({name for names in class_lists for name in names}))
        )
    parts = tuple(open_source(name, split, cache_dir, classes) for _, name in weighted_sources)
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    spans = tuple(
        (int(first), len(part), weight)
        for first, part, (weight, _) in zip(offsets, parts, weighted_sources, strict=False)
    )
    return MixtureSource(classes, parts, spans)


def _unknown(source: str) -> UserError:
    return UserError(
        f"unknown data source {source!r}: use 'toybox' (or 'toybox:CONFIG'), 'folder:PATH', "
        "'tfds:NAME' (or 'tfds:PATH' of a prepared data set) or 'mix:WEIGHT*SOURCE,...'."
    )
