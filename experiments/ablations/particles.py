# SPDX-License-Identifier: Apache-2.0
"""Compares particle policies by accuracy against particles per clip, from scratch.

    python -m particlejax.main --config experiments/ablations/particles.py:jhmdb \
        --config.data.source=folder:JHMDB --workdir runs/particles-jhmdb
    python -m particlejax.main --config experiments/ablations/particles.py:toybox \
        --workdir runs/particles-toybox

Policies: `grid` at several strides, `tubes`, `random` (a subset of the grid), `run_length` and
`adaptive`, with all, half and a quarter of the full grid's 256 particles; three seeds. The toybox
takes 50 minutes on 2 cores; experiments/ablations/README.md has the table.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    DataSpec,
    EvalSpec,
    ModelSpec,
    OptimSpec,
    ParticleSpec,
    StageSpec,
    arguments,
    section,
)
from particlejax.config.job_specs import SweepJob, SweepSpec

FULL = 256  # particles of the full grid
FINE = {"patch_size": (4, 8, 8)}  # for 16 x 64 x 64; the payload size at every extent


def sweep(base: tuple[int, int, int] = FINE["patch_size"]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the changed settings of each run."""

    def tubes(*scales: tuple[int, int, int]) -> dict[str, Any]:
        shapes = [tuple(b * s for b, s in zip(base, scale, strict=True)) for scale in scales]
        return {
            "particles": {"policy": "tubes", "tubes": tuple((shape, shape) for shape in shapes)}
        }

    yield f"grid-{FULL}", {}
    yield "grid-128-time", tubes((2, 1, 1))
    yield "grid-64-space", tubes((1, 2, 2))
    yield "tubes-128", tubes((4, 1, 1), (1, 2, 2))
    for budget in (128, 64):
        yield f"random-{budget}", {"particles": {"budget": budget}}
        yield f"adaptive-{budget}", {"particles": {"policy": "adaptive", "budget": budget}}
    yield (
        "motion-128",
        {"particles": {"policy": "adaptive", "budget": 128, "split_criterion": "motion"}},
    )
    yield "runs-128", {"particles": {"policy": "run_length", "budget": 128}}


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: 'jhmdb' (with data.source), 'toybox' or 'tiny' (one run of the tiny
    toybox).
    """
    args = arguments(arg, "jhmdb", "toybox", "tiny")
    tiny, real = args["tiny"], args["jhmdb"]
    runs = dict(sweep())
    if tiny:
        runs = {"adaptive-64": runs["adaptive-64"]}
    data = section(
        DataSpec,
        source="" if real else "toybox:tiny" if tiny else "toybox",
        num_frames=16,
        image_size=64,
        decode_short_side=80 if real else 0,
        temporal_mean_scale=0.4,
        ram_cache_gib=0.0 if tiny else 4.0,
        augment={"crop_scale": (0.4, 1.0), "hflip_prob": 0.5},
    )
    train = section(
        StageSpec,
        num_steps=2 if tiny else 0,
        num_epochs=0 if tiny else 12,
        batch_size=8 if tiny else 16,
        val_split="",
        objectives={"classify": {"label_smoothing": 0.1}},
        ema_decay=0.99,
        optim=section(OptimSpec, learning_rate=1e-3, weight_decay=0.05, b2=0.999),
    )
    split = "val" if real else "test"
    return ConfigDict(
        section(
            SweepJob,
            data=data,
            particles=section(
                ParticleSpec, policy="grid", patch_size=FINE["patch_size"], num_levels=3
            ),
            model=(
                section(ModelSpec, width=32, depth=2, num_heads=2, unroll_layers=False)
                if tiny
                else section(ModelSpec, width=64, depth=3, num_heads=2)
            ),
            eval=section(
                EvalSpec,
                splits=(split,),
                views=(2, 1) if real else (1, 1),
                batch_size=8 if tiny else 16,
            ),
            stages={"train": train},
            sweep=section(
                SweepSpec,
                runs=runs,
                seeds=(0,) if tiny else (0, 1, 2),
                metric=f"train/{split}/top1",
            ),
        )
    )
