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

from particlejax.config import renames
from particlejax.config.data import FeatureSpec
from particlejax.config.job_specs import ExtractFeaturesSpec
from particlejax.core.io import write_text
from particlejax.core.typing import UserError
from particlejax.data.modalities import feature_store
from particlejax.data.sources.records import Record
from particlejax.data.video.decode import Unreadable
from particlejax.particles.types import Particles

DESCRIPTION = "network.json"
GEOMETRY_SIZE = 6  # values before a particle's features: place and extent
_MIN_RMS = 1e-6  # minimum root mean square in the normalization of a particle
_TIME_EPS = 1e-4  # tolerance in seconds of a sub-clip's position in a span


@dataclasses.dataclass(frozen=True)
class FeatureSet:
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
    def particles_per_subclip(self) -> int:
        """Particles per sub-clip."""
        return math.prod(self.sampling["cells"])

    @property
    def covers_whole_clip(self) -> bool:
        """Whether a clip has one sub-clip, the whole clip."""
        return not self.sampling["seconds"]

    def max_particles(self, seconds: float) -> int:
        """Returns the maximum number of particles in a span of so many seconds."""
        length, stride = self.sampling["seconds"], self.sampling["stride"]
        return self.particles_per_subclip * (
            1
            if self.covers_whole_clip
            else 1 + max(0, math.floor((seconds - length + 2 * _TIME_EPS) / stride))
        )


def read_description(folder: Path) -> FeatureSet | None:
    """Returns a folder's description, or None without one. Raises UserError if it is damaged."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        found = FeatureSet(**json.loads(path.read_text(encoding="utf-8")))
        command = renames.command(ExtractFeaturesSpec, found.command)
        return dataclasses.replace(found, command=command)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it and run extract_features again, which reuses "
            "the saved features."
        ) from error


def write_description(folder: Path, feature_set: FeatureSet) -> None:
    """Writes network.json atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / DESCRIPTION, json.dumps(dataclasses.asdict(feature_set)))


def open_features(spec: FeatureSpec, modality: str = "video_features") -> FeatureSet:
    """Returns the description of config.data.video_features or another modality. Raises UserError
    if there is none.
    """
    if not spec.folder:
        raise UserError(
            f"config.data.{modality}.folder is empty: set it to the output of `python -m "
            "particlejax.main --config experiments/extract_features.py --config.out_dir=FOLDER`."
        )
    feature_set = read_description(Path(spec.folder).expanduser())
    if feature_set is None:
        raise UserError(
            f"{spec.folder} holds no features (it has no {DESCRIPTION}): first run `python -m "
            "particlejax.main --config experiments/extract_features.py "
            f"--config.out_dir={spec.folder}` with your source."
        )
    return feature_set


def subclip_starts(length: float, seconds: float, stride: float) -> np.ndarray:
    """Returns the starts of sub-clips in seconds; beyond a clip's end, the last frame repeats."""
    begin_times = (
        np.arange(1 + max(0, math.ceil((length - seconds - _TIME_EPS) / stride))) * stride
        if seconds
        else np.zeros(1)
    )
    # with gaps between sub-clips, the last one may start after the end
    return begin_times[begin_times < max(length, _TIME_EPS)]


def subclip_geometry(starts: np.ndarray, seconds: float, cells: tuple[int, int, int]) -> np.ndarray:
    """Returns place and extent, float32 [n, 6], of the cells of sub-clips, in the order time, row,
    column.
    """
    size = np.array([seconds, 1.0, 1.0]) / cells
    cell_centers = (
        np.stack(np.meshgrid(*map(np.arange, cells), indexing="ij"), axis=-1).reshape(-1, 3) + 0.5
    ) * size
    centers = cell_centers[None] + np.stack([starts, 0 * starts, 0 * starts], axis=-1)[:, None]
    return (
        np.concatenate([centers, np.broadcast_to(size, centers.shape)], axis=-1)
        .reshape(-1, GEOMETRY_SIZE)
        .astype(np.float32)
    )


def join_geometry(geometry_N6: np.ndarray, features_ND: np.ndarray) -> np.ndarray:
    """Returns the saved array of a clip, float32 [n, 6 + D]."""
    return np.concatenate([geometry_N6, features_ND], axis=1, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class ClipFeatures:
    """A clip's normalized features: place and extent float32 [n, 6], features float32 [n, D].

    n is 0 if the clip has no input for the network, such as no audio.
    """

    geometry: np.ndarray
    features: np.ndarray
    feature_set: FeatureSet

    @property
    def length(self) -> float:
        """Seconds from the clip's start to the end of its last sub-clip; always above 0."""
        return float((self.geometry[:, 0] + self.geometry[:, 3] / 2).max(initial=_TIME_EPS))

    def slice_time(self, start: float, seconds: float) -> Particles:
        """Returns the sub-clips within a span, else the one nearest to its center, with times from
        the span's start.
        """
        if not len(self.geometry):
            return Particles(
                self.features, self.geometry[:, :3], self.geometry[:, 3:], np.ones(0, np.int32)
            )
        num_cells = self.feature_set.particles_per_subclip
        geometry = self.geometry.reshape(-1, num_cells, GEOMETRY_SIZE)
        first, last = (
            geometry[:, 0, 0] - geometry[:, 0, 3] / 2,
            geometry[:, -1, 0] + geometry[:, -1, 3] / 2,
        )
        inside = (first >= start - _TIME_EPS) & (last <= start + seconds + _TIME_EPS)
        if not inside.any():
            inside = (
                np.arange(len(first)) == np.abs((first + last) / 2 - start - seconds / 2).argmin()
            )
        selected = np.repeat(inside, num_cells)
        place, extent = self.geometry[selected, :3].copy(), self.geometry[selected, 3:]
        place[:, 0] -= start
        return Particles(self.features[selected], place, extent, np.ones(len(place), np.int32))


def read(record: Record, spec: FeatureSpec, modality: str = "video_features") -> ClipFeatures:
    """Reads a clip's features. Raises decode.Unreadable, with the command that computes them, if
    they are missing or damaged.
    """
    feature_set, folder = open_features(spec, modality), Path(spec.folder).expanduser()
    try:
        stored = feature_store.load(
            folder, feature_store.key(record, feature_set.network, feature_set.sampling)
        )
    except OSError as error:
        raise Unreadable(str(error)) from error
    except feature_store.DamagedFeatures as error:
        raise Unreadable(
            f"{error}, run `{feature_set.command}` to compute its features again"
        ) from error
    if stored is None:
        raise Unreadable(
            f"it has no features in {spec.folder}, run `{feature_set.command}` with its source and "
            "split"
        )
    values = stored[:, GEOMETRY_SIZE:]
    if spec.normalization == "standardize":
        values = (values - np.float32(feature_set.mean)) / np.float32(feature_set.deviation)
    else:  # unit root mean square per particle
        values = values / np.maximum(
            np.sqrt(np.square(values).mean(axis=1, keepdims=True)), _MIN_RMS
        )
    return ClipFeatures(stored[:, :GEOMETRY_SIZE], values, feature_set)
