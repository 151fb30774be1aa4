# SPDX-License-Identifier: Apache-2.0
"""Modules of the user's own that add an objective, a particle policy, an augmentation, a source or
a network: `config.plugins = ("my_project.losses",)`.

They are imported before the config is checked. config.json keeps their names, so that every later
command on the run imports them again. Processes that are started later (data workers) find them in
the environment.
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
    """Imports the modules and returns their names; an experiment file that uses what they add calls
    it first. Raises UserError for one that is not there.
    """
    for name in names:
        try:
            _import(name)
        except ImportError as error:
            raise UserError(
                f"config.plugins names {name!r}, which cannot be imported ({error}): install its "
                "package, or start from the folder that holds it."
            ) from error
    known = [name for name in os.environ.get(_VARIABLE, "").split(",") if name]
    os.environ[_VARIABLE] = ",".join(dict.fromkeys([*known, *names]))
    return names


def load_inherited() -> None:
    """Imports what the process that started this one had loaded."""
    for name in os.environ.get(_VARIABLE, "").split(","):
        if name:
            _import(name)


def _import(name: str) -> None:
    """Imports a module; like `python -m`, the working directory counts as a place to find it."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    importlib.import_module(name)


def add(table: MutableMapping[str, T], kind: str, name: str, item: T) -> None:
    """Puts an item into a table of this package. Raises ValueError for a name that is taken.

    An item of the same module and name takes the place of the old one, so that a notebook's cell
    may be run again.
    """
    if name in table and _origin(table[name]) != _origin(item):
        raise ValueError(f"there is a {kind} {name!r} already: register yours by another name.")
    table[name] = item


def _origin(item: Any) -> Any:
    made: Callable[..., Any] = getattr(item, "make", None) or getattr(item, "cut", None) or item
    return getattr(made, "__module__", None), getattr(made, "__qualname__", None)
