# SPDX-License-Identifier: Apache-2.0
"""What an objective is, and where it finds its teacher."""

from collections.abc import Callable

from jax import Array

from particlejax.models.model import Model
from particlejax.particles.types import Batch
from particlejax.typing import Metrics, Params

Objective = Callable[[Params, Model, Batch, Array, bool], tuple[Array, Metrics]]
TEACHER = "teacher"  # branch of the parameters that the step puts their moving average in
