# SPDX-License-Identifier: Apache-2.0
"""Scales that change while the rows stay: the plan loses nothing, fills its rows, and is the same
wherever it goes on.
"""

import dataclasses
import json
import pickle
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from particlejax import main as entry
from particlejax.config.experiment import (
    DataSpec,
    ModelSpec,
    ParticleSpec,
    ScaleScheduleSpec,
    ScaleSpec,
)
from particlejax.config.objectives import ClassifySpec
from particlejax.core.typing import UserError
from particlejax.data import pipeline, sources
from particlejax.data.packing_plan import Plan, PlanState
from particlejax.data.scale_schedule import ScaleSchedule
from particlejax.models import particle_model as models
from particlejax.models.heads import classification
from particlejax.models.modality import ModalitySpec
from particlejax.objectives import registry
from particlejax.particles import packing, policies
from particlejax.particles.types import Batch

DATA = DataSpec(num_frames=8, image_size=32, num_threads=1)
CUT = ParticleSpec("grid", (4, 8, 8))  # 32 particles at the largest scale
# 32, 18, 8 and 9
MIXED = ScaleScheduleSpec(
    "mixture",
    (
        ScaleSpec(weight=0.3),
        ScaleSpec(image_size=24, weight=0.2),
        ScaleSpec(image_size=16, weight=0.2),
        ScaleSpec(num_frames=4, image_size=24, weight=0.3),
    ),
)


def planned(
    scales: ScaleScheduleSpec = MIXED, rows: int = 8, per_row: int = 1, **more: object
) -> Plan:
    return Plan(
        ScaleSchedule(scales, dataclasses.replace(DATA, clips_per_row=per_row), CUT),
        rows,
        3,
        **more,
    )


def test_mixed_sizes_fill_the_rows_and_every_clip_comes_once_and_soon() -> None:
    plan, seen, filled = planned(rows=16, per_row=2), Counter(), 0
    sizes, row = [each["vision"] for each in plan.schedule.sizes], plan.schedule.row
    assert sizes == [32, 18, 8, 9] and row.slots["vision"].length == 64 and row.max_clips == 8
    for k in range(60):
        rows = Counter()
        for position, where, scale in plan.batch(k):
            rows[where] += sizes[scale]
            seen[position] += 1
            assert seen[position] == 1
        assert max(rows.values()) <= 64
        assert all(each.batch >= k - 5 for each in plan.data_state(k).pending), (
            "nobody waits for ever"
        )
        filled += sum(rows.values())
    left = {each.position for each in plan.data_state(60).pending}
    assert set(seen) | left == set(range(plan.data_state(60).position)) and not left & set(seen)
    assert filled / (60 * 16 * 64) >= 0.95
    assert plan.clips_before(60) == len(seen)


def test_the_plan_is_the_same_from_wherever_it_goes_on() -> None:
    plan = planned()
    expected = [plan.batch(k) for k in range(20)]
    saved = PlanState.from_json(json.loads(json.dumps(plan.data_state(12))))
    assert [planned(start_state=saved).batch(k) for k in (12, 15, 14, 19)] == [
        expected[k] for k in (12, 15, 14, 19)
    ]
    assert planned(start_state=saved).batch(3) == expected[3], "also for what came before"
    assert pickle.loads(pickle.dumps(plan)).batch(7) == expected[7]
    plan.batch(700)
    assert plan.batch(2) == expected[2], "and for what was forgotten"
    frontier = plan.data_state(9)
    filled = []
    plan._fill_batch = lambda stand: filled.append(
        stand
    )  # asking again where it stands costs nothing
    assert plan.data_state(9) == frontier and not filled


@pytest.mark.parametrize("scales", [MIXED, ScaleScheduleSpec()])
def test_epochs_end_with_every_clip_seen(scales: ScaleScheduleSpec) -> None:
    plan = planned(scales, positions=101)
    steps = plan.num_batches()
    seen = [placed.position for k in range(steps) for placed in plan.batch(k)]
    assert sorted(seen) == list(range(101)) and plan.batch(steps) == [] and plan.batch(steps - 1)


