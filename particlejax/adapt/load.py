# SPDX-License-Identifier: Apache-2.0
"""Parameters that start from another run's: params -> params, saying what was taken and what was not."""

from pathlib import Path
from typing import Any

import jax

from particlejax import checkpoint, tree
from particlejax.typing import Params, UserError

_NEW_PER_TASK = ("head", "head_norm", "pool", "decoder", "predictor", "compare", "questions", "each")  # parts that a stage may have to itself; the encoder must match


def from_checkpoint(params: Params, folder: Path) -> tuple[Params, str]:
    """`params` with every leaf that the checkpoint has under the same path, and a sentence about the rest.

    The average is taken where one was kept. Raises UserError when the encoder's paths or shapes differ.
    """
    want = tree.flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params))
    found, shapes = checkpoint.load_subtree(folder, want, ("average", "params"))
    fresh = [name for name in want if name not in found]
    for name in fresh:
        if not name.startswith(_NEW_PER_TASK):
            there = f"shape {shapes[name]}" if name in shapes else "nothing"
            raise UserError(f"checkpoint {folder} has {there} for {name} where this model has {tuple(want[name].shape)}: "
                            "give config.model, config.particles and the data the settings of that run.")
    unused = sorted({name.split("/")[0] for name in shapes if name not in found})
    merged = tree.map_named(lambda name, leaf: found.get(name, leaf), params)
    return merged, _sentence(folder, found, fresh, unused)


def _sentence(folder: Path, found: dict[str, Any], fresh: list[str], unused: list[str]) -> str:
    new = sorted({name.split("/")[0] for name in fresh})
    text = f"{len(found)} arrays from {folder}"
    return text + (f"; new here: {', '.join(new)}" if new else "") + (f"; left there: {', '.join(unused)}" if unused else "")
