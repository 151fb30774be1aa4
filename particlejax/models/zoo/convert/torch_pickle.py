# SPDX-License-Identifier: Apache-2.0
"""Reads arrays from pickles without running their code: PyTorch's .pt, .pth, .pyth, .bin, and
numpy's.

A pickle names functions to call. Here a name maps to a stand-in of ours or is rejected: only
containers and array descriptions, which are built from bytes with bounds checks. Needs no torch,
and passes no data to numpy's classes.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from particlejax.core.typing import UserError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file from before PyTorch 1.6
_ZIP = b"PK\x03\x04"  # how a file of PyTorch 1.6 or later begins
_NUMPY_TYPES = frozenset("f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1".split())


class _ForbiddenObject(Exception):
    """A name outside the whitelist."""


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by dotted names. Raises UserError for a file with other objects, or a
    damaged one.
    """
    try:
        if zipfile.is_zipfile(path):
            loaded = _read_zip(path)
        else:
            with open(path, "rb") as file:
                if file.read(len(_ZIP)) == _ZIP:
                    raise ValueError("its zip archive is truncated")
                file.seek(0)
                loaded = _read_stream(file)
    except _ForbiddenObject as error:
        raise UserError(
            f"{path} holds the Python object {error}, which could run code and is not loaded: save "
            "only "
            "its arrays, as in torch.save(model.state_dict(), PATH)."
        ) from error
    except Exception as error:  # a damaged file can make zipfile and pickle raise anything
        raise UserError(
            f"{path} cannot be read as a pickle of arrays ({type(error).__name__}: {error}): fetch "
            "it again, or give it the suffix of its format."
        ) from error
    arrays: dict[str, np.ndarray] = {}
    _flatten("", loaded, arrays)
    return arrays


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        index = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(index) != 1:
            raise ValueError("no data.pkl of PyTorch in it")
        folder = index[0].removesuffix("data.pkl")
        if (
            folder + "byteorder" in archive.namelist()
            and archive.read(folder + "byteorder") != b"little"
        ):
            raise ValueError("its bytes are in big-endian order")
        raw: dict[str, np.ndarray] = {}

        def storage(dtype: np.dtype, key: str, count: int) -> np.ndarray:
            if key not in raw:
                raw[key] = np.frombuffer(archive.read(f"{folder}data/{key}"), np.uint8)
            return _typed(raw[key], dtype, count)

        return _Reader(io.BytesIO(archive.read(index[0])), storage).load()


def _read_stream(file: Any) -> Any:
    """A plain pickle, or the five pickles of PyTorch before 1.6, followed by the arrays' bytes."""
    first = _Reader(file, None).load()
    if not isinstance(first, int) or first != _LEGACY_MAGIC:
        return first
    _Reader(file, None).load()  # version
    if not _Reader(file, None).load().get("little_endian", True):
        raise ValueError("its bytes are in big-endian order")
    stores: dict[str, np.ndarray] = {}

    def storage(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        # filled below; tensors are views until then
        return stores.setdefault(key, np.zeros(count, dtype))

    loaded = _Reader(file, storage, copy=False).load()
    for key in _Reader(file, None).load():
        count = int.from_bytes(file.read(8), "little")
        if count != stores[key].size:
            raise ValueError(f"{count} numbers where {stores[key].size} were announced")
        stores[key][:] = np.frombuffer(file.read(stores[key].nbytes), stores[key].dtype)
    return loaded


class _Reader(pickle.Unpickler):
    """An unpickler that resolves only the stand-ins of this file."""

    def __init__(
        self,
        file: Any,
        storage: Callable[[np.dtype, str, int], np.ndarray] | None,
        copy: bool = True,
    ) -> None:
        super().__init__(file, encoding="latin1")
        self._storage, self._copy = storage, copy

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name. Raises _Refused for any other."""
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        known: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": _first_argument,
            "torch.Size": tuple,
            "numpy._reconstruct": _Array,
            "numpy.ndarray": "ndarray",
            "numpy.dtype": _Type,
            "numpy.scalar": _scalar,
            "_codecs.encode": _latin1,
        }
        short = {"numpy.core.multiarray": "numpy", "numpy._core.multiarray": "numpy"}.get(
            module, module
        )
        if f"{short}.{name}" not in known:
            raise _ForbiddenObject(f"{module}.{name}")
        return known[f"{short}.{name}"]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The storage of a tensor."""
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or self._storage is None or not isinstance(dtype, np.dtype):
            raise ValueError("a reference to something other than a storage")
        return self._storage(dtype, str(key), int(count))

    def _tensor(
        self, storage: np.ndarray, offset: int, size: tuple, stride: tuple, *unused: Any
    ) -> np.ndarray:
        del unused  # requires_grad, hooks, metadata
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if min(offset, *size, *stride, 0) < 0 or (0 not in size and last >= storage.size):
            raise ValueError(f"a tensor of shape {tuple(size)} beyond the end of its storage")
        steps = [s * storage.itemsize for s in stride]
        view = np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), steps)
        return view.copy() if self._copy else view


class _Type:
    """A numpy dtype: numeric ones only."""

    def __init__(self, code: str, *unused: Any) -> None:
        del unused
        if str(code) not in _NUMPY_TYPES:
            raise ValueError(f"numbers of type {code}")
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder({">": ">", "<": "<"}.get(state[1], "="))


class _Array:
    """A numpy array: shape, dtype and bytes, assembled by `_flatten`."""

    def __init__(self, *unused: Any) -> None:
        del unused
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self.value = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _scalar(kind: _Type, raw: Any) -> np.ndarray:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, kind.dtype).reshape(())


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"text in {encoding}")
    return text.encode("latin1")


def _first_argument(data: Any, *unused: Any) -> Any:
    del unused
    return data


def _typed(raw: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
    if raw.size < count * dtype.itemsize:
        raise ValueError(f"{raw.size} bytes for {count} numbers")
    return raw[: count * dtype.itemsize].view(dtype)


def _flatten(prefix: str, value: Any, output: dict[str, np.ndarray]) -> None:
    """Arrays within nested mappings, by dotted names; ignores all else in a training state."""
    if isinstance(value, _Array):
        value = value.value
    if isinstance(value, np.ndarray):
        output[prefix] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), item, output)
