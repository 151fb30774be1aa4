# SPDX-License-Identifier: Apache-2.0
"""A small Transformer over what a frozen network says of clips: the features that
experiments/features.py kept, as particles.

    python -m particlejax.main --config experiments/features.py --config.source=folder:PATH \
        --config.folder=FOLDER
    python -m particlejax.main --config experiments/finetune_features.py \
        --config.data.source=folder:PATH \
        --config.data.features.folder=FOLDER

`:pretrain` first fills in hidden features, without labels, and fine-tunes from there; `:sweep`
compares ways of fine-tuning from such a run, named by --config.init=RUN_DIR:pretrain, over three
seeds, and `:shots` does with 1, 5 and 10 labelled clips a class, the rest without labels or left
out. `:words` pretrains with what MiniLM read in the captions, too (--config.data.told.folder), and
fine-tunes without. No video is decoded. `:tiny` is a smoke run.

It is kept near a linear reading of the mean: particles of equal length, branches that begin at a
hundredth, few steps. With attention pooling, standardised features or forty epochs it learns
JHMDB's clips by heart and falls behind a regression.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    DataSpec,
    EvaluateSpec,
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
FEW = {"linear": 2e-3, "lora": 2e-3, "full": 5e-4}


def stages(tiny: bool, pretrain: bool) -> dict[str, Any]:
    """What is trained."""
    rows = 8 if tiny else 16
    finetune = section(
        StageSpec,
        steps=4 if tiny else 263,
        rows=rows,
        val_every=4 if tiny else 100,  # eight epochs of JHMDB
        objectives={"classify": {"label_smoothing": 0.1}},
        ema=0.99,
        init="pretrain" if pretrain else "",
        optim=section(OptimSpec, rate=5e-4, weight_decay=0.1, b2=0.999),
    )
    masked = section(
        StageSpec,
        steps=4 if tiny else 1500,
        rows=rows,
        val_every=4 if tiny else 500,
        objectives={
            "masked": {
                "modality": "features",
                "mask": "random",
                "keep": 0.5,
                "predict": 0.5,
                "normalise": False,
            }
        },
        optim=section(OptimSpec, rate=1e-3),
    )
    return {"pretrain": masked, "finetune": finetune} if pretrain else {"finetune": finetune}


def few() -> Iterator[tuple[str, dict[str, Any]]]:
    """Ways to learn from a few labelled clips of each class."""
    for shots in (1, 5, 10):
        fixed = {"steps": 150}
        for how, rate in FEW.items():
            yield (
                f"{how}-{shots}",
                {
                    "data": {"shots": shots},
                    "stages": {
                        "finetune": {**fixed, "tune": {"how": how}, "optim": {"rate": rate}}
                    },
                },
            )
        pseudo = {
            "classify": {"label_smoothing": 0.1},
            "pseudo": {"threshold": 0.6, "teacher": "average"},
        }
        yield (
            f"semi-{shots}",
            {
                "data": {"shots": shots, "unlabelled": 0.7},
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
        trained["pretrain"]["data"] = {"modalities": ("features", "told")}
        trained["pretrain"]["objectives"]["contrast"] = {"pair": ("features", "told")}
    ways = (
        dict(few())
        if args["shots"]
        else {
            how: {"stages": {"finetune": {"tune": {"how": how}, "optim": {"rate": rate}}}}
            for how, rate in WAYS.items()
        }
    )
    if tiny:
        ways = {"semi-1": ways["semi-1"]} if args["shots"] else {"lora": ways["lora"]}
        ways[next(iter(ways))]["stages"]["finetune"]["steps"] = 4
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
                modalities=("features",),
                features=section(FeatureSpec, scale="length"),
            ),
            model=section(
                ModelSpec,
                width=32 if tiny else 128,
                depth=2,
                heads=2,
                dropout=0.1 if tiny else 0.3,
                layer_scale=0.01,
                decoder_width=32 if tiny else 128,
            ),
            evaluate=section(EvaluateSpec, splits=("val",)),
            stages=trained,
            order=tuple(trained),
            **({"sweep": sweep} if args["sweep"] or args["shots"] else {}),
        )
    )
