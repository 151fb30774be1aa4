# SPDX-License-Identifier: Apache-2.0
"""Storage of precomputed features: one file per network, clip and sampling, with a checksum."""

import hashlib
import io
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from particlejax.core.io import atomic_file
from particlejax.data.sources.records import Record

_DIGEST = 32  # bytes of SHA-256 before the array
# NumPy parses headers with `ast`, which is not thread-safe in CPython 3.11 (python/cpython#106905)
_NUMPY_HEADER_LOCK = threading.Lock()


class DamagedFeatures(ValueError):
    """A file does not match its checksum."""


def key(record: Record, network: Mapping[str, Any], sampling: Mapping[str, Any]) -> str:
    """Returns the name of a clip's features, in hexadecimal.

    A file is identified by path, size and modification time, encoded bytes by their hash, a clip
    also by its start and end. network: identifies weights and endpoint. sampling: frames and their
    size; for text networks the caption is part of the key.
    """
    if isinstance(record.video, bytes):
        file: Any = hashlib.sha256(record.video).hexdigest()
    else:
        file_stat = os.stat(record.video)
        file = [os.path.realpath(record.video), file_stat.st_size, file_stat.st_mtime_ns]
    caption = [record.caption] if "words" in sampling else []
    text = json.dumps(
        [file, record.start, record.end, dict(network), dict(sampling), *caption], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def load(folder: Path, name: str) -> np.ndarray | None:
    """Returns the features of a key, or None. Raises Damaged."""
    path = _path(folder, name)
    if not path.is_file():
        return None
    data = path.read_bytes()
    if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
        raise DamagedFeatures(f"{path} is damaged")
    with _NUMPY_HEADER_LOCK:
        return np.load(io.BytesIO(data[_DIGEST:]), allow_pickle=False)


def save(folder: Path, name: str, features: np.ndarray) -> None:
    """Keeps the features under this key, whole or not at all, also where several processes do."""
    path = _path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, features, allow_pickle=False)
    with atomic_file(path) as temporary:
        temporary.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def _path(folder: Path, name: str) -> Path:
    return folder / name[:2] / f"{name[2:]}.features"
