# SPDX-License-Identifier: Apache-2.0
"""Trains a small Transformer on stored features of a frozen network.

    python -m particlejax.main --config experiments/extract_features.py \
        --config.source=folder:PATH \
        --config.out_dir=FOLDER
    python -m particlejax.main --config experiments/finetune_features.py \
        --config.data.source=folder:PATH \
        --config.data.video_features.folder=FOLDER

`:pretrain` first trains a masked autoencoder on the features, without labels, then fine-tunes.
`:sweep` compares fine-tuning methods from such a run (--config.init_from=RUN_DIR:pretrain) over
three seeds. `:shots` does so with 1, 5 and 10 labelled clips a class; the other clips are used
without labels or left out. `:words` pretrains with MiniLM's features of the captions too
(--config.data.text_features.folder) and fine-tunes without them. No video is decoded. `:tiny` is a
smoke run.

The defaults keep the model near a linear probe of the mean feature: RMS-normalized particles, layer
scales of 0.01, few steps. With attention pooling, standardized features or forty epochs it overfits
JHMDB and falls behind logistic regression.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    DataSpec,
    EvalSpec,
    Experiment,
    FeatureSpec,
    ModelSpec,
    OptimSpec,
    StageSpec,
    arguments,
    section,
)
from particlejax.config.job_specs import SweepSpec

WAYS = {"full": 5e-4, "lora": 2e-3, "adapter": 2e-3, "prefix": 2e-3}  # learning rates
FEW = {"linear_probe": 2e-3, "lora": 2e-3, "full": 5e-4}


def stages(tiny: bool, pretrain: bool) -> dict[str, Any]:
    """The stages."""
    rows = 8 if tiny else 16
    finetune = section(
        StageSpec,
        num_steps=4 if tiny else 263,
        batch_size=rows,
        val_every_steps=4 if tiny else 100,  # eight epochs of JHMDB
        objectives={"classify": {"label_smoothing": 0.1}},
        ema_decay=0.99,
        init_from="pretrain" if pretrain else "",
        optim=section(OptimSpec, learning_rate=5e-4, weight_decay=0.1, b2=0.999),
    )
    masked = section(
        StageSpec,
        num_steps=4 if tiny else 1500,
        batch_size=rows,
        val_every_steps=4 if tiny else 500,
        objectives={
            "masked_autoencoder": {
                "modality": "video_features",
                "mask_type": "random",
                "mask_ratio": 0.5,
                "target_ratio": 0.5,
                "norm_pix_loss": False,
            }
        },
        optim=section(OptimSpec, learning_rate=1e-3),
    )
    return {"pretrain": masked, "finetune": finetune} if pretrain else {"finetune": finetune}


def few() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the few-shot methods with their settings."""
    for shots in (1, 5, 10):
        fixed = {"num_steps": 150}
        for how, rate in FEW.items():
            yield (
                f"{how}-{shots}",
                {
                    "data": {"shots": shots},
                    "stages": {
                        "finetune": {
                            **fixed,
                            "finetune": {"method": how},
                            "optim": {"learning_rate": rate},
                        }
                    },
                },
            )
        pseudo = {
            "classify": {"label_smoothing": 0.1},
            "pseudo_label": {"threshold": 0.6, "teacher": "ema"},
        }
        yield (
            f"semi-{shots}",
            {
                "data": {"shots": shots, "unlabelled_fraction": 0.7},
                "stages": {"finetune": {**fixed, "objectives": pseudo}},
            },
        )


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '', 'pretrain', 'words', 'sweep', 'shots', 'tiny' or 'tiny,' and one of
    these.
    """
    args = arguments(arg, "tiny", "pretrain", "words", "sweep", "shots")
    tiny, trained = args["tiny"], stages(args["tiny"], args["pretrain"] or args["words"])
    if args["words"]:
        trained["pretrain"]["data"] = {"modalities": ("video_features", "text_features")}
        trained["pretrain"]["objectives"]["contrastive"] = {
            "modalities": ("video_features", "text_features")
        }
    ways = (
        dict(few())
        if args["shots"]
        else {
            how: {
                "stages": {
                    "finetune": {"finetune": {"method": how}, "optim": {"learning_rate": rate}}
                }
            }
            for how, rate in WAYS.items()
        }
    )
    if tiny:
        ways = {"semi-1": ways["semi-1"]} if args["shots"] else {"lora": ways["lora"]}
        ways[next(iter(ways))]["stages"]["finetune"]["num_steps"] = 4
    sweep = section(
        SweepSpec, runs=ways, seeds=(0,) if tiny else (0, 1, 2), metric="finetune/val/top1"
    )
    return ConfigDict(
        section(
            Experiment,
            job="sweep" if args["sweep"] or args["shots"] else "train",
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                modalities=("video_features",),
                video_features=section(FeatureSpec, normalization="rms"),
            ),
            model=section(
                ModelSpec,
                width=32 if tiny else 128,
                depth=2,
                num_heads=2,
                dropout=0.1 if tiny else 0.3,
                layer_scale=0.01,
                decoder_width=32 if tiny else 128,
            ),
            eval=section(EvalSpec, splits=("val",)),
            stages=trained,
            stage_order=tuple(trained),
            **({"sweep": sweep} if args["sweep"] or args["shots"] else {}),
        )
    )
