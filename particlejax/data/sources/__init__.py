# SPDX-License-Identifier: Apache-2.0
"""Data sources: a folder, a TFDS data set, the toybox or a mixture, each a random-access sequence
of records.
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from particlejax.config import plugins
from particlejax.config.data import DataSpec
from particlejax.core.typing import UserError
from particlejax.data.sources import folder, label_rules, mixture, tfds
from particlejax.data.sources.label_rules import NO_RULES, LabelRules
from particlejax.data.sources.mixture import MixtureSource, parts_of
from particlejax.data.sources.records import ListSource, Record, Source, labels, match_classes
from particlejax.data.sources.split_names import ALL, UnknownSplit
from particlejax.data.sources.tfds import TfdsSource

__all__ = (
    "ListSource",
    "MixtureSource",
    "Record",
    "Source",
    "TfdsSource",
    "labels",
    "open_source",
    "open_split",
    "parts_of",
    "splits",
)


def open_split(
    data: DataSpec,
    split: str = "",
    classes: tuple[str, ...] | None = None,
    key: str = "config.data.split",
    check: bool = False,
) -> Source:
    """Opens a split of `data.source` with the labels that `data.classes` and `data.label_map` make.

    split: '' for `data.split`. key: the setting that holds it, for errors. check: refuses rules
    that name no label of the source; a trained run's rules need not fit another source. Raises
    UserError as `open_source` does.
    """
    rules, split = label_rules.rules_of(data), split or data.split
    if check and rules:
        whole = open_source(data.source, split, data.cache_dir, key=key)
        rules.check(whole.classes, data.source)
    return open_source(data.source, split, data.cache_dir, classes, rules, key)


def open_source(
    source: str,
    split: str,
    cache_dir: str,
    classes: tuple[str, ...] | None = None,
    rules: LabelRules = NO_RULES,
    key: str = "",
) -> Source:
    """Opens one split of 'toybox', 'toybox:CONFIG', 'folder:PATH', 'tfds:NAME_OR_PATH' or
    'mix:WEIGHT*SOURCE,...'.

    'folder:PATH#COLUMN' reads labels from another column of clips.csv.

    split: a name, or part of one as in TFDS: 'train[:90%]', 'val[10:20]'; 'all' is every clip of
    every split. In a folder, parts follow a fixed shuffled order that keeps groups together, so two
    parts share at most one group. cache_dir: its folder 'tfds' holds prepared data sets. classes:
    of a trained run; labels are mapped to them by name. rules: labels that are renamed or left out.
    key: the setting that holds the split. Raises UserError for an unknown source, split or label.
    """
    try:
        return _open(source, split, cache_dir, classes, rules)
    except UnknownSplit as error:
        raise UnknownSplit(f"{key}={split!r}: {error}" if key else str(error)) from error


def _open(
    source: str, split: str, cache_dir: str, classes: tuple[str, ...] | None, rules: LabelRules
) -> Source:
    kind, _, location = source.partition(":")
    if kind == "mix" and location:
        return _open_mix(source, split, cache_dir, classes, rules)
    if rules:
        whole = _open(source, split, cache_dir, None, NO_RULES)
        relabeled = label_rules.relabel(whole, rules, f"split {split!r} of {source}")
        return _with_classes(relabeled, classes, source)
    if kind == "folder" and location:
        return folder.open_folder(location, split, classes)
    if kind == "toybox":
        builder = tfds.toybox(location or "default", _tfds_dir(cache_dir))
        return tfds.open_builder(builder, source, split, classes)
    if kind == "tfds" and location:
        try:
            builder = tfds.find_builder(location, _tfds_dir(cache_dir))
            return tfds.open_builder(builder, source, split, classes)
        except ImportError as error:
            raise tfds.needs_tensorflow(source, error) from error
    if kind in CUSTOM:
        return _open_custom(CUSTOM[kind], source, split, classes)
    raise _unknown(source)


def _tfds_dir(cache_dir: str) -> str:
    return os.path.join(os.path.expanduser(cache_dir), "tfds")


def _open_custom(
    custom: "CustomSource", source: str, split: str, classes: tuple[str, ...] | None
) -> Source:
    location = source.partition(":")[2]
    if split != ALL or ALL in custom.splits or not custom.splits:
        return _with_classes(custom.open(location, split), classes, source)
    parts = [custom.open(location, name) for name in custom.splits]
    classes = _union(parts) if classes is None else classes
    weighted_parts = [(float(len(part)), _with_classes(part, classes, source)) for part in parts]
    return _mixture(classes, weighted_parts)


def _with_classes(own_source: Source, classes: tuple[str, ...] | None, source: str) -> Source:
    """Maps a source's labels to the classes of a trained run, if given."""
    if classes is None or not own_source.classes or own_source.classes == classes:
        return own_source
    index = match_classes(own_source.classes, classes, source)
    return label_rules.with_labels(own_source, classes, index)


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
    if kind == "folder" and location:
        return folder.folder_splits(location)
    if kind == "mix" and location:
        split_sets = [set(splits(part, cache_dir)) for _, part in mixture.parse(source)]
        return tuple(sorted(set.intersection(*split_sets)))
    if kind == "toybox":
        return tfds.builder_splits(tfds.toybox(location or "default", _tfds_dir(cache_dir)))
    if kind == "tfds" and location:
        return tfds.builder_splits(tfds.find_builder(location, _tfds_dir(cache_dir)))
    if kind in CUSTOM:
        return CUSTOM[kind].splits
    raise _unknown(source)


