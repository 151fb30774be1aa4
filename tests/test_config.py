# SPDX-License-Identifier: Apache-2.0
"""Settings check themselves, whoever makes them, and what is measured later is checked first."""

import dataclasses
import math
import typing
from pathlib import Path

import numpy as np
import pytest

from particlejax.config import experiment as specs
from particlejax.config import jobs, model, objectives, training
from particlejax.config.experiment import Experiment, MeshSpec, ModelSpec, OptimSpec, ParticleSpec
from particlejax.config.fields import Spec, make
from particlejax.core.typing import UserError
from particlejax.particles import policies

ALL = sorted(
    {
        kind
        for module in (specs, model, training, jobs)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Spec) and kind is not Spec
    },
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.__name__)
def test_every_number_has_a_range_and_every_default_is_allowed(spec: type) -> None:
    for field in dataclasses.fields(spec):
        kinds = {field.type, *typing.get_args(field.type)}
        if kinds & {int, float} and typing.get_origin(field.type) in (None, tuple):
            assert "least" in field.metadata, f"{spec.__name__}.{field.name} may be any number"
            with pytest.raises(UserError, match=rf"^{spec.__name__}\.{field.name} is "):
                spec(**{field.name: math.nan})
    spec()


@pytest.mark.parametrize(
    ("spec", "values", "sentence"),
    [
        (ParticleSpec, {"policy": "chekker"}, "ParticleSpec.policy is 'chekker': choose one of"),
        (OptimSpec, {"b1": 2}, "OptimSpec.b1 is 2: use a number of 0 or more and below 1"),
        (OptimSpec, {"learning_rate": -1}, "OptimSpec.learning_rate is -1"),
        (OptimSpec, {"warmup_ratio": 5}, "OptimSpec.warmup_ratio is 5"),
        (ModelSpec, {"dropout": 1.5}, "ModelSpec.dropout is 1.5"),
        (ModelSpec, {"num_heads": 0}, "ModelSpec.num_heads is 0: use a number of 1 or more"),
        (ModelSpec, {"num_heads": 5}, "width=192 .* must be multiples of num_heads=5"),
        (specs.StageSpec, {"ema_decay": 1.5}, "StageSpec.ema_decay is 1.5"),
        (specs.EvalSpec, {"views": (0, 3)}, "EvalSpec.views is"),
        (MeshSpec, {"data": 0}, "MeshSpec.data is 0"),
        (MeshSpec, {"fsdp": -1}, "only one axis can take the rest"),
        (
            specs.DataSpec,
            {"train_fraction": 0},
            "DataSpec.train_fraction is 0: use a number above 0 and at",
        ),
        (specs.DataSpec, {"modalities": ()}, "DataSpec.modalities is empty"),
        (specs.DataSpec, {"modalities": ("sight",)}, "DataSpec.modalities has 'sight'"),
        (specs.DataSpec, {"num_frames": True}, "DataSpec.num_frames is True: write a whole number"),
        (specs.DataSpec, {"source": 3}, "DataSpec.source is 3: write a string"),
    ],
)
def test_a_wrong_value_is_refused_in_python_and_in_a_config(
    spec: type, values: dict, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        spec(**values)
    with pytest.raises(UserError, match=sentence.replace(f"{spec.__name__}.", "config.x.")):
        make(spec, values, "config.x")


def test_whole_numbers_may_be_written_as_floats_and_tuples_as_lists() -> None:
    stage = specs.StageSpec(num_steps=1e3)
    assert stage.num_steps == 1000 and isinstance(stage.num_steps, int)
    assert specs.EvalSpec(splits=["a", "b"]).splits == ("a", "b")


def test_stages_of_an_experiment_made_in_python_are_checked_too() -> None:
    stage = specs.StageSpec(
        num_steps=2, objectives={"masked_autoencoder": objectives.MaskedAutoencoderSpec()}
    )
    with pytest.raises(UserError, match="Experiment.stage_order is empty"):
        Experiment(stages={"a": stage, "b": stage})
    ordered = Experiment(stages={"a": stage, "b": stage}, stage_order=("b", "a"))
    assert list(ordered.stages) == ["b", "a"]
    with pytest.raises(UserError, match=r"config\.stages\.a has num_steps=0"):
        Experiment.of({"stages": {"a": {"objectives": {"masked_autoencoder": {}}}}})


@pytest.mark.parametrize("policy", ["grid", "tubes", "pyramid", "adaptive", "run_length"])
def test_the_budget_is_kept_by_every_policy(policy: str) -> None:
    video = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    times = np.arange(16, dtype=np.float32) / 25
    spec = ParticleSpec(
        policy=policy, budget=64, tubes=(((2, 16, 16), (2, 16, 16)),), patch_size=(2, 8, 8)
    )
    cut = policies.cut_clip(video, times, spec)
    assert 0 < len(cut.segment) <= 64
    again = policies.cut_clip(video, times, spec, np.random.default_rng(1))
    same = policies.cut_clip(video, times, spec, np.random.default_rng(1))
    np.testing.assert_array_equal(again.place, same.place)


def test_what_is_measured_later_is_checked_before_the_first_step(tmp_path: Path) -> None:
    from particlejax import main

    quick = ["particlejax.main", "--config", "experiments/quickstart.py:tiny,scratch"]
    for number, (setting, sentence) in enumerate(
        {
            "--config.eval.splits=('val','trest')": "has no split 'trest'",
            "--config.stages.finetune.best_metric=classify/topp1": "is not measured: choose one of "
            "loss",
        }.items()
    ):
        folder = tmp_path / str(number)
        assert main.main([*quick, setting, "--workdir", str(folder)]) == 2, sentence
        assert (
            not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text()
        ), "no step was trained"
