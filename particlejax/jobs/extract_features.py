# SPDX-License-Identifier: Apache-2.0
"""Extracts features of a frozen network for the sub-clips of a data set, and stores them as
particles.

Legend: K sub-clips of a clip, n particles of a clip, D width, T H W a feature map, t h w its cells,
N audio samples, L tokens.
"""

import dataclasses
import hashlib
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.config.experiment import DataSpec, TextSpec
from particlejax.config.jobs import ExtractFeaturesSpec
from particlejax.core.typing import UserError
from particlejax.data import clips, pipeline, sources
from particlejax.data.modalities import audio, feature_reader
from particlejax.data.modalities import feature_store as files
from particlejax.data.modalities import tokenizer as tokens
from particlejax.data.video import decode
from particlejax.jobs import linear_probe
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import packages
from particlejax.models.zoo.networks import BackboneSpec
from particlejax.train import stage
from particlejax.train.log import Progress, say

_PIECES = 128  # tokens of a caption that a text network reads, at most
_TYPES = {"video_features": "uint8", "audio_features": "float32", "text_features": "int32"}
_LEAST = 1e-3  # lower bound of the std, so that constant features stay small


class Work(NamedTuple):
    """Output folder, sampling and network; `compute` maps `Given.data` to [K, t h w, D]."""

    folder: Path
    sampling: dict[str, Any]
    frozen: linear_probe.Frozen
    compute: Callable[[np.ndarray], np.ndarray]
    width: int  # D


class Given(NamedTuple):
    """Inputs of one clip: start times [K] of its sub-clips, their length in seconds, and network
    inputs.

    Frames uint8 [K, T, H, W, 3], audio float32 [K, N] or tokens int32 [K, L]; K is 0 for a clip
    without audio or text.
    """

    begins: np.ndarray
    seconds: float
    data: np.ndarray


class Moments(NamedTuple):
    """Sums of a split's features and of their squares, float64 [D], and the number of particles."""

    total: np.ndarray
    squares: np.ndarray
    count: int

    def plus(self, values_ND: np.ndarray) -> "Moments":
        """Adds these features [N, D]."""
        return Moments(
            self.total + values_ND.sum(axis=0),
            self.squares + (values_ND**2).sum(axis=0),
            self.count + len(values_ND),
        )


def extract_features(spec: ExtractFeaturesSpec, workdir: Path, name: str) -> None:
    """Job 'extract_features': features of every readable clip of `config.splits`, and network.json,
    which describes them.
    """
    del name
    begun = time.perf_counter()
    work, bad = (
        prepared(spec, Path(spec.out_dir).expanduser() if spec.out_dir else workdir),
        stage.BadClips(spec.max_unreadable),
    )
    figures: dict[str, Any] = {}
    for split in spec.splits:
        source = sources.open_source(spec.source, split, spec.cache_dir)
        computed, moments = _split(work, source, spec, bad)
        if not moments.count:
            raise UserError(
                f"{spec.source} has no readable clip in {split} with the input of {spec.model}: "
                "set other splits with config.splits."
            )
        # written once, so that trained models keep their normalization
        if feature_reader.described(work.folder) is None:
            feature_reader.describe(work.folder, _description(work, spec, moments))
        figures[split] = {
            "num_clips": len(source),
            "computed": computed,
            "particles": moments.count,
        }
        say(
            f"{split}: features of {computed} clips computed, {moments.count} particles of width "
            f"{len(moments.total)} in total"
        )
    seconds = time.perf_counter() - begun
    stage.add_results(
        workdir,
        "extract_features",
        {**figures, "width": len(moments.total), "seconds": seconds},
        bad.all(),
    )
    modality = modality_of(work.frozen)
    say(
        f"train on them with --config.data.modalities=\"('{modality}',)\" "
        f"--config.data.{modality}.folder={work.folder}"
    )


