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

from particlejax.config.data import DataSpec, TextSpec
from particlejax.config.job_specs import ExtractFeaturesSpec
from particlejax.core.typing import UserError
from particlejax.data import clips, pipeline, sources
from particlejax.data.modalities import audio, feature_reader
from particlejax.data.modalities import feature_store as files
from particlejax.data.modalities import tokenizer as tokens
from particlejax.data.video import decode
from particlejax.data.video.frame_ops import center_crop
from particlejax.jobs import linear_probe
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import packages, pretrained_folder
from particlejax.models.zoo.convert.description import DEFAULT_MODEL
from particlejax.models.zoo.networks import BackboneSpec
from particlejax.train import stage
from particlejax.train.log import Progress, log_info

_MAX_TOKENS = 128  # tokens of a caption that a text network reads, at most
_TYPES = {"video_features": "uint8", "audio_features": "float32", "text_features": "int32"}
_MIN_STD = 1e-3  # lower bound of the std, so that constant features stay small


class Extraction(NamedTuple):
    """Output folder, sampling and network; `compute` maps `Given.data` to [K, t h w, D]."""

    folder: Path
    sampling: dict[str, Any]
    frozen: linear_probe.FrozenBackbone
    compute: Callable[[np.ndarray], np.ndarray]
    width: int  # D


class ClipInputs(NamedTuple):
    """Inputs of one clip: start times [K] of its sub-clips, their length in seconds, and network
    inputs.

    Frames uint8 [K, T, H, W, 3], audio float32 [K, N] or tokens int32 [K, L]; K is 0 for a clip
    without audio or text.
    """

    start_times: np.ndarray
    seconds: float
    data: np.ndarray


class RunningMoments(NamedTuple):
    """Sums of a split's features and of their squares, float64 [D], and the number of particles."""

    total: np.ndarray
    squares: np.ndarray
    count: int

    def add(self, values_ND: np.ndarray) -> "RunningMoments":
        """Adds these features [N, D]."""
        return RunningMoments(
            self.total + values_ND.sum(axis=0),
            self.squares + (values_ND**2).sum(axis=0),
            self.count + len(values_ND),
        )


def extract_features(spec: ExtractFeaturesSpec, workdir: Path, name: str) -> None:
    """Job 'extract_features': features of every readable clip of `config.splits`, and network.json,
    which describes them.
    """
    del name
    start = time.perf_counter()
    work, unreadable = (
        prepare_extraction(spec, Path(spec.out_dir).expanduser() if spec.out_dir else workdir),
        stage.UnreadableClips(spec.max_unreadable),
    )
    counts: dict[str, Any] = {}
    for split in spec.splits:
        source = sources.open_source(spec.source, split, spec.cache_dir, key="config.splits")
        computed, moments = _extract_split(work, source, spec, unreadable)
        if not moments.count:
            raise UserError(
                f"{spec.source} has no readable clip in {split} with the input of "
                f"{work.frozen.backbone.spec.name}: "
                "set other splits with config.splits."
            )
        # written once, so that trained models keep their normalization
        if feature_reader.read_description(work.folder) is None:
            feature_reader.write_description(work.folder, _description(work, spec, moments))
        counts[split] = {"num_clips": len(source), "computed": computed, "particles": moments.count}
        log_info(
            f"{split}: features of {computed} clips computed, {moments.count} particles of width "
            f"{len(moments.total)} in total"
        )
    seconds = time.perf_counter() - start
    stage.add_results(
        workdir,
        "extract_features",
        {**counts, "width": len(moments.total), "seconds": seconds},
        unreadable.gather_all(),
    )
    modality = modality_of(work.frozen)
    log_info(
        f"train on them with --config.data.modalities=\"('{modality}',)\" "
        f"--config.data.{modality}.folder={work.folder}"
    )


