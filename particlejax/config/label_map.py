# SPDX-License-Identifier: Apache-2.0
"""The setting `data.label_map`: pairs of labels, or the CSV file that holds them."""

import os
from collections.abc import Sequence
from typing import Any

from particlejax.core import csv_table, text
from particlejax.core.errors import UserError

_COLUMNS = ("from", "to")


def pairs(value: Sequence[Any]) -> tuple[tuple[str, str], ...]:
    """Returns (from, to) pairs of labels in NFC. value: pairs, or the path of one CSV file.

    Raises UserError for what is neither, and for a label that is renamed twice.
    """
    if len(value) == 1 and isinstance(value[0], str):
        return _read(value[0])
    if not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
        for pair in value
    ):
        raise UserError(
            f"DataSpec.label_map is {tuple(value)!r}: write pairs such as (('jog', 'run'),), or "
            "the path of a CSV file with the columns from,to."
        )
    found = tuple((text.nfc(old), text.nfc(new)) for old, new in value)
    names = [old for old, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"DataSpec.label_map renames {twice!r} twice: remove one of the pairs.")
    if any(not new for _, new in found):
        raise UserError("DataSpec.label_map has an empty new label: name one.")
    return found


def _read(path: str) -> tuple[tuple[str, str], ...]:
    try:
        table = csv_table.read_file(os.path.expanduser(path), "from", _COLUMNS)
    except OSError as error:
        raise UserError(
            f"DataSpec.label_map={path!r} cannot be read ({error.strerror}): check the path."
        ) from error
    if "to" not in table.columns:
        raise UserError(
            f"{table.name} has no column 'to' (it has {', '.join(table.columns)}): add it."
        )
    found: dict[str, str] = {}
    for row in table.rows:
        old, new = (row.cells[column] for column in _COLUMNS)
        if not old or not new:
            raise UserError(f"{table.place(row)}: a label is empty: fill it in or remove the line.")
        if old in found:
            raise UserError(f"{table.place(row)}: {old!r} is renamed twice: remove one line.")
        found[old] = new
    if not found:
        raise UserError(f"{table.name} renames no label: add a line per label.")
    return tuple(found.items())
