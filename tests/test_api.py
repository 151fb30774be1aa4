# SPDX-License-Identifier: Apache-2.0
"""`import particlejax as pj`: light to import, and its answers are those of the jobs."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import particlejax as pj
from particlejax import main
from particlejax.data import sources
from particlejax.data.video.decode import Video
from particlejax.jobs import config_files

HEAVY = "('flax', 'orbax', 'tensorflow_datasets', 'av', 'optax', 'grain')"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "quick"
    args = ["--config", "experiments/quickstart.py:tiny,scratch", "--workdir", str(folder)]
    assert main.main(["main", *args, f"--config.data.cache_dir={cache_dir}"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(run_dir: Path) -> pj.Run:
    return pj.load_run(run_dir)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> list[Path]:
    folder, source = (
        tmp_path_factory.mktemp("videos"),
        sources.open_source("toybox:tiny", "test", cache_dir),
    )
    paths = [folder / f"{i}.mp4" for i in range(2)]
    for i, path in enumerate(paths):
        path.write_bytes(source[i].video)
    return paths


def test_the_package_and_its_particles_are_light() -> None:
    code = (
        "import sys, time; begun = time.perf_counter(); import particlejax as pj; "
        "print(time.perf_counter() - begun, 'jax' in sys.modules); pj.particles.patchify; "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.endswith("False") and second == "[]"
    assert set(pj.__all__) <= set(dir(pj)) and all(getattr(pj, name) for name in pj.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode_run'"):
        pj.lode_run  # noqa: B018


def test_predict_is_what_evaluate_wrote(run: pj.Run, run_dir: Path, videos: list[Path]) -> None:
    answers = run.predict(videos, top_k=12)
    with open(run_dir / "predictions_finetune_test.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, answer in zip(rows, answers, strict=False):
        assert len(answer) == len(run.classes) and set(run.classes) == {
            label for label, _ in answer
        }
        for label, probability in answer:  # rounding of colors: `evaluate` scales them otherwise
            assert abs(float(row[f"p:{label}"]) - probability) < 0.02
    assert run.predict(videos[0], top_k=2) == answers[0][:2]
    assert run.predict(videos[0].parent, top_k=12) == answers
    figures = run.evaluate(split="test")
    written = json.loads((run_dir / "results.json").read_text())["finetune"]["test"]
    assert figures["top1"] == written["top1"] and figures["num_clips"] == written["num_clips"]


def test_frames_in_memory_give_the_vector_of_their_file(run: pj.Run, videos: list[Path]) -> None:
    with Video(str(videos[0])) as video:
        frames, fps = (
            np.stack([picture for picture, _ in video.iter_frames(video.height)]),
            video.fps,
        )
    vectors = run.embed(videos)
    assert vectors.shape == (2, run.config.model.width) and vectors.dtype == np.float32
    np.testing.assert_allclose(run.embed(frames, fps=fps), vectors[0], atol=1e-5)
    tokens = run.embed(videos[0], pool=False)
    np.testing.assert_allclose(tokens.x.mean(axis=0), vectors[0], atol=1e-5)
    assert tokens.place.shape == tokens.extent.shape == (len(tokens.x), 3)
    assert set(tokens.modality) == {"vision"}


@pytest.mark.parametrize(
    ("video", "sentence"),
    [
        ("nowhere.mp4", "nowhere.mp4 does not exist"),
        (np.zeros((4, 8, 8, 3), np.float32), "float32 .* give uint8 frames"),
        (np.zeros((4, 8, 8, 3), np.uint8), "give fps"),
    ],
)
def test_a_wrong_video_gets_a_sentence(run: pj.Run, video: object, sentence: str) -> None:
    with pytest.raises(pj.UserError, match=sentence):
        run.predict(video)


def test_a_broken_video_is_named(run: pj.Run, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(pj.UserError, match=r"broken.mp4 cannot be read \(not a media file"):
        run.embed(tmp_path / "broken.mp4")


def test_a_trainer_takes_the_steps_of_the_loop(run_dir: Path, cache_dir: str) -> None:
    config = config_files.load("experiments/quickstart.py:tiny,scratch")
    config.data.cache_dir = cache_dir
    trainer = pj.Trainer(config)
    state, losses = trainer.init_state(), []
    for batch in itertools.islice(trainer.batches(), trainer.steps):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "train"][-1]
    assert losses[-1] == last["loss"] and last["step"] == trainer.steps
    vector = trainer.run(state).embed(np.zeros((8, 64, 64, 3), np.uint8), fps=8)
    assert vector.shape == (config.model.width,)


def test_a_published_network_predicts_and_embeds(videos: list[Path]) -> None:
    network = pj.load_backbone("i3d_tiny", weights="random")
    assert len(network.classes) == 400 and "i3d" in pj.list_models()
    (label, probability), *rest = network.predict(videos[0], top_k=400)
    assert label in network.classes and abs(probability + sum(p for _, p in rest) - 1) < 1e-4
    assert network.embed(videos).shape[0] == 2
    with pytest.raises(pj.UserError, match="there is no model 'i3dd': did you mean i3d"):
        pj.load_backbone("i3dd")


def test_particles_tile_pack_and_paint() -> None:
    video = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    grid = pj.particles.patchify(video, fps=25, patch_size=(2, 8, 8))
    painted = pj.particles.paint(grid, video.shape, fps=25, patch_size=(2, 8, 8))
    np.testing.assert_array_equal(painted, video)
    few = pj.particles.patchify(video, fps=25, policy="adaptive", budget=128, patch_size=(2, 8, 8))
    assert 0 < len(few.segment) <= 128
    row = pj.particles.pack([grid, few], length=700)
    counts = np.bincount(row.segment[0])
    assert counts.tolist() == [700 - len(grid.segment) - len(few.segment), 512, len(few.segment)]
    with pytest.raises(pj.UserError, match="are not a multiple of particles"):
        pj.particles.patchify(video[:, :60], fps=25, patch_size=(2, 8, 8))


def test_the_ten_tasks_of_the_page_run_as_they_stand_there(
    run_dir: Path, videos: list[Path], cache_dir: str, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[1] / "experiments" / "README.md").read_text()
    code = page.split("## Ten tasks in Python")[1].split("```python")[1].split("```")[0]
    config = config_files.load("experiments/quickstart.py:tiny,scratch")
    config.data.cache_dir = cache_dir
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    command = ["--config=experiments/quickstart.py:tiny,scratch", f"--workdir={folder}"]
    names = {
        "RUN_DIR": str(folder),
        "VIDEO": str(videos[0]),
        "FEATURES": tmp_path / "features.npz",
        "COMMAND": [*command, f"--config.data.cache_dir={cache_dir}"],
        "config": config,
        "__name__": "ten_tasks",
    }
    module = types.ModuleType("ten_tasks")
    sys.modules["ten_tasks"] = module  # where dataclasses look up their annotations
    vars(module).update(names)
    exec(code, vars(module))
    assert module.vectors.shape[0] == 2 and len(module.particles.segment) == 256
    assert sources.open_source("pair", "train", cache_dir)[1].label == 1
    results = json.loads((folder / "results.json").read_text())
    assert results["finetune"]["train"]["steps"] == 10
