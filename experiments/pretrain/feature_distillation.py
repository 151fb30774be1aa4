# SPDX-License-Identifier: Apache-2.0
"""A published network as the teacher: what it says of sub-clips, kept by extract_features.py, is
learnt from half of a clip's particles.

    python -m particlejax.main --config experiments/extract_features.py \
        --config.source=folder:PATH \
        --config.out_dir=FOLDER
    python -m particlejax.main --config experiments/pretrain/feature_distillation.py \
        --config.data.source=folder:PATH \
        --config.data.video_features.folder=FOLDER --workdir runs/distil
    python -m particlejax.main --config experiments/finetune.py \
        --config.data.source=folder:PATH --config.init_from=runs/distil

Needs no labels. The encoder never sees the features, so what comes after needs neither them nor
their network. They are of the unmirrored centre square, and so clips are neither cropped nor
flipped here. `distil/cosine` in the metrics is 1 where all is learnt. It has been run shrunk only:
what it reaches is not measured yet. `:tiny` is a smoke run.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import (
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
    """The experiment; arg: '' or 'tiny'."""
    tiny = arguments(arg, "tiny")["tiny"]
    stage = section(
        StageSpec,
        num_steps=4 if tiny else 0,
        num_epochs=0 if tiny else 60,
        batch_size=8 if tiny else 16,
        val_split="" if tiny else "val",
        val_every_steps=200,
        objectives={"feature_distillation": {"mask_ratio": 0.5}},
        ema_decay=0.99,
        optim=section(OptimSpec, learning_rate=1e-3),
    )
    small = section(
        ModelSpec,
        width=24,
        depth=1,
        num_heads=2,
        decoder_width=24,
        decoder_depth=1,
        unroll_layers=False,
    )
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "folder:../shared/data/jhmdb21",
                num_frames=16,
                modalities=("vision", "video_features"),
                image_size=32 if tiny else 64,
                temporal_mean_scale=0.4,
                ram_cache_gib=0.0 if tiny else 4.0,
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=(16, 8, 8)),
            model=small if tiny else section(ModelSpec, width=128, depth=4, num_heads=2),
            stages={"pretrain": stage},
        )
    )
