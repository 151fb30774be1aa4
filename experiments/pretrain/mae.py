# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoder (VideoMAE) with tube masks: predicts the pixels of masked particles.

    python -m particlejax.main --config experiments/pretrain/mae.py

Trains on the toybox; use `--config.data.source=folder:PATH` for other clips. The encoder sees a
quarter of the particles. 1200 steps take 73 s of a core. Frozen, experiments/probe.py gives 19.2 %
(linear), 6.2 % (k-NN) and 32.5 % (attentive) on twelve actions (seed 0; untrained, at width 64,
19.6, 14.2 and 19.8 %).
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
    stage = section(
        StageSpec,
        num_steps=4 if tiny else 1200,
        batch_size=8 if tiny else 16,
        val_split="" if tiny else "val",
        val_every_steps=300,
        objectives={
            "masked_autoencoder": {"mask_type": "tube", "mask_ratio": 0.75, "target_ratio": 0.5}
        },
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
                num_frames=16,
                image_size=32,
                temporal_mean_scale=0.4,
                ram_cache_gib=1.0,
                augment={"crop_scale": (0.5, 1.0), "hflip_prob": 0.5},
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=(16, 4, 4)),
            model=small
            if tiny
            else section(ModelSpec, width=96, depth=3, num_heads=3, decoder_width=96),
            stages={"pretrain": stage},
        )
    )