def prepare_extraction(spec: ExtractFeaturesSpec, folder: Path) -> Extraction:
    """Loads the network and checks the folder. Raises UserError if the folder holds other features,
    or if the feature map has fewer cells than pool_grid.
    """
    frozen = linear_probe.load_backbone(spec)
    sampling = _sampling(spec, frozen.backbone.spec)
    example = jax.ShapeDtypeStruct((1, *_shape(sampling)), np.dtype(_TYPES[modality_of(frozen)]))

    def feature_maps(params: Any, pixels: Array) -> Array:
        return backbones.features(frozen.backbone, params, pixels, spec.endpoint, pool=False)

    map_shape = jax.eval_shape(feature_maps, frozen.params, example)
    cells = _cells(spec, frozen.backbone.spec.name, map_shape.shape[1:-1])
    sampling["cells"] = list(cells)
    stored = feature_reader.read_description(folder)
    if stored and (stored.network, stored.sampling) != (frozen.identity, sampling):
        settings, stored_settings = frozen.identity | sampling, stored.network | stored.sampling
        changed_key = next(
            key
            for key in settings | stored_settings
            if stored_settings.get(key) != settings.get(key)
        )
        raise UserError(
            f"{folder} holds features of another network or sampling ({changed_key} differs): set "
            f"another config.out_dir, or repeat its command: `{stored.command}`."
        )

    compute = jax.jit(lambda params, pixels: average_cells(feature_maps(params, pixels), cells))
    return Extraction(
        folder,
        sampling,
        frozen,
        lambda data: np.asarray(compute(frozen.params, data), np.float32),
        map_shape.shape[-1],
    )


def _sampling(spec: ExtractFeaturesSpec, network: BackboneSpec) -> dict[str, Any]:
    """Identifies how clips are sampled for the network. Raises UserError for an invalid audio
    length.
    """
    if network.text:
        tokenizer_digest = hashlib.sha256(_tokenizer_path(spec).read_bytes()).hexdigest()
        return {
            "words": min(_MAX_TOKENS, network.net.max_positions),
            "tokenizer": tokenizer_digest,
            "seconds": 0.0,
            "stride": 0.0,
        }
    if not network.sound:
        # a Transformer has position embeddings for a fixed number of frames
        frames = network.frames if network.inputs or not spec.num_frames else spec.num_frames
        sampling = {
            "frames": frames,
            "size": network.size,
            "seconds": float(spec.window_seconds),
            "stride": float(spec.stride_seconds or spec.window_seconds),
        }
        return sampling | ({"short_side": network.short_side} if network.short_side else {})
    seconds = network.net.samples / network.net.rate
    if spec.window_seconds not in (0, seconds):
        raise UserError(
            f"{network.name} reads windows of {seconds:g} s: leave config.window_seconds at 0, and "
            "set the stride with config.stride_seconds."
        )
    return {
        "samples": network.net.samples,
        "rate": network.net.rate,
        "seconds": seconds,
        "stride": float(spec.stride_seconds or seconds),
    }


def _shape(sampling: Mapping[str, Any]) -> tuple[int, ...]:
    """Input shape of one sub-clip."""
    for key in ("samples", "words"):
        if key in sampling:
            return (sampling[key],)
    return (sampling["frames"], sampling["size"], sampling["size"], 3)


def _tokenizer_path(spec: ExtractFeaturesSpec) -> Path:
    """Path of tokenizer.json. Raises UserError if it does not exist."""
    name = spec.tokenizer
    if not name and spec.weights != "random":
        weights = spec.weights or packages.find_weights(spec.model or DEFAULT_MODEL, "weights")
        path = pretrained_folder.snapshot(Path(weights).expanduser())
        name = str((path if path.is_dir() else path.parent) / "tokenizer.json")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"the network reads text, but there is no tokenizer at {name!r}: set "
            "config.tokenizer to its tokenizer.json."
        )
    return path


def modality_of(frozen: linear_probe.FrozenBackbone) -> str:
    """The default feature modality of the network (one of `clips.KEPT`)."""
    return (
        "text_features"
        if frozen.backbone.spec.text
        else "audio_features"
        if frozen.backbone.spec.sound
        else "video_features"
    )


