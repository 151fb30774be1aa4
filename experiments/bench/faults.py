# SPDX-License-Identifier: Apache-2.0
"""Kills, damage, a full disk, a lost process: what is lost (nothing) and what somebody at the
screen sees.

    python -m particlejax.main --config experiments/bench/faults.py

Ten minutes on one core, as root with a disk of its own that fills, else with files limited in size.
`:tiny` kills nothing and starts no pair of processes.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    BenchSpec,
    CheckpointSpec,
    ClusterSpec,
    DataSpec,
    EvaluateSpec,
    Experiment,
    LogSpec,
    ModelSpec,
    OptimSpec,
    ParticleSpec,
    StageSpec,
    arguments,
    section,
)


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny'."""
    tiny = arguments(arg, "tiny")["tiny"]
    stage = section(
        StageSpec,
        steps=20 if tiny else 240,
        rows=8,
        val="" if tiny else "val",
        val_every=0 if tiny else 80,
        ema=0.99,
        objectives={"classify": {}},
        optim=section(OptimSpec, rate=1e-3),
    )
    return ConfigDict(
        section(
            Experiment,
            job="bench_faults",
            data=section(
                DataSpec,
                source="toybox:tiny",
                frames=16,
                size=32,
                memory_gib=0.5,
                augment={"crop": (0.5, 1.0), "flip": 0.5},
            ),
            particles=section(ParticleSpec, policy="grid", base=(16, 8, 8)),
            model=section(ModelSpec, width=32, depth=1, heads=2, dropout=0.1),
            evaluate=section(EvaluateSpec, splits=() if tiny else ("val",), rows=8),
            stages={"victim": stage},
            checkpoint=section(CheckpointSpec, every=5),
            cluster=section(ClusterSpec, heartbeat=10),
            log=section(LogSpec, every=1),
            bench=section(
                BenchSpec,
                repetitions=1 if tiny else 20,
                faults=("disk",) if tiny else ("kill", "term", "damage", "disk", "pair"),
            ),
        )
    )
