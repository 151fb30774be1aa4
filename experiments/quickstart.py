# SPDX-License-Identifier: Apache-2.0
"""The main job on the embedded toybox: pretrain on 960 clips without labels, fine-tune on a quarter of them with.

    python -m particlejax.main --config experiments/quickstart.py

See README.md for the expected figures. `:tiny` is a smoke run, `:scratch` leaves out the pretraining.
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
    """The experiment; arg: '', 'tiny', 'scratch' or 'tiny,scratch'."""
    args = arguments(arg, "tiny", "scratch")
    tiny = args["tiny"]
    stages = {
        "pretrain": section(
            StageSpec, steps=4 if tiny else 600, rows=8 if tiny else 32, val_every=4 if tiny else 150,
            objectives={"masked": {"keep": 0.25, "predict": 0.375, "mask": "tube"}},
            optim=section(OptimSpec, rate=1e-3)),
        "finetune": section(
            StageSpec, steps=4 if tiny else 300, rows=8 if tiny else 16, val_every=4 if tiny else 100,
            init="" if args["scratch"] else "pretrain", data={"fraction": 0.25},
            objectives={"classify": {"label_smoothing": 0.1}},
            model={"dropout": 0.1, "drop_path": 0.1},
            optim=section(OptimSpec, rate=5e-4, weight_decay=0.05, b2=0.999)),
    }
    if args["scratch"]:
        del stages["pretrain"]
    return ConfigDict(section(
        Experiment,
        data=section(DataSpec, source="toybox:tiny" if tiny else "toybox", frames=16, size=64, memory_gib=1.0),
        particles=section(ParticleSpec, policy="grid", base=(2, 16, 16)),
        model=section(ModelSpec, width=32, depth=2, heads=2, decoder_width=32) if tiny else section(ModelSpec),
        evaluate=section(EvaluateSpec, splits=("test",), views=(1, 1)),
        stages=stages,
        order=tuple(stages),
    ))