def _cells(spec: ExtractFeaturesSpec, name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Cells (t, h, w) of a feature map of this shape; tokens and vectors have one."""
    if len(shape) != 3:
        if spec.pool_grid not in ((1, 1, 1), (0, 0, 0)):
            raise UserError(
                f"{name} has no feature map of time, rows and columns: leave "
                "config.pool_grid at (1, 1, 1)."
            )
        return 1, 1, 1
    cells = tuple(
        count or available for count, available in zip(spec.pool_grid, shape, strict=True)
    )
    if any(count > available for count, available in zip(cells, shape, strict=True)):
        raise UserError(
            f"config.pool_grid={spec.pool_grid} has more cells than the feature map of "
            f"{name}, {shape}: use these or fewer."
        )
    return cells


def average_cells(maps: Array, cells: tuple[int, int, int]) -> Array:
    """Mean-pools maps [K, T, H, W, D] to equal cells [K, t h w, D]; positions across two cells
    count in both.

    Tokens [K, L, D] and vectors [K, D] are one cell.
    """
    if maps.ndim != 5:
        return jnp.mean(maps.reshape(len(maps), -1, maps.shape[-1]), axis=1, keepdims=True)
    weights = (
        jnp.asarray(_cell_weights(size, count))
        for size, count in zip(maps.shape[1:4], cells, strict=True)
    )
    averaged = jnp.einsum("ktrcd,at,br,ec->kabed", maps, *weights)
    return averaged.reshape(len(maps), math.prod(cells), -1)


def _cell_weights(size: int, num_cells: int) -> np.ndarray:
    """Weights [cells, number] of each of `size` positions in each cell."""
    edges, width = np.arange(size), size / num_cells
    begin = np.arange(num_cells)[:, None] * width
    return (
        np.clip(np.minimum(edges + 1, begin + width) - np.maximum(edges, begin), 0, None) / width
    ).astype(np.float32)


def _extract_split(
    work: Extraction,
    source: sources.Source,
    spec: ExtractFeaturesSpec,
    unreadable: stage.UnreadableClips,
) -> tuple[int, RunningMoments]:
    """Computes missing features of a source. Returns how many, and the moments of all."""
    text_spec = (
        TextSpec(str(_tokenizer_path(spec)), work.sampling["words"])
        if "words" in work.sampling
        else None
    )
    progress, moments = (
        Progress("features", len(source), unit="clip"),
        RunningMoments(np.zeros(1), np.zeros(1), 0),
    )
    pending: dict[str, ClipInputs] = {}
    computed = 0
    for i in range(len(source)):
        record, arrays = source[i], []
        if name := linear_probe.feature_key(i, record, work.frozen, work.sampling, unreadable):
            stored = linear_probe.load_stored(work.folder, name)
            if stored is not None:
                arrays = [stored]
            elif inputs := _read_inputs(i, record, work.sampling, text_spec, unreadable):
                pending[name] = inputs
        if (
            i + 1 == len(source)
            or sum(len(clip_inputs.data) for clip_inputs in pending.values()) >= spec.batch_size
        ):
            computed += len(pending)
            arrays += _compute_pending(work, pending, spec.batch_size)
            pending = {}
        for array in arrays:
            moments = moments.add(array[:, feature_reader.GEOMETRY_SIZE :].astype(np.float64))
        progress.update()
    progress.close()
    return computed, moments


def _compute_pending(
    work: Extraction, pending: Mapping[str, ClipInputs], rows: int
) -> list[np.ndarray]:
    """Computes and stores features of the waiting clips; returns a float32 [n, 6 + D] a clip."""
    if not pending:
        return []
    data = np.concatenate([clip_inputs.data for clip_inputs in pending.values()])
    values = [np.zeros((0, math.prod(work.sampling["cells"]), work.width), np.float32)]
    for start in range(0, len(data), rows):
        chunk = data[start : start + rows]
        # fixed shape: compiles once
        padded = np.concatenate([chunk, np.repeat(chunk[:1], rows - len(chunk), axis=0)])
        values.append(work.compute(padded)[: len(chunk)])
    offsets = np.cumsum([len(clip_inputs.data) for clip_inputs in pending.values()])
    arrays = []
    for (name, clip_inputs), value in zip(
        pending.items(), np.split(np.concatenate(values), offsets[:-1]), strict=True
    ):
        geometry = feature_reader.subclip_geometry(
            clip_inputs.start_times, clip_inputs.seconds, work.sampling["cells"]
        )
        if not np.isfinite(value).all():
            raise UserError(
                f"the network's features of clip {name} contain NaN or Inf: check config.weights."
            )
        arrays.append(feature_reader.join_geometry(geometry, value.reshape(-1, value.shape[-1])))
        files.save(work.folder, name, arrays[-1])
    return arrays


def _read_inputs(
    i: int,
    record: sources.Record,
    sampling: Mapping[str, Any],
    text_spec: TextSpec | None,
    unreadable: stage.UnreadableClips,
) -> ClipInputs | None:
    """Network inputs of a clip; None for an unreadable clip, which is recorded."""
    try:
        with decode.Video(record.video) as video:
            length, origin = (
                max(record.until(video.duration) - record.start, 1 / video.fps),
                video.origin,
            )
        start_times, seconds = (
            feature_reader.subclip_starts(length, sampling["seconds"], sampling["stride"]),
            sampling["seconds"] or length,
        )
        if "samples" in sampling:
            return _sound_inputs(
                audio.read(record.video, origin, record.start, length, sampling["rate"]),
                start_times,
                sampling,
            )
        if text_spec:
            return _text_inputs(record.caption, seconds, text_spec)
        data = DataSpec(
            num_frames=sampling["frames"],
            image_size=sampling.get("short_side", sampling["size"]),
            clip_seconds=seconds,
        )
        ends = record.start + np.minimum(start_times + seconds, length)
        subclips = (
            dataclasses.replace(record, start=record.start + float(start), end=float(end))
            for start, end in zip(start_times, ends, strict=True)
        )
        return ClipInputs(
            start_times,
            seconds,
            np.stack(
                [
                    center_crop(
                        clips.load(subclip, data, clips.CENTER_VIEW).frames, sampling["size"]
                    )
                    for subclip in subclips
                ]
            ),
        )
    except decode.Unreadable as error:
        unreadable.record(
            pipeline.LoadedBatch(None, (pipeline.UnreadableClip(i, record.name, error.reason),))
        )
        return None


def _text_inputs(caption: str, seconds: float, spec: TextSpec) -> ClipInputs:
    ids = tokens.encode(caption, spec) if caption else np.zeros(0, np.int32)
    padded = np.pad(ids, (0, spec.max_length - len(ids)))[None]
    return (
        ClipInputs(np.zeros(1), seconds, padded)
        if len(ids)
        else ClipInputs(np.zeros(0), seconds, padded[:0])
    )


def _sound_inputs(
    samples: np.ndarray | None, start_times: np.ndarray, sampling: Mapping[str, Any]
) -> ClipInputs:
    """Sub-clips that begin before the track ends; the last one is padded with silence."""
    num_samples = sampling["samples"]
    samples = np.zeros(0, np.float32) if samples is None else samples
    first_samples = np.rint(start_times * sampling["rate"]).astype(int)
    first_samples = first_samples[first_samples < len(samples)]
    padded = np.pad(samples, (0, num_samples))
    parts = [padded[first : first + num_samples] for first in first_samples]
    return ClipInputs(
        start_times[: len(first_samples)],
        sampling["seconds"],
        np.stack(parts) if parts else np.zeros((0, num_samples), np.float32),
    )


def _description(
    work: Extraction, spec: ExtractFeaturesSpec, moments: RunningMoments
) -> feature_reader.FeatureSet:
    mean = moments.total / moments.count
    std = np.sqrt(np.maximum(moments.squares / moments.count - mean**2, 0))
    return feature_reader.FeatureSet(
        " ".join(_command(spec, work.folder)),
        work.frozen.identity,
        work.sampling,
        tuple(map(float, mean)),
        tuple(map(float, np.maximum(std, _MIN_STD))),
    )


def _command(spec: ExtractFeaturesSpec, folder: Path) -> Iterator[str]:
    """The command that repeats this job."""
    command = "python -m particlejax.main --config experiments/extract_features.py"
    yield f"{command} {shlex.quote(f'--config.out_dir={folder}')}"
    # the experiment file may set these too
    default, always_given = (ExtractFeaturesSpec(), ("source", "splits", "num_frames", "pool_grid"))
    for key, value in dataclasses.asdict(spec).items():
        if key in always_given or key not in ("job", "out_dir") and value != getattr(default, key):
            yield shlex.quote(f"--config.{key}={value}")
