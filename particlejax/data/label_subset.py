# SPDX-License-Identifier: Apache-2.0
"""Few labels: some clips keep their labels; the others are left out or used without labels."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from particlejax.config.data import DataSpec
from particlejax.core import csv_table, text
from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import UserError
from particlejax.data.sources import MixtureSource, Record, Source, labels, parts_of

_SHOTS_SEED = 0x5407  # separates this random stream from others of the same seed


@dataclass(frozen=True)
class Subset:
    """Some records of a source, with or without labels."""

    source: Source
    indices: tuple[int, ...]
    labeled: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the source."""
        return self.source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Record:
        record = self.source[self.indices[i]]
        return record if self.labeled else replace(record, label=-1)

    def clip_labels(self) -> np.ndarray:
        """Labels int [N], -1 if unlabeled."""
        inner = labels(self.source)[list(self.indices)]
        return inner if self.labeled else np.full(len(self), -1)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the log, of the source."""
        return tuple(getattr(self.source, "notes", ()))


def limit_labels(source: Source, data: DataSpec, seed: int) -> Source:
    """Returns the source with the labels of `data.shots` clips per class, drawn by the seed, or of
    the clips in `data.labelled_csv`.

    `data.unlabelled_fraction` is the fraction of training clips drawn from the others, without
    labels; 0: none. Raises UserError if a class has too few clips, the file does not match, or
    `train_fraction` is below 1.
    """
    if not data.shots and not data.labelled_csv:
        return source
    if data.train_fraction < 1:
        raise UserError(
            f"config.data.train_fraction={data.train_fraction:g} cannot be combined with "
            "data.shots or data.labelled_csv: set it to 1."
        )
    labeled_indices = (
        read_list(source, data.labelled_csv)
        if data.labelled_csv
        else draw_shots(labels(source), data.shots, seed, source.classes)
    )
    if not data.unlabelled_fraction:
        return Subset(source, tuple(int(index) for index in labeled_indices))
    parts, weights = [], []
    for first, count, weight in parts_of(source):
        labeled_here = labeled_indices[
            (labeled_indices >= first) & (labeled_indices < first + count)
        ]
        unlabeled_here = np.setdiff1d(np.arange(first, first + count), labeled_here)
        for indices, labeled, fraction in (
            (labeled_here, True, 1 - data.unlabelled_fraction),
            (unlabeled_here, False, data.unlabelled_fraction),
        ):
            if len(indices) and fraction:
                parts.append(Subset(source, tuple(int(index) for index in indices), labeled))
                weights.append(weight * fraction)
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    return MixtureSource(
        source.classes,
        tuple(parts),
        tuple(
            (int(first), len(part), weight)
            for first, part, weight in zip(offsets, parts, weights, strict=False)
        ),
    )


def draw_shots(label: np.ndarray, shots: int, seed: int, classes: Sequence[str]) -> np.ndarray:
    """Returns the indices of `shots` clips per class, ascending. Raises UserError if a class has
    fewer.
    """
    rng, selected = np.random.default_rng((seed % 2**32, _SHOTS_SEED)), []
    for class_index in np.unique(label[label >= 0]):
        # a prefix, so that 5 shots include the 1 shot of the same seed
        class_clips = rng.permutation(np.flatnonzero(label == class_index))
        if len(class_clips) < shots:
            raise UserError(
                f"config.data.shots={shots}, but class {classes[class_index]!r} has "
                f"{len(class_clips)} clips: use a smaller number."
            )
        selected.append(class_clips[:shots])
    if not selected:
        raise UserError(
            f"config.data.shots={shots}, but no clip has a label: add column 'label' to clips.csv."
        )
    return np.sort(np.concatenate(selected))


def read_list(source: Source, path: str) -> np.ndarray:
    """Returns the indices of the clips in a CSV's column `path`, ascending. Raises UserError for an
    unknown clip.
    """
    try:
        table = csv_table.read_file(os.path.expanduser(path), "path")
    except OSError as error:
        raise UserError(
            f"config.data.labelled_csv={path!r} cannot be read ({error.strerror}): check the path."
        ) from error
    if not table.rows:
        raise UserError(f"{table.name} lists no clip: add a line per clip.")
    index_by_name = {text.escape(source[i].name): i for i in range(len(source))}
    indices = []
    for row in table.rows:
        name = row.cells["path"]
        if name not in index_by_name:
            raise UserError(
                f"{table.place(row)}: config.data.labelled_csv has clip {name!r}, which is not in "
                f"the source: {did_you_mean(name, index_by_name)}"
            )
        indices.append(index_by_name[name])
    return np.unique(indices)
