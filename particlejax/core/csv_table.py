# SPDX-License-Identifier: Apache-2.0
"""Tables of users (CSV), read strictly: what is not clear is refused, not guessed.

An error is one sentence `FILE, line N: what: remedy`. Lines are the file's physical lines, also
after a cell of several lines. Text is composed (NFC), and cells are stripped.
"""

import codecs
import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from particlejax.core import text as names
from particlejax.core.errors import UserError

_MARKS = {  # byte order marks; UTF-32 first, because UTF-16's is a prefix of it
    codecs.BOM_UTF32_LE: "UTF-32-LE",
    codecs.BOM_UTF32_BE: "UTF-32-BE",
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16-LE",
    codecs.BOM_UTF16_BE: "UTF-16-BE",
}
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
_FLOAT32_MAX = 3.4e38
_CLOSE_MATCH = 0.8  # least similarity of a misspelt column


class Row(NamedTuple):
    """A row: the line it starts at, and its cells by column."""

    line: int
    cells: Mapping[str, str]


class Table(NamedTuple):
    """A table. name: of the file, for errors. columns: in order, known ones as they are spelled in
    the documentation.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def place(self, row: Row, column: str = "") -> str:
        """Returns 'FILE, line N' or "FILE, line N, column 'COLUMN'"."""
        return f"{self.name}, line {row.line}" + (f", column {column!r}" if column else "")


def read_file(
    path: str | os.PathLike[str],
    required: str,
    known: Collection[str] = (),
    others: Collection[str] = (),
    remedy: str = "",
) -> Table:
    """Reads a file as `read` does. Raises OSError and UserError."""
    with open(path, "rb") as file:
        return read(file.read(), names.escape(str(path)), required, known, others, remedy)


def read(
    data: bytes,
    name: str,
    required: str,
    known: Collection[str] = (),
    others: Collection[str] = (),
    remedy: str = "",
) -> Table:
    """Reads a table whose header holds the column `required`.

    The delimiter is the comma, semicolon or tab with which the header holds that column. The known
    columns are found in any case. A column that is nearly a known one that is missing is refused,
    unless it is one of the others. remedy: for a table without the required column. Raises
    UserError.
    """
    text = decode(data, name)
    delimiter = _delimiter(text, name, required)
    records = (record for record in _records(text, delimiter, name) if any(record[1]))
    line, header = next(records, (1, []))
    known = (required, *(column for column in known if column != required))
    columns = _columns(header, known, others, f"{name}, line {line}")
    if required not in columns:
        listed = ", ".join(filter(None, columns)) or "none"
        raise UserError(
            f"{name} has no column {required!r} (it has {listed}): {remedy or 'add it'}."
        )
    rows = []
    for line, cells in records:
        filled = _as_wide(cells, columns, delimiter, f"{name}, line {line}")
        rows.append(Row(line, {k: v for k, v in zip(columns, filled, strict=True) if k}))
    return Table(name, tuple(filter(None, columns)), tuple(rows))


def read_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads a list of names, one a line, without empty lines; of a .csv file its column `name`.
    Raises OSError and UserError.
    """
    if str(path).lower().endswith(".csv"):
        return tuple(row.cells["name"] for row in read_file(path, "name").rows)
    with open(path, "rb") as file:
        text = decode(file.read(), names.escape(str(path)))
    return tuple(line.strip() for line in _lines(text) if line.strip())


def number(cell: str) -> float | None:
    """Returns the number in a cell, also NaN and infinity; None if it is not a number."""
    try:
        return float(cell) if cell.isascii() and "_" not in cell else None
    except ValueError:
        return None


def is_finite(value: float) -> bool:
    """Whether a number is finite as float32."""
    return abs(value) <= _FLOAT32_MAX


