# SPDX-License-Identifier: Apache-2.0
"""The safetensors format: eight bytes of length, a JSON header with each array's dtype, shape and
offsets, the arrays.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from particlejax.core.io import atomic_file
from particlejax.core.typing import UserError

_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _TYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # bytes, the limit of the reference implementation


def read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, read-only. Raises UserError if it is incomplete."""
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    length = int(data[:8].view("<u8")[0]) if len(data) >= 8 else 0
    if not 2 <= length <= min(len(data) - 8, _MAX_HEADER_BYTES):
        raise _read_error(path, "its header is truncated or it has another format")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
        if end > len(data):
            raise ValueError(f"it is truncated: {len(data):,} of {end:,} bytes")
        return {name: _array(data[8 + length :], entry) for name, entry in entries.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error) if "truncated" in str(error) else f"{type(error).__name__}: {error}"
        raise _read_error(path, reason) from error


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays, sorted by name, atomically."""
    header: dict[str, Any] = {}
    offset = 0
    for name, array in sorted(arrays.items()):
        end = offset + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of eight
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            file.write(np.ascontiguousarray(arrays[name]).tobytes())


def _array(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"type {entry['dtype']}")
    dtype, shape, (begin, end) = (
        np.dtype(_TYPES[entry["dtype"]]),
        tuple(entry["shape"]),
        entry["data_offsets"],
    )
    if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} at bytes {begin} to {end} of {len(data)}")
    # Copied, because a view into the file may be misaligned for its dtype.
    return np.frombuffer(data[begin:end].tobytes(), dtype).reshape(shape)


def _read_error(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be read as safetensors ({reason}): fetch it again, or give it the suffix "
        "of its format."
    )
