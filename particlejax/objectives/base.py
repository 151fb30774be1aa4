# SPDX-License-Identifier: Apache-2.0
"""The interface of an objective, the sum of a stage's objectives, and the place of its teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from particlejax.core.typing import Metrics, Params
from particlejax.losses import Mean
from particlejax.models.heads import HeadSpec
from particlejax.models.particle_model import Model
from particlejax.particles.types import Batch

# (params, model, batch, key, train) -> (loss, metrics). A `Mean` names its weight; a plain scalar
# counts as a mean over all clips of the batch.
Objective = Callable[
    [Params, Model, Batch, Array, bool], tuple[Array | Mean, Mapping[str, Array | Mean]]
]
TEACHER = "teacher"  # branch of the parameters that holds their EMA during a step


class ObjectiveType(NamedTuple):
    """An entry of the objectives' registry: how to build it, and what it needs.

    make: (spec) -> Objective, or (spec, targets) if `labelled`. heads: (spec, classes) -> the heads
    it uses, by name; objectives with equal declarations share a head. modalities: (spec) ->
    modalities it reads. labelled: whether it needs labels and thus classes. unseen: (spec) ->
    modalities that are only targets and never reach the encoder.
    """

    make: Callable[..., Objective]
    heads: Callable[[Any, int], Mapping[str, HeadSpec]] = lambda spec, classes: {}
    modalities: Callable[[Any], tuple[str, ...]] = lambda spec: (spec.modality,)
    labelled: bool = False
    unseen: Callable[[Any], tuple[str, ...]] = lambda spec: ()


class Measured(NamedTuple):
    """Losses of a stage's objectives by name, and their metrics by 'name/metric', on one batch or
    recombined over several.
    """

    losses: Mapping[str, Mean]
    metrics: Mapping[str, Mean]


@dataclass(frozen=True)
class WeightedSum:
    """The objectives of a stage: a step minimizes the weighted sum of their losses.

    measure: (params, model, batch, key, train) -> Measured. weights: of the losses, by name.
    """

    measure: Callable[[Params, Model, Batch, Array, bool], Measured]
    weights: Mapping[str, float]

    def __call__(
        self, params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        """The loss and the metrics of one batch, as scalars."""
        measured = self.measure(params, model, batch, key, train)
        return self.loss(measured), self.metrics(measured)

    def loss(self, measured: Measured, shares: Measured | None = None) -> Array:
        """The weighted sum; an objective that applies to no clip adds 0.

        shares: the part of a whole's weight that each mean of this micro-batch has; the losses of
        its micro-batches add up to the loss of the whole.
        """
        total = jnp.zeros(())
        for name, weight in self.weights.items():
            loss = measured.losses[name].value
            total += weight * (loss if shares is None else shares.losses[name] * loss)
        return total

    def metrics(self, measured: Measured) -> Metrics:
        """'loss', the weighted sum, and all metrics; NaN where one applies to no clip."""
        return {"loss": self.loss(measured)} | {
            name: jnp.where(weight > 0, value, jnp.nan)
            for name, (value, weight) in measured.metrics.items()
        }


def single(objective: Objective) -> WeightedSum:
    """One objective as a stage's only one, its metrics under their own names."""
    if isinstance(objective, WeightedSum):
        return objective

    def measure(params: Params, model: Model, batch: Batch, key: Array, train: bool) -> Measured:
        loss, metrics = objective(params, model, batch, key, train)
        return Measured(
            {"": declared(loss, batch)},
            {name: declared(value, batch) for name, value in metrics.items()},
        )

    return WeightedSum(measure, {"": 1.0})


def declared(value: Array | Mean, batch: Batch) -> Mean:
    """The value with its weight: by default, the number of clips in the batch, 1 without clips."""
    if isinstance(value, Mean):
        return value
    if not isinstance(batch, Batch):
        return Mean(value, jnp.ones(()))
    return Mean(value, jnp.sum(batch.clip_index >= 0, dtype=jnp.float32))
