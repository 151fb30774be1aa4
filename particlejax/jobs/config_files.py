# SPDX-License-Identifier: Apache-2.0
"""Experiment files: Python files whose `get_config` gives the config that the command line then
changes.
"""

import ast
import runpy
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from particlejax.config import jobs, renames
from particlejax.config.experiment import unknown_key
from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import UserError


def load(file: str) -> ml_collections.ConfigDict:
    """The config of FILE or FILE:ARGUMENT before any setting is changed. Raises UserError when the
    file is not there.
    """
    path, _, arg = file.partition(":")
    if not path:
        raise UserError(
            "no experiment: add --config experiments/quickstart.py or another file of experiments/."
        )
    if not Path(path).is_file():
        new = renames.FILES.get(path, "")
        if Path(new).is_file():
            raise UserError(f"the experiment file {path} is now {new}.")
        known = sorted(str(p) for p in Path("experiments").rglob("*.py"))
        raise UserError(f"there is no experiment file {path!r}: {did_you_mean(path, known)}")
    make = runpy.run_path(path)["get_config"]
    return make(arg) if arg else make()


def change(config: ml_collections.ConfigDict, settings: Sequence[str]) -> None:
    """Puts 'some.key=value' into the config, values written as in Python or plain. Raises UserError
    for a key it lacks.
    """
    for text in settings:
        key, _, value = text.partition("=")
        parent, last = place(config, key.strip())
        try:
            parent[last] = _value(value)
        except TypeError as error:
            raise UserError(f"{text!r} does not fit: {' '.join(str(error).split())}.") from error


def place(config: ml_collections.ConfigDict, key: str) -> tuple[ml_collections.ConfigDict, str]:
    """The section that holds 'some.key', and the last part of it. Raises UserError for a key that
    the config lacks.
    """
    node, where = config, "config"
    for part in key.split("."):
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            new = renames.path(jobs.spec_of(config.to_dict()), key)
            if new != key:
                raise UserError(f"config.{key} is now config.{new}.")
            raise UserError(
                unknown_key(
                    part, where, list(node) if isinstance(node, ml_collections.ConfigDict) else ()
                )
            )
        parent, node, where = node, node[part], f"{where}.{part}"
    return parent, part


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
