# SPDX-License-Identifier: Apache-2.0
"""Action recognition on a folder of one's own videos, from scratch or from a pretrained run.

    python -m particlejax.main --config experiments/finetune.py --config.data.source=folder:PATH [--config.init=RUN_DIR]

Trains on the split 'train', measures on 'val'. `:tiny` is a smoke run on the toybox. See README.md for figures on JHMDB.
"""

from ml_collections import ConfigDict

from particlejax.spec import (
    DataSpec,
    EvaluateSpec,
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
    finetune = section(
        StageSpec, steps=4 if tiny else 0, epochs=0 if tiny else 60, rows=8 if tiny else 16, val_every=4 if tiny else 200,
        objectives={"classify": {"label_smoothing": 0.1}}, ema=0.99 if tiny else 0.999,
        optim=section(OptimSpec, rate=5e-4, weight_decay=0.05, b2=0.999))
    small = section(ModelSpec, width=32, depth=2, heads=2)
    return ConfigDict(section(
        Experiment,
        data=section(DataSpec, source="toybox:tiny" if tiny else "folder:../shared/data/jhmdb21", frames=16,
                     size=32 if tiny else 96, decode_side=0 if tiny else 112, crop=(0.5, 1.0), flip=True,
                     memory_gib=0.0 if tiny else 4.0),
        particles=section(ParticleSpec, policy="grid", base=(2, 16, 16)),
        model=small if tiny else section(ModelSpec, dropout=0.1, drop_path=0.1),
        evaluate=section(EvaluateSpec, splits=("val",), views=(1, 1) if tiny else (2, 3)),
        stages={"finetune": finetune},
    ))
