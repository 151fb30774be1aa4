# SPDX-License-Identifier: Apache-2.0
"""An objective, a policy, an augmentation, a source and a network of somebody's own package work in
training and in every later command on the run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from particlejax.objectives import registry
from particlejax.particles import policies

PLUGIN = '''
import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from particlejax import losses
from particlejax.config.fields import Spec, at_least
from particlejax.data import sources
from particlejax.data.augment import register_augmentation
from particlejax.data.sources import register_source
from particlejax.models.heads import ClipHead
from particlejax.models.zoo import networks
from particlejax.objectives.registry import register_objective
from particlejax.particles import cuboids
from particlejax.particles.policies import register_policy


@dataclass(frozen=True)
class BrightnessSpec(Spec):
    """How bright a clip is."""

    weight: float = at_least(1.0, 0)
    scale: float = at_least(2.0, 0)


@register_objective(
    "brightness",
    heads=lambda spec, classes: {"brightness_head": ClipHead(1)},
    modalities=lambda spec: ("vision",),
)
def brightness(spec: BrightnessSpec):
    def objective(params, model, batch, key, train):
        clips = batch.clip_index.shape[1]
        tokens = model.encode(params, batch.particles, clips, key=key if train else None)
        told = model.head(params, "brightness_head", tokens, clips)[..., 0]
        vision = batch.particles["vision"]
        true = losses.clip_mean(vision.payload.mean(axis=-1), vision.segment, clips)
        loss = losses.mean_over(jnp.square(told - spec.scale * true), batch.clip_index >= 0)
        return loss, {"loss": loss}

    return objective


def half(size, spec):
    return len(cuboids.lattice(size, cuboids.Tube(spec.patch_size, spec.patch_size))) // 2


@register_policy("checker", count=half)
def checker(video, times, spec):
    tube = cuboids.Tube(spec.patch_size, spec.patch_size)
    whole = cuboids.cut_cuboids(video, times, tube, spec.patch_size)
    return whole.take(np.arange(0, len(whole.segment) // 2 * 2, 2))


@register_augmentation("darken")
def darken(frames, rng):
    return (frames * rng.uniform(0.5, 1.0)).astype(np.uint8)


@register_source("films", splits=("train", "val", "test"))
def films(rest, split):
    source = sources.open_source("toybox:tiny", split, rest)
    return sources.ListSource(source.classes, tuple(source[i] for i in range(8)))


@networks.register_network("small_one")
def small_one():
    return networks.VARIANTS["x3d_tiny"]
'''

EXPERIMENT = """
from ml_collections import ConfigDict
from particlejax.config import plugins
from particlejax.config.experiment import (
    DataSpec, Experiment, ModelSpec, ParticleSpec, StageSpec, section)

PLUGINS = plugins.load("my_project.parts")


def get_config(arg=""):
    stage = section(
        StageSpec, num_steps=2, batch_size=8,
        objectives={"brightness": {"scale": 3.0}, "classify": {}},
    )
    return ConfigDict(section(
        Experiment,
        plugins=PLUGINS,
        data=section(
            DataSpec, num_frames=4, image_size=32, source="films:CACHE",
            augment={"custom": ("darken",)},
            num_workers=WORKERS,
        ),
        particles=section(ParticleSpec, patch_size=(2, 8, 8), policy="checker"),
        model=section(ModelSpec, width=16, depth=1, num_heads=2),
        stages={"one": stage},
    ))
"""


def start(folder: Path, *args: str) -> str:
    """A command in a fresh process whose working directory holds the package."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "particlejax.main", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_project").mkdir()
    (folder / "my_project" / "__init__.py").touch()
    (folder / "my_project" / "parts.py").write_text(PLUGIN)
    text = EXPERIMENT.replace("CACHE", cache_dir).replace("WORKERS", "1")
    (folder / "mine.py").write_text(text)
    start(folder, "--config", "mine.py", "--workdir", "run")
    return folder


def test_a_run_with_five_things_of_ones_own_trains_with_a_worker(project: Path) -> None:
    text = (project / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    last = [line for line in lines if line["split"] == "train"][-1]
    assert last["brightness/loss"] > 0 and last["param_norm/brightness_head/out"] > 0
    figures = json.loads((project / "run" / "results.json").read_text())["one"]
    # 2 x 16 cuboids of the grid, every other one
    assert figures["train"]["particles_per_clip"] == 16


def test_later_commands_know_the_plugins_from_config_json(project: Path) -> None:
    evaluate = str(Path(__file__).parents[1] / "experiments" / "evaluate.py")
    args = ["--config", evaluate, "--config.run=run", "--config.data.source=", "--workdir", "eval"]
    start(project, *args)
    assert json.loads((project / "eval" / "results.json").read_text())["one"]


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="policy 'grid' exists already"):
        policies.register_policy("grid", count=lambda size, spec: 1)(lambda *args: None)
    with pytest.raises(TypeError, match="annotate the argument of"):
        registry.register_objective("mine")(lambda spec: None)
