# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is whole or absent: every damage is named and passed over, nothing is deleted,
another mesh restores.
"""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax.config.experiment import MeshSpec
from particlejax.core.typing import UserError
from particlejax.distributed import checkpoint, sharding
from particlejax.distributed.checkpoint import Checkpoints
from particlejax.finetune import restore
from particlejax.train.train_state import TrainState, as_abstract


def state_of(step: int, mesh: jax.sharding.Mesh, width: int = 64) -> TrainState:
    encoder = {
        "kernel": np.arange(width * 64, dtype=np.float32).reshape(width, 64) + step,
        "bias": np.ones(64, np.float32),
    }
    params = {"encoder": encoder, "head": {"kernel": np.full((64, 3), step, np.float32)}}
    state = TrainState(
        jnp.int32(step), jnp.uint32(0), params, (jax.tree.map(np.zeros_like, params),), ()
    )
    return jax.tree.map(jax.device_put, state, sharding.param_shardings(state, mesh))


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshSpec(data=2, fsdp=4))


@pytest.fixture
def saved(tmp_path: Path, mesh: jax.sharding.Mesh) -> Path:
    checkpoints = Checkpoints(tmp_path / "run", max_to_keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step, mesh), {"next_batch": step})
    checkpoints.close()
    return tmp_path / "run"


def reopened(folder: Path, mesh: jax.sharding.Mesh) -> tuple[tuple | None, list[str]]:
    said: list[str] = []
    checkpoints = Checkpoints(folder, 2, said.append)
    found = checkpoints.restore(as_abstract(state_of(0, mesh)))
    checkpoints.close()
    return found, said


def test_newest_are_kept_and_restore_exactly_on_another_mesh(
    saved: Path, mesh: jax.sharding.Mesh
) -> None:
    other = sharding.make_mesh(MeshSpec(data=4, fsdp=2))
    (step, state, data), said = reopened(saved, other)
    assert (step, data, said) == (3, {"next_batch": 3}, [])
    jax.tree.map(np.testing.assert_array_equal, state, state_of(3, mesh))
    assert state.params["encoder"]["kernel"].sharding.mesh == other
    assert sorted(p.name for p in saved.iterdir() if p.name.isdigit()) == ["2", "3"]


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "3").rglob("*") if p.is_file())


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_every_file_damaged_in_turn_is_noticed(
    saved: Path, mesh: jax.sharding.Mesh, how: str, tmp_path: Path
) -> None:
    for i, name in enumerate(p.relative_to(saved) for p in files_of(saved)):
        copy = tmp_path / f"copy{i}"
        shutil.copytree(saved, copy)
        path = copy / name
        content = bytearray(path.read_bytes())
        if how == "remove" or not content:
            os.remove(path)
        elif how == "truncate":
            path.write_bytes(content[:-1])
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        found, said = reopened(copy, mesh)
        assert found is not None and found[0] == 2, name
        assert len(said) == 1 and "failed verification" in said[0] and "damaged/3" in said[0], said
        assert (copy / "damaged" / "3").is_dir(), "nothing that was saved is deleted"


def test_a_cut_off_save_and_an_empty_folder_are_passed_over(
    saved: Path, mesh: jax.sharding.Mesh
) -> None:
    (saved / "10").mkdir()
    os.remove(saved / "3" / "manifest.json")
    found, said = reopened(saved, mesh)
    assert found[0] == 2 and len(said) == 2 and all("interrupted" in s for s in said)
    checkpoints = Checkpoints(saved, 2)
    checkpoints.save(3, state_of(33, mesh), {})  # the same step can be written again
    checkpoints.close()
    assert float(reopened(saved, mesh)[0][1].params["head"]["kernel"][0, 0]) == 33


def test_parameters_start_from_a_checkpoint(saved: Path, mesh: jax.sharding.Mesh) -> None:
    fresh = state_of(7, mesh).params
    fresh["head"]["kernel"] = jnp.zeros((64, 5))  # another task
    params, sentence = restore.from_checkpoint(fresh, saved)
    np.testing.assert_array_equal(
        params["encoder"]["kernel"], state_of(3, mesh).params["encoder"]["kernel"]
    )
    assert (params["head"]["kernel"] == 0).all()
    assert "randomly initialized: head" in sentence


@pytest.mark.parametrize(
    "data, outputs, kept, sentence",
    [
        ({"outputs": ["a", "b", "c"]}, "abc", (0, 1, 2), "arrays from"),
        ({"outputs": ["a", "b", "c"]}, "cab", (2, 0, 1), "the head by class name for 3 of 3"),
        ({"outputs": ["a", "b", "c"]}, "xcya", (-1, 2, -1, 0), "for 2 of 4 classes, new for x, y"),
        ({"outputs": ["a", "b", "c"]}, "xyz", (-1, -1, -1), "a new head, as no class is one of a"),
        # older versions recorded labels alone
        ({"classes": ["a", "b", "c"]}, "bca", (1, 2, 0), "the head by class name for 3 of 3"),
        ({"classes": ["a|b", "c"]}, "ca", (2, 0), "the head by class name for 2 of 2"),
        ({"classes": ["a|b", "c|a", "b"]}, "abc", (0, 1, 2), "arrays from"),
        ({"classes": ["a"]}, "abc", (0, 1, 2), "the head by position, as its class names are unkn"),
    ],
)
def test_a_head_is_taken_over_by_class_name(
    data: dict, outputs: str, kept: tuple[int, ...], sentence: str, tmp_path: Path
) -> None:
    mesh = sharding.make_mesh(MeshSpec(data=2, fsdp=4))

    def params(width: int, start: float) -> dict:
        kernel = start + np.arange(64 * width, dtype=np.float32).reshape(64, width)
        head = {"kernel": kernel, "bias": kernel[0]}
        made = {"encoder": {"kernel": np.full((64, 64), start, np.float32)}, "head": head}
        return jax.tree.map(jax.device_put, made, sharding.param_shardings(made, mesh))

    stored, fresh = params(3, 1000.0), params(len(outputs), -5000.0)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, {"params": stored}, data)
    checkpoints.close()
    found, said = restore.from_checkpoint(fresh, tmp_path, outputs=tuple(outputs))
    assert sentence in said and ("initialized: head" in said) == (set(kept) == {-1})
    for name, leaf in found["head"].items():
        for i, source in enumerate(kept):
            expected = (
                fresh["head"][name][..., i] if source < 0 else stored["head"][name][..., source]
            )
            np.testing.assert_array_equal(leaf[..., i], expected)
        assert leaf.sharding == fresh["head"][name].sharding
    np.testing.assert_array_equal(found["encoder"]["kernel"], stored["encoder"]["kernel"])


def test_a_checkpoint_of_another_shape_is_refused(saved: Path, mesh: jax.sharding.Mesh) -> None:
    with pytest.raises(
        UserError,
        match=r"has shape \(64, 64\) for encoder/kernel but this model has \(32, 64\): set",
    ):
        restore.from_checkpoint(state_of(0, mesh, width=32).params, saved)
    with pytest.raises(UserError, match="has no valid checkpoint"):
        restore.from_checkpoint(state_of(0, mesh).params, saved / "nowhere")


def test_json_is_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})
    assert path.read_text().split() == ["{", '"a":', "1", "}"]
