# SPDX-License-Identifier: Apache-2.0
"""Injects kills, corrupt checkpoints, a full disk and a lost process, and checks recovery.

    python -m particlejax.main --config experiments/bench/fault_tolerance.py

Takes ten minutes on one core. Root fills a disk of its own; other users limit the file size
instead. `:tiny` kills nothing and starts no pair of processes.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    CheckpointSpec,
    DataSpec,
    DistributedSpec,
    EvalSpec,
    LogSpec,
    ModelSpec,
    OptimSpec,
    ParticleSpec,
    StageSpec,
    arguments,
    section,
)
from particlejax.config.job_specs import BenchJob, BenchSpec


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny'."""
    tiny = arguments(arg, "tiny")["tiny"]
    stage = section(
        StageSpec,
        num_steps=20 if tiny else 240,
        batch_size=8,
        val_split="" if tiny else "val",
        val_every_steps=0 if tiny else 80,
        ema_decay=0.99,
        objectives={"classify": {}},
        optim=section(OptimSpec, learning_rate=1e-3),
    )
    return ConfigDict(
        section(
            BenchJob,
            job="bench_fault_tolerance",
            data=section(
                DataSpec,
                source="toybox:tiny",
                num_frames=16,
                image_size=32,
                ram_cache_gib=0.5,
                augment={"crop_scale": (0.5, 1.0), "hflip_prob": 0.5},
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=(16, 8, 8)),
            model=section(ModelSpec, width=32, depth=1, num_heads=2, dropout=0.1),
            eval=section(EvalSpec, splits=() if tiny else ("val",), batch_size=8),
            stages={"victim": stage},
            checkpoint=section(CheckpointSpec, save_interval_steps=5),
            distributed=section(DistributedSpec, heartbeat_timeout_seconds=10),
            log=section(LogSpec, every_steps=1),
            bench=section(
                BenchSpec,
                repetitions=1 if tiny else 20,
                faults=("disk_full",)
                if tiny
                else ("sigkill", "sigterm", "corrupt_checkpoint", "disk_full", "lost_process"),
            ),
        )
    )
