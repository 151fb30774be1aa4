# SPDX-License-Identifier: Apache-2.0
"""What may change when a run goes on: a longer run continues, other settings are refused with the
way to a new run, and a folder that holds nothing yet refuses nothing.
"""

import json
from pathlib import Path

import pytest

from particlejax import main

QUICK = ["main", "--config", "experiments/quickstart.py:tiny,scratch"]
STAGE = "--config.stages.finetune"


@pytest.fixture(scope="module")
def args(cache_dir: str) -> list[str]:
    return [*QUICK, f"--config.data.cache_dir={cache_dir}", "--config.log.every_steps=1"]


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["learning_rate"] for line in lines if line["split"] == "train"}


def test_a_longer_run_goes_on_and_other_settings_are_refused(
    args: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    here = ["--workdir", str(folder)]
    assert main.main([*args, *here, f"{STAGE}.num_steps=12"]) == 0
    said = capfd.readouterr().err
    assert "devices: 8 x cpu, 1 process, mesh data=8" in said
    assert "clips to train on" in said and "12 classes" in said
    before = losses(folder)
    # what only concerns measuring, logging and speed
    free = [
        f"{STAGE}.val_every_steps=3",
        "--config.data.num_threads=1",
        "--config.checkpoint.save_interval_steps=5",
    ]
    longer = [f"{STAGE}.num_steps=16", f"{STAGE}.optim.schedule_steps=12"]
    assert main.main([*args, *here, *free, *longer]) == 0
    assert "finetune is longer now" in capfd.readouterr().err
    after = losses(folder)
    assert list(after) == list(range(1, 17)), "no step is repeated"
    assert {step: after[step] for step in before} == before
    assert after[16] == after[13] <= before[12], "the schedule of before stays at its end"
    assert json.loads((folder / "results.json").read_text())["finetune"]["train"]["steps"] == 16
    assert (
        json.loads((folder / "results.before.json").read_text())["finetune"]["train"]["steps"] == 12
    )
    assert main.main([*args, *here, *longer, f"{STAGE}.optim.learning_rate=3.0"]) == 2
    said = capfd.readouterr().err
    assert "optim.learning_rate was 0.001, is 3.0" in said
    assert f"--config.init_from={folder} to start a new run" in said


def test_a_folder_without_checkpoint_and_results_takes_other_settings(
    args: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    bad = [*args, "--workdir", str(folder), "--config.eval.splits=('nowhere',)"]
    assert main.main(bad) == 2 and (folder / "config.json").exists()
    good = [
        *args,
        "--workdir",
        str(folder),
        f"{STAGE}.num_steps=2",
        f"{STAGE}.optim.learning_rate=0.5",
    ]
    assert main.main(good) == 0
    assert json.loads((folder / "config.json").read_text())["stages"]["finetune"]["num_steps"] == 2