def prepared(spec: ExtractFeaturesSpec, folder: Path) -> Work:
    """Loads the network and checks the folder. Raises UserError if the folder holds other features,
    or if the feature map has fewer cells than pool_grid.
    """
    frozen = linear_probe.load(spec)
    sampling = _sampling(spec, frozen.backbone.spec)
    example = jax.ShapeDtypeStruct((1, *_shape(sampling)), np.dtype(_TYPES[modality_of(frozen)]))

    def maps(params: Any, pixels: Array) -> Array:
        return backbones.features(frozen.backbone, params, pixels, spec.endpoint, pooled=False)

    made = jax.eval_shape(maps, frozen.params, example)
    cells = _cells(spec, made.shape[1:-1])
    sampling["cells"] = list(cells)
    known = feature_reader.described(folder)
    if known and (known.network, known.sampling) != (frozen.known, sampling):
        there = known.network | known.sampling
        differs = next(
            key for key, value in (frozen.known | sampling).items() if there.get(key) != value
        )
        raise UserError(
            f"{folder} holds features of another network or sampling ({differs} differs): set "
            f"another config.out_dir, or repeat its command: `{known.command}`."
        )

    compute = jax.jit(lambda params, pixels: averaged(maps(params, pixels), cells))
    return Work(
        folder,
        sampling,
        frozen,
        lambda data: np.asarray(compute(frozen.params, data), np.float32),
        made.shape[-1],
    )


def _sampling(spec: ExtractFeaturesSpec, net: BackboneSpec) -> dict[str, Any]:
    """Identifies how clips are sampled for the network. Raises UserError for an invalid audio
    length.
    """
    if net.text:
        known = hashlib.sha256(_tokenizer(spec).read_bytes()).hexdigest()
        return {
            "words": min(_PIECES, net.net.positions),
            "tokenizer": known,
            "seconds": 0.0,
            "stride": 0.0,
        }
    if not net.sound:
        # a Transformer has position embeddings for a fixed number of frames
        frames = net.frames if net.inputs or not spec.num_frames else spec.num_frames
        return {
            "frames": frames,
            "size": net.size,
            "seconds": float(spec.window_seconds),
            "stride": float(spec.stride_seconds or spec.window_seconds),
        }
    seconds = net.net.samples / net.net.rate
    if spec.window_seconds not in (0, seconds):
        raise UserError(
            f"{spec.model} reads windows of {seconds:g} s: leave config.window_seconds at 0, and "
            "set the stride with config.stride_seconds."
        )
    return {
        "samples": net.net.samples,
        "rate": net.net.rate,
        "seconds": seconds,
        "stride": float(spec.stride_seconds or seconds),
    }


def _shape(sampling: Mapping[str, Any]) -> tuple[int, ...]:
    """Input shape of one sub-clip."""
    for only in ("samples", "words"):
        if only in sampling:
            return (sampling[only],)
    return (sampling["frames"], sampling["size"], sampling["size"], 3)


def _tokenizer(spec: ExtractFeaturesSpec) -> Path:
    """Path of tokenizer.json. Raises UserError if it does not exist."""
    named = spec.tokenizer
    if not named and spec.weights != "random":
        named = str(
            Path(spec.weights or packages.find(spec.model, "weights")).with_name("tokenizer.json")
        )
    path = Path(named).expanduser()
    if not path.is_file():
        raise UserError(
            f"{spec.model} reads text, but there is no tokenizer at {named!r}: set "
            "config.tokenizer to its tokenizer.json."
        )
    return path


def modality_of(frozen: linear_probe.Frozen) -> str:
    """The default feature modality of the network (one of `clips.KEPT`)."""
    return (
        "text_features"
        if frozen.backbone.spec.text
        else "audio_features"
        if frozen.backbone.spec.sound
        else "video_features"
    )


