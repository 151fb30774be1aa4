# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: written beside their place, then moved there in one step."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def fresh_file(path: str | os.PathLike[str], sync: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends well.

    A block that raises leaves `path` as it was and no other file. sync: the bytes are on the disk
    before the move, so that a loss of power loses nothing. Raises OSError as writing does.
    """
    path = Path(path)
    # the ending stays, as some writers choose a format by it; a hidden name is no result yet
    fresh = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield fresh
        if sync:
            with open(fresh, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, sync: bool = False) -> None:
    """Writes a text file, UTF-8, whole or not at all."""
    with fresh_file(path, sync) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file, on the disk whole or not at all, whatever happens."""
    write_text(path, json.dumps(value, indent=1), sync=True)
