# SPDX-License-Identifier: Apache-2.0
"""Names shared by every floor: array types and the one exception that is meant for people."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Mapping[str, Any]  # a pytree of arrays: nested dicts, as linen makes them
Metrics = dict[str, jax.Array]  # scalars, float32


class UserError(ValueError):
    """A mistake that its maker can mend: one sentence that names the file or key at fault and the
    remedy.

    `main` prints the sentence alone; any other exception is a bug and keeps its traceback.
    """
