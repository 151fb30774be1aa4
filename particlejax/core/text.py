# SPDX-License-Identifier: Apache-2.0
"""Names of classes and files as text that every writer and every reader takes."""

import os
import re
import unicodedata

_ESCAPED = re.compile(r"\\u(dc[89a-f][0-9a-f])")


def nfc(text: str) -> str:
    """Returns the composed Unicode form (NFC), in which names are compared."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def escape(name: str) -> str:
    r"""Returns a file name in NFC; a byte that is not UTF-8 is written as `\udcXX`.

    Python and JSON write such a byte in the same way; `PathFinder` finds the file by it.
    """
    if name.isascii():
        return name
    return nfc(name.encode("utf-8", "backslashreplace").decode("utf-8"))


class PathFinder:
    """Finds files whose names are written in another Unicode form, or with escaped bytes.

    It keeps the folders that it has listed, so one finder serves one reading of a table.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, str]] = {}

    def find(self, path: str) -> str:
        """Returns the path as it is on the disk, or `path` if there is no such file."""
        if (path.isascii() and not _ESCAPED.search(path)) or os.path.lexists(path):
            return path
        found = os.sep if os.path.isabs(path) else ""
        for part in filter(None, path.split(os.sep)):
            following = os.path.join(found, part)
            if not os.path.lexists(following):
                name = self._listing(found).get(escape(part))
                if name is None:
                    return path
                following = os.path.join(found, name)
            found = following
        return found

    def _listing(self, folder: str) -> dict[str, str]:
        """Names of a folder by their escaped form."""
        if folder not in self._entries:
            try:
                names = sorted(os.listdir(folder or "."))
            except OSError:
                names = []
            self._entries[folder] = {escape(name): name for name in names}
        return self._entries[folder]


def find_path(path: str) -> str:
    """Returns the path as it is on the disk, or `path` if there is no such file."""
    return PathFinder().find(path)
