# SPDX-License-Identifier: Apache-2.0
"""Sight and captions: InfoNCE between them, does this text belong to this clip, and the words that are hidden.

    python -m particlejax.main --config experiments/pretrain/video_text.py

experiments/probe.py measures retrieval both ways. On the toybox 1200 steps take 7 minutes of a core; frozen, sight is at 35.8 %
(linear), 24.2 % (k-NN) and 32.9 % (attentive) of twelve actions, untrained at 18.8, 12.5 and 26.7 %. Retrieval among 240 unseen
clips reaches R@1 and R@10 of 1.7 and 8.8 % from sight to captions, 0.8 and 8.3 % back, untrained 0.4 and 4.2 %; the match, with
hard negatives, is told for 55.8 % of clips (seed 0). What limits it are the 960 clips to learn from: of these it finds 31 %
among 16, of others 12 %.
"""

from ml_collections import ConfigDict

from particlejax.spec import DataSpec, Experiment, ModelSpec, OptimSpec, ParticleSpec, StageSpec, arguments, section


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny'."""
    tiny = arguments(arg, "tiny")["tiny"]
    objectives = {"contrast": {"pair": ("vision", "text")}, "match": {"negatives": "hard"}, "words": {"weight": 0.5}}
    stage = section(
        StageSpec, steps=4 if tiny else 2400, rows=8 if tiny else 16, val="" if tiny else "val", val_every=300,
        objectives={name: objectives[name] for name in objectives if not tiny or name == "contrast"},  # one compiles sooner
        optim=section(OptimSpec, rate=1e-3))
    small = section(ModelSpec, width=24, depth=1, heads=2, decoder_width=24, decoder_depth=1, unroll=False)
    return ConfigDict(section(
        Experiment,
        data=section(DataSpec, source="toybox:tiny" if tiny else "toybox", modalities=("vision", "text"),
                     frames=16, size=32, still=0.05, memory_gib=1.0, augment={"crop": (0.7, 1.0), "flip": 0.5}),
        particles=section(ParticleSpec, policy="grid", base=(16, 4, 4)),
        model=small if tiny else section(ModelSpec, width=96, depth=3, heads=3, decoder_width=96, dropout=0.2),
        stages={"pretrain": stage},
    ))
