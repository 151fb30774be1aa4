# SPDX-License-Identifier: Apache-2.0
"""Compares fusions of video and audio with each modality alone, from scratch.

    python -m particlejax.main --config experiments/ablations/fusion.py:toybox \
        --workdir runs/fusion-toybox
    python -m particlejax.main --config experiments/ablations/fusion.py \
        --config.data.source=folder:PATH --workdir runs/fusion

In half of the clips of `:toybox` only the sound tells who acts, in the other half only the picture;
accuracy is given for all clips and for each half. Clips have 16 frames of 32 x 32 and log-mel
patches of 0.08 s; three seeds. `:toybox,long` compares early fusion and bottlenecks in rows so long
that attention dominates the cost. experiments/ablations/README.md has the results.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    AudioSpec,
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


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the changed settings of each run."""
    yield "sight", {"data": {"modalities": ("vision",)}}
    yield "sound", {"data": {"modalities": ("audio",)}}
    yield "early", {}
    yield "bottleneck", {"model": {"fusion": "bottleneck", "fusion_layer": 1, "num_bottlenecks": 4}}
    yield "cross", {"model": {"fusion": "cross", "fusion_layer": 1}}
    yield "late", {"model": {"fusion": "late"}}


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '', 'toybox' or 'tiny' (one run of the tiny toybox); 'long' (4x the
    video, 8x the audio).
    """
    args = arguments(arg, "toybox", "long", "tiny")
    tiny, toybox, long = (
        args["tiny"],
        args["toybox"] or args["tiny"],
        args["long"] and not args["tiny"],
    )
    chosen = (
        ("bottleneck",)
        if tiny
        else ("early", "bottleneck")
        if long
        else tuple(name for name, _ in sweep())
    )
    runs = {name: changes for name, changes in sweep() if name in chosen}
    train = section(
        StageSpec,
        num_steps=2 if tiny else 600,
        batch_size=8 if tiny else 16,
        val_split="",
        ema_decay=0.99,
        objectives={"classify": {"label_smoothing": 0.1}},
        optim=section(OptimSpec, learning_rate=1e-3, b2=0.999),
    )
    side, patch, pool = (64, (4, 16), "attention") if long else (32, (8, 64), "mean")
    size = (
        {"width": 24, "depth": 3, "num_heads": 2, "unroll_layers": False}
        if tiny
        else {"width": 96, "depth": 3, "num_heads": 3}
    )
    splits = ("test", "test[:50%]", "test[50%:]") if toybox else ("val",)
    return ConfigDict(
        section(
            SweepJob,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox:apart",
                modalities=("vision", "audio"),
                num_frames=16,
                image_size=side,
                temporal_mean_scale=0.05,
                ram_cache_gib=1.0,
                augment={"crop_scale": (0.5, 1.0), "hflip_prob": 0.5},
                audio=section(AudioSpec, patch_size=patch, max_seconds=2.0),
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=(16, 4, 4)),
            model=section(ModelSpec, pool_type=pool, **size),
            eval=section(EvalSpec, splits=splits, batch_size=8 if tiny else 16),
            stages={"train": train},
            sweep=section(
                SweepSpec,
                runs=runs,
                seeds=(0,) if tiny else (0, 1, 2),
                metric=f"train/{splits[0]}/top1",
            ),
        )
    )
