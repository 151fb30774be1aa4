# SPDX-License-Identifier: Apache-2.0
"""User modules that add objectives, particle policies, augmentations, sources or networks:
`config.plugins = ("my_project.losses",)`.

They are imported before the config is checked. config.json stores their names, so later commands on
the run import them again. Processes started later (data workers) find the names in an environment
variable.
"""

import importlib
import os
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

from particlejax.core.errors import UserError

T = TypeVar("T")
_VARIABLE = "PARTICLEJAX_PLUGINS"


def load(*names: str) -> tuple[str, ...]:
    """Imports modules and returns their names. An experiment file that uses what they add calls
    this first. Raises UserError if an import fails.
    """
    for name in names:
        try:
            _import(name)
        except ImportError as error:
            raise UserError(
                f"config.plugins: {name!r} cannot be imported ({error}): install its package, or "
                "run from the folder that contains it."
            ) from error
    loaded = [name for name in os.environ.get(_VARIABLE, "").split(",") if name]
    os.environ[_VARIABLE] = ",".join(dict.fromkeys([*loaded, *names]))
    return names


def load_inherited() -> None:
    """Imports the plugins of the parent process."""
    for name in os.environ.get(_VARIABLE, "").split(","):
        if name:
            _import(name)


def _import(name: str) -> None:
    """Imports a module, with the working directory on the path, like `python -m`."""
    if (working_dir := os.getcwd()) not in sys.path:
        sys.path.append(working_dir)
    importlib.import_module(name)


def add(table: MutableMapping[str, T], kind: str, name: str, item: T) -> None:
    """Registers an item in a table of this package. Raises ValueError for a name that is taken.

    An item of the same module and name is replaced, so that notebook cells can run again.
    """
    if name in table and _origin(table[name]) != _origin(item):
        raise ValueError(f"{kind} {name!r} exists already: register yours under another name.")
    table[name] = item


def _origin(item: Any) -> Any:
    function: Callable[..., Any] = getattr(item, "make", None) or getattr(item, "cut", None) or item
    return getattr(function, "__module__", None), getattr(function, "__qualname__", None)
