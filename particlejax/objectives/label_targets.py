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
from particlejax.config.model import ClassifySpec
from particlejax.core.typing import Array, UserError

SEVERAL = "|"  # separator of the classes of a multi-label clip


class Targets(NamedTuple):
    """names: of the outputs. table: float32 [L, O], targets of each label. weight: float32 [L],
    loss weight.

    middle, spread: mean and standard deviation of regression targets, which the head predicts
    normalized.
    """

    loss: str
    names: tuple[str, ...]
    table: np.ndarray
    weight: np.ndarray
    middle: float = 0.0
    spread: float = 1.0

    def answers(self, logits: Array) -> Array:
        """Class probabilities [..., O], or the denormalized number [..., 1]."""
        if self.loss == "regression":
            return logits * self.spread + self.middle
        return jax.nn.sigmoid(logits) if self.loss == "sigmoid" else jax.nn.softmax(logits)


def of(spec: ClassifySpec, labels: tuple[str, ...]) -> Targets:
    """The targets of all labels. Raises UserError for a regression label that is not a number."""
    even = np.ones(len(labels), np.float32)
    if spec.loss == "softmax":
        return Targets(spec.loss, labels, np.eye(len(labels), dtype=np.float32), even)
    if spec.loss == "regression":
        values = np.array([_number(label) for label in labels], np.float32)
        middle, spread = float(values.mean()), float(values.std()) or 1.0
        return Targets(
            spec.loss, ("value",), ((values - middle) / spread)[:, None], even, middle, spread
        )
    names = tuple(sorted(set().union(*(_parts(label) for label in labels))))
    return Targets(spec.loss, names, _several(labels, names), even)


def asked(targets: Targets, labels: tuple[str, ...]) -> Targets:
    """The same head's targets for labels of another source: other numbers, other combinations of
    classes.

    Raises UserError for an unknown class.
    """
    if targets.loss == "softmax":
        return targets
    even = np.ones(len(labels), np.float32)
    if targets.loss == "regression":
        values = np.array([_number(label) for label in labels], np.float32)
        return targets._replace(
            table=((values - targets.middle) / targets.spread)[:, None], weight=even
        )
    for label in labels:
        if _parts(label) - set(targets.names):
            raise UserError(
                f"label {label!r} is not made of the trained run's classes "
                f"({', '.join(targets.names)}): rename it, or remove these clips."
            )
    return targets._replace(table=_several(labels, targets.names), weight=even)


def _parts(label: str) -> set[str]:
    return {part.strip() for part in label.split(SEVERAL)} - {""}


def _several(labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    return np.array(
        [[float(name in _parts(label)) for name in names] for label in labels], np.float32
    )


def weighted(targets: Targets, spec: ClassifySpec, counts: Sequence[int]) -> Targets:
    """Adds class-balanced weights from label frequencies, if the spec asks for them."""
    if not spec.class_balance_beta:
        return targets
    return targets._replace(
        weight=np.asarray(
            losses.class_weights(jnp.asarray(counts, jnp.float32), spec.class_balance_beta)
        )
    )


def _number(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        raise UserError(
            f"label {label!r} is not a number, which loss='regression' needs: name a numeric "
            "column, as in config.data.source=folder:PATH#COLUMN, or use another loss."
        ) from None
