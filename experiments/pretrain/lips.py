# SPDX-License-Identifier: Apache-2.0
"""Lips and voice: by how many frames is the sound shifted against the picture? For a folder of
talking faces, cut to the mouth.

    python -m particlejax.main --config experiments/pretrain/lips.py \
        --config.data.source=folder:PATH

Of 2.4 s at 25 frames a second, eleven shifts of one frame are told apart, each modality read by
itself (sync, `how='correlation'`). README.md has what it finds on GRID.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    AudioSpec,
    DataSpec,
    Experiment,
    ModelSpec,
    OptimSpec,
    ParticleSpec,
    StageSpec,
    arguments,
    section,
)


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (of the toybox, with one shift to either side)."""
    tiny = arguments(arg, "tiny")["tiny"]
    sync = {"how": "correlation", "shifts": 1 if tiny else 5, "step": 1, "other": 0.0}
    stage = section(
        StageSpec,
        steps=4 if tiny else 400,
        rows=8 if tiny else 16,
        val="" if tiny else "val",
        val_every=100,
        ema=0.99,
        objectives={"sync": sync},
        optim=section(OptimSpec, rate=1e-3),
    )
    size = (
        {"width": 24, "depth": 1, "heads": 2, "unroll": False}
        if tiny
        else {"width": 64, "depth": 3, "heads": 2}
    )
    seconds = 2.0 if tiny else 2.4
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                modalities=("vision", "audio"),
                seconds=seconds,
                frames=8 if tiny else 60,
                size=32,
                still=0.05,
                memory_gib=1.0,
                augment={"crop": (0.8, 1.0), "flip": 0.5, "jitter": 0.3},
                audio=section(AudioSpec, patch=(4, 64), seconds=seconds),
            ),
            particles=section(ParticleSpec, policy="grid", base=(2, 16, 16)),
            model=section(ModelSpec, **size),
            stages={"pretrain": stage},
        )
    )
