# SPDX-License-Identifier: Apache-2.0
"""From preprocessor_config.json of the library transformers to pixel normalization and scaling."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from particlejax.models.zoo.convert.config_settings import Settings
from particlejax.models.zoo.networks import BackboneSpec


def with_preprocessing(
    spec: BackboneSpec, preprocessor: Mapping[str, Any], file: str
) -> BackboneSpec:
    """The spec with the pixel normalization and the scaling before the crop that a
    preprocessor_config.json describes; {}: unchanged.

    Raises UserError for a mean or deviation that is not one of three channels.
    """
    takes_pixels = any(len(shape) > 2 and shape[-1] == 3 for shape, _ in spec.examples)
    if not preprocessor or not takes_pixels:
        return spec
    settings = Settings(file, preprocessor)
    # pixels * factor - offset, then (... - mean) / std; ours is (pixels / 255 - mean) / std
    factor = (
        settings.number("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1
    )
    offset = 1.0 if preprocessor.get("offset") and preprocessor.get("do_rescale", True) else 0.0
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if preprocessor.get("do_normalize", True):
        mean = _channels(settings, "image_mean", spec.mean)
        std = _channels(settings, "image_std", spec.std)
        if 0 in std:
            raise settings.error("image_std", "it must not be zero")
    scale = 255 * factor
    return dataclasses.replace(
        spec,
        mean=tuple(_tidy((m + offset) / scale) for m in mean),
        std=tuple(_tidy(s / scale) for s in std),
        short_side=_short_side(settings, spec.size),
    )


def _channels(settings: Settings, key: str, default: Any) -> tuple[float, float, float]:
    value = settings.values.get(key)
    value = default if value is None else value
    value = [value] * 3 if isinstance(value, int | float) else value
    is_triple = isinstance(value, Sequence) and len(value) == 3
    if not is_triple or not all(isinstance(x, int | float) for x in value):
        raise settings.error(key, "a number for each of three channels is needed")
    return tuple(map(float, value))


def _tidy(value: float) -> float:
    """Rounds away what 255 * (1 / 255) leaves."""
    return float(f"{value:.9g}")


def _short_side(settings: Settings, size: int) -> int:
    """Pixels of the short side before the crop to `size`; 0: as `size`, or not described."""
    if not settings.values.get("do_resize", True) or not settings.values.get("do_center_crop"):
        return 0
    short, crop = (_edge(settings.values.get(key)) for key in ("size", "crop_size"))
    if not short or not crop or short <= crop:
        return 0
    return round(size * short / crop)


def _edge(value: Any) -> int:
    """The short side of a size of an image processor: a number, two, or named edges; else 0."""
    if isinstance(value, Mapping):
        value = [value[k] for k in ("shortest_edge", "height", "width") if k in value]
    sides = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    numbers = [n for n in sides if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return min(numbers) if numbers and len(numbers) == len(sides) else 0
