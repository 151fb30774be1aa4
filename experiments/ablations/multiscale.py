# SPDX-License-Identifier: Apache-2.0
"""Scales over training: how much sooner a schedule is as good as training at the largest scale throughout.

    python -m particlejax.main --config experiments/ablations/multiscale.py:jhmdb --workdir runs/multiscale-jhmdb
    python -m particlejax.main --config experiments/ablations/multiscale.py:toybox --workdir runs/multiscale-toybox

Rows keep their shape, so a step costs the model the same whatever it holds: one large clip a row or eight small ones.
`fixed-720` trains at the largest scale; the others have a third or a half of its steps, and are measured at that scale too.
One compilation each. README.md beside this file has the tables.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from particlejax.spec import ScaleSpec, ScheduleSpec, SweepSpec, arguments, section

HERE = Path(__file__).parent


STEPS = 720  # of the run that the others are compared with


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, each with its number of steps, and what is different."""

    def schedule(steps: int, *scales: dict[str, Any], **more: Any) -> dict[str, Any]:
        made = section(ScheduleSpec, scales=tuple(section(ScaleSpec, **scale) for scale in scales), **more)
        return {"stages": {"train": {"steps": steps, "schedule": made}}}

    small, half, whole = {"frames": 8, "size": 32}, {"frames": 8}, {}  # 32, 128 and 256 particles
    yield f"fixed-{STEPS}", {}
    for steps in (STEPS // 3, STEPS // 2):
        yield f"fixed-{steps}", {"stages": {"train": {"steps": steps}}}
        yield f"progressive-{steps}", schedule(steps, {**small, "share": 0.4}, {**half, "share": 0.3}, {**whole, "share": 0.3},
                                               kind="progressive")
        yield f"multigrid-{steps}", schedule(steps, half, whole, kind="cycles", rounds=4, settle=0.2, short=(0.5, 1.0))
    yield f"mixture-{STEPS // 3}", schedule(STEPS // 3, small, half, whole, kind="mixture")
    yield f"cycles-{STEPS // 3}", schedule(STEPS // 3, small, half, whole, kind="cycles", rounds=4, settle=0.2)


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: 'jhmdb', 'toybox' or 'tiny' (one run of the tiny toybox)."""
    tiny = arguments(arg, "jhmdb", "toybox", "tiny")["tiny"]
    config = runpy.run_path(str(HERE / "particles.py"))["get_config"](arg)
    runs = dict(sweep())
    if tiny:
        name = f"multigrid-{STEPS // 3}"
        runs = {name: runs[name]}
        runs[name]["stages"]["train"]["steps"] = 2
    else:
        config.stages.train.steps, config.stages.train.epochs = STEPS, 0
    config.sweep = ConfigDict(section(SweepSpec, runs=runs, seeds=tuple(config.sweep.seeds), metric=config.sweep.metric))
    return config
