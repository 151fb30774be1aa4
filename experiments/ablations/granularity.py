# SPDX-License-Identifier: Apache-2.0
"""Ablates adaptive particles at half the particle count: split axes, depth and criterion.

    python -m particlejax.main --config experiments/ablations/granularity.py:jhmdb \
        --config.data.source=folder:JHMDB --workdir runs/granularity-jhmdb
    python -m particlejax.main --config experiments/ablations/granularity.py:toybox \
        --workdir runs/granularity-toybox

experiments/ablations/README.md has the tables. The runs with token reduction start from the full
grid and remove half of the tokens after the first block.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import SweepSpec

HERE = Path(__file__).parent
HALF = 128


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the changed settings of each run."""

    def adaptive(**more: Any) -> dict[str, Any]:
        return {"particles": {"policy": "adaptive", "budget": HALF, **more}}

    yield "time-or-space", adaptive()
    yield "both-at-once", adaptive(split_axes=("spacetime",))
    yield "time-only", adaptive(split_axes=("time",))
    yield "space-only", adaptive(split_axes=("space",))
    yield "two-levels", adaptive(num_levels=2)
    yield "absolute", adaptive(split_criterion="absolute_error")
    yield "motion", adaptive(split_criterion="motion")
    yield "pyramid", {"particles": {"policy": "pyramid", "budget": HALF}}
    yield "merge", {"model": {"token_reduction": "merge", "token_reduction_layers": (1,)}}
    yield "drop", {"model": {"token_reduction": "prune", "token_reduction_layers": (1,)}}


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: 'jhmdb' (with data.source), 'toybox' or 'tiny' (one run of the tiny
    toybox).
    """
    tiny = arguments(arg, "jhmdb", "toybox", "tiny")["tiny"]
    config = runpy.run_path(str(HERE / "particles.py"))["get_config"](arg)
    runs = dict(sweep())
    if tiny:
        runs = {"merge": runs["merge"]}
    config.sweep = ConfigDict(
        section(SweepSpec, runs=runs, seeds=tuple(config.sweep.seeds), metric=config.sweep.metric)
    )
    return config
