# SPDX-License-Identifier: Apache-2.0
"""Hooks for fine-tuning parameters in a block: active if the parameters exist, no-ops otherwise.

Legend: B rows, L queries, M keys, D width, H heads, K width of a head, Z prefix vectors or an
adapter's hidden width.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from particlejax.nn import dense


def apply_adapter(x_BLD: Array, params: Mapping[str, Mapping[str, Array]] | None) -> Array:
    """x + up(GELU(down(x))), the bottleneck of arXiv:1902.00751; x if there are no parameters."""
    if params is None:
        return x_BLD
    return x_BLD + dense.affine(jax.nn.gelu(dense.affine(x_BLD, params["down"])), params["up"])


def prefix_logits(
    query_BHLK: Array, prefix: Mapping[str, Array], sharpness_H3: Array | None, place_BL3: Array
) -> Array:
    """Logits [B, H, L, Z] of the prefix for scaled queries.

    A prefix has no position: under a distance bias it counts as at each query's own position. The
    block's logits omit the query-only term, so it is added here.
    """
    key_BZHK = jnp.broadcast_to(
        prefix["key"][None], (query_BHLK.shape[0], *prefix["key"].shape)
    ).astype(query_BHLK.dtype)
    logits = jnp.einsum("bhlk,bzhk->bhlz", query_BHLK, key_BZHK, preferred_element_type=jnp.float32)
    if sharpness_H3 is None:
        return logits
    return logits + jnp.einsum("hk,blk->bhl", sharpness_H3, place_BL3**2)[..., None]