def notes(source: Source) -> tuple[str, ...]:
    """Returns sentences for the log: what was made of a source or left out of it."""
    return tuple(getattr(source, "notes", ()))


def locate_label(source: str, label: str) -> str:
    """Returns where a source has a label: "FILE, line N, column 'COLUMN'", or the source."""
    kind, _, location = source.partition(":")
    if kind == "folder" and location:
        return folder.locate_label(location, label)
    parts = [part for _, part in mixture.parse(source)] if kind == "mix" else []
    places = (locate_label(part, label) for part in parts)
    return next((place for place in places if ", line " in place), source)


def _open_mix(
    source: str, split: str, cache_dir: str, classes: tuple[str, ...] | None, rules: LabelRules
) -> MixtureSource:
    weighted_names = mixture.parse(source)
    if classes is None:
        classes = _union(
            [open_source(name, split, cache_dir, None, rules) for _, name in weighted_names]
        )
    return _mixture(
        classes,
        [
            (weight, open_source(name, split, cache_dir, classes, rules))
            for weight, name in weighted_names
        ],
    )


def _union(parts: Sequence[Source]) -> tuple[str, ...]:
    """Returns the classes of all parts: as they are if all parts have the same, else sorted."""
    first, *others = (part.classes for part in parts)
    if all(names == first for names in others):
        return first
    return tuple(sorted({name for part in parts for name in part.classes}))


def _mixture(
    classes: tuple[str, ...], weighted_parts: Sequence[tuple[float, Source]]
) -> MixtureSource:
    parts = tuple(part for _, part in weighted_parts)
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    spans = tuple(
        (int(first), len(part), weight)
        for first, (weight, part) in zip(offsets, weighted_parts, strict=False)
    )
    return MixtureSource(classes, parts, spans)


def _unknown(source: str) -> UserError:
    if not source:
        return UserError(
            "config.data.source is empty: name the data, as in --config.data.source=folder:PATH."
        )
    return UserError(
        f"unknown data source {source!r}: use 'toybox' (or 'toybox:CONFIG'), 'folder:PATH', "
        "'tfds:NAME' (or 'tfds:PATH' of a prepared data set) or 'mix:WEIGHT*SOURCE,...'."
    )
