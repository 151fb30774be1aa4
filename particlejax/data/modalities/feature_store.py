# SPDX-License-Identifier: Apache-2.0
"""Features of clips on disk: computed once for a network, a clip and a way of sampling it, and
computed again where damaged.
"""

import hashlib
import io
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from particlejax.core.io import fresh_file
from particlejax.data.sources.records import Record

_DIGEST = 32  # bytes of SHA-256 that stand before the array
# numpy parses its headers with `ast`, which in CPython 3.11 two threads break
# (python/cpython#106905)
_PARSING = threading.Lock()


class Damaged(ValueError):
    """What a file says is not what was written to it."""


def key(record: Record, network: Mapping[str, Any], sampling: Mapping[str, Any]) -> str:
    """The name of a clip's features, in hexadecimal.

    A file is known by its path, size and time of change, encoded bytes by themselves; a clip also
    by where it begins and ends. network: what tells its weights and endpoint from others; sampling:
    which frames it sees, and how large; where it reads words, the caption counts too.
    """
    if isinstance(record.video, bytes):
        file: Any = hashlib.sha256(record.video).hexdigest()
    else:
        found = os.stat(record.video)
        file = [os.path.realpath(record.video), found.st_size, found.st_mtime_ns]
    caption = [record.caption] if "words" in sampling else []
    text = json.dumps(
        [file, record.start, record.end, dict(network), dict(sampling), *caption], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def load(folder: Path, name: str) -> np.ndarray | None:
    """The features of this key, None where there are none. Raises Damaged."""
    path = _path(folder, name)
    if not path.is_file():
        return None
    data = path.read_bytes()
    if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
        raise Damaged(f"{path} is damaged")
    with _PARSING:
        return np.load(io.BytesIO(data[_DIGEST:]), allow_pickle=False)


def save(folder: Path, name: str, features: np.ndarray) -> None:
    """Keeps the features under this key, whole or not at all, also where several processes do."""
    path = _path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, features, allow_pickle=False)
    with fresh_file(path) as fresh:
        fresh.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def _path(folder: Path, name: str) -> Path:
    return folder / name[:2] / f"{name[2:]}.features"
