# SPDX-License-Identifier: Apache-2.0
"""The toy clips as a TFDS data set in array_record files, built and read without TensorFlow."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from tensorflow_datasets.core.utils import tqdm_utils

from particlejax.data.sources.toybox import render, sound
from particlejax.data.sources.toybox.actions import ACTIONS, FRAME_TIMES

SPLITS = ("train", "val", "test")  # the order is the split's number in the random seed
Example = dict[str, Any]


@dataclasses.dataclass(eq=False)
class ToyboxConfig(tfds.core.BuilderConfig):
    """How many clips each split has, and the seed; without a name, one is made of these.

    apart: in the first half of each split the actor is heard and not seen, in the other seen and
    not heard.
    """

    name: str = ""
    train: int = 960
    val: int = 120
    test: int = 240
    seed: int = 0
    apart: bool = False

    def __post_init__(self) -> None:
        self.name = self.name or "-".join(f"{key}{value}" for key, value in self.content.items())

    @property
    def content(self) -> dict[str, int]:
        """All that the clips depend on."""
        return dict(
            train=self.train,
            val=self.val,
            test=self.test,
            seed=self.seed,
            **({"apart": 1} if self.apart else {}),
        )


def make_example(config: ToyboxConfig, split: str, index: int) -> Example:
    """Clip `index` of a split as TFDS stores it; the fields are those of `Toybox._info`."""
    omit = ("sight" if 2 * index < config.content[split] else "sound") if config.apart else ""
    clip = render.render(config.seed, SPLITS.index(split), index, split, omit)
    return {
        "video": sound.encode(clip.frames, clip.audio),
        "label": clip.label,
        "caption": clip.caption,
        "tracks": clip.tracks,
        "contacts": clip.contacts,
        "moment": clip.moment,
        "abnormal": clip.abnormal_time >= 0,
        "abnormal_time": clip.abnormal_time,
        "name": clip.name,
    }


class Toybox(tfds.core.GeneratorBasedBuilder):
    """Two-second clips with sound in which one object does one of twelve things."""

    # raise it whenever a clip changes, or old files pass for new ones
    VERSION = tfds.core.Version("1.0.1")
    RELEASE_NOTES = {
        "1.0.0": "First version.",
        "1.0.1": "Encoded alike on every processor; same scenes.",
    }
    BUILDER_CONFIGS = [
        ToyboxConfig(name="default"),
        ToyboxConfig(name="tiny", train=48, val=24, test=24),
        ToyboxConfig(name="apart", apart=True),
    ]
    # TFDS would look for this by way of importlib_resources, on which it depends without saying so
    code_path = tfds.core.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            # mp4 bytes: H.264 64 x 64 at 12 frames/s, AAC mono at 16 kHz, 2 s
            "video": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=list(ACTIONS)),
            "caption": tfds.features.Text(),
            # objects (the actor first) x frames x (centre row, centre col, height, width),
            # fractions of the frame
            "tracks": tfds.features.Tensor(shape=(None, len(FRAME_TIMES), 4), dtype=np.float32),
            "contacts": tfds.features.Tensor(shape=(None,), dtype=np.float32),  # seconds
            "moment": tfds.features.Scalar(dtype=np.float32),  # seconds
            "abnormal": tfds.features.Scalar(dtype=np.bool_),
            "abnormal_time": tfds.features.Scalar(dtype=np.float32),  # seconds, -1 when normal
            "name": tfds.features.Text(),  # e.g. train/00012
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self.builder_config.content),
            # in order of index: every dozen of clips then holds every action
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, Example]]]:
        del dl_manager  # nothing is downloaded
        sizes = self.builder_config.content
        return {
            split: self._generate_examples(split, sizes[split]) for split in SPLITS if sizes[split]
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, Example]]:
        config = self.builder_config
        # None: only on a terminal
        bar = tqdm.tqdm(total=count, desc=f"toybox {split}", unit="clip", disable=None)
        with bar, concurrent.futures.ThreadPoolExecutor(2) as pool:
            for index, example in enumerate(
                pool.map(lambda i: make_example(config, split, i), range(count))
            ):
                yield index, example
                bar.update()

    def _log_download_bytes(self) -> None:
        """Nothing: TFDS would print a size that it does not know."""

    def _log_download_done(self) -> None:
        """Nothing: a caller reads `data_path`."""


@contextlib.contextmanager
def _exclusive(path: str) -> Iterator[None]:
    # one process at a time; the lock goes when its holder dies, however it dies
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _no_tfds_bars() -> Iterator[None]:
    previous = tqdm_utils._active  # TFDS has a setter but no getter
    tfds.display_progress_bar(enable=False)
    try:
        yield
    finally:
        tfds.display_progress_bar(enable=previous)


def _open(config: str | ToyboxConfig, data_dir: str | os.PathLike[str] | None) -> Toybox:
    return Toybox(
        config=config, data_dir=data_dir and os.fspath(data_dir), file_format="array_record"
    )


def prepare(
    config: str | ToyboxConfig = "default", data_dir: str | os.PathLike[str] | None = None
) -> Toybox:
    """Renders the data set under data_dir (TFDS's own folder when None) unless it is there, and
    returns its builder.

    TFDS writes into a folder named incomplete.* and renames it when whole, so a killed run leaves
    nothing that passes for a data set; two processes take turns.
    """
    builder = _open(config, data_dir)
    if not os.path.exists(builder.data_path / "dataset_info.json"):
        parent_dir, version = os.path.split(os.fspath(builder.data_path))
        with _exclusive(os.path.join(parent_dir, ".lock")):
            # what a killed run left: we hold the lock, so nobody writes there
            for entry in os.scandir(parent_dir):
                if entry.name.startswith("incomplete.") and entry.name.endswith(f"_{version}"):
                    shutil.rmtree(entry.path)
            # afresh: another process may have finished while we waited
            builder = _open(config, data_dir)
            with _no_tfds_bars():
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(num_shards=1)
                )
    stored, requested = dict(builder.info.metadata), builder.builder_config.content
    if stored != requested:
        raise ValueError(
            f"{builder.data_path} holds {stored}, not {requested}: give the ToyboxConfig another "
            "name."
        )
    return builder
