# SPDX-License-Identifier: Apache-2.0
"""What a model computes in, and what it computes twice to remember less: policies by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Precision:
    """Types of parameters, of products and activations, and of what sums many numbers (softmax,
    norms, means, losses).
    """

    compute: Any
    param: Any = jnp.float32
    reduce: Any = jnp.float32


PRECISIONS = {name: Precision(jnp.dtype(name)) for name in ("float32", "bfloat16")}

# What the backward pass computes again, hence need not be remembered: 'full' everything within a
# block, 'dots_no_batch' whatever is not a product with parameters, 'dots' whatever is not a
# product.
REMATS: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


def remat(name: str, step: Callable, unrolled: bool) -> Callable:
    """`step` of a scan over blocks, under a policy of REMATS.

    An unrolled loop must hide from the compiler that two computations are the same, or it keeps one
    of them after all.
    """
    policy = REMATS[name]
    return step if policy is None else jax.checkpoint(step, policy=policy, prevent_cse=unrolled)