def _cells(spec: ExtractFeaturesSpec, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Cells (t, h, w) of a feature map of this shape; tokens and vectors have one."""
    if len(shape) != 3:
        if spec.pool_grid not in ((1, 1, 1), (0, 0, 0)):
            raise UserError(
                f"{spec.model} has no feature map of time, rows and columns: leave "
                "config.pool_grid at (1, 1, 1)."
            )
        return 1, 1, 1
    wanted = tuple(number or most for number, most in zip(spec.pool_grid, shape, strict=True))
    if any(number > most for number, most in zip(wanted, shape, strict=True)):
        raise UserError(
            f"config.pool_grid={spec.pool_grid} has more cells than the feature map of "
            f"{spec.model}, {shape}: use these or fewer."
        )
    return wanted


def averaged(maps: Array, cells: tuple[int, int, int]) -> Array:
    """Mean-pools maps [K, T, H, W, D] to equal cells [K, t h w, D]; positions across two cells
    count in both.

    Tokens [K, L, D] and vectors [K, D] are one cell.
    """
    if maps.ndim != 5:
        return jnp.mean(maps.reshape(len(maps), -1, maps.shape[-1]), axis=1, keepdims=True)
    shares = (
        jnp.asarray(_shares(number, count))
        for number, count in zip(maps.shape[1:4], cells, strict=True)
    )
    made = jnp.einsum("ktrcd,at,br,ec->kabed", maps, *shares)
    return made.reshape(len(maps), math.prod(cells), -1)


def _shares(number: int, cells: int) -> np.ndarray:
    """Weights [cells, number] of each of `number` positions in each cell."""
    edges, width = np.arange(number), number / cells
    begin = np.arange(cells)[:, None] * width
    return (
        np.clip(np.minimum(edges + 1, begin + width) - np.maximum(edges, begin), 0, None) / width
    ).astype(np.float32)


def _split(
    work: Work, source: sources.Source, spec: ExtractFeaturesSpec, bad: stage.BadClips
) -> tuple[int, Moments]:
    """Computes missing features of a source. Returns how many, and the moments of all."""
    words = (
        TextSpec(str(_tokenizer(spec)), work.sampling["words"])
        if "words" in work.sampling
        else None
    )
    progress, moments = (
        Progress("features", len(source), unit="clip"),
        Moments(np.zeros(1), np.zeros(1), 0),
    )
    waiting: dict[str, Given] = {}
    computed = 0
    for i in range(len(source)):
        record, found = source[i], []
        if name := linear_probe.key_of(i, record, work.frozen, work.sampling, bad):
            kept = linear_probe.kept(work.folder, name)
            if kept is not None:
                found = [kept]
            elif read := _given(i, record, work.sampling, words, bad):
                waiting[name] = read
        if (
            i + 1 == len(source)
            or sum(len(each.data) for each in waiting.values()) >= spec.batch_size
        ):
            computed += len(waiting)
            found += _computed(work, waiting, spec.batch_size)
            waiting = {}
        for each in found:
            moments = moments.plus(each[:, feature_reader.ABOUT :].astype(np.float64))
        progress.update()
    progress.close()
    return computed, moments


def _computed(work: Work, waiting: Mapping[str, Given], rows: int) -> list[np.ndarray]:
    """Computes and stores features of the waiting clips; returns a float32 [n, 6 + D] a clip."""
    if not waiting:
        return []
    data = np.concatenate([each.data for each in waiting.values()])
    values = [np.zeros((0, math.prod(work.sampling["cells"]), work.width), np.float32)]
    for first in range(0, len(data), rows):
        part = data[first : first + rows]
        # fixed shape: compiles once
        full = np.concatenate([part, np.repeat(part[:1], rows - len(part), axis=0)])
        values.append(work.compute(full)[: len(part)])
    ends = np.cumsum([len(each.data) for each in waiting.values()])
    found = []
    for (name, each), value in zip(
        waiting.items(), np.split(np.concatenate(values), ends[:-1]), strict=True
    ):
        about = feature_reader.placed(each.begins, each.seconds, work.sampling["cells"])
        if not np.isfinite(value).all():
            raise UserError(
                f"the network's features of clip {name} contain NaN or Inf: check config.weights."
            )
        found.append(feature_reader.joined(about, value.reshape(-1, value.shape[-1])))
        files.save(work.folder, name, found[-1])
    return found


def _given(
    i: int,
    record: sources.Record,
    sampling: Mapping[str, Any],
    words: TextSpec | None,
    bad: stage.BadClips,
) -> Given | None:
    """Network inputs of a clip; None for an unreadable clip, which is recorded."""
    try:
        with decode.Video(record.video) as video:
            length, origin = (
                max(record.until(video.duration) - record.start, 1 / video.fps),
                video.origin,
            )
        begins, seconds = (
            feature_reader.starts(length, sampling["seconds"], sampling["stride"]),
            sampling["seconds"] or length,
        )
        if "samples" in sampling:
            return _sound(
                audio.read(record.video, origin, record.start, length, sampling["rate"]),
                begins,
                sampling,
            )
        if words:
            return _words(record.caption, seconds, words)
        data = DataSpec(
            num_frames=sampling["frames"], image_size=sampling["size"], clip_seconds=seconds
        )
        ends = record.start + np.minimum(begins + seconds, length)
        parts = (
            dataclasses.replace(record, start=record.start + float(begin), end=float(end))
            for begin, end in zip(begins, ends, strict=True)
        )
        return Given(
            begins,
            seconds,
            np.stack([clips.load(part, data, clips.CENTRE).frames for part in parts]),
        )
    except decode.Unreadable as error:
        bad.note(pipeline.Loaded(None, (pipeline.Bad(i, record.name, error.reason),)))
        return None


def _words(caption: str, seconds: float, spec: TextSpec) -> Given:
    ids = tokens.encode(caption, spec) if caption else np.zeros(0, np.int32)
    padded = np.pad(ids, (0, spec.max_length - len(ids)))[None]
    return (
        Given(np.zeros(1), seconds, padded) if len(ids) else Given(np.zeros(0), seconds, padded[:0])
    )


def _sound(heard: np.ndarray | None, begins: np.ndarray, sampling: Mapping[str, Any]) -> Given:
    """Sub-clips that begin before the track ends; the last one is padded with silence."""
    count = sampling["samples"]
    heard = np.zeros(0, np.float32) if heard is None else heard
    firsts = np.rint(begins * sampling["rate"]).astype(int)
    firsts = firsts[firsts < len(heard)]
    padded = np.pad(heard, (0, count))
    parts = [padded[first : first + count] for first in firsts]
    return Given(
        begins[: len(firsts)],
        sampling["seconds"],
        np.stack(parts) if parts else np.zeros((0, count), np.float32),
    )


def _description(
    work: Work, spec: ExtractFeaturesSpec, moments: Moments
) -> feature_reader.Described:
    mean = moments.total / moments.count
    deviation = np.sqrt(np.maximum(moments.squares / moments.count - mean**2, 0))
    return feature_reader.Described(
        " ".join(_command(spec, work.folder)),
        work.frozen.known,
        work.sampling,
        tuple(map(float, mean)),
        tuple(map(float, np.maximum(deviation, _LEAST))),
    )


def _command(spec: ExtractFeaturesSpec, folder: Path) -> Iterator[str]:
    """The command that repeats this job."""
    command = "python -m particlejax.main --config experiments/extract_features.py"
    yield f"{command} {shlex.quote(f'--config.out_dir={folder}')}"
    # the experiment file may set these too
    default, always = (ExtractFeaturesSpec(), ("source", "splits", "num_frames", "pool_grid"))
    for key, value in dataclasses.asdict(spec).items():
        if key in always or key not in ("job", "out_dir") and value != getattr(default, key):
            yield shlex.quote(f"--config.{key}={value}")
