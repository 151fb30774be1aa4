# SPDX-License-Identifier: Apache-2.0
"""What an objective is, and where it finds its teacher."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array

from particlejax.core.typing import Metrics, Params
from particlejax.models.heads import HeadSpec
from particlejax.models.particle_model import Model
from particlejax.particles.types import Batch

# (params, model, batch, key, train) -> (loss, metrics)
Objective = Callable[[Params, Model, Batch, Array, bool], tuple[Array, Metrics]]
TEACHER = "teacher"  # branch of the parameters that the step puts their moving average in


class ObjectiveType(NamedTuple):
    """One line of the table of objectives: how it is made of its settings, and what it needs.

    make: (spec) -> Objective, or (spec, targets) where `labelled`. heads: (spec, classes) -> the
    heads that it calls by these names; one that several objectives declare alike is shared.
    modalities: (spec) -> those it reads. labelled: whether it reads labels, so that there are
    classes. unseen: (spec) -> modalities that are its targets, which the encoder never sees.
    """

    make: Callable[..., Objective]
    heads: Callable[[Any, int], Mapping[str, HeadSpec]] = lambda spec, classes: {}
    modalities: Callable[[Any], tuple[str, ...]] = lambda spec: (spec.modality,)
    labelled: bool = False
    unseen: Callable[[Any], tuple[str, ...]] = lambda spec: ()
