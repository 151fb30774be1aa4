# SPDX-License-Identifier: Apache-2.0
"""The interface of an objective, and the place of its teacher."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array

from particlejax.core.typing import Metrics, Params
from particlejax.models.heads import HeadSpec
from particlejax.models.particle_model import Model
from particlejax.particles.types import Batch

# (params, model, batch, key, train) -> (loss, metrics)
Objective = Callable[[Params, Model, Batch, Array, bool], tuple[Array, Metrics]]
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
