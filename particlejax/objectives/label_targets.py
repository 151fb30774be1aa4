# SPDX-License-Identifier: Apache-2.0
"""Targets from labels: one class, several at once ('a|b'), or a number.

The data give a label as an index; this table maps it to targets. Legend: L labels, O outputs of the
head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from particlejax import losses
from particlejax.config.objectives import ClassifySpec
from particlejax.core import csv_table
from particlejax.core.typing import Array, UserError
from particlejax.data import sources

MULTI_LABEL_SEPARATOR = "|"  # separator of the classes of a multi-label clip


class Targets(NamedTuple):
    """names: of the outputs. table: float32 [L, O], targets of each label. weight: float32 [L],
    loss weight.

    mean, std: mean and standard deviation of regression targets, which the head predicts
    normalized. pos_weight: float32 [O], weight of an output that holds (sigmoid); None: 1.
    """

    loss: str
    names: tuple[str, ...]
    table: np.ndarray
    weight: np.ndarray
    mean: float = 0.0
    std: float = 1.0
    pos_weight: np.ndarray | None = None

    @property
    def weights(self) -> dict[str, list[float]]:
        """The weights that are not 1, by field, as a checkpoint keeps them."""
        weights = {"weight": self.weight, "pos_weight": self.pos_weight}
        return {name: x.tolist() for name, x in weights.items() if x is not None and (x != 1).any()}

    def activate(self, logits: Array) -> Array:
        """Class probabilities [..., O], or the denormalized number [..., 1]."""
        if self.loss == "regression":
            return logits * self.std + self.mean
        return jax.nn.sigmoid(logits) if self.loss == "sigmoid" else jax.nn.softmax(logits)


def build_targets(spec: ClassifySpec, labels: tuple[str, ...], source: str = "") -> Targets:
    """The targets of all labels. Raises UserError for a regression label that is not a finite
    number, with its place in `source`.
    """
    uniform_weight = np.ones(len(labels), np.float32)
    if spec.loss == "softmax":
        return Targets(spec.loss, labels, np.eye(len(labels), dtype=np.float32), uniform_weight)
    if spec.loss == "regression":
        values = _parse_numbers(labels, source)
        mean, std = float(values.mean()), float(values.std()) or 1.0
        return Targets(
            spec.loss, ("value",), ((values - mean) / std)[:, None], uniform_weight, mean, std
        )
    names = tuple(sorted(set().union(*(_split_label(label) for label in labels))))
    return Targets(spec.loss, names, _multi_hot(labels, names), uniform_weight)


def remap_to_source(targets: Targets, labels: tuple[str, ...], source: str = "") -> Targets:
    """The same head's targets for labels of another source: other numbers, other combinations of
    classes.

    Raises UserError for an unknown class and a number that is none, with its place in `source`.
    """
    if targets.loss == "softmax":
        return targets
    uniform_weight = np.ones(len(labels), np.float32)
    if targets.loss == "regression":
        values = _parse_numbers(labels, source)
        return targets._replace(
            table=((values - targets.mean) / targets.std)[:, None], weight=uniform_weight
        )
    for label in labels:
        if _split_label(label) - set(targets.names):
            raise UserError(
                f"label {label!r} is not made of the trained run's classes "
                f"({', '.join(targets.names)}): rename it, or remove these clips."
            )
    return targets._replace(table=_multi_hot(labels, targets.names), weight=uniform_weight)


def _split_label(label: str) -> set[str]:
    return {part.strip() for part in label.split(MULTI_LABEL_SEPARATOR)} - {""}


def _multi_hot(labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    return np.array(
        [[float(name in _split_label(label)) for name in names] for label in labels], np.float32
    )


def with_class_weights(targets: Targets, spec: ClassifySpec, counts: Sequence[int]) -> Targets:
    """Adds class-balanced weights and the weight of positives from label frequencies, if the spec
    asks for them. counts: training clips of each label.
    """
    if spec.loss == "sigmoid" and spec.pos_weight != 1:
        positives = np.asarray(counts, np.float32) @ targets.table
        negatives = sum(counts) - positives
        both = (positives > 0) & (negatives > 0)
        balanced = np.where(both, negatives / np.maximum(positives, 1), 1)
        fixed = np.full(len(targets.names), spec.pos_weight)
        weight = fixed if spec.pos_weight else balanced
        return targets._replace(pos_weight=weight.astype(np.float32))
    if not spec.class_balance_beta:
        return targets
    return targets._replace(
        weight=np.asarray(
            losses.class_weights(jnp.asarray(counts, jnp.float32), spec.class_balance_beta)
        )
    )


def _parse_numbers(labels: Sequence[str], source: str) -> np.ndarray:
    """Numbers float32 [L]. Raises UserError for one that is not finite."""
    numbers = [csv_table.number(label) for label in labels]
    for label, value in zip(labels, numbers, strict=True):
        if value is None or not csv_table.is_finite(value):
            place = f"{sources.locate_label(source, label)}: " if source else ""
            kind = "a number" if value is None else "a finite number"
            raise UserError(
                f"{place}label {label!r} is not {kind}, which loss='regression' needs: name a "
                "numeric column, as in config.data.source=folder:PATH#COLUMN, use another loss, or "
                "leave the label of that clip empty."
            )
    return np.array(numbers, np.float32)
