# SPDX-License-Identifier: Apache-2.0
"""What weights say of their network: a `save_pretrained` folder by its config.json, an import by
what the job import_weights kept of it.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from particlejax.core.errors import UserError
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import (
    formats,
    preprocessor_config,
    pretrained_folder,
    transformer_names,
    transformers_config,
)
from particlejax.models.zoo.convert.config_settings import Keys
from particlejax.models.zoo.convert.transformers_config import IMAGE_VIT
from particlejax.models.zoo.networks import VARIANTS, BackboneSpec, with_size

DEFAULT_MODEL = "i3d"  # of weights that do not say what they are
# parameters of the classifier and of the pooling before it, which features do not need
_HEAD = ("head", "pool")
# By kind: names of arrays that its network leaves out, and what they are; also under our own names.
_LEFT_OUT: dict[str, tuple[tuple[str, str], ...]] = {
    "videomae": (
        (
            r"decoder\.|decoder_(norm|head)\.|encoder_to_decoder\.|to_decoder\.|mask_token$",
            "the decoder of pretraining",
        ),
    ),
    "vivit": ((r"(vivit\.|vit\.)?pooler\.", "a pooler, which the classifier does not use"),),
    "vjepa2": (
        (
            r"(vjepa2\.)?predictor\.|predictor_(norm|head)\.|to_predictor\.|mask_tokens$",
            "the predictor of pretraining",
        ),
    ),
    "vjepa2_pretraining": ((r"pooler\.|classifier\.", "the classification head"),),
    "videomae_pretraining": ((r"fc_norm\.|classifier\.", "the classification head"),),
    "videoprism_text": ((r"text_model\.embeddings\.position_embedding$", "constants"),),
    "bert": (
        (r"cls\.", "the heads of pretraining"),
        (r"(classifier|qa_outputs)\.", "the head of another task"),
    ),
}
_CONSTANTS = (r"(.*\.)?position_ids$", "constants")


class Description(NamedTuple):
    """What weights say of their network; empty for a file that says nothing.

    file: where it says so. kept: what the job import_weights kept beside the parameters. strict:
    whether an array that is missing or without a use is an error.
    """

    file: str = ""
    config: Mapping[str, Any] = {}
    preprocessor: Mapping[str, Any] = {}
    kept: Mapping[str, Any] = {}
    strict: bool = False

    @property
    def model(self) -> str:
        """The published variant or architecture of an import, '' if the weights are none."""
        return self.kept.get("model", "")

    @property
    def is_empty(self) -> bool:
        """Whether the weights say nothing."""
        return not self.config and not self.model


def describe(path: str | os.PathLike[str]) -> Description:
    """The description of weights. Raises UserError if the path does not exist, and for a damaged
    config.json.
    """
    given = pretrained_folder.snapshot(Path(path).expanduser())
    located = formats.located(given)
    if located.is_dir():
        kept = formats.saved_metadata(located)
        return Description(str(given), kept.get("config", {}), kept.get("preprocessor", {}), kept)
    config, folder = pretrained_folder.config_of(given), located.parent
    # a file by itself may be of another model than its neighbor
    if not config or (given.is_file() and not transformers_config.is_supported(config)):
        return Description()
    return Description(
        str(folder / pretrained_folder.CONFIG),
        config,
        pretrained_folder.preprocessor_of(folder),
        strict=given.is_dir(),
    )


def to_keep(found: Description, spec: BackboneSpec, missing: Iterable[str]) -> dict[str, Any]:
    """What an import keeps of its weights' description, for `describe`."""
    return {
        "config": dict(found.config),
        "preprocessor": dict(found.preprocessor),
        "num_frames": spec.frames,
        "image_size": spec.size,
        "class_names": list(spec.class_names),
        "missing": list(missing),
    }


def check_model(model: str) -> None:
    """Raises UserError for a name that is neither a published network nor an architecture."""
    if model and model not in transformer_names.KINDS:
        backbones.find_backbone(model)


