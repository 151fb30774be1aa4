# SPDX-License-Identifier: Apache-2.0
"""Precomputed features of a frozen network as particles, read from a folder.

A folder holds one network's features at one sampling, described by `network.json`, with a file per
clip (see feature_store). Legend: n particles of a clip, D width of the features.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from particlejax.config.experiment import FeatureSpec
from particlejax.core.io import write_text
from particlejax.core.typing import UserError
from particlejax.data.modalities import feature_store
from particlejax.data.sources.records import Record
from particlejax.data.video.decode import Unreadable
from particlejax.particles.types import Particles

DESCRIPTION = "network.json"
ABOUT = 6  # values before a particle's features: place and extent
_LEAST = 1e-6  # minimum root mean square in the normalization of a particle
_HAIR = 1e-4  # tolerance in seconds of a sub-clip's position in a span


@dataclasses.dataclass(frozen=True)
class Described:
    """The content of a folder. mean, deviation: of each of the D features, over the first computed
    split.
    """

    command: str  # computes missing features
    network: Mapping[str, str]  # identifies the network
    # seconds and stride of sub-clips, their cells, number and size of frames
    sampling: Mapping[str, Any]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def width(self) -> int:
        """Feature width D."""
        return len(self.mean)

    @property
    def cells(self) -> int:
        """Particles per sub-clip."""
        return math.prod(self.sampling["cells"])

    @property
    def whole(self) -> bool:
        """Whether a clip has one sub-clip, the whole clip."""
        return not self.sampling["seconds"]

    def most(self, seconds: float) -> int:
        """Returns the maximum number of particles in a span of so many seconds."""
        length, stride = self.sampling["seconds"], self.sampling["stride"]
        return self.cells * (
            1 if self.whole else 1 + max(0, math.floor((seconds - length + 2 * _HAIR) / stride))
        )


def described(folder: Path) -> Described | None:
    """Returns a folder's description, or None without one. Raises UserError if it is damaged."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        return Described(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it and run extract_features again, which reuses "
            "the saved features."
        ) from error


def describe(folder: Path, what: Described) -> None:
    """Writes network.json atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / DESCRIPTION, json.dumps(dataclasses.asdict(what)))


def opened(spec: FeatureSpec, modality: str = "video_features") -> Described:
    """Returns the description of config.data.video_features or another modality. Raises UserError
    if there is none.
    """
    if not spec.folder:
        raise UserError(
            f"config.data.{modality}.folder is empty: set it to the output of `python -m "
            "particlejax.main --config experiments/extract_features.py --config.out_dir=FOLDER`."
        )
    found = described(Path(spec.folder).expanduser())
    if found is None:
        raise UserError(
            f"{spec.folder} holds no features (it has no {DESCRIPTION}): first run `python -m "
            "particlejax.main --config experiments/extract_features.py "
            f"--config.out_dir={spec.folder}` with your source."
        )
    return found


def starts(length: float, seconds: float, stride: float) -> np.ndarray:
    """Returns the starts of sub-clips in seconds; beyond a clip's end, the last frame repeats."""
    begins = (
        np.arange(1 + max(0, math.ceil((length - seconds - _HAIR) / stride))) * stride
        if seconds
        else np.zeros(1)
    )
    # with gaps between sub-clips, the last one may start after the end
    return begins[begins < max(length, _HAIR)]


def placed(starts: np.ndarray, seconds: float, cells: tuple[int, int, int]) -> np.ndarray:
    """Returns place and extent, float32 [n, 6], of the cells of sub-clips, in the order time, row,
    column.
    """
    size = np.array([seconds, 1.0, 1.0]) / cells
    inside = (
        np.stack(np.meshgrid(*map(np.arange, cells), indexing="ij"), axis=-1).reshape(-1, 3) + 0.5
    ) * size
    place = inside[None] + np.stack([starts, 0 * starts, 0 * starts], axis=-1)[:, None]
    return (
        np.concatenate([place, np.broadcast_to(size, place.shape)], axis=-1)
        .reshape(-1, ABOUT)
        .astype(np.float32)
    )


def joined(about_N6: np.ndarray, features_ND: np.ndarray) -> np.ndarray:
    """Returns the saved array of a clip, float32 [n, 6 + D]."""
    return np.concatenate([about_N6, features_ND], axis=1, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A clip's normalized features: place and extent float32 [n, 6], features float32 [n, D].

    n is 0 if the clip has no input for the network, such as no audio.
    """

    about: np.ndarray
    features: np.ndarray
    what: Described

    @property
    def length(self) -> float:
        """Seconds from the clip's start to the end of its last sub-clip; always above 0."""
        return float((self.about[:, 0] + self.about[:, 3] / 2).max(initial=_HAIR))

    def during(self, start: float, seconds: float) -> Particles:
        """Returns the sub-clips within a span, else the one nearest to its center, with times from
        the span's start.
        """
        if not len(self.about):
            return Particles(
                self.features, self.about[:, :3], self.about[:, 3:], np.ones(0, np.int32)
            )
        size = self.what.cells
        about = self.about.reshape(-1, size, ABOUT)
        first, last = about[:, 0, 0] - about[:, 0, 3] / 2, about[:, -1, 0] + about[:, -1, 3] / 2
        inside = (first >= start - _HAIR) & (last <= start + seconds + _HAIR)
        if not inside.any():
            inside = (
                np.arange(len(first)) == np.abs((first + last) / 2 - start - seconds / 2).argmin()
            )
        chosen = np.repeat(inside, size)
        place, extent = self.about[chosen, :3].copy(), self.about[chosen, 3:]
        place[:, 0] -= start
        return Particles(self.features[chosen], place, extent, np.ones(len(place), np.int32))


def read(record: Record, spec: FeatureSpec, modality: str = "video_features") -> Kept:
    """Reads a clip's features. Raises decode.Unreadable, with the command that computes them, if
    they are missing or damaged.
    """
    what, folder = opened(spec, modality), Path(spec.folder).expanduser()
    try:
        found = feature_store.load(folder, feature_store.key(record, what.network, what.sampling))
    except OSError as error:
        raise Unreadable(str(error)) from error
    except feature_store.Damaged as error:
        raise Unreadable(f"{error}, run `{what.command}` to compute its features again") from error
    if found is None:
        raise Unreadable(
            f"it has no features in {spec.folder}, run `{what.command}` with its source and split"
        )
    values = found[:, ABOUT:]
    if spec.normalization == "standardize":
        values = (values - np.float32(what.mean)) / np.float32(what.deviation)
    else:  # unit root mean square per particle
        values = values / np.maximum(np.sqrt(np.square(values).mean(axis=1, keepdims=True)), _LEAST)
    return Kept(found[:, :ABOUT], values, what)