def decode(data: bytes, name: str) -> str:
    """Returns text of UTF-8, or of UTF-16 or UTF-32 with a byte order mark, in NFC. Raises
    UserError with the line of the first byte that is neither.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "UTF-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(encoding, "replace")
        raise UserError(
            f"{name}, line {len(_lines(before))}: is not {encoding} text (byte "
            f"0x{error.object[error.start]:02x}): save it as UTF-8."
        ) from error
    if "\0" in text:
        raise UserError(
            f"{name}, line {len(_lines(text[: text.index(chr(0))]))}: is not UTF-8 text (a byte of "
            "zero, as in UTF-16 without a byte order mark): save it as UTF-8."
        )
    return names.nfc(text)


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _delimiter(text: str, name: str, required: str) -> str:
    """Returns the delimiter with which the first line that is not empty holds `required`."""
    for delimiter in _DELIMITERS:
        header = next((cells for _, cells in _records(text, delimiter, name) if any(cells)), [])
        if required in map(str.casefold, header):
            return delimiter
    return ","


def _columns(
    header: list[str], known: tuple[str, ...], others: Collection[str], place: str
) -> list[str]:
    """Returns the header's columns. Raises UserError for one that stands twice or is misspelt."""
    by_fold = {column.casefold(): column for column in known}
    columns = [by_fold.get(column.casefold(), column) for column in header]
    for column in filter(None, columns):
        if columns.count(column) > 1:
            raise UserError(
                f"{place}: column {column!r} stands twice: rename or remove one of the two."
            )
    missing = [column for column in known if column not in columns]
    for column in filter(None, columns):
        close = difflib.get_close_matches(column.casefold(), missing, 1, _CLOSE_MATCH)
        if column not in known and column not in others and close:
            raise UserError(
                f"{place}: column {column!r} is not known: did you mean {close[0]!r}? Rename it, "
                f"or add a column {close[0]!r}, which may be empty."
            )
    return columns


def _as_wide(cells: list[str], columns: list[str], delimiter: str, place: str) -> list[str]:
    """Returns as many cells as there are columns. Raises UserError for more or fewer."""
    width = len(columns)
    if len(cells) > width and not any(cells[width:]):
        cells = cells[:width]  # spreadsheets end lines with empty cells
    if len(cells) != width:
        remedy = (
            f"quote what holds a {_DELIMITERS[delimiter]}"
            if len(cells) > width
            else "write a cell for each column; it may be empty"
        )
        raise UserError(f"{place}: {len(cells)} cells for {width} columns: {remedy}.")
    for column, cell in list(zip(columns, cells, strict=True))[1:]:  # the first is an index
        if cell and not column:
            raise UserError(
                f"{place}: {cell!r} is in a column without a name: quote what holds a "
                f"{_DELIMITERS[delimiter]}, or name the column."
            )
    return cells


# -- records: the cells of one row, which may be several lines


def _records(text: str, delimiter: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the first line, from 1, and the cells of every record."""
    lines, i = _lines(text), 0
    while i < len(lines):
        first = i + 1
        if '"' in lines[i]:
            cells, i = _quoted_record(lines, i, delimiter, name)
        else:
            cells = lines[i].split(delimiter)
        yield first, [cell.strip() for cell in cells]
        i += 1


def _quoted_record(lines: list[str], i: int, delimiter: str, name: str) -> tuple[list[str], int]:
    """Returns the cells of the record that starts in line i, and the index of its last line."""
    cells, position = [], 0
    while True:
        line = lines[i]
        start = len(line) - len(line[position:].lstrip(" "))
        if line.startswith('"', start):
            cell, i, position = _quoted_cell(lines, i, start, delimiter, name)
            line = lines[i]
            end = len(line) - len(line[position:].lstrip(" "))
        else:
            found = line.find(delimiter, position)
            end = found if found >= 0 else len(line)
            cell = line[position:end]
        cells.append(cell)
        if end >= len(line):
            return cells, i
        position = end + 1


def _quoted_cell(
    lines: list[str], i: int, start: int, delimiter: str, name: str
) -> tuple[str, int, int]:
    """Returns a quoted cell, the index of its last line and the position after its closing quote.

    Raises UserError, with the line of the opening quote, if it is not closed at the end of a cell.
    """
    first, position, pieces = i, start + 1, []
    while (end := lines[i].find('"', position)) < 0 or lines[i].startswith('""', end):
        if end >= 0:
            pieces.append(lines[i][position : end + 1])
            position = end + 2
            continue
        pieces += [lines[i][position:], "\n"]
        i, position = i + 1, 0
        if i == len(lines):
            raise UserError(
                f"{name}, line {first + 1}: a quote opens and is never closed: close it, or "
                'write a quote in a text as "" within quotes.'
            )
    pieces.append(lines[i][position:end])
    after = lines[i][end + 1 :].lstrip(" ")
    # the quote that opens another cell does not close this one
    opens = i > first and re.search(rf"(^|{re.escape(delimiter)}) *$", lines[i][:end])
    if opens or (after and not after.startswith(delimiter)):
        closed = f"in line {i + 1} " if i > first else ""
        raise UserError(
            f"{name}, line {first + 1}: a quote opens, and the next quote {closed}does not end "
            'the cell: close it, or write a quote in a text as "" within quotes.'
        )
    return "".join(pieces), i, end + 1
