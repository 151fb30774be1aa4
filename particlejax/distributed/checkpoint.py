# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with integrity checks: Orbax writes them, a manifest holds SHA-256 checksums of all
files.

Orbax does not detect flipped bits. The manifest is written after Orbax finishes, and verified
before any read. A checkpoint without a valid manifest is logged, moved to `damaged/` and skipped.
If a write fails (a full disk), earlier checkpoints stay.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_utils

from particlejax.config import renames
from particlejax.core import tree
from particlejax.core.io import write_json
from particlejax.core.typing import UserError
from particlejax.distributed import cluster

_MANIFEST = "manifest.json"
_STATE, _DATA = "state", "data"
_PARTIAL = "*.orbax-checkpoint-tmp*"  # unfinished Orbax writes
_CHECKSUM_THREADS = 4  # threads that compute checksums
_MIN_SLICE_BYTES = 2**20  # minimum bytes of a slice that a replica writes in parallel
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# TensorStore reports no errno
_DISK_ERROR_TEXTS = tuple(os.strerror(number) for number in _DISK_ERRNOS) + ("RESOURCE_EXHAUSTED",)
# files of an Orbax checkpoint not written by particlejax
_ORBAX_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Orbax's handlers, but replicas divide only large arrays, as each slice shape is compiled."""
    kinds = [(kind, ocp.type_handlers.ScalarHandler()) for kind in (int, float, np.number)]
    kinds += [
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (
            jax.Array,
            ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES),
        ),
    ]
    arrays = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(*kinds)
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add(_STATE, args, arrays)
    for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add(_DATA, args, ocp.JsonCheckpointHandler())
    return registry


