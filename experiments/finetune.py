# SPDX-License-Identifier: Apache-2.0
"""Action recognition on a folder of one's own videos, from scratch or from a pretrained run.

    python -m particlejax.main --config experiments/finetune.py --config.data.source=folder:PATH [--config.init=RUN_DIR]

Trains on the split 'train', measures on 'val'. `:tiny` is a smoke run on the toybox. See README.md for figures on JHMDB.
"""

from ml_collections import ConfigDict

from particlejax.spec import DataSpec, EvaluateSpec, Experiment, ModelSpec, OptimSpec, ParticleSpec, StageSpec, arguments, section


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny'."""
    tiny = arguments(arg, "tiny")["tiny"]
    finetune = section(
        StageSpec, steps=4 if tiny else 0, epochs=0 if tiny else 60, rows=8 if tiny else 16, val_every=4 if tiny else 200,
        objectives={"classify": {"label_smoothing": 0.1}}, ema=0.99 if tiny else 0.999,
        optim=section(OptimSpec, rate=1e-3, weight_decay=0.05, b2=0.999))
    small = section(ModelSpec, width=32, depth=2, heads=2)
    return ConfigDict(section(
        Experiment,
        data=section(DataSpec, source="toybox:tiny" if tiny else "folder:../shared/data/jhmdb21", frames=16,
                     size=32 if tiny else 64, decode_side=0 if tiny else 80, still=0.4,
                     augment={"crop": (0.3, 1.0), "flip": 0.5}, memory_gib=0.0 if tiny else 4.0),
        particles=section(ParticleSpec, policy="grid", base=(16, 8, 8)),
        model=small if tiny else section(ModelSpec, width=128, depth=4, heads=2),
        evaluate=section(EvaluateSpec, splits=("val",), views=(1, 1) if tiny else (2, 3)),
        stages={"finetune": finetune},
    ))
