# SPDX-License-Identifier: Apache-2.0
"""Atomic file writes: to a temporary file beside the target, then renamed or linked."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_file(path: str | os.PathLike[str], sync: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`; it replaces `path` if the block succeeds.

    If the block raises, `path` is unchanged and the temporary file is removed. sync: fsync before
    the rename, safe against power loss. Raises OSError as writing does.
    """
    path = Path(path)
    # keeps the suffix, from which some writers choose a format; hidden, as it is incomplete
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, sync: bool = False) -> None:
    r"""Writes a UTF-8 text file atomically; bytes of names that are not UTF-8 become `\udcXX`."""
    with atomic_file(path, sync) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def create_text(path: str | os.PathLike[str], text: str) -> bool:
    """Creates a UTF-8 text file, atomically also on network file systems. Returns False if there is
    one already.

    Where the file system has no hard links, the new file is empty for a moment. Raises OSError as
    writing does.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            # NFS may report the failure of a link that it has made
            return temporary.stat().st_nlink > 1
        except OSError:  # no hard links
            with open(path, "x", encoding="utf-8", newline="\n") as file:
                file.write(text)
            return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file atomically, with fsync."""
    write_text(path, json.dumps(value, indent=1), sync=True)
