# SPDX-License-Identifier: Apache-2.0
"""A small Transformer over what a frozen network says of clips: the features that
experiments/extract_features.py kept, as particles.

    python -m particlejax.main --config experiments/extract_features.py \
        --config.source=folder:PATH \
        --config.out_dir=FOLDER
    python -m particlejax.main --config experiments/finetune_features.py \
        --config.data.source=folder:PATH \
        --config.data.video_features.folder=FOLDER

`:pretrain` first fills in hidden features, without labels, and fine-tunes from there; `:sweep`
compares ways of fine-tuning from such a run, named by --config.init_from=RUN_DIR:pretrain, over
three seeds, and `:shots` does with 1, 5 and 10 labelled clips a class, the rest without labels or
left out. `:words` pretrains with what MiniLM read in the captions, too
(--config.data.text_features.folder), and fine-tunes without. No video is decoded. `:tiny` is a
smoke run.

It is kept near a linear reading of the mean: particles of equal length, branches that begin at a
hundredth, few steps. With attention pooling, standardised features or forty epochs it learns
JHMDB's clips by heart and falls behind a regression.
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
    SweepSpec,
    arguments,
    section,
)

WAYS = {"full": 5e-4, "lora": 2e-3, "adapter": 2e-3, "prefix": 2e-3}  # learning rates
FEW = {"linear_probe": 2e-3, "lora": 2e-3, "full": 5e-4}


def stages(tiny: bool, pretrain: bool) -> dict[str, Any]:
    """What is trained."""
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
    """Ways to learn from a few labelled clips of each class."""
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
    them.
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
                source="toybox:tiny" if tiny else "folder:../shared/data/jhmdb21",
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