def network_of(
    found: Description, model: str, keys: Keys, default: str = "", whole: bool = False
) -> BackboneSpec:
    """The network of weights: of their description, of `model`, or else of `default`.

    whole: of pretraining weights all that trains, not the encoder alone. Raises UserError where
    the two contradict each other, and where neither says what it is.
    """
    if found.config:
        if (
            transformers_config.model_type_of(found.config) == IMAGE_VIT
        ):  # of an import: the ViViT that it became
            model = model or found.model
        spec = transformers_config.network_of(found.config, found.file, model, keys, whole)
        preprocessor = str(Path(found.file).with_name("preprocessor_config.json"))
        spec = preprocessor_config.with_preprocessing(spec, found.preprocessor, preprocessor)
    elif found.model in VARIANTS:
        spec = backbones.find_backbone(model or found.model)
        _check_import(found, spec, keys)
    elif model or default:
        spec = backbones.find_backbone(model or default)
    else:
        raise UserError(
            f"{keys.model} is empty, and the weights have no config.json that says what they are: "
            f"add --{keys.model}=NAME, such as --{keys.model}=videomae_base."
        )
    if found.kept and (found.config or model in ("", found.model)):
        frames, size = found.kept.get("num_frames", 0), found.kept.get("image_size", 0)
        if (frames or spec.frames, size or spec.size) != (spec.frames, spec.size):
            spec = with_size(spec, frames, size)
        spec = dataclasses.replace(spec, class_names=tuple(found.kept.get("class_names", ())))
    return spec


def _check_import(found: Description, spec: BackboneSpec, keys: Keys) -> None:
    """Raises UserError if an import is of another architecture than the model that is named."""
    kinds = [kind.removesuffix("_pretraining") for kind in (spec.kind, VARIANTS[found.model].kind)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{keys.model}={spec.name!r} is another architecture than that of {found.file}, which "
            f"holds {found.model}: {keys.remedy}."
        )


def grid_of(found: Description, spec: BackboneSpec) -> tuple[int, ...]:
    """The grid of the position tables in weights that are described, () of others."""
    knows_sizes = found.config or "num_frames" in found.kept
    if not knows_sizes or not hasattr(spec.net, "grid"):
        return ()
    is_image = transformers_config.model_type_of(found.config) == IMAGE_VIT and not found.kept
    return (1, *spec.net.grid[1:]) if is_image else spec.net.grid


def own_settings(spec: BackboneSpec) -> str:
    """Settings in which a network differs from the published one of its name, as JSON; ''."""
    published = VARIANTS.get(spec.name)
    theirs = _settings_of(published) if published else {}
    own = {key: text for key, text in _settings_of(spec).items() if theirs.get(key) != text}
    return json.dumps(own, sort_keys=True) if own else ""


def _settings_of(spec: BackboneSpec) -> dict[str, str]:
    fields = {
        field.name: repr(getattr(spec.net, field.name))
        for field in dataclasses.fields(spec.net)
        if field.name not in ("parent", "name", "dtype", "classes", "frames", "rows", "columns")
    }
    mean, std = (np.broadcast_to(x, 3).tolist() for x in (spec.mean, spec.std))
    return {**fields, "mean": repr(mean), "std": repr(std)}


def without_head(missing: Iterable[str]) -> list[str]:
    """Missing parameters without those of a classification head."""
    return [name for name in missing if not name.split("/")[0].startswith(_HEAD)]


def left_out(kind: str, unused: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Unused arrays by what they are, where that is known and harmless, and all others."""
    known: dict[str, list[str]] = {}
    others = []
    for name in unused:
        rules = (*_LEFT_OUT.get(kind, ()), _CONSTANTS)
        reason = next((text for pattern, text in rules if re.match(pattern, name)), "")
        (known.setdefault(reason, []) if reason else others).append(name)
    return known, others
