# SPDX-License-Identifier: Apache-2.0
"""The command as a person uses it: every experiment file runs shrunk, and each mistake gets one
sentence.
"""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

from particlejax import main as entry
from particlejax.config.experiment import DataSpec, Experiment
from particlejax.config.fields import make
from particlejax.config.job_specs import PrepareSpec
from particlejax.core.typing import UserError
from particlejax.data.sources.toybox import builder
from particlejax.train import stage as run_parts

ROOT = Path(__file__).parents[1]
TOP_KEYS = {"top1", "top5", "mean_class_accuracy", "ece", "confusion", "per_class"}


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> Path:
    """Toybox clips as a researcher's folder: split/class/clip.mp4, one of the files damaged."""
    folder = tmp_path_factory.mktemp("clips")
    made = builder.prepare("tiny", Path(cache_dir) / "tfds")
    for split in ("train", "val"):
        for i, example in enumerate(made.as_data_source(split=split)):
            if i < 24 and example["label"] < 4:
                path = folder / split / builder.ACTIONS[example["label"]] / f"{i}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(example["video"])
    (folder / "val" / "bounce" / "broken.mp4").write_bytes(b"not a video at all")
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def run(capfd: pytest.CaptureFixture, *args: str) -> tuple[int, str]:
    code = entry.main(["main", *args])
    return code, capfd.readouterr().err


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> Path:
    """The quickstart, shrunk, run once."""
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    assert (
        entry.main(
            [
                "main",
                "--config",
                "experiments/quickstart.py:tiny",
                f"--config.data.cache_dir={cache_dir}",
                "--workdir",
                str(workdir),
            ]
        )
        == 0
    )
    return workdir


def test_quickstart_leaves_what_the_design_says(quickstart: Path) -> None:
    results = json.loads((quickstart / "results.json").read_text())
    assert set(results) == {"pretrain", "finetune", "unreadable"}
    assert TOP_KEYS <= set(results["finetune"]["test"])
    assert (
        results["pretrain"]["train"]["compilations"]
        == results["finetune"]["train"]["compilations"]
        == 1
    )
    lines = [json.loads(line) for line in (quickstart / "metrics.jsonl").read_text().splitlines()]
    assert {(line["stage"], line["split"]) for line in lines} == {
        (s, p) for s in results if s != "unreadable" for p in ("train", "val")
    }
    assert all("step" in line and np.isfinite(line["loss"]) for line in lines)
    report = (quickstart / "report.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", report)
    assert len(links) >= 5 and all((quickstart / link).stat().st_size > 1000 for link in links)
    assert (
        list((quickstart / "tensorboard").iterdir())
        and (quickstart / "checkpoints" / "finetune").is_dir()
    )
    rows = read_csv(quickstart / "predictions_finetune_test.csv")
    assert (
        len(rows) == 24
        and abs(sum(float(v) for k, v in rows[0].items() if k.startswith("p:")) - 1) < 1e-4
    )


def test_the_same_command_again_does_nothing_anew(
    quickstart: Path, cache_dir: str, capfd: pytest.CaptureFixture
) -> None:
    before = (quickstart / "metrics.jsonl").read_bytes()
    code, said = run(
        capfd,
        "--config",
        "experiments/quickstart.py:tiny",
        f"--config.data.cache_dir={cache_dir}",
        "--workdir",
        str(quickstart),
    )
    assert code == 0 and "already done" in said
    assert (quickstart / "metrics.jsonl").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(
    quickstart: Path, cache_dir: str, capfd: pytest.CaptureFixture
) -> None:
    code, said = run(
        capfd,
        "--config",
        "experiments/quickstart.py:tiny",
        f"--config.data.cache_dir={cache_dir}",
        "--config.seed=1",
        "--workdir",
        str(quickstart),
    )
    assert code == 2 and "config.seed was 0, is 1" in said and "or another --workdir" in said


