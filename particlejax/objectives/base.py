# SPDX-License-Identifier: Apache-2.0
"""What an objective is, and where it finds its teacher."""

from collections.abc import Callable

from jax import Array

from particlejax.core.typing import Metrics, Params
from particlejax.models.particle_model import Model
from particlejax.particles.types import Batch

Objective = Callable[[Params, Model, Batch, Array, bool], tuple[Array, Metrics]]
TEACHER = "teacher"  # branch of the parameters that the step puts their moving average in
