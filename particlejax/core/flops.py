# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a traced function, counted from the shapes of its matmuls and convolutions.

Counts the model's FLOPs, independent of the compiler: two per multiply-add, loops times their trip
count, the most expensive branch. Elementwise operations are excluded, as usual for MFU
(arXiv:2204.02311, B).
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def count(jaxpr: Any) -> int:
    """FLOPs of a jaxpr (such as `jit(f).trace(*args).jaxpr`), including all that it calls."""
    return sum(_equation_flops(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation_flops(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        return 2 * eqn.outvars[0].aval.size * depth
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval, params["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[numbers.rhs_spec[0]]
    if name == "cond":
        return max(count(branch) for branch in params["branches"])
    repeats = params["length"] if name == "scan" else 1
    if name == "shard_map":  # shapes are per device
        axes = (
            params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        )
        repeats = math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":  # the body is one grid cell
        repeats = math.prod(params["grid_mapping"].grid)
    return repeats * sum(count(inner_jaxpr) for inner_jaxpr in _inner_jaxprs(params))


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(inner, (core.Jaxpr, core.ClosedJaxpr)):
                yield inner
