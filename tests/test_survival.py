# SPDX-License-Identifier: Apache-2.0
"""A full disk and numbers that are none: what was saved stays, somebody is told, and skipping
changes nothing else.
"""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import checkpoint_manager

from particlejax import main as entry
from particlejax.config.experiment import OptimSpec
from particlejax.core.typing import UserError
from particlejax.distributed import checkpoint
from particlejax.distributed.checkpoint import Checkpoints
from particlejax.particles.types import Batch
from particlejax.train import nan_guard, optim
from particlejax.train.nan_guard import NanGuard
from particlejax.train.train_state import TrainState, make_step

TINY = "--config=experiments/finetune.py:tiny"


def full(*args: object, **more: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    found = Checkpoints(tmp_path / "run", max_to_keep=2)
    for step in (1, 2):
        found.save(step, {"w": jnp.full((64,), step)}, {"step": step})
        found.finish()
    yield found
    found.close()


@pytest.mark.parametrize("where", ["manifest", "arrays", "commit"])
def test_a_full_disk_keeps_what_was_saved(
    checkpoints: Checkpoints, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {
        "manifest": (checkpoint, "write_json"),
        "commit": (checkpoint_manager.CheckpointManager, "_finalize_checkpoint"),
        "arrays": (checkpoint_manager.CheckpointManager, "save"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(*place, full)
        with pytest.raises(
            UserError,
            match=r"\(No space left on device\); step 2 and all before it are kept: free disk",
        ):
            checkpoints.save(3, {"w": jnp.full((64,), 3)}, {})
            checkpoints.finish()
    assert not list(checkpoints.folder.glob(checkpoint._PARTIAL)), "what is half written makes room"
    reopened = Checkpoints(checkpoints.folder, 2, lambda sentence: None)
    step, state, data = reopened.restore(
        {"w": jax.ShapeDtypeStruct((64,), jnp.int32, sharding=jnp.zeros(64).sharding)}
    )
    assert (step, data) == (2, {"step": 2}) and (state["w"] == 2).all()
    reopened.close()


def test_an_error_that_is_not_the_disks_keeps_its_name(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise KeyError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", broken)
        checkpoints.save(3, {"w": jnp.full((64,), 3)}, {})
        with pytest.raises(KeyError, match="a bug"):
            checkpoints.finish()


def test_a_checkpoint_is_whole_before_the_next_is_asked_for(checkpoints: Checkpoints) -> None:
    checkpoints.save(3, {"w": jnp.full((64,), 3)}, {})
    checkpoints._manifest_thread.join()  # and not `finish`: a kill may come first
    assert checkpoint.integrity_error(checkpoints.folder / "3") == ""
    (checkpoints.folder / "4.orbax-checkpoint-tmp").mkdir()
    Checkpoints(checkpoints.folder, 2).close()
    assert not (checkpoints.folder / "4.orbax-checkpoint-tmp").exists()


def stepped(on_nan: str, batches: list[float]) -> tuple[TrainState, list[float]]:
    def objective(params: dict, model: object, batch: Batch, key: jax.Array, train: bool) -> tuple:
        loss = jnp.sum((params["body"]["w"] - batch) ** 2)
        return loss, {"loss": loss}

    optimizer = optim.build_optimizer(OptimSpec(learning_rate=0.1, warmup_ratio=0), 10)
    params = {"body": {"w": jnp.ones(3)}, "head": {"w": jnp.ones(2)}}
    state = TrainState(
        jnp.zeros((), jnp.int32),
        jnp.uint32(0),
        params,
        optimizer.init(params),
        jax.tree.map(jnp.copy, params),
    )
    step = jax.jit(make_step(None, objective, optimizer, ema=0.5, accumulate=1, on_nan=on_nan))
    seen = []
    for batch in batches:
        state, metrics = step(state, jnp.float32(batch))
        seen.append(float(metrics["finite"]))
    return state, seen


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_step_left_out_changes_only_its_number(wrong: float) -> None:
    good, _ = stepped("skip", [0.5])
    skipped, seen = stepped("skip", [0.5, wrong, -wrong])
    assert seen == [1, 0, 0] and int(skipped.step) == 3
    jax.tree.map(
        np.testing.assert_array_equal,
        (good.params, good.opt_state, good.average),
        (skipped.params, skipped.opt_state, skipped.average),
    )
    poisoned, _ = stepped("stop", [0.5, wrong])
    assert not np.isfinite(poisoned.params["body"]["w"]).any(), (
        "which is why such a state must not be saved"
    )


def test_norms_of_groups_make_up_the_whole() -> None:
    optimizer = optim.build_optimizer(OptimSpec(), 10)
    encoder = {"place": {"a": {"kernel": jnp.full(4, 2.0)}}, "norm": {"scale": jnp.ones(9)}}
    params = {"encoder": encoder, "head": {"kernel": jnp.ones(16)}}
    state = TrainState(jnp.zeros((), jnp.int32), jnp.uint32(0), params, optimizer.init(params), ())

    def objective(params: dict, *rest: object) -> tuple:
        loss = sum(jnp.sum(x) for x in jax.tree.leaves(params))
        return loss, {"loss": loss}

    _, metrics = jax.jit(make_step(None, objective, optimizer, ema=0.0, accumulate=1))(state, None)
    groups = {
        name.split("/", 1)[1]: float(value)
        for name, value in metrics.items()
        if name.startswith("grad_norm/")
    }
    np.testing.assert_allclose(
        [groups[name] for name in ("encoder/place", "encoder/norm", "head")], [2, 3, 4], rtol=1e-6
    )
    np.testing.assert_allclose(float(metrics["grad_norm"]), np.sqrt(29), rtol=1e-6)
    assert {
        name.replace("grad_", "param_") for name in metrics if name.startswith("grad_norm")
    } <= set(metrics)


def test_skipping_for_ever_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nan_guard, "_MAX_CONSECUTIVE", 3)
    watch = NanGuard(tmp_path, "a", "skip", lambda step: [f"clip{step}.mp4"])
    for step, value in enumerate((0.0, 0.0, 1.0, 0.0, 0.0), 1):
        watch.record(step, value)
        watch.check()
    watch.record(6, 0.0)
    with pytest.raises(
        UserError, match="step 6, .*a_6.json. This happened in 3 consecutive steps: check these"
    ):
        watch.check()
    assert json.loads((tmp_path / "nan" / "a_6.json").read_text())["clips"] == ["clip6.mp4"]


def test_numbers_that_are_none_stop_the_run_before_they_are_saved(
    cache_dir: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    command = [
        "main",
        TINY,
        f"--config.data.cache_dir={cache_dir}",
        "--config.stages.finetune.optim.learning_rate=1e15",
        "--config.stages.finetune.optim.warmup_ratio=0.0",
        "--config.stages.finetune.optim.weight_decay=0.0",
        "--config.checkpoint.save_interval_steps=1",
        "--config.profile_steps=(2,2)",
        "--workdir",
        str(tmp_path / "run"),
    ]
    assert entry.main(command) == 2
    said = capfd.readouterr().err
    (path,) = (tmp_path / "run" / "nan").iterdir()
    found = json.loads(path.read_text())
    assert (
        f"NaN or Inf in the loss at step {found['step']}," in said
        and f"the batch's clips are listed in {path}" in said
        and "Traceback" not in said
    )
    assert len(found["clips"]) == 8 and all(isinstance(name, str) for name in found["clips"])
    latest = tmp_path / "run" / "checkpoints" / "finetune" / "latest"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoint.load_arrays(latest)))
    assert max(int(p.name) for p in latest.iterdir() if p.name.isdigit()) < found["step"]
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb")), (
        "the profile of the first step"
    )
