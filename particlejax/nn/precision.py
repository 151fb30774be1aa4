# SPDX-License-Identifier: Apache-2.0
"""Dtypes of a model's computation and rematerialization policies by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Precision:
    """Dtypes of parameters, of products and activations, and of reductions (softmax, norms, means,
    losses).
    """

    compute: Any
    param: Any = jnp.float32
    reduce: Any = jnp.float32


PRECISIONS = {name: Precision(jnp.dtype(name)) for name in ("float32", "bfloat16")}

# Values that the backward pass recomputes instead of storing: 'full' everything within a block,
# 'dots_no_batch' all but products with parameters, 'dots' all but products.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


def remat(name: str, step: Callable, unrolled: bool) -> Callable:
    """Wraps `step` of a scan over blocks with a policy of REMATS.

    An unrolled loop must prevent CSE, or the compiler undoes the recomputation.
    """
    policy = REMAT_POLICIES[name]
    return step if policy is None else jax.checkpoint(step, policy=policy, prevent_cse=unrolled)
