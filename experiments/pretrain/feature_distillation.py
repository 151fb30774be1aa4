# SPDX-License-Identifier: Apache-2.0
"""Distills stored features of a published network from a masked clip, without labels.

    python -m particlejax.main --config experiments/extract_features.py \
        --config.source=folder:PATH \
        --config.out_dir=FOLDER
    python -m particlejax.main --config experiments/pretrain/feature_distillation.py \
        --config.data.source=folder:PATH \
        --config.data.video_features.folder=FOLDER --workdir runs/distill
    python -m particlejax.main --config experiments/finetune.py \
        --config.data.source=folder:PATH --config.init_from=runs/distill

The encoder sees half of a clip's particles and never the features, so later stages need neither the
features nor their network. Features are of the unflipped center crop, so clips are not augmented
here. The metric `feature_distillation/cosine_similarity` is 1 for a perfect fit. Only a shrunk run
has been tested; there is no measured result yet. `:tiny` is a smoke run.
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
                source="toybox:tiny" if tiny else "toybox",
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