def sizes_over(scales: ScaleScheduleSpec, steps: int) -> list[tuple[int, ...]]:
    """Size in pixels of the clips of each step that were not carried over from the one before."""
    plan = planned(scales, steps=steps)
    every = plan.schedule.scales
    return [
        tuple(
            sorted(
                {
                    every[p.scale].data.image_size
                    for p in plan.batch(k)
                    if p.position >= plan.data_state(k).position
                }
            )
        )
        for k in range(steps)
    ]


def test_schedules_say_which_scale_when() -> None:
    small, large = ScaleSpec(image_size=16, weight=1), ScaleSpec(image_size=32, weight=3)
    assert (
        sizes_over(ScaleScheduleSpec("progressive", (small, large)), 8) == [(16,)] * 2 + [(32,)] * 6
    )
    cycles = ScaleScheduleSpec(
        "cycles", (small, ScaleSpec(image_size=32)), num_cycles=2, final_fraction=0.2
    )
    assert sizes_over(cycles, 10) == [(16,)] * 2 + [(32,)] * 2 + [(16,)] * 2 + [(32,)] * 4
    short = sizes_over(
        ScaleScheduleSpec("cycles", (ScaleSpec(),), short_cycle_factors=(0.5, 0.75, 1.0)), 6
    )
    assert short == [(16,), (24,), (32,)] * 2
    mixed = planned()
    assert all({p.scale for p in mixed.batch(k)} == {0, 1, 2, 3} for k in range(4, 8)), (
        "all at a time"
    )
    speeds = ScaleSchedule(
        ScaleScheduleSpec(
            "mixture", (ScaleSpec(clip_seconds=0.5), ScaleSpec(clip_seconds=2.0, budget=4))
        ),
        DATA,
        CUT,
    )
    assert [(s.data.clip_seconds, s.particles.budget) for s in speeds.scales] == [
        (0.5, 0),
        (2.0, 4),
    ]
    assert speeds.row.max_clips == 8


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"kind": "mixture"}, "'mixture' with 0 scales: add scales"),
        ({"scales": ({"image_size": 16},)}, "'fixed' with 1 scales: set another kind"),
        (
            {"kind": "mixture", "scales": ({"image_size": 16},), "num_cycles": 2},
            "require kind 'cycles'",
        ),
        (
            {"kind": "mixture", "scales": ({"image_sise": 16},)},
            r"scale_schedule.scales\[0\] has no key 'image_sise'",
        ),
        ({"kind": "mixture", "scales": ({"image_size": 17},)}, "17 rows are not a multiple"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(changes: dict, sentence: str) -> None:
    from particlejax.config.experiment import Experiment, as_dict

    stage = {"num_steps": 1, "objectives": {"classify": {}}, "scale_schedule": changes}
    with pytest.raises(UserError, match=sentence):
        experiment = Experiment.of(
            {"stages": {"one": stage}, "data": as_dict(DATA), "particles": as_dict(CUT)}
        )
        pipeline.row_shape(
            experiment.data, experiment.particles, experiment.stages["one"].scale_schedule
        )


def test_batches_of_mixed_scales_are_one_whoever_reads_them(cache_dir: str) -> None:
    source = sources.open_source("toybox:tiny", "train", cache_dir)
    adaptive = dataclasses.replace(
        CUT, policy="adaptive", patch_size=(2, 4, 4), num_levels=2, budget=128
    )
    scales = ScaleScheduleSpec(
        "mixture",
        (ScaleSpec(), ScaleSpec(image_size=16, budget=32), ScaleSpec(image_size=24, budget=60)),
    )
    made = pipeline.TrainBatches(source, DATA, adaptive, 3, num_rows=4, scales=scales)
    expected = [made[k] for k in range(4)]
    parts = [dataclasses.replace(made, process_index=p, num_processes=2)[1] for p in range(2)]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *(part.batch for part in parts))
    jax.tree.map(np.testing.assert_array_equal, joined, expected[1].batch)
    later = dataclasses.replace(made, start_state=made.plan.data_state(2))
    for data in (DATA, dataclasses.replace(DATA, num_workers=2)):
        for a, b in zip(pipeline.read_batches(later, 2, 4, data), expected[2:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, a.batch, b.batch)
    vision = expected[0].batch.particles["vision"]
    assert vision.segment.shape == (4, 128) and expected[0].batch.clip_index.shape == (4, 4)
    assert {tuple(row[row >= 0]) for row in expected[0].batch.clip_index} == {
        tuple(row[row >= 0]) for row in expected[0].batch.clip_index
    }
    assert len({round(float(e), 4) for e in vision.extent[vision.segment > 0][:, 1]}) > 2, (
        "several granularities"
    )


def test_a_stage_of_many_scales_compiles_once_and_is_measured_at_any(
    cache_dir: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    command = [
        "main",
        "--config=tests/experiments/mixed.py",
        f"--config.data.cache_dir={cache_dir}",
        "--config.log.every_steps=2",
        "--config.stages.finetune.num_steps=8",
        "--config.stages.finetune.val_every_steps=0",
    ]
    assert entry.main([*command, "--workdir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())["finetune"]
    assert results["train"]["compilations"] == 1 and results["train"]["clips_seen"] > 8 * 8
    fill = [
        json.loads(line)["packing_efficiency"]
        for line in (tmp_path / "run/timing.jsonl").read_text().splitlines()
    ]
    assert np.mean(fill) > 0.8
    for name, setting in (
        ("small", "image_size=16"),
        ("large", "image_size=48"),
        ("fewer", "budget=5"),
    ):
        code = entry.main(
            [
                "main",
                "--config=experiments/evaluate.py:tiny",
                f"--config.run={tmp_path / 'run'}",
                f"--config.data.cache_dir={cache_dir}",
                f"--config.eval.scale.{setting}",
                "--workdir",
                str(tmp_path / name),
            ]
        )
        assert code == 0, capfd.readouterr().err
        assert (
            json.loads((tmp_path / name / "results.json").read_text())["finetune"]["val"][
                "num_clips"
            ]
            == 24
        )


def ramps(frames: int, size: int, number: int, seed: int) -> Batch:
    """Waves that move in one of four ways, the label, seen at some number of frames and pixels."""
    rng, clips = np.random.default_rng(seed), []
    at = [(np.arange(n) + 0.5) / n * span for n, span in ((frames, 2.0), (size, 8.0), (size, 8.0))]
    t, y, x = np.meshgrid(*at, indexing="ij")
    cut = ParticleSpec("grid", (2, 4, 4))
    for i in range(number):
        way = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])[i % 4]
        video = np.sin((y - 2 * way[0] * t) * 0.8 + rng.uniform(0, 6)) + np.sin(
            (x - 2 * way[1] * t) * 0.8 + rng.uniform(0, 6)
        )
        video = np.repeat(video[..., None], 3, -1).astype(np.float32)
        particles = policies.cut_clip(
            video, (np.arange(frames) * 2 / frames).astype(np.float32), cut
        )
        clips.append(packing.Clip({"vision": particles}, i % 4, i))
    length = frames * size * size // 32
    return jax.tree.map(
        jnp.asarray,
        packing.pack(clips, range(number), {"vision": packing.SlotSpec(length, 96)}, number, 1),
    )


def test_what_was_learnt_at_one_scale_holds_at_another() -> None:
    model = models.build(
        ModelSpec(width=32, depth=2, num_heads=2, unroll_layers=False),
        {"vision": ModalitySpec(96)},
        heads=classification(4),
    )
    objective = registry.combine({"classify": ClassifySpec()})
    params = jax.jit(model.init)(jax.random.key(0), ramps(4, 8, 1, 0))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params: dict, state: optax.OptState, batch: Batch) -> tuple:
        grads, metrics = jax.grad(
            lambda p: objective(p, model, batch, jax.random.key(0), True), has_aux=True
        )(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics

    state = optimizer.init(params)
    for i in range(80):
        params, state, _ = step(params, state, ramps(4, 8, 16, i))
    for frames, size in ((4, 8), (8, 8), (4, 12)):  # more frames a second, more pixels
        _, metrics = jax.jit(lambda p, b: objective(p, model, b, jax.random.key(0), False))(
            params, ramps(frames, size, 64, 999)
        )
        assert metrics["classify/top1"] > 0.9, (frames, size)
