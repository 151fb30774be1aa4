# SPDX-License-Identifier: Apache-2.0
"""Pretrains on 960 unlabelled toybox clips and fine-tunes on a quarter of them with labels.

    python -m particlejax.main --config experiments/quickstart.py

experiments/README.md has the expected figures. `:tiny` is a smoke run, `:scratch` skips
pretraining.
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
    arguments,
    section,
)


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '', 'tiny', 'scratch' or 'tiny,scratch'."""
    args = arguments(arg, "tiny", "scratch")
    tiny = args["tiny"]
    stages = {
        "pretrain": section(
            StageSpec,
            num_steps=4 if tiny else 2400,
            batch_size=8 if tiny else 16,
            val_every_steps=4 if tiny else 400,
            objectives={
                "masked_autoencoder": {
                    "mask_ratio": 0.6,
                    "target_ratio": 0.3,
                    "mask_type": "random",
                    "norm_pix_loss": False,
                }
            },
            optim=section(OptimSpec, learning_rate=1e-3),
        ),
        "finetune": section(
            StageSpec,
            num_steps=4 if tiny else 200,
            batch_size=8 if tiny else 16,
            val_every_steps=4 if tiny else 50,
            init_from="" if args["scratch"] else "pretrain",
            data={"train_fraction": 0.25},
            objectives={"classify": {"label_smoothing": 0.1}},
            optim=section(OptimSpec, learning_rate=1e-3, weight_decay=0.05, b2=0.999),
        ),
    }
    if args["scratch"]:
        del stages["pretrain"]
    small = section(
        ModelSpec, width=32, depth=2, num_heads=2, decoder_width=32, pool_type="attention"
    )
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                num_frames=16,
                image_size=32,
                temporal_mean_scale=0.05,
                ram_cache_gib=1.0,
                augment={"crop_scale": (0.5, 1.0), "hflip_prob": 0.5},
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=(16, 4, 4)),
            model=small
            if tiny
            else section(
                ModelSpec, width=128, depth=4, num_heads=2, decoder_width=96, pool_type="attention"
            ),
            eval=section(EvalSpec, splits=("test",), views=(1, 1)),
            stages=stages,
            stage_order=tuple(stages),
        )
    )
