# SPDX-License-Identifier: Apache-2.0
"""Sweeps: every run once and its own, whoever takes it; what is done is not done again; the table
says what the runs said.
"""

import importlib.util
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from processes import DEADLINE, spawn

from particlejax import main as entry
from particlejax.config.experiment import Experiment, as_dict
from particlejax.config.job_specs import SweepJob
from particlejax.core import tree
from particlejax.core.typing import UserError
from particlejax.jobs import optuna_sweep, sweep
from particlejax.train import loop
from particlejax.train import stage as run

RUNS = {
    "grid-16": {},
    "random-8": {"particles": {"budget": 8}},
    "random-4": {"particles": {"budget": 4}},
    "wide-8": {"particles": {"budget": 8}, "model": {"width": 384}},
}
HAS_OPTUNA = importlib.util.find_spec("optuna") is not None


def experiment(**more: object) -> SweepJob:
    stage = {"num_steps": 1, "objectives": {"classify": {"label_smoothing": 0.1}}}
    return SweepJob.of(
        {
            "job": "sweep",
            "stages": {"finetune": stage},
            "sweep": {"runs": RUNS, "seeds": (0, 1), "metric": "finetune/val/top1", **more},
        }
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs in the order in which they were trained; a run is as good as it has particles, a second
    seed a little better.
    """
    names: list[str] = []

    def train(each: Experiment, folder: Path, name: str) -> None:
        names.append(name)
        particles = each.particles.budget or 16
        cost = {
            "particles_per_clip": particles,
            "flops_per_clip": particles * each.model.width * 1e6,
            "train_seconds": 2.0,
            "clips_per_second": 100 / particles,
        }
        run.add_results(
            folder,
            "finetune",
            {"train": cost, "val": {"top1": particles / 20 + each.seed / 100}},
            {},
        )

    monkeypatch.setattr(sweep, "train", train)
    return names


def test_a_sweep_runs_every_seed_tables_what_came_of_it_and_goes_on_where_it_stopped(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, stopped = sweep.train, [False]

    def interrupted(each: Experiment, folder: Path, name: str) -> None:
        if name == "random-8-seed1" and not stopped[0]:
            stopped[0] = True
            raise loop.Stopped("SIGTERM: saved")
        good(each, folder, name)

    monkeypatch.setattr(sweep, "train", interrupted)
    with pytest.raises(loop.Stopped):
        sweep.sweep(experiment(), tmp_path, "s")
    before = list(trained)
    sweep.sweep(experiment(), tmp_path, "s")
    assert Counter(trained) == Counter(f"{name}-seed{seed}" for name in RUNS for seed in (0, 1)), (
        "each once"
    )
    assert trained[: len(before)] == before and before[:4] == [f"{name}-seed0" for name in RUNS], (
        "seed by seed"
    )
    row = run.read_results(tmp_path)["sweep"]["random-8"]
    assert (
        np.allclose(row["values"], [0.4, 0.41])
        and row["particles"] == [8, 8]
        and row["gflops"] == [1.536, 1.536]
    )
    assert abs(row["mean"] - 0.405) < 1e-9 and abs(row["std"] - 0.01 / 2**0.5) < 1e-9
    report = (tmp_path / "report.md").read_text()
    assert "| random-8 | 0.405 ± 0.007 | 2 | 8 | 1.54 | 12.5 | 2 | yes |" in report
    assert all(
        (tmp_path / "report" / f"pareto_{cost}.png").stat().st_size > 5000
        for cost in ("particles", "gflops", "seconds")
    )
    config = json.loads((tmp_path / "runs/wide-8/seed1/config.json").read_text())
    assert (
        config["model"]["width"] == 384
        and config["particles"]["budget"] == 8
        and config["seed"] == 1
    )
    assert (
        config["job"] == "train"
        and config["stages"]["finetune"]["objectives"]["classify"]["label_smoothing"] == 0.1
    )


NAMES = {  # with a pattern of the folder's name
    "lr-1e-3_wd=0.05": r"lr-1e-3_wd=0\.05",
    "folder:/clips/a.b": r"folder_clips_a\.b_[0-9a-f]{8}",
    "folder:/clips/a,b": r"folder_clips_a_b_[0-9a-f]{8}",
    "folder_clips_a_b": "folder_clips_a_b",
    "../../up": "up_[0-9a-f]{8}",
    "/top$^$": "top_[0-9a-f]{8}",  # no formula
    "..": "[0-9a-f]{8}",
    "many " * 60: "(many_){20}[0-9a-f]{8}",
}


def test_runs_of_any_name_have_folders_of_their_own_inside_the_sweep(
    trained: list[str], tmp_path: Path, cache_dir: str
) -> None:
    file, workdir = tmp_path / "names.py", tmp_path / "up" / "up" / "sweep"
    file.write_text(
        "import runpy\n"
        "from ml_collections import ConfigDict\n"
        "from particlejax.config.job_specs import SweepSpec\n"
        "from particlejax.config.experiment import section\n"
        "def get_config():\n"
        "    config = runpy.run_path('experiments/finetune_sweep.py')['get_config']('tiny')\n"
        f"    runs = {{name: {{'model': {{'depth': 1}}}} for name in {list(NAMES)!r}}}\n"
        "    config.sweep = ConfigDict(section(SweepSpec, runs=runs, seeds=(0,)))\n"
        "    return config\n"
    )
    command = [
        "main",
        f"--config={file}",
        f"--config.data.cache_dir={cache_dir}",
        "--config.sweep.runs.folder:/clips/a.b.model.depth=2",
        f"--workdir={workdir}",
    ]
    assert entry.main(command) == 0 and len(trained) == len(NAMES)
    rows = run.read_results(workdir)["sweep"]
    assert rows.keys() == NAMES.keys()
    for name, pattern in NAMES.items():
        assert re.fullmatch(f"runs/{pattern}", rows[name]["folder"]), name
        config = json.loads((workdir / rows[name]["folder"] / "seed0/config.json").read_text())
        assert config["model"]["depth"] == (2 if name == "folder:/clips/a.b" else 1)
    assert len(list((workdir / "runs").iterdir())) == len(NAMES), "none outside, none shared"
    assert (
        f"| folder:/clips/a,b ({rows['folder:/clips/a,b']['folder']}) | "
        in (workdir / "report.md").read_text()
    )
    assert entry.main(command) == 0 and len(trained) == len(NAMES), "done before"


def test_the_front_is_what_nothing_cheaper_matches() -> None:
    figures = {
        name: {"mean": mean, "particles": [cost]}
        for name, mean, cost in (
            ("a", 0.5, 10),
            ("b", 0.4, 20),
            ("c", 0.6, 30),
            ("d", 0.6, 40),
            ("e", 0.3, 10),
        )
    }
    assert sweep.pareto_front(figures, "particles") == ["a", "c"]


def test_a_run_that_fails_is_named_and_the_others_are_run(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = sweep.train

    def some(each: Experiment, folder: Path, name: str) -> None:
        if each.particles.budget == 4:
            raise UserError("the loss is nan at step 3")
        good(each, folder, name)

    monkeypatch.setattr(sweep, "train", some)
    with pytest.raises(
        UserError, match=r"1 of 4 have failed runs: random-4 .the loss is nan at step 3."
    ):
        sweep.sweep(experiment(), tmp_path, "s")
    assert len(trained) == 6 and "No result yet: random-4" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(sweep, "train", good)
    sweep.sweep(experiment(), tmp_path, "s")
    assert len(trained) == 8, "mended, it is run again"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"runs": {}}, "config.sweep.runs is empty"),
        (
            {"runs": {"a": {"particle": {"budget": 1}}}},
            "no key 'particle': did you mean config.particles",
        ),
        ({"metric": "finetune/val/top2"}, "is not measured: did you mean top5"),
    ],
)
def test_a_wrong_sweep_is_refused(
    trained: list[str], changes: dict, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        sweep.sweep(experiment(**changes), tmp_path, "s")


TAKE = """
import sys
from particlejax.jobs import optuna_sweep as shared
storage, log = sys.argv[1:]
def work(i):
    with open(log, "a") as file:
        file.write(f"{i}\\n")
shared.run_each(storage, "s", [f"run{i}" for i in range(12)], work)
"""


def test_processes_take_each_run_exactly_once(tmp_path: Path) -> None:
    storage, log = str(tmp_path / "journal"), tmp_path / "log"
    if not HAS_OPTUNA:
        with pytest.raises(UserError, match=r"pip install -e .\.\[optuna\]"):
            optuna_sweep.run_each(storage, "s", ["a"], lambda i: None)
        return
    with pytest.raises(KeyboardInterrupt):  # one that is interrupted puts its run back
        optuna_sweep.run_each(storage, "s", [f"run{i}" for i in range(12)], _interrupt)
    command = [sys.executable, "-W", "ignore", "-c", TAKE, storage, str(log)]
    several = [spawn(command, cwd=Path(__file__).parents[1]) for _ in range(3)]
    assert [process.wait(timeout=DEADLINE) for process in several] == [0, 0, 0]
    assert Counter(log.read_text().split()) == Counter(str(i) for i in range(12))
    with pytest.raises(UserError, match="holds another sweep"):
        optuna_sweep.run_each(storage, "s", ["other"], lambda i: None)
    with pytest.raises(UserError, match="SQLite may give one run to two processes"):
        optuna_sweep.run_each("sqlite:///study.db", "s", ["a"], lambda i: None)


def _interrupt(i: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not HAS_OPTUNA, reason="Optuna is an extra")
def test_a_search_combines_what_the_runs_differ_in(trained: list[str], tmp_path: Path) -> None:
    sweep.sweep(experiment(num_trials=6), tmp_path, "s")
    assert len(trained) == 6
    tried = [
        json.loads(p.read_text()) for p in sorted(tmp_path.glob("runs/trial*/seed0/config.json"))
    ]
    assert len(tried) == 6 and all(
        each["particles"]["budget"] in (8, 4) and each["model"]["width"] == 384 for each in tried
    )
    found = (tmp_path / "results.json").read_text()
    assert len(json.loads(found)["sweep"]) == 6
    sweep.sweep(experiment(num_trials=6), tmp_path, "s")
    assert len(trained) == 6, "done before"
    assert (tmp_path / "results.json").read_text() == found, "and still told of"


def test_every_setting_of_the_search_that_is_shipped_is_one_of_an_experiment() -> None:
    config = runpy.run_path("experiments/finetune_sweep.py")["get_config"]("tiny,search")
    changed = {
        path: value
        for each in sweep.plan_runs(SweepJob.of(config.to_dict()))
        for path, value in tree.flatten(config.sweep.runs[each.name].to_dict()).items()
        if tree.flatten(as_dict(each.experiment))[path] == value
    }
    assert {path.rsplit("/", 1)[1] for path in changed} == {
        "method",
        "learning_rate",
        "warmup_ratio",
        "final_lr_ratio",
        "weight_decay",
        "layer_decay",
    }
