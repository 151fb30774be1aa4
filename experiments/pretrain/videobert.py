# SPDX-License-Identifier: Apache-2.0
"""Masked words given the video, and masked visual words given the text (VideoBERT): one encoder
reads both.

    python -m particlejax.main --config experiments/pretrain/videobert.py

Visual words are clusters that k-means finds among the particles of the first batches. As in the
paper they may be those of a frozen network: compute experiments/extract_features.py, then
--config.data.modalities="('video_features','text')"
--config.data.video_features.folder=FOLDER
--config.stages.pretrain.objectives.masked_visual_tokens.modality=video_features.

On the toybox 1200 steps take 7 minutes of a core. Of 240 unseen clips' hidden visual words it names
42.7 % of 64, of the captions' hidden bytes 23.4 %, and the match of 54.6 % of clips. Frozen, sight
is at 26.2 % (linear), 10.4 % (k-NN) and 35.0 % (attentive) of twelve actions, untrained at 18.8,
12.5 and 26.7 % (seed 0).
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
from particlejax.config.model import MaskedVisualTokensSpec


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny'."""
    tiny = arguments(arg, "tiny")["tiny"]
    seen = section(
        MaskedVisualTokensSpec,
        mask_type="random",
        mask_ratio=0.6,
        target_ratio=0.3,
        codebook_size=16 if tiny else 64,
    )
    objectives = {
        "masked_lm": {"mask_ratio": 0.3},
        "masked_visual_tokens": seen,
        "text_matching": {"negatives": "hard"},
    }
    stage = section(
        StageSpec,
        num_steps=4 if tiny else 1200,
        batch_size=8 if tiny else 16,
        val_split="" if tiny else "val",
        val_every_steps=300,
        objectives={
            name: objectives[name]
            for name in objectives
            if not tiny or name == "masked_visual_tokens"
        },  # one compiles sooner
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
                augment={"hflip_prob": 0.5},
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=(16, 4, 4)),
            model=small
            if tiny
            else section(ModelSpec, width=96, depth=3, num_heads=3, decoder_width=96),
            stages={"pretrain": stage},
        )
    )
