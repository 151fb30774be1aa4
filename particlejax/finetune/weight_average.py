# SPDX-License-Identifier: Apache-2.0
"""Weight averages: of a run's latest checkpoints (SWA, arXiv:1803.05407) or several runs (model
soups, arXiv:2203.05482).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from particlejax.core import tree
from particlejax.core.typing import Params, UserError


def mean_params(params_list: Sequence[Params]) -> Params:
    """The mean of each parameter, summed in float32."""
    return jax.tree.map(
        lambda *leaves: (sum(jnp.asarray(x, jnp.float32) for x in leaves) / len(leaves)).astype(
            leaves[0].dtype
        ),
        *params_list,
    )


def check_same_architecture(first: Params, second: Params, name: str) -> None:
    """Raises UserError, with the parameter's path, if two architectures differ."""
    first_shapes, second_shapes = (
        {path: tuple(leaf.shape) for path, leaf in tree.flatten(params).items()}
        for params in (first, second)
    )
    for path in sorted(first_shapes.keys() | second_shapes.keys()):
        if first_shapes.get(path) != second_shapes.get(path):
            raise UserError(
                f"{name} has {second_shapes.get(path, 'nothing')} for {path} where the first has "
                f"{first_shapes.get(path, 'nothing')}: only runs of one architecture can be "
                "averaged."
            )
