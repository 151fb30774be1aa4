# SPDX-License-Identifier: Apache-2.0
"""The main job on the embedded toybox: pretrain on 960 clips without labels, fine-tune on a quarter
of them with.

    python -m particlejax.main --config experiments/quickstart.py

See README.md for the expected figures. `:tiny` is a smoke run, `:scratch` leaves out the
pretraining.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import (
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
            StageSpec,
            steps=4 if tiny else 2400,
            rows=8 if tiny else 16,
            val_every=4 if tiny else 400,
            objectives={
                "masked": {"keep": 0.4, "predict": 0.3, "mask": "random", "normalise": False}
            },
            optim=section(OptimSpec, rate=1e-3),
        ),
        "finetune": section(
            StageSpec,
            steps=4 if tiny else 200,
            rows=8 if tiny else 16,
            val_every=4 if tiny else 50,
            init="" if args["scratch"] else "pretrain",
            data={"fraction": 0.25},
            objectives={"classify": {"label_smoothing": 0.1}},
            optim=section(OptimSpec, rate=1e-3, weight_decay=0.05, b2=0.999),
        ),
    }
    if args["scratch"]:
        del stages["pretrain"]
    small = section(ModelSpec, width=32, depth=2, heads=2, decoder_width=32, pool="attention")
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                frames=16,
                size=32,
                still=0.05,
                memory_gib=1.0,
                augment={"crop": (0.5, 1.0), "flip": 0.5},
            ),
            particles=section(ParticleSpec, policy="grid", base=(16, 4, 4)),
            model=small
            if tiny
            else section(
                ModelSpec, width=128, depth=4, heads=2, decoder_width=96, pool="attention"
            ),
            evaluate=section(EvaluateSpec, splits=("test",), views=(1, 1)),
            stages=stages,
            order=tuple(stages),
        )
    )
