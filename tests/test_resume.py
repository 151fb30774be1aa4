# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, a run of mixed scales continues and ends with the figures of one that was
left alone, bit for bit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import DEADLINE, spawn

from particlejax.distributed import checkpoint

ROOT = Path(__file__).parents[1]
STEPS, KILLS = 24, 3
OVERRIDES = [
    f"--config.stages.finetune.num_steps={STEPS}",
    "--config.stages.finetune.val_every_steps=8",
    "--config.log.every_steps=1",
    "--config.stages.finetune.grad_accum_steps=2",
    "--config.checkpoint.save_interval_steps=5",
    "--config.model.dropout=0.2",
    "--config.stages.finetune.best_metric=classify/top1",
    "--config.data.num_workers=0",
]


def start(workdir: Path, cache_dir: str) -> subprocess.Popen:
    """The command in a process of its own, its output in a file beside the folder."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    with open(f"{workdir}.log", "a") as log:
        return spawn(
            [
                sys.executable,
                "-m",
                "particlejax.main",
                "--config",
                "tests/experiments/mixed.py",
                "--workdir",
                str(workdir),
                f"--config.data.cache_dir={cache_dir}",
                *OVERRIDES,
            ],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )


def steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return (
        sum('"split": "train"' in line for line in path.read_text().splitlines())
        if path.exists()
        else 0
    )


def interrupt(workdir: Path, cache_dir: str, step: int, number: int) -> int:
    """Starts the run and sends it a signal once it has written that many steps; returns its exit
    code.
    """
    process = start(workdir, cache_dir)
    until = time.monotonic() + DEADLINE
    while steps_done(workdir) < step and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)  # there is nothing to wait on but the file
    process.send_signal(number)
    return process.wait(timeout=DEADLINE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> Path:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert start(workdir, cache_dir).wait(timeout=DEADLINE) == 0, Path(f"{workdir}.log").read_text()
    return workdir


def test_killed_and_stopped_run_equals_an_undisturbed_one(
    undisturbed: Path, cache_dir: str, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    for moment in sorted(random.Random(0).sample(range(1, STEPS - 4), KILLS)):
        assert interrupt(workdir, cache_dir, moment, signal.SIGKILL) == -signal.SIGKILL
        assert (workdir / "lock.json").exists(), "which stops no later run on this host"
    assert interrupt(workdir, cache_dir, steps_done(workdir) + 1, signal.SIGTERM) == 0
    stopped = steps_done(workdir)
    said = Path(f"{workdir}.log").read_text()
    assert "SIGTERM: finetune is saved at step" in said and "continuing at step" in said
    assert said.count("is taken over") == KILLS and not (workdir / "lock.json").exists()
    assert stopped < STEPS, "it stopped before the end"
    before = checkpoint.load_data(workdir / "checkpoints/finetune/latest")["counts"]
    process = start(workdir, cache_dir)
    assert process.wait(timeout=DEADLINE) == 0
    assert f"continuing at step {stopped}" in Path(f"{workdir}.log").read_text(), (
        "nothing is repeated after SIGTERM"
    )
    assert (workdir / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    mine, theirs = (
        json.loads((each / "results.json").read_text())["finetune"]
        for each in (workdir, undisturbed)
    )
    assert mine["val"] == theirs["val"]
    assert mine["train"]["clips_seen"] == theirs["train"]["clips_seen"], "of all sessions"
    assert mine["train"]["wall_seconds"] > before["seconds"] > 0, "of all sessions"
    assert (workdir / "predictions_finetune_val.csv").read_bytes() == (
        undisturbed / "predictions_finetune_val.csv"
    ).read_bytes()
