# SPDX-License-Identifier: Apache-2.0
"""Pretrains on video and captions: contrastive, text matching and masked language modeling.

    python -m particlejax.main --config experiments/pretrain/video_text.py

experiments/probe.py measures retrieval in both directions. On the toybox 2400 steps take 15 minutes
of a busy core. Frozen, on twelve actions (linear, k-NN, attentive): video 42.5, 39.6 and 45.4 %,
untrained 18.8, 12.5 and 26.7 %. Retrieval among 240 unseen clips: R@1 1.2 and R@10 16.2 % from
video to captions, 2.1 and 19.6 % back, untrained 0.4 and 4.2 %. Masked bytes are right for 32.4 %
and matching with hard negatives for 55.0 % (seed 0). Crops and dropout prevent overfitting to the
960 clips: without them R@10 is 8 to 9 % and video is at 35.8, 24.2 and 32.9 %.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    DataSpec,
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
    objectives = {
        "contrastive": {"modalities": ("vision", "text")},
        "text_matching": {"negatives": "hard"},
        "masked_lm": {"weight": 0.5},
    }
    stage = section(
        StageSpec,
        num_steps=4 if tiny else 2400,
        batch_size=8 if tiny else 16,
        val_split="" if tiny else "val",
        val_every_steps=300,
        objectives={
            name: objectives[name] for name in objectives if not tiny or name == "contrastive"
        },  # one compiles faster
        optim=section(OptimSpec, learning_rate=1e-3),
    )
    small = section(
        ModelSpec,
        width=24,
        depth=1,
        num_heads=2,
        decoder_width=24,
        decoder_depth=1,
        unroll_layers=False,
    )
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                modalities=("vision", "text"),
                num_frames=16,
                image_size=32,
                temporal_mean_scale=0.05,
                ram_cache_gib=1.0,
                augment={"crop_scale": (0.7, 1.0), "hflip_prob": 0.5},
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=(16, 4, 4)),
            model=small
            if tiny
            else section(ModelSpec, width=96, depth=3, num_heads=3, decoder_width=96, dropout=0.2),
            stages={"pretrain": stage},
        )
    )