def _print_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one stage in one folder, named by step; saves run in the background.

    state: a pytree of arrays. data: JSON values (position in the data). Only process 0 writes
    manifests.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_to_keep: int,
        log_fn: Callable[[str], None] = _print_stderr,
    ) -> None:
        self.folder = Path(folder).absolute()
        self._log_fn = log_fn
        self._manifest_thread: threading.Thread | None = None
        self._manifest_error: Exception | None = None  # error of the last manifest
        if cluster.is_primary():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_partial()
            self._move_damaged()
        # other processes read after damaged checkpoints are moved
        cluster.barrier(f"open {self.folder}")
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=False)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, handler_registry=_handlers()
        )

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Starts to save `step`, unless it exists; the state may be changed or donated on return.

        Raises UserError if this or the previous save cannot be written; earlier ones stay.
        """
        self.finish()
        if step in self._manager.all_steps():
            return
        items = {_STATE: ocp.args.PyTreeSave(state), _DATA: ocp.args.JsonSave(data)}
        try:
            started = self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._as_user_error(error) from error
        if not started:
            raise RuntimeError(
                f"Orbax refused to save step {step} in {self.folder}: it holds {self.steps()}"
            )
        if cluster.is_primary():  # immediately, so that a kill before the next save loses nothing
            self._manifest_thread = threading.Thread(
                target=self._write_manifest, args=(step,), daemon=True
            )
            self._manifest_thread.start()

    def finish(self) -> None:
        """Waits until the started save and its manifest are on disk. Raises UserError if that
        failed.
        """
        if self._manifest_thread is not None:
            self._manifest_thread.join()
            self._manifest_thread = None
        error, self._manifest_error = self._manifest_error, None
        try:
            self._manager.wait_until_finished()
        except Exception as raised:
            error = raised
        if error is not None:
            raise self._as_user_error(error) from error

    def _write_manifest(self, step: int) -> None:
        folder = self.folder / str(step)
        try:
            self._manager.wait_until_finished()
            write_json(folder / _MANIFEST, _checksums(folder))
        except Exception as error:  # raised by `finish`
            self._manifest_error = error

    def _as_user_error(self, error: Exception) -> Exception:
        """A UserError if the disk caused the error; partial writes are removed to free space."""
        reason = disk_error(error)
        if not reason:
            return error
        if cluster.is_primary():
            self._remove_partial()
        valid = [p for p in _step_folders(self.folder) if (p / _MANIFEST).exists()]
        remaining = (
            f"step {valid[-1].name} and all before it are kept"
            if valid
            else "there is no earlier one"
        )
        return UserError(
            f"a checkpoint cannot be written to {self.folder} ({reason}); {remaining}: free disk "
            "space and run the same command again."
        )

    def _remove_partial(self) -> None:
        for path in self.folder.glob(_PARTIAL):
            shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the valid checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def restore(
        self, abstract: Any, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, data) of the newest or the given checkpoint, None if there is none.

        abstract: ShapeDtypeStructs with shardings, of any mesh.
        """
        step = max(self.steps(), default=None) if step is None else step
        if step is None:
            return None
        saved = self._saved_names(step)
        if saved != set(tree.flatten(abstract)):
            return step, *self._restore_renamed(step, abstract, saved)
        args = checkpoint_utils.construct_restore_args(abstract)
        items = {
            _STATE: ocp.args.PyTreeRestore(item=abstract, restore_args=args),
            _DATA: ocp.args.JsonRestore(),
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return step, restored[_STATE], restored[_DATA]

    def read_data(self) -> dict[str, Any]:
        """The JSON data of the newest checkpoint, {} if there is none."""
        if not self.steps():
            return {}
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(self.folder / str(self.steps()[-1]) / _DATA)

    def _saved_names(self, step: int) -> set[str]:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            saved = reader.metadata(self.folder / str(step) / _STATE).item_metadata.tree
        return set(tree.flatten(saved))

    def _restore_renamed(
        self, step: int, abstract: Any, saved: set[str]
    ) -> tuple[Any, dict[str, Any]]:
        """The state of a checkpoint whose parameters have names of format 1."""
        old = {renames.parameter(name): name for name in saved}
        flat = tree.flatten(abstract)
        wanted = tree.nest({old.get(name, name): leaf for name, leaf in flat.items()})
        args = ocp.args.PyTreeRestore(
            item=wanted, restore_args=checkpoint_utils.construct_restore_args(wanted)
        )
        items = {_STATE: args, _DATA: ocp.args.JsonRestore()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        leaves = {
            renames.parameter(name): leaf for name, leaf in tree.flatten(restored[_STATE]).items()
        }
        return tree.map_named(lambda name, _: leaves[name], abstract), restored[_DATA]

    def delete_after(self, step: int) -> None:
        """Deletes checkpoints after `step`: the run resumes before them and writes them again."""
        for saved_step in self.steps():
            if saved_step > step:
                self._manager.delete(saved_step)

    def close(self) -> None:
        """Finishes and releases Orbax's resources."""
        try:
            self.finish()
        finally:
            self._manager.close()

    def _move_damaged(self) -> None:
        for folder in _step_folders(self.folder):
            problem = integrity_error(folder)
            if problem:
                destination = self.folder / "damaged" / folder.name
                destination.parent.mkdir(exist_ok=True)
                while destination.exists():
                    destination = destination.with_name(destination.name + "x")
                shutil.move(folder, destination)
                self._log_fn(
                    f"checkpoint {folder} failed verification ({problem}) and was moved to "
                    f"{destination}; using the one before."
                )


def load_subtree(
    folder: str | os.PathLike[str], wanted: Any, branches: tuple[str, ...], step: int | None = None
) -> tuple[Any, dict[str, tuple]]:
    """Arrays of the newest valid checkpoint, or of `step`, that `wanted` names, and the shapes of
    all saved arrays.

    wanted: {path name: ShapeDtypeStruct with sharding}; branches: top-level names of the saved
    state, the first that exists is read. Missing paths and other shapes are left out; the caller
    compares. Raises UserError if the folder has no valid checkpoint.
    """
    item = _newest_valid(folder, step) / _STATE
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(item).item_metadata.tree
        branch_name = next(name for name in branches if saved.get(name))
        flat = tree.flatten(saved[branch_name])
        old = {renames.parameter(name): name for name in flat}
        shapes = {name: tuple(flat[old[name]].shape) for name in old}
        matching = {
            old[name]: leaf
            for name, leaf in wanted.items()
            if shapes.get(name) == tuple(leaf.shape)
        }

        nested = {branch_name: tree.nest(matching)}
        args = checkpoint_utils.construct_restore_args(nested)
        restored = reader.restore(
            item, args=ocp.args.PyTreeRestore(item=nested, restore_args=args, partial_restore=True)
        )
    return _renamed(restored[branch_name]), shapes


def _renamed(restored: Any) -> dict[str, Any]:
    """Leaves by today's path names."""
    return {renames.parameter(name): leaf for name, leaf in tree.flatten(restored).items()}


def load_data(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON data of the newest valid checkpoint. Raises UserError if there is none."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(_newest_valid(folder) / _DATA)


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """A fingerprint of the newest valid checkpoint. Raises UserError if there is none."""
    return _digest(_newest_valid(folder) / _MANIFEST)[:16]


def load_arrays(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays by path name, in memory: the EMA or else the parameters of the newest valid
    checkpoint, or any Orbax checkpoint. Raises UserError if it is neither.
    """
    folder = Path(folder).absolute()
    is_plain_orbax = any((folder / name).exists() for name in _ORBAX_FILES)
    item = folder if is_plain_orbax else _newest_valid(folder) / _STATE
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(item).item_metadata.tree
        branch_name = (
            next((name for name in ("average", "params") if saved.get(name)), None)
            if not is_plain_orbax
            else None
        )
        wanted = saved if branch_name is None else {branch_name: saved[branch_name]}
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        restored = reader.restore(
            item, args=ocp.args.PyTreeRestore(item=wanted, restore_args=args, partial_restore=True)
        )
    return tree.flatten(restored) if branch_name is None else _renamed(restored[branch_name])


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds checkpoints, whole or damaged, or is one of Orbax."""
    folder = Path(folder)
    is_plain_orbax = any((folder / name).exists() for name in _ORBAX_FILES)
    return is_plain_orbax or bool(_step_folders(folder))


def valid_steps(folder: str | os.PathLike[str]) -> list[int]:
    """Steps of the valid checkpoints in a folder, ascending."""
    folder = Path(folder)
    steps = (
        sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    )
    return [step for step in steps if not integrity_error(folder / str(step))]


def _newest_valid(folder: str | os.PathLike[str], step: int | None = None) -> Path:
    folder = Path(folder).absolute()
    candidates = _step_folders(folder) if folder.is_dir() else []
    for path in reversed(candidates if step is None else [folder / str(step)]):
        if not integrity_error(path):
            return path
    raise UserError(f"{folder} has no valid checkpoint: use a run that has saved one.")


def _step_folders(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def disk_error(error: BaseException | None) -> str:
    """The disk error that caused `error`, or ''."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
            return os.strerror(error.errno)
        if text := next((text for text in _DISK_ERROR_TEXTS if text in str(error)), ""):
            return text
        error = error.__cause__ or error.__context__
    return ""


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(_MANIFEST))
    with ThreadPoolExecutor(_CHECKSUM_THREADS) as pool:
        return dict(
            zip(
                (p.relative_to(folder).as_posix() for p in files),
                pool.map(_digest, files),
                strict=True,
            )
        )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def integrity_error(folder: Path) -> str:
    """Why a checkpoint is invalid, '' if it is valid."""
    try:
        expected = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "its writing was interrupted"
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read: {error}"
    actual = _checksums(folder)
    mismatched = sorted(
        name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)
    )
    return f"{mismatched[0]} is missing or differs from its checksum" if mismatched else ""
