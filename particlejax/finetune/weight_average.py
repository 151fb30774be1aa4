# SPDX-License-Identifier: Apache-2.0
"""Weight averages: of a run's latest checkpoints (SWA, arXiv:1803.05407) or several runs (model
soups, arXiv:2203.05482).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from particlejax.core import tree
from particlejax.core.typing import Params, UserError


def mean(several: Sequence[Params]) -> Params:
    """The mean of each parameter, summed in float32."""
    return jax.tree.map(
        lambda *leaves: (sum(jnp.asarray(x, jnp.float32) for x in leaves) / len(leaves)).astype(
            leaves[0].dtype
        ),
        *several,
    )


def check(one: Params, other: Params, name: str) -> None:
    """Raises UserError, with the parameter's path, if two architectures differ."""
    ours, theirs = (
        {path: tuple(leaf.shape) for path, leaf in tree.flatten(each).items()}
        for each in (one, other)
    )
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            raise UserError(
                f"{name} has {theirs.get(path, 'nothing')} for {path} where the first has "
                f"{ours.get(path, 'nothing')}: only runs of one architecture can be averaged."
            )
