# SPDX-License-Identifier: Apache-2.0
"""Weight files to {dotted name: array}, and back: safetensors, PyTorch, npz, numpy pickles, folders
of `save_pretrained` and of Orbax.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from particlejax.core.io import atomic_file
from particlejax.core.typing import UserError
from particlejax.distributed import checkpoint
from particlejax.models.zoo.convert import pretrained_folder, safetensors, torch_pickle

_PICKLES = (".pt", ".pth", ".pyth", ".bin", ".ckpt", ".pkl", ".tar")
SUFFIXES = (".safetensors", ".npz", *_PICKLES)
ACCEPTED = (
    f"a file ({', '.join(SUFFIXES)}), a folder that transformers' save_pretrained wrote "
    "(config.json beside model.safetensors or pytorch_model.bin, whole or in shards), the workdir "
    "of import_weights, or an Orbax folder"
)
_NPZ_LIMITS = "npz holds no bfloat16 or float8: name a file that ends in .safetensors."


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file or folder, without running code from it. Raises UserError if it cannot
    be read.
    """
    path = located(path)
    if path.is_dir():
        arrays = checkpoint.load_arrays(path)
    elif path.name.endswith(pretrained_folder.INDEX_SUFFIX):
        arrays = {}
        for shard, listed in pretrained_folder.shards_of(path).items():
            part = _read_file(shard)
            pretrained_folder.check_shard(path, shard, listed, part)
            arrays |= part
    else:
        arrays = _read_file(path)
    if not arrays:
        raise UserError(f"{path} holds no arrays: name the file with the weights.")
    return _dequantize({name.replace("/", "."): array for name, array in arrays.items()})


def located(path: str | os.PathLike[str]) -> Path:
    """The file or index with the weights that a path names, or else the folder of a checkpoint.

    Raises UserError if the path does not exist, and for a folder that holds neither.
    """
    path = pretrained_folder.snapshot(Path(path).expanduser())
    if not path.exists():
        hub = "; a name on a hub is not fetched, download its folder first"
        is_hub_name = len(path.parts) == 2 and not path.parent.exists()
        raise UserError(
            f"{path} does not exist: check the path of the weights, {ACCEPTED}{hub * is_hub_name}."
        )
    if not path.is_dir():
        return path
    folder = checkpoints_in(path)
    found = (pretrained_folder.weights_in(path) if folder == path else None) or folder
    if found.is_dir() and not checkpoint.is_checkpoint(found):
        names = sorted(p.name for p in found.iterdir())
        held = f"it holds {pretrained_folder.listing(names)}" if names else "it is empty"
        raise UserError(
            f"{found} has no valid checkpoint and no weights under the names of save_pretrained "
            f"({held}): name {ACCEPTED}."
        )
    return found


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} has none of the suffixes {', '.join(SUFFIXES)}: rename it after its format, "
            "or name a folder of save_pretrained or of Orbax."
        )
    pretrained_folder.refuse_other_content(path)
    if path.suffix == ".safetensors":
        return safetensors.read(path)
    return _read_npz(path) if path.suffix == ".npz" else torch_pickle.read(path)


def _dequantize(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dequantizes TFLite's int8 arrays: NAME.w times NAME.scale, if present, becomes NAME.w in
    float32.

    TFLite scales depthwise kernels [1, h, w, C] along the last axis, others along the first.
    """
    scaled = {
        name: name.removesuffix(".w") + ".scale"
        for name, array in arrays.items()
        if name.endswith(".w")
        and array.dtype == np.int8
        and name.removesuffix(".w") + ".scale" in arrays
    }
    for name, scale in scaled.items():
        kernel, factor = arrays[name].astype(np.float32), arrays.pop(scale)
        axis = -1 if kernel.ndim == 4 and kernel.shape[0] == 1 else 0
        arrays[name] = kernel * np.expand_dims(
            factor, tuple(set(range(kernel.ndim)) - {axis % kernel.ndim})
        )
    return arrays


def checkpoints_in(folder: Path) -> Path:
    """The checkpoint folder of a run with one stage, such as an import, or else `folder`.

    Raises UserError for several stages.
    """
    stages = sorted(p for p in (folder / "checkpoints").glob("*/latest"))
    if len(stages) > 1:
        raise UserError(f"{folder} holds {len(stages)} stages: name one, such as {stages[-1]}.")
    return stages[0] if stages else folder


def saved_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Metadata of a particlejax checkpoint; {} for any other folder or file."""
    folder = checkpoints_in(Path(path).expanduser())
    is_own = folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())
    return checkpoint.load_data(folder) if is_own else {}


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as .safetensors or .npz. Raises UserError for another suffix."""
    path = Path(path).expanduser()
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(
            f"weights cannot be written to {path}: name a file that ends in .safetensors or .npz."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.write(path, arrays)
        return
    if any(array.dtype.kind == "V" for array in arrays.values()):
        raise UserError(_NPZ_LIMITS)
    with atomic_file(path) as temporary:
        np.savez(temporary, **dict(arrays))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # a damaged file can make zipfile and numpy raise anything
        raise UserError(
            f"{path} cannot be read as npz ({type(error).__name__}: {error}): fetch it again, or "
            "give it the suffix of its format."
        ) from error
