# SPDX-License-Identifier: Apache-2.0
"""What a frozen network said of a clip's sub-clips, read from a folder as particles: no worker
needs the network.

A folder holds one network's features at one sampling, as `network.json` says, each clip's in a file
of `data.video_features`. Legend: n particles of a clip, D width of the features.
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
ABOUT = 6  # numbers that stand before a particle's features: its place and its extent
_LEAST = 1e-6  # root mean square of a particle that is not blown up
_HAIR = 1e-4  # seconds by which a sub-clip may stand out of the span that is asked for


@dataclasses.dataclass(frozen=True)
class Described:
    """What a folder holds. mean, deviation: of each of the D features, over the first split that
    was computed.
    """

    command: str  # that computes what is not there
    network: Mapping[str, str]  # what tells it from others
    # seconds and stride of sub-clips, the cells of each, frames and their size
    sampling: Mapping[str, Any]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def cells(self) -> int:
        """Particles of a sub-clip."""
        return math.prod(self.sampling["cells"])

    @property
    def whole(self) -> bool:
        """Whether the one sub-clip of a clip is the whole clip."""
        return not self.sampling["seconds"]

    def most(self, seconds: float) -> int:
        """How many particles a span of so many seconds holds at most."""
        length, stride = self.sampling["seconds"], self.sampling["stride"]
        return self.cells * (
            1 if self.whole else 1 + max(0, math.floor((seconds - length + 2 * _HAIR) / stride))
        )


def described(folder: Path) -> Described | None:
    """What the folder says of itself, None where it says nothing yet."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        return Described(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it and compute the features again, those that "
            "are kept are "
            "found there."
        ) from error


def describe(folder: Path, what: Described) -> None:
    """Writes network.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / DESCRIPTION, json.dumps(dataclasses.asdict(what)))


def opened(spec: FeatureSpec, modality: str = "video_features") -> Described:
    """What config.data.video_features or another modality names. Raises UserError where that is
    nothing.
    """
    if not spec.folder:
        raise UserError(
            f"config.data.{modality}.folder is empty: name the folder that `python -m "
            "particlejax.main --config "
            "experiments/extract_features.py --config.out_dir=FOLDER` wrote."
        )
    found = described(Path(spec.folder).expanduser())
    if found is None:
        raise UserError(
            f"{spec.folder} holds no features (it has no {DESCRIPTION}): run `python -m "
            "particlejax.main --config "
            f"experiments/extract_features.py --config.out_dir={spec.folder}` with your source "
            "first."
        )
    return found


def starts(length: float, seconds: float, stride: float) -> np.ndarray:
    """Where the sub-clips of a clip begin, in seconds; the last may go past its end, where it shows
    the last frame.
    """
    begins = (
        np.arange(1 + max(0, math.ceil((length - seconds - _HAIR) / stride))) * stride
        if seconds
        else np.zeros(1)
    )
    # where they stand apart, the last one may lie beyond
    return begins[begins < max(length, _HAIR)]


def placed(starts: np.ndarray, seconds: float, cells: tuple[int, int, int]) -> np.ndarray:
    """Place and extent, float32 [n, 6], of the cells of sub-clips of so many seconds, in the order
    of time, row, column.
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
    """What is kept of a clip, float32 [n, 6 + D]."""
    return np.concatenate([about_N6, features_ND], axis=1, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A clip's particles as they were kept, to scale: place and extent float32 [n, 6], features
    float32 [n, D].

    There are none where the clip has nothing for the network, such as no sound.
    """

    about: np.ndarray
    features: np.ndarray
    what: Described

    @property
    def length(self) -> float:
        """Seconds from the clip's start to where its last sub-clip ends; at least a moment, so that
        there is a span.
        """
        return float((self.about[:, 0] + self.about[:, 3] / 2).max(initial=_HAIR))

    def during(self, start: float, seconds: float) -> Particles:
        """The sub-clips within a span, else the one nearest to its middle, on the clock of the
        span.
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
    """The clip's features. Raises decode.Unreadable, with the command that computes them, where
    they are not there or damaged.
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
    else:  # of root mean square one, so that layers find the numbers that they expect
        values = values / np.maximum(np.sqrt(np.square(values).mean(axis=1, keepdims=True)), _LEAST)
    return Kept(found[:, :ABOUT], values, what)
