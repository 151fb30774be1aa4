# SPDX-License-Identifier: Apache-2.0
"""Random augmentations of clips, the same for all frames; deterministic given the generator.

Legend: T frames, H rows, W columns; frames are uint8 [T, H, W, 3].
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from particlejax.config import plugins
from particlejax.config.data import AUGMENTATIONS, AugmentSpec

_FILL_GRAY = 115  # fill value of geometric operations and random erasing
_ERASE_AREA = (0.02, 0.33)  # area range of random erasing, as a fraction of the frame
_MIN_ASPECT = 0.3  # minimum aspect ratio of an erased box, either way
_HUE_STRENGTH = 0.25  # hue jitter relative to the other jitters, in half turns of the color circle

Change = TypeVar("Change", bound=Callable[..., np.ndarray])
ImageOp = Callable[[Image.Image], Image.Image]


def augment_frames(frames: np.ndarray, spec: AugmentSpec, rng: np.random.Generator) -> np.ndarray:
    """Applies color jitter, RandAugment, random erasing and plugin augmentations, in this order."""
    ops = [*_color_jitter(spec.color_jitter, rng)] if spec.color_jitter else []
    if spec.randaug_num_ops:
        ops += [
            _draw_operation(name, spec.randaug_magnitude, rng)
            for name in rng.choice(sorted(_OPERATIONS), spec.randaug_num_ops)
        ]
    if ops:
        frames = np.stack([np.asarray(_apply(ops, frame)) for frame in frames])
    if spec.random_erasing_prob and rng.random() < spec.random_erasing_prob:
        frames = _erase(frames, rng)
    for name in spec.custom:
        frames = _custom(name)(frames, rng)
    return frames


CUSTOM: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {}


def _custom(name: str) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """Returns a plugin's augmentation; data workers import plugins on first use."""
    if name not in CUSTOM:
        plugins.load_inherited()
    return CUSTOM[name]


def register_augmentation(name: str) -> Callable[[Change], Change]:
    """Decorator that registers an augmentation for `config.data.augment.custom`.

    The function maps (frames uint8 [T, H, W, 3], generator) to frames of the same shape and dtype;
    all randomness must come from the generator. Raises ValueError for a name that is taken.
    """

    def register(fn: Change) -> Change:
        plugins.add(CUSTOM, "augmentation", name, fn)
        AUGMENTATIONS[name] = None
        return fn

    return register


def _apply(ops: list[ImageOp], frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(frame))
    for op in ops:
        image = op(image)
    return image


def _color_jitter(strength: float, rng: np.random.Generator) -> list[ImageOp]:
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, len(kinds))
    ops: list[ImageOp] = [
        lambda image, kind=kind, factor=factor: kind(image).enhance(factor)
        for kind, factor in zip(kinds, factors, strict=True)
    ]
    hue_shift = rng.uniform(-1, 1) * strength * _HUE_STRENGTH * 128
    ops.append(lambda image: _shift_hue(image, int(hue_shift)))
    return [ops[i] for i in rng.permutation(len(ops))]


def _shift_hue(image: Image.Image, hue_shift: int) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(lambda x: (x + hue_shift) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _draw_operation(name: str, magnitude: float, rng: np.random.Generator) -> ImageOp:
    sign = 1 if rng.random() < 0.5 else -1
    return lambda image: _OPERATIONS[name](image, magnitude, sign)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BILINEAR,
        fillcolor=(_FILL_GRAY,) * 3,
    )


# Ranges as in RandAugment: magnitude 1 is its level 10.
_OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda image, m, s: image,
    "autocontrast": lambda image, m, s: ImageOps.autocontrast(image),
    "equalize": lambda image, m, s: ImageOps.equalize(image),
    "posterize": lambda image, m, s: ImageOps.posterize(image, 8 - round(4 * m)),
    "solarize": lambda image, m, s: ImageOps.solarize(image, 255 - round(255 * m)),
    "brightness": lambda image, m, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s * m),
    "contrast": lambda image, m, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s * m),
    "colour": lambda image, m, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s * m),
    "sharpness": lambda image, m, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s * m),
    "rotate": lambda image, m, s: image.rotate(
        30 * s * m, Image.Resampling.BILINEAR, fillcolor=(_FILL_GRAY,) * 3
    ),
    "shear_x": lambda image, m, s: _affine(image, (1, 0.3 * s * m, 0, 0, 1, 0)),
    "shear_y": lambda image, m, s: _affine(image, (1, 0, 0, 0.3 * s * m, 1, 0)),
    "translate_x": lambda image, m, s: _affine(image, (1, 0, 0.45 * s * m * image.width, 0, 1, 0)),
    "translate_y": lambda image, m, s: _affine(image, (1, 0, 0, 0, 1, 0.45 * s * m * image.height)),
}


def _erase(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = frames.shape[1:3]
    area = rng.uniform(*_ERASE_AREA)
    aspect = np.exp(rng.uniform(np.log(_MIN_ASPECT), -np.log(_MIN_ASPECT)))
    frames = frames.copy()
    rows, columns = _box((height, width), area, aspect, rng)
    frames[:, rows, columns] = _FILL_GRAY
    return frames


def _box(
    size: tuple[int, int], area: float, aspect: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Returns rows and columns of a box with this fraction of the frame, clipped to the frame."""
    sides = (np.sqrt(area * aspect), np.sqrt(area / aspect))
    spans = []
    for length, fraction in zip(size, sides, strict=True):
        side = min(length, max(1, round(length * fraction)))
        start = int(rng.integers(0, length - side + 1))
        spans.append(slice(start, start + side))
    return spans[0], spans[1]


def mix(
    frames: np.ndarray, other_frames: np.ndarray, spec: AugmentSpec, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Mixes two clips of one shape by MixUp or CutMix; also returns the weight of the first."""
    kinds = [kind for kind in ("mixup_alpha", "cutmix_alpha") if getattr(spec, kind)]
    kind = kinds[int(rng.integers(len(kinds)))]
    alpha = getattr(spec, kind)
    weight = rng.beta(alpha, alpha)
    if kind == "mixup_alpha":
        mixed = frames.astype(np.float32) * weight + other_frames.astype(np.float32) * (1 - weight)
        return mixed.round().astype(np.uint8), float(weight)
    rows, columns = _box(frames.shape[1:3], 1 - weight, 1.0, rng)
    frames = frames.copy()
    frames[:, rows, columns] = other_frames[:, rows, columns]
    box_area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return frames, 1 - box_area / (frames.shape[1] * frames.shape[2])


def random_gain(audio: np.ndarray, spec: AugmentSpec, rng: np.random.Generator) -> np.ndarray:
    """Changes the volume of audio float32 [N] by up to `spec.audio_gain_db` dB."""
    return audio * np.float32(10 ** (rng.uniform(-spec.audio_gain_db, spec.audio_gain_db) / 20))


def mask_bands(
    mel: np.ndarray, spec: AugmentSpec, rng: np.random.Generator, fill: float
) -> np.ndarray:
    """SpecAugment on log-mel spectrograms [F, M]: sets bands of up to a fifth of time and frequency
    to `fill`.
    """
    mel = mel.copy()
    for axis, length in enumerate(mel.shape):
        for _ in range(spec.specaugment_num_masks):
            width = int(rng.integers(0, max(1, length // 5) + 1))
            start = int(rng.integers(0, length - width + 1))
            mel[(slice(None),) * axis + (slice(start, start + width),)] = fill
    return mel
