# SPDX-License-Identifier: Apache-2.0
"""Array types shared by all modules, and UserError."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from particlejax.core.errors import UserError as UserError

Array = jax.Array | np.ndarray
Params = Mapping[str, Any]  # a pytree of arrays: nested dicts, as in Flax Linen
Metrics = dict[str, jax.Array]  # scalars, float32
