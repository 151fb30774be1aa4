# SPDX-License-Identifier: Apache-2.0
"""Published weights that are named where a run of training is asked for."""

import json
from pathlib import Path

from particlejax.core.errors import UserError
from particlejax.models.zoo.convert import description, formats, pretrained_folder
from particlejax.models.zoo.convert.config_settings import Keys
from particlejax.models.zoo.networks import VARIANTS, BackboneSpec

CONFIG = "config.json"


def network_at(text: str) -> BackboneSpec | None:
    """The network of published weights: an import, a `save_pretrained` folder or a file; else None.

    Raises UserError if they are damaged.
    """
    path = pretrained_folder.snapshot(Path(text).expanduser())
    if path.is_file():
        is_weights = path.suffix in formats.SUFFIXES
        is_weights = is_weights or path.name.endswith(pretrained_folder.INDEX_SUFFIX)
    else:
        is_weights = _is_import(path) or pretrained_folder.weights_in(path)
    if not is_weights:
        return None
    found = description.describe(path)
    if not found.config and found.model not in VARIANTS:
        return BackboneSpec("", None, 0, 0, "", name="unknown architecture")
    return description.network_of(found, "", Keys())


def _is_import(folder: Path) -> bool:
    """Whether a folder is the workdir of the job import_weights."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("job") == "import_weights"


def refuse(text: str) -> None:
    """Raises UserError for published weights."""
    network = network_at(text)
    if network is not None:
        other = (
            "; a published Transformer is not trained end to end"
            if network.inputs
            else ", or, of a 3D CNN, as config.model.stem.weights of experiments/finetune_cnn.py"
        )
        raise UserError(
            f"{text} holds published weights ({network.name}), not a run of training: name it in "
            "config.weights of the jobs predict, linear_probe, extract_features and "
            f"import_weights, or in pj.load_backbone(weights=...){other}."
        )
