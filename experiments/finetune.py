# SPDX-License-Identifier: Apache-2.0
"""Action recognition on a folder of videos, from scratch or from a pretrained run.

    python -m particlejax.main --config experiments/finetune.py \
        --config.data.source=folder:PATH [--config.init_from=RUN_DIR]

Trains on the split 'train' and evaluates on 'val'. `:pretrain` first pretrains on the training
clips without labels. To pretrain on other clips too, make a separate run
(--config.stage_order="('pretrain',)" --config.data.source=mix:...) and pass it as
--config.init_from. The default source is the toybox; `:tiny` is a smoke run on it.
experiments/README.md has the figures.
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
    """The experiment; arg: '', 'pretrain', 'tiny' or 'tiny,pretrain'."""
    args = arguments(arg, "tiny", "pretrain")
    tiny = args["tiny"]
    finetune = section(
        StageSpec,
        num_steps=4 if tiny else 0,
        num_epochs=0 if tiny else 60,
        batch_size=8 if tiny else 16,
        val_every_steps=4 if tiny else 200,
        objectives={"classify": {"label_smoothing": 0.1}},
        ema_decay=0.99 if tiny else 0.999,
        init_from="pretrain" if args["pretrain"] else "",
        optim=section(OptimSpec, learning_rate=1e-3, weight_decay=0.05, b2=0.999),
    )
    stages = {"finetune": finetune}
    if args["pretrain"]:
        stages = {
            "pretrain": section(
                StageSpec,
                num_steps=4 if tiny else 3000,
                batch_size=8 if tiny else 16,
                val_every_steps=4 if tiny else 500,
                objectives={
                    "masked_autoencoder": {
                        "mask_type": "random",
                        "mask_ratio": 0.6,
                        "target_ratio": 0.3,
                        "norm_pix_loss": False,
                    }
                },
                optim=section(OptimSpec, learning_rate=1e-3),
            ),
            **stages,
        }
    small = section(ModelSpec, width=32, depth=2, num_heads=2)
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                num_frames=16,
                image_size=32 if tiny else 64,
                decode_short_side=0 if tiny else 80,
                temporal_mean_scale=0.4,
                augment={"crop_scale": (0.3, 1.0), "hflip_prob": 0.5},
                ram_cache_gib=0.0 if tiny else 4.0,
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=(16, 8, 8)),
            model=small if tiny else section(ModelSpec, width=128, depth=4, num_heads=2),
            eval=section(EvalSpec, splits=("val",), views=(1, 1) if tiny else (2, 3)),
            stages=stages,
            stage_order=tuple(stages),
        )
    )
