# SPDX-License-Identifier: Apache-2.0
"""Learning some classes only, and merging labels: `config.data.classes` and `data.label_map`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from particlejax.config.data import DataSpec
from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import UserError
from particlejax.data.sources.records import ListSource, Record, Source, labels

SEPARATOR = "|"  # of the classes of a multi-label clip


@dataclass(frozen=True)
class LabelRules:
    """label_map: new names of labels, of whole ones or of the parts of 'a|b'. classes: the classes
    to keep, after renaming; (): all.
    """

    classes: tuple[str, ...] = ()
    label_map: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.classes or self.label_map)

    def apply(self, label: str) -> str | None:
        """Returns the label to learn; None if none of its classes is kept."""
        label = self.label_map.get(label, label)
        if label in self.classes or not label:
            return label
        parts = list(dict.fromkeys(self.label_map.get(part, part) for part in parts_of(label)))
        if self.classes:
            parts = [part for part in parts if part in self.classes]
        changed = parts != parts_of(label)
        return (SEPARATOR.join(parts) if changed else label) if parts else None

    def check(self, known: Iterable[str], source: str) -> None:
        """Raises UserError for a rule that names none of the source's labels."""
        known = list(dict.fromkeys(part for label in known for part in (label, *parts_of(label))))
        for name in self.label_map:
            if name not in known:
                raise UserError(
                    f"config.data.label_map renames {name!r}, which is not a label of {source}: "
                    f"{did_you_mean(name, known)}"
                )
        renamed = dict.fromkeys(self.label_map.get(name, name) for name in known)
        for name in self.classes:
            if name not in renamed:
                raise UserError(
                    f"config.data.classes has {name!r}, which is not a class of {source}: "
                    f"{did_you_mean(name, renamed)}"
                )


NO_RULES = LabelRules()


def parts_of(label: str) -> list[str]:
    """Returns the classes of a label: of 'a|b' a and b."""
    return [part for part in map(str.strip, label.split(SEPARATOR)) if part]


def rules_of(data: DataSpec) -> LabelRules:
    """Returns the rules of a config."""
    return LabelRules(data.classes, dict(data.label_map))


@dataclass(frozen=True)
class RelabeledSource:
    """Some clips of a source, with other labels. new_label: of each class of the source."""

    classes: tuple[str, ...]
    source: Source
    indices: tuple[int, ...]
    new_label: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Record:
        record = self.source[self.indices[i]]
        return replace(record, label=self.new_label[record.label]) if record.label >= 0 else record

    def clip_labels(self) -> np.ndarray:
        """Labels int [N], -1 if unlabeled."""
        old = labels(self.source)[list(self.indices)]
        return np.where(old >= 0, np.asarray((*self.new_label, -1))[old], -1)


def relabel(source: Source, rules: LabelRules, where: str) -> Source:
    """Returns the clips of a source with their new labels, without those that are left out.

    Unlabeled clips stay. Raises UserError if no clip is left.
    """
    if not rules or not source.classes:
        return source
    renamed = [rules.apply(name) for name in source.classes]
    classes = tuple(dict.fromkeys(name for name in renamed if name is not None))
    if list(source.classes) == sorted(source.classes):
        classes = tuple(sorted(classes))
    index = {name: i for i, name in enumerate(classes)} | {None: -1}
    new_label = tuple(index[name] for name in renamed)
    label = labels(source)
    dropped = np.array([name is None for name in renamed])[label] & (label >= 0)
    counts = Counter(source.classes[i] for i in label[dropped])
    notes = tuple(getattr(source, "notes", ()))
    if counts:
        sizes = ", ".join(f"{name} {count}" for name, count in counts.most_common(20))
        noun = "clip" if counts.total() == 1 else "clips"
        notes += (f"{where}: config.data.classes leaves out {counts.total()} {noun} ({sizes})",)
    kept = tuple(np.flatnonzero(~dropped).tolist())
    if not kept:
        raise UserError(
            f"no clip of {where} is of one of config.data.classes ({', '.join(rules.classes)}): "
            "name other classes, or another split."
        )
    return with_labels(source, classes, new_label, kept, notes)


def with_labels(
    source: Source,
    classes: tuple[str, ...],
    new_label: Sequence[int],
    kept: Sequence[int] | None = None,
    notes: tuple[str, ...] | None = None,
) -> Source:
    """Returns the clips `kept` (None: all) with a new label for each class of the source. Records
    that are not in memory are read when they are needed.
    """
    kept = range(len(source)) if kept is None else kept
    notes = tuple(getattr(source, "notes", ())) if notes is None else notes
    relabeled = RelabeledSource(classes, source, tuple(kept), tuple(new_label), notes)
    if not isinstance(source, ListSource):
        return relabeled
    return ListSource(classes, tuple(map(relabeled.__getitem__, range(len(kept)))), notes)
