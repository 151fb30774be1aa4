# SPDX-License-Identifier: Apache-2.0
"""VideoBERT: masked language modeling and masked visual tokens in one encoder.

    python -m particlejax.main --config experiments/pretrain/videobert.py

Visual tokens are k-means clusters of the particles of the first batches. As in the paper, they may
be clusters of a frozen network's features: run experiments/extract_features.py, then add
--config.data.modalities="('video_features','text')"
--config.data.video_features.folder=FOLDER
--config.stages.pretrain.objectives.masked_visual_tokens.modality=video_features.

On the toybox 1200 steps take 7 minutes of a core. On 240 unseen clips the accuracy is 42.7 % on
masked visual tokens (of 64), 23.4 % on masked bytes and 54.6 % on text matching. Frozen, on twelve
actions (linear, k-NN, attentive): video 26.2, 10.4 and 35.0 %, untrained 18.8, 12.5 and 26.7 %
(seed 0).
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
from particlejax.config.objectives import MaskedVisualTokensSpec


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
                augment={"hflip_prob": 0.5},
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=(16, 4, 4)),
            model=small
            if tiny
            else section(ModelSpec, width=96, depth=3, num_heads=3, decoder_width=96),
            stages={"pretrain": stage},
        )
    )
