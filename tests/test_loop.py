# SPDX-License-Identifier: Apache-2.0
"""The loop's promises beyond resuming: early stopping, the best checkpoint, the moving average, W&B
without a network.
"""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax import main as entry
from particlejax.config.experiment import DataSpec, MeshSpec, OptimSpec
from particlejax.core import tree
from particlejax.core.typing import UserError
from particlejax.data import pipeline
from particlejax.distributed import sharding
from particlejax.particles.types import Batch
from particlejax.train import log, loop, optim, train_step
from particlejax.train.train_state import Step, TrainState, make_step

TINY = "--config=experiments/finetune.py:tiny"


def test_no_progress_ends_a_stage_and_the_best_is_measured(
    cache_dir: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    stage = "--config.stages.finetune"
    # a rate at which it can only get worse
    code = entry.main(
        [
            "main",
            TINY,
            f"--config.data.cache_dir={cache_dir}",
            f"{stage}.num_steps=40",
            f"{stage}.val_every_steps=2",
            f"{stage}.best_metric=classify/loss",
            f"{stage}.best_mode=min",
            f"{stage}.early_stopping_patience=2",
            f"{stage}.ema_decay=0.0",
            f"{stage}.optim.learning_rate=5.0",
            f"{stage}.optim.warmup_ratio=0.05",
            f"{stage}.optim.grad_clip_norm=0.0",
            "--workdir",
            str(tmp_path),
        ]
    )
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = [(line["step"], line["classify/loss"]) for line in lines if line["split"] == "val"]
    best = min(measured, key=lambda each: each[1])
    assert measured[-1][0] == best[0] + 4 < 40, "two measurements without a better one"
    assert (
        f"classify/loss has not improved in 2 evaluations, stopping at step {measured[-1][0]}"
        in capfd.readouterr().err
    )
    kept = [
        int(p.name) for p in (tmp_path / "checkpoints/finetune/best").iterdir() if p.name.isdigit()
    ]
    assert max(kept) == best[0]
    results = json.loads((tmp_path / "results.json").read_text())["finetune"]
    assert results["train"]["steps"] == measured[-1][0]
    top1 = next(
        line["classify/top1"]
        for line in lines
        if line["split"] == "val" and line["step"] == best[0]
    )
    assert np.isclose(results["val"]["top1"], top1), (
        "what is measured at the end is the best, not the last"
    )


def test_what_was_trained_is_saved_when_the_data_fails(
    cache_dir: str, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, traced = pipeline.read_batches, []

    def counting(*args: Any, **settings: Any) -> Step:
        step = make_step(*args, **settings)
        return lambda state, batch: traced.append(batch) or step(state, batch)

    monkeypatch.setattr(train_step, "make_step", counting)

    def failing(
        batches: pipeline.TrainBatches, start: int, stop: int, data: DataSpec
    ) -> Iterator[pipeline.LoadedBatch]:
        for k, loaded in enumerate(read(batches, start, stop, data), start):
            if k == 3:
                raise UserError("a process that decodes was killed")
            if k == 1:
                empty = np.full_like(loaded.batch.clip_index, -1)
                loaded = loaded._replace(batch=replace(loaded.batch, clip_index=empty))
            yield loaded

    command = ["main", TINY, f"--config.data.cache_dir={cache_dir}", "--workdir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "read_batches", failing)
        assert entry.main(command) == 2
    assert entry.main(command) == 0
    log = capfd.readouterr().err
    assert "no clip of step 2 can be read, so the step is skipped" in log
    assert "continuing at step 3" in log
    assert len(traced) == 2, "once a run, though its operations are counted, too"


def test_the_average_follows_the_parameters() -> None:
    mesh = sharding.make_mesh(MeshSpec())

    def objective(params: dict, model: object, batch: Batch, key: jax.Array, train: bool) -> tuple:
        loss = jnp.sum(params["w"] ** 2)
        return loss, {"loss": loss}

    optimizer = optim.build_optimizer(
        OptimSpec(
            "sgd", learning_rate=0.1, warmup_ratio=0, weight_decay=0, grad_clip_norm=0, momentum=0.0
        ),
        1000,
    )
    params = {"w": jnp.array([1.0, -2.0])}
    state = TrainState(
        jnp.zeros((), jnp.int32), jnp.uint32(0), params, optimizer.init(params), params
    )
    step = jax.jit(make_step(None, objective, optimizer, ema=0.5, accumulate=1))
    average = np.asarray(params["w"])
    with jax.set_mesh(mesh):
        for i in range(20):
            state, _ = step(state, None)
            decay = min(0.5, (1 + i) / (10 + i))
            average = decay * average + (1 - decay) * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.average["w"], average, rtol=1e-5)
    assert state.eval_params is state.average and tree.count(state.params) == 2


def test_what_a_stage_took_is_counted_over_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bad = (pipeline.UnreadableClip(1, "b", "damaged"),)
    clips = np.array([[0, -1], [2, 3]])
    batch = Batch({}, clips, clips, clips, clips)
    counts = loop._Counts.restored({}, clips=0)
    for _ in range(2):
        counts.record(pipeline.LoadedBatch(batch, bad))
    now[0] += 10.0
    saved = counts.gather_all(0)
    assert saved == {"seconds": 10.0, "clips": 6, "unreadable": ["b"]}, "the clip unread is none"
    now[0] += 1000.0  # until it was started again
    again = loop._Counts.restored({"counts": saved}, clips=99)
    again.record(pipeline.LoadedBatch(batch, ()))
    now[0] += 3.0
    assert again.gather_all(0) == {"seconds": 13.0, "clips": 9, "unreadable": ["b"]}
    assert loop._Counts.restored({"bad": {}}, clips=99).clips == 99, "of an older version"
    others = [
        {"part": i, "clips": n, "unreadable": []} for i, n in ((0, 9), (1, 4), (0, 3), (1, 4))
    ]
    monkeypatch.setattr(loop.cluster, "gather_json", lambda own: others)
    assert again.gather_all(0)["clips"] == 9 + 4, "two processes read each half of a batch"


def test_weights_and_biases_without_a_network(
    cache_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    code = entry.main(
        [
            "main",
            TINY,
            f"--config.data.cache_dir={cache_dir}",
            "--config.log.wandb_project=trial",
            "--workdir",
            str(tmp_path / "run"),
        ]
    )
    if importlib.util.find_spec("wandb") is None:
        assert code == 2 and 'pip install -e ".[wandb]"' in capfd.readouterr().err
        return
    assert code == 0 and list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_the_time_left_has_no_compilation_in_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    progress = log.Progress("train", 10)
    now[0] += 1.0
    log.Progress("once", 1).update()
    for seconds in (100.0, *[2.0] * 9):  # the first step compiles
        now[0] += seconds
        progress.update()
    progress.close()
    said = capfd.readouterr().err
    assert "once: step 1/1  \n" in said and "train: step 1/10  \n" in said, "no rate is known yet"
    assert "step 10/10, 0.50/s, 0:00 left" in said and "step 9/10, 0.50/s, 0:02 left" in said