def test_finetune_on_a_folder_from_a_run_then_evaluate(
    quickstart: Path, clips_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    code, said = run(
        capfd,
        "--config=experiments/finetune.py:tiny",
        f"--config.data.source=folder:{clips_folder}",
        f"--config.init_from={quickstart}:pretrain",
        "--workdir",
        str(tmp_path / "f"),
    )
    assert code == 0, said
    assert "loaded " in said and "randomly initialized: head" in said
    assert (
        "settings taken from" in said
        and "data.temporal_mean_scale=0.05, particles.patch_size=(16, 4, 4)" in said
    ), "payloads are those that the encoder knows"
    results = json.loads((tmp_path / "f" / "results.json").read_text())
    assert results["finetune"]["val"]["num_clips"] == 8
    assert [bad["path"] for bad in results["unreadable"]] == ["val/bounce/broken.mp4"] and results[
        "unreadable"
    ][0]["reason"]
    code, said = run(
        capfd,
        "--config=experiments/evaluate.py",
        f"--config.run={tmp_path / 'f'}",
        f"--config.data.source=folder:{clips_folder}",
        "--config.data.split=train",
        "--workdir",
        str(tmp_path / "e"),
    )
    assert code == 0, said
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert TOP_KEYS <= set(results["finetune"]["train"])
    rows = read_csv(tmp_path / "e" / "predictions.csv")
    right = np.mean([row["label"] == row["predicted"] for row in rows])
    assert len(rows) == 8 and np.isclose(results["finetune"]["train"]["top1"], right)
    assert list(rows[0]) == [
        "path",
        "label",
        "predicted",
        "p:bounce",
        "p:grow",
        "p:slide",
        "p:spin",
    ]


def test_labels_and_names_of_a_folder_are_those_of_all_its_jobs(
    clips_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    for i, path in enumerate(sorted(clips_folder.rglob("[0-9]*.mp4"))):
        target = data / path.parent.name / os.fsdecode(b"b\xfcrste%d.mp4" % i)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy(path, target)
        except OSError:
            pytest.skip("the file system takes UTF-8 names only")
    (data / "spin" / os.fsdecode(b"d\xe9faut.mp4")).write_bytes(b"not a video")
    code, said = run(
        capfd,
        "--config=experiments/finetune.py:tiny",
        f"--config.data.source=folder:{data}",
        "--config.data.classes=moves,spin",
        "--config.data.label_map=(('slide','moves'),('bounce','moves'))",
        f"--workdir={tmp_path / 'f'}",
    )
    assert code == 0, said
    assert "has 2 classes: moves, spin" in said
    assert "a fifth becomes val" in said and "config.data.classes leaves out" in said
    code, said = run(
        capfd,
        "--config=experiments/evaluate.py:tiny",
        f"--config.run={tmp_path / 'f'}",
        "--config.data.split=all",
        f"--workdir={tmp_path / 'e'}",
    )
    assert code == 0, said
    rows = read_csv(tmp_path / "e" / "predictions.csv")
    merged = {"spin": "spin", "slide": "moves", "bounce": "moves"}
    wanted = {
        str(path.relative_to(data)).replace("\udcfc", r"\udcfc"): merged[path.parent.name]
        for path in data.rglob("b*.mp4")
        if path.parent.name in merged
    }
    assert {row["path"]: row["label"] for row in rows} == wanted
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert results["finetune"]["all"]["num_clips"] == len(wanted)
    assert [bad["path"] for bad in results["unreadable"]] == [r"spin/d\udce9faut.mp4"]


@pytest.mark.parametrize(
    "name",
    sorted(str(p.relative_to(ROOT / "experiments")) for p in (ROOT / "experiments").rglob("*.py")),
)
def test_every_experiment_file_runs_shrunk(
    name: str,
    quickstart: Path,
    clips_folder: Path,
    cache_dir: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    if name == "quickstart.py":
        return  # the fixture ran it
    cache = [f"--config.data.cache_dir={cache_dir}"]
    video = [f"--config.videos={next((clips_folder / 'train').rglob('*.mp4'))}"]
    trained = [*cache, f"--config.run={quickstart}"]
    huge = "--config.seed=99999999999999999999"  # more than 64 bits
    more = {
        "evaluate.py": trained,
        "fewshot_prototypes.py": trained,
        "active_learning.py": trained,
        "import_weights.py": [huge],
        "pretrain/mae.py": [*cache, huge],
        "model_soup.py": [*cache, f"--config.runs=('{quickstart}',)"],
        "predict.py": video,
        "plan.py": [],
        "bench/scaling.py": [],
        "extract_features.py": [f"--config.cache_dir={cache_dir}"],
        "finetune_features.py": [
            *cache,
            f"--config.data.video_features.folder={tmp_path / 'kept'}",
        ],
        "pretrain/feature_distillation.py": [
            *cache,
            f"--config.data.video_features.folder={tmp_path / 'kept'}",
        ],
        "linear_probe.py": [f"--config.cache_dir={cache_dir}"],
        "probe.py": [
            f"--config.cache_dir={cache_dir}",
            f"--config.run={quickstart}:pretrain",
            huge,
        ],
        "finetune_sweep.py": [*cache, f"--config.init_from={quickstart}:pretrain"],
    }
    # which reads what another job wrote
    if name in ("finetune_features.py", "pretrain/feature_distillation.py"):
        kept = str(tmp_path / "kept")
        assert (
            run(
                capfd,
                "--config=experiments/extract_features.py:tiny",
                "--workdir",
                kept,
                *more["extract_features.py"],
            )[0]
            == 0
        )
    code, said = run(
        capfd,
        "--config",
        f"experiments/{name}:tiny",
        "--workdir",
        str(tmp_path / "run"),
        *more.get(name, cache),
    )
    assert code == 0, said
    assert (tmp_path / "run" / "results.json").exists()
    assert (tmp_path / "run" / "report.md").exists() or name in (
        "prepare_data.py",
        "extract_features.py",
    )


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        (
            DataSpec,
            {"frame_stride": (3,)},
            r"config.frame_stride is \(3,\): write 2 values, such as \(2, 2\)\.",
        ),
        (
            DataSpec,
            {"frame_stride": (0, 0)},
            r"config.frame_stride is \(0, 0\): use numbers of 1 "
            r"or more\.",
        ),
        (
            DataSpec,
            {"frame_stride": (4, 2)},
            "config.frame_stride is .*: write the smaller number first",
        ),
        (DataSpec, {"num_frames": 0}, "config.num_frames is 0: use a number of 1 or more"),
        (DataSpec, {"num_frames": "many"}, "config.num_frames is 'many': write a whole number"),
        (
            DataSpec,
            {"clip_seconds": -1.0},
            "config.clip_seconds is -1.0: use a number of 0 or more",
        ),
        (DataSpec, {"clip_seconds": float("nan")}, "config.clip_seconds is nan"),
        (
            DataSpec,
            {"modalities": "vision"},
            r"config.modalities is 'vision': write a tuple, such as \('vision',\)",
        ),
        (
            DataSpec,
            {"augment": {"crop_scale": (0.5,)}},
            r"config.augment.crop_scale is \(0.5,\): write 2 values, such as \(1.0, 1.0\)",
        ),
        (
            DataSpec,
            {"augment": {"crop_scale": [0.5, 1.5]}},
            "config.augment.crop_scale .*: use numbers between 0.01 and 1",
        ),
        (
            DataSpec,
            {"audio": {"patch_size": (16, 0)}},
            "config.audio.patch_size is .*: use numbers of 1 or more",
        ),
        (PrepareSpec, {"num_workers": 0}, "config.num_workers is 0: use a number of 1 or more"),
    ],
)
def test_values_of_the_wrong_shape_get_a_sentence(
    section: type, values: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        make(section, values, "config")


def test_values_of_the_right_shape_are_taken() -> None:
    assert make(
        DataSpec,
        {"frame_stride": [1, 4], "modalities": ("vision", "audio"), "clip_seconds": 0},
        "config",
    ).frame_stride == (1, 4)


def test_settings_that_do_not_go_together_get_a_sentence() -> None:
    stage = {"num_steps": 1, "objectives": {"classify": {}}}
    with pytest.raises(
        UserError,
        match="stages.a.early_stopping_patience=3 needs best_metric: set it to a validation",
    ):
        Experiment.of({"stages": {"a": {**stage, "early_stopping_patience": 3}}})
    experiment = Experiment.of(
        {"stages": {"a": stage}, "data": {"augment": {"no_flip_classes": ("slide_lft",)}}}
    )
    with pytest.raises(
        UserError,
        match="no_flip_classes names 'slide_lft', which is not a class of toybox: did you mean",
    ):
        run_parts.build_stage(experiment, "a", ("slide_left", "bounce"))


def mistakes(clips: Path, run_dir: Path, tmp: Path) -> dict[str, tuple[list[str], str]]:
    quick, evaluate = (
        ["--config=experiments/quickstart.py:tiny"],
        ["--config=experiments/evaluate.py:tiny"],
    )
    table = tmp / "table"
    table.mkdir()
    (table / "clips.csv").write_text("file,label\na.mp4,x\n")
    other = tmp / "other"
    shutil.copytree(clips / "val" / "bounce", other / "val" / "bouncing")
    return {
        "misspelt section": (
            [*quick, "--config.dat.source=toybox"],
            "config has no key 'dat': did you mean config.data?",
        ),
        "misspelt key": (
            [*quick, "--config.data.sorce=x"],
            "config.data has no key 'sorce': did you mean config.data.source?",
        ),
        "misspelt deep key": (
            [*quick, "--config.stages.finetune.optim.learning_ratee=1"],
            "config.stages.finetune.optim has no key 'learning_ratee': did you mean "
            "config.stages.finetune.optim.learning_rate?",
        ),
        "unknown name": (
            [*quick, "--config.stages.pretrain.objectives.masked_autoencoder.mask_type=tubes"],
            "objectives.masked_autoencoder.mask_type is 'tubes': choose one of tube, random",
        ),
        "wrong type": ([*quick, "--config.seed=zero"], "seed"),
        "negative seed": ([*quick, "--config.seed=-1"], "config.seed is -1: use a number of 0 or"),
        "unknown stage": (
            [*quick, "--config.stage_order=pretrian"],
            "config.stage_order names 'pretrian', which config.stages lacks: did you mean pretrain",
        ),
        "stage twice": (
            [*quick, "--config.stage_order=finetune,finetune"],
            "config.stage_order names 'finetune' twice: name each stage once",
        ),
        "no order": (
            [*quick, "--config.stage_order="],
            r"config.stage_order is empty: .* order \(finetune, pretrain\)",
        ),
        "order against init": (
            [*quick, "--config.stage_order=finetune,pretrain"],
            "stages.finetune.init_from='pretrain' does not run before finetune: change config.st",
        ),
        "init without run": (
            [*quick, "--config.stages.finetune.init_from=pretrian"],
            "config.stages.finetune.init_from='pretrian' is not an earlier stage, and pretrian is",
        ),
        "no stage": (
            [*evaluate, "--config.job=train"],
            "config.run is not read by job train but by",
        ),
        "unknown argument": (
            ["--config=experiments/quickstart.py:tinny"],
            "no argument 'tinny': did you mean tiny",
        ),
        "missing folder": (
            [*quick, "--config.data.source=folder:/no/such"],
            "folder:/no/such does not exist: check the path",
        ),
        "missing column": (
            [*quick, f"--config.data.source=folder:{table}"],
            "has no column 'path' .it has file, label.: give",
        ),
        "unknown source": (
            [*quick, "--config.data.source=web:x"],
            "unknown data source 'web:x': use 'toybox'",
        ),
        "unknown split": (
            [*quick, "--config.stages.pretrain.val_split=dev"],
            "has no split 'dev': use one of train, val, test",
        ),
        "unknown label": (
            [*evaluate, f"--config.run={run_dir}", f"--config.data.source=folder:{other}"],
            "label 'bouncing' of .* is not a class of the trained run: did you mean bounce",
        ),
        "no run": (evaluate, "config.run is empty: set the run"),
        "not a run": ([*evaluate, "--config.run=/tmp"], "/tmp is not a run"),
        "another shape": (
            [*quick, f"--config.init_from={run_dir}:pretrain", "--config.model.width=64"],
            r"has shape .* but this model has .*: set config.model",
        ),
        "bad sizes": (
            [*quick, "--config.data.image_size=70"],
            "clips of 70 rows are not a multiple of particles of 4",
        ),
        "too many bad": (
            [
                *quick,
                f"--config.data.source=folder:{clips}",
                "--config.data.max_unreadable=0",
                "--config.eval.splits=('val',)",
                "--config.stage_order=('finetune',)",
                "--config.stages.finetune.init_from=",
            ],
            "more than config.data.max_unreadable=0: repair the data or raise the limit",
        ),
        "all missing": (
            [
                "--config=experiments/finetune.py:tiny",
                f"--config.data.source=folder:{missing(tmp)}",
            ],
            r"none of the 6 clips can be read \(v\d.mp4 \(missing\), .*: check the paths",
        ),
        "steps and epochs": ([*quick, "--config.stages.pretrain.num_epochs=2"], "set one of them"),
        "mesh": ([*quick, "--config.mesh.data=3"], "there are 8 devices"),
        "no labels": (
            [
                "--config=experiments/finetune.py:tiny",
                f"--config.data.source=folder:{flat(clips, tmp)}",
            ],
            "classifies but .* has no labels: give clips.csv",
        ),
    }


def missing(tmp: Path) -> Path:
    (tmp / "missing").mkdir()
    rows = [f"v{i}.mp4,{'train' if i < 6 else 'val'},{'ab'[i % 2]}\n" for i in range(8)]
    (tmp / "missing" / "clips.csv").write_text("path,split,label\n" + "".join(rows))
    return tmp / "missing"


def flat(clips: Path, tmp: Path) -> Path:
    (tmp / "flat").mkdir()
    for path in (clips / "train").rglob("*.mp4"):
        shutil.copy(path, tmp / "flat" / f"{path.parent.name}{path.name}")
    return tmp / "flat"


def test_each_mistake_gets_one_sentence_with_the_remedy(
    clips_folder: Path,
    quickstart: Path,
    cache_dir: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    for name, (args, sentence) in mistakes(clips_folder, quickstart, tmp_path).items():
        cache = [f"--config.data.cache_dir={cache_dir}"] if args else []
        code, said = run(capfd, *args, *cache, "--workdir", str(tmp_path / name.replace(" ", "_")))
        last = said.strip().splitlines()[-1]
        assert code == 2 and last.startswith("particlejax: "), (name, said)
        assert re.search(sentence, last), (name, last)
        assert "Traceback" not in said


def test_the_toybox_video_is_real(clips_folder: Path) -> None:
    path = next((clips_folder / "train").rglob("*.mp4"))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.audio[0].codec_context.name == "aac"
