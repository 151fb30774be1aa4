# SPDX-License-Identifier: Apache-2.0
"""Compares scale schedules with training at the largest scale throughout.

    python -m particlejax.main --config experiments/ablations/multiscale.py:jhmdb \
        --config.data.source=folder:JHMDB --workdir runs/multiscale-jhmdb
    python -m particlejax.main --config experiments/ablations/multiscale.py:toybox \
        --workdir runs/multiscale-toybox

Rows have a fixed shape, so a step costs the same whether a row holds one large clip or eight small
ones. `fixed` trains at the largest scale; the schedules use less than a quarter of its rows. All
runs are evaluated at the largest scale. A scale is a size (frames, pixels) or a budget of adaptive
particles. Each run compiles once. experiments/ablations/README.md has the tables.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from particlejax.config.experiment import ScaleScheduleSpec, ScaleSpec, arguments, section
from particlejax.config.job_specs import SweepSpec

HERE = Path(__file__).parent


STEPS = 720  # of the baseline
# Schedules: as many clips per update as the baseline at the cheapest scale, and less than a quarter
# of its rows in total.
SHORT, FEW = 640, 4


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the changed settings of each run."""

    def schedule(*scales: dict[str, Any], **more: Any) -> dict[str, Any]:
        made = section(
            ScaleScheduleSpec, scales=tuple(section(ScaleSpec, **scale) for scale in scales), **more
        )
        return {
            "stages": {"train": {"num_steps": SHORT, "batch_size": FEW, "scale_schedule": made}}
        }

    whole: dict[str, Any] = {}  # the full grid
    half, small = {"num_frames": 8}, {"num_frames": 8, "image_size": 32}  # 128 and 32 particles
    few, some = {"policy": "adaptive", "budget": 64}, {"policy": "adaptive", "budget": 128}
    yield "fixed", {}
    yield "fixed-third", {"stages": {"train": {"num_steps": STEPS // 3}}}
    yield "fixed-few-rows", {"stages": {"train": {"num_steps": SHORT, "batch_size": FEW}}}
    sizes = ({**small, "weight": 0.6}, {**half, "weight": 0.3}, {**whole, "weight": 0.1})
    budgets = ({**few, "weight": 0.7}, {**some, "weight": 0.2}, {**whole, "weight": 0.1})
    yield "progressive-sizes", schedule(*sizes, kind="progressive")
    yield "progressive-budgets", schedule(*budgets, kind="progressive")
    cycles = schedule(*budgets, kind="cycles", num_cycles=4, final_fraction=0.1)
    yield "cycles-budgets", cycles
    yield (
        "cycles-budgets-short",
        {"stages": {"train": {**cycles["stages"]["train"], "num_steps": SHORT * 9 // 10}}},
    )
    yield (
        "mixture-budgets",
        schedule(
            {**few, "weight": 0.8},
            {**some, "weight": 0.15},
            {**whole, "weight": 0.05},
            kind="mixture",
        ),
    )
    yield (
        "multigrid",
        schedule(
            half,
            whole,
            kind="cycles",
            num_cycles=4,
            final_fraction=0.2,
            short_cycle_factors=(0.5, 1.0),
        ),
    )


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: 'jhmdb' (with data.source), 'toybox' or 'tiny' (one run of the tiny
    toybox).
    """
    tiny = arguments(arg, "jhmdb", "toybox", "tiny")["tiny"]
    config = runpy.run_path(str(HERE / "particles.py"))["get_config"](arg)
    runs = dict(sweep())
    if tiny:
        runs = {"multigrid": runs["multigrid"]}
        runs["multigrid"]["stages"]["train"].update(num_steps=2, batch_size=8)
    else:
        config.stages.train.num_steps, config.stages.train.num_epochs = STEPS, 0
    config.sweep = ConfigDict(
        section(SweepSpec, runs=runs, seeds=tuple(config.sweep.seeds), metric=config.sweep.metric)
    )
    return config
