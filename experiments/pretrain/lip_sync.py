# SPDX-License-Identifier: Apache-2.0
"""Lip synchronization: predicts the shift between audio and mouth crops in frames.

    python -m particlejax.main --config experiments/pretrain/lip_sync.py \
        --config.data.source=folder:PATH

Takes a folder of talking faces, cropped to the mouth. Clips are 2.4 s at 25 frames/s; there are
eleven shifts, one frame apart. Each modality is encoded separately (synchronization,
`method='correlation'`). experiments/pretrain/README.md has the figures on GRID.
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
    """The experiment; arg: '' or 'tiny' (the toybox, one shift in each direction)."""
    tiny = arguments(arg, "tiny")["tiny"]
    sync = {
        "method": "correlation",
        "max_shift": 1 if tiny else 5,
        "shift_stride": 1,
        "mismatch_prob": 0.0,
    }
    stage = section(
        StageSpec,
        num_steps=4 if tiny else 400,
        batch_size=8 if tiny else 16,
        val_split="" if tiny else "val",
        val_every_steps=100,
        ema_decay=0.99,
        objectives={"synchronization": sync},
        optim=section(OptimSpec, learning_rate=1e-3),
    )
    size = (
        {"width": 24, "depth": 1, "num_heads": 2, "unroll_layers": False}
        if tiny
        else {"width": 64, "depth": 3, "num_heads": 2}
    )
    seconds = 2.0 if tiny else 2.4
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                modalities=("vision", "audio"),
                clip_seconds=seconds,
                num_frames=8 if tiny else 60,
                image_size=32,
                temporal_mean_scale=0.05,
                ram_cache_gib=1.0,
                augment={"crop_scale": (0.8, 1.0), "hflip_prob": 0.5, "color_jitter": 0.3},
                audio=section(AudioSpec, patch_size=(4, 64), max_seconds=seconds),
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=(2, 16, 16)),
            model=section(ModelSpec, **size),
            stages={"pretrain": stage},
        )
    )
