# SPDX-License-Identifier: Apache-2.0
"""The Python API: trained runs and published networks that predict and embed, and a trainer.

    import particlejax as pj
    run = pj.load_run("runs/mine")
    run.predict("clip.mp4")                  # [(label, probability), ...]
    run.embed(["a.mp4", "b.mp4"])            # float32 [2, D]

Thin faces over train/ and models/. Legend: N videos, T frames, H rows, W columns, L tokens, D
width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from particlejax.config.experiment import Experiment
from particlejax.config.training import EvalSpec, MeshSpec
from particlejax.core.typing import Metrics, Params, UserError
from particlejax.data import pipeline, sources
from particlejax.data.sources.folder import VIDEO_SUFFIXES
from particlejax.data.video import decode
from particlejax.data.video.frame_ops import center_crop
from particlejax.distributed import sharding
from particlejax.models.zoo import backbones, networks
from particlejax.models.zoo.convert.config_settings import Keys
from particlejax.particles.types import Batch
from particlejax.train import eval, loop, pretrained
from particlejax.train import stage as stages
from particlejax.train.setup import Setup, set_up
from particlejax.train.train_state import TrainState

Video = str | Path | np.ndarray
Answers = list[tuple[str, float]]  # (label, probability), the likeliest first


class Tokens(NamedTuple):
    """The tokens of one video, as an encoder gives them.

    x: float32 [L, D]. place: float32 [L, 3], centres: seconds from the clip's start, row and column
    as fractions of the frame. extent: float32 [L, 3], sizes along the same axes. modality: [L].
    """

    x: np.ndarray
    place: np.ndarray
    extent: np.ndarray
    modality: np.ndarray


@dataclass(frozen=True)
class Run:
    """A trained stage of a run: `load_run` makes one."""

    stage: stages.Stage
    params: Params
    mesh: Mesh

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the outputs; () where the stage has no labels."""
        return self.stage.targets.names if self.stage.targets else ()

    @property
    def config(self) -> Experiment:
        """The experiment that made it."""
        return self.stage.experiment

    def predict(
        self,
        videos: Video | Sequence[Video],
        fps: float | None = None,
        top_k: int = 5,
        views: tuple[int, int] = (1, 1),
    ) -> Answers | list[Answers]:
        """The likeliest labels of a video, or of each of several.

        videos: a path, a folder of videos, uint8 frames [T, H, W, 3] with their `fps`, or a list of
        these. views: temporal clips x spatial crops of each, probabilities averaged. Of a
        regression the answer is [("value", number)]. Whole RGB frames are cropped and scaled, so
        that frames in memory and their file give equal answers; `evaluate` cuts large pictures out
        of the file's own pixels, which differs in rounding. Raises UserError where the stage has no
        labels, and for a video that cannot be read.
        """
        if not self.classes:
            raise UserError(
                f"stage {self.stage.name} has no classification head, so it cannot predict: load "
                "another stage as 'RUN_DIR:STAGE', or use embed."
            )
        outputs = self._compute(self._predict, videos, fps, views, "predict")
        answers = [_best(row, self.classes, top_k) for row in outputs]
        return answers[0] if _is_one(videos) else answers

    def embed(
        self, videos: Video | Sequence[Video], fps: float | None = None, pool: bool = True
    ) -> np.ndarray | Tokens | list[Tokens]:
        """What the encoder makes of a video, or of each of several (see `predict`).

        The mean of all tokens, float32 [D] or [N, D]; where not `pool`, `Tokens` with their places
        and extents. Raises UserError for a video that cannot be read.
        """
        if pool:
            embeddings = self._compute(self._features, videos, fps, (1, 1), "embed")[""]
            embeddings = embeddings.astype(np.float32)
            return embeddings[0] if _is_one(videos) else embeddings
        tokens = [self._tokens(record) for record in _records(videos, fps)]
        return tokens[0] if _is_one(videos) else tokens

    def evaluate(self, source: str = "", split: str = "test") -> dict[str, Any]:
        """Figures of a labelled split of a source, as the job `evaluate` gives them.

        source: as config.data.source, such as 'folder:PATH'; '': the run's own. Raises UserError
        where the stage has no labels, and for a source, split or label that is not there.
        """
        stage = replace(self.stage, data=replace(self.stage.data, split=split))
        if source:
            stage = replace(stage, data=replace(stage.data, source=source))
        return evaluate(stage, self.params, self.mesh, stage.experiment.eval)

    # -- programs, each compiled once

    @cached_property
    def _predict(self) -> Any:
        return eval.jit_predict(self.stage.model, self.mesh, self.stage.targets.activate)

    @cached_property
    def _features(self) -> Any:
        return eval.jit_features(self.stage.model, self.mesh)

    @cached_property
    def _encode(self) -> Any:
        model = self.stage.model
        return jax.jit(
            lambda params, batch: model.encode(params, batch.particles, batch.clip_index.shape[1]).x
        )

    def _compute(
        self,
        program: Any,
        videos: Video | Sequence[Video],
        fps: float | None,
        views: tuple[int, int],
        name: str,
    ) -> Any:
        """A tree of [N, ...] of what the program gives of each video."""
        records = _records(videos, fps)
        source = sources.ListSource((), tuple(records))
        rows = max(
            1, min(len(records) * views[0] * views[1], self.stage.experiment.eval.batch_size)
        )
        shown = self.stage.eval_batches(source, _rows(rows, self.mesh), views)
        refuse_unreadable = _Refusing()
        _, outputs = eval.mean_per_clip(
            program, self.params, shown, self.mesh, refuse_unreadable, name
        )
        return outputs

    def _tokens(self, record: sources.Record) -> Tokens:
        stage = replace(self.stage, data=replace(self.stage.data, clips_per_row=1))
        shown = stage.eval_batches(sources.ListSource((), (record,)), _rows(1, self.mesh))
        loaded = shown[0]
        _Refusing()(loaded)
        x = self._encode(self.params, sharding.shard_batch(loaded.batch, self.mesh))
        names = [name for name, _ in sorted(loaded.batch.particles.items())]
        parts = [loaded.batch.particles[name] for name in names]
        segment, place, extent = (
            np.concatenate([getattr(part, field)[0] for part in parts])
            for field in ("segment", "place", "extent")
        )
        modality = np.concatenate(
            [np.full(part.segment.shape[1], name) for name, part in zip(names, parts, strict=True)]
        )
        occupied = segment > 0
        tokens = np.asarray(x[0], np.float32)
        if len(tokens) != len(occupied):
            raise UserError(
                "model.token_reduction_layers leaves fewer tokens than particles, so they have no "
                "places: "
                "use embed(pool=True)."
            )
        return Tokens(tokens[occupied], place[occupied], extent[occupied], modality[occupied])


def load_run(path: str | Path, mesh: MeshSpec | None = None) -> Run:
    """A trained run: RUN_DIR, or RUN_DIR:STAGE; without a stage, the last one.

    mesh: how parameters and batches lie on the devices; None: batches over all. Raises UserError
    where there is no such run, stage or whole checkpoint.
    """
    devices = sharding.make_mesh(mesh or MeshSpec())
    stage, params = stages.load_trained(str(path), devices, {})
    return Run(stage, params, devices)


def evaluate(stage: stages.Stage, params: Params, mesh: Mesh, spec: EvalSpec) -> dict[str, Any]:
    """Figures of a stage on the source and split of its data, `spec` says how; no file is written.

    Raises UserError where the stage does not classify or no clip has a label, and past
    data.max_unreadable unreadable clips.
    """
    stage, source = stages.on_labeled_source(stage)
    unreadable = stages.UnreadableClips(stage.data.max_unreadable)
    return loop.score(stage, params, source, mesh, spec, unreadable.record, stage.name, None)


# -- published networks


@dataclass(frozen=True)
class Backbone:
    """A published network with weights: `load_backbone` makes one."""

    name: str
    backbone: backbones.Backbone
    params: Params
    classes: tuple[str, ...]

    def predict(
        self,
        videos: Video | Sequence[Video],
        fps: float | None = None,
        top_k: int = 5,
        num_views: int = 3,
    ) -> Answers | list[Answers]:
        """The likeliest labels of a video, or of each of several; see `Run.predict`.

        num_views: windows spread over a video, probabilities averaged. Raises UserError for a
        network without a head.
        """
        if not self.classes:
            raise UserError(f"{self.name} has no classification head: use embed.")
        predictions = []
        for record in _records(videos, fps):
            windows = self._windows(record, num_views)
            view_probs = [jax.nn.softmax(self._classify(self.params, w[None]))[0] for w in windows]
            predictions.append(_best(np.mean(view_probs, axis=0), self.classes, top_k))
        return predictions[0] if _is_one(videos) else predictions

    def embed(
        self,
        videos: Video | Sequence[Video],
        fps: float | None = None,
        pool: bool = True,
        endpoint: str = "",
    ) -> np.ndarray | list[np.ndarray]:
        """Features of the middle window of a video, or of each of several.

        Float32 [D] or [N, D]; where not `pool`, the map [t, h, w, D] of a CNN or the tokens [L, D]
        of a Transformer, a list of them for several videos. endpoint: a feature map; '': the last.
        """
        program = jax.jit(
            lambda params, pixels: backbones.features(self.backbone, params, pixels, endpoint, pool)
        )
        embeddings = [
            np.asarray(program(self.params, self._windows(record, 1)[0][None])[0], np.float32)
            for record in _records(videos, fps)
        ]
        if _is_one(videos):
            return embeddings[0]
        return np.stack(embeddings) if pool else embeddings

    @cached_property
    def _classify(self) -> Any:
        return jax.jit(lambda params, x: backbones.classify(self.backbone, params, x))

    def _windows(self, record: sources.Record, count: int) -> list[np.ndarray]:
        """Windows uint8 [T, size, size, 3] of the centre, spread evenly over the video."""
        spec = self.backbone.spec
        try:
            found = windows(record.video, spec.frames, spec.size, count, short_side=spec.short_side)
            return [frames for frames, _ in found]
        except decode.Unreadable as error:
            raise UserError(f"{record.name} cannot be read ({error.reason}).") from error


def load_backbone(
    name: str | Path = "", weights: str | Path = "", labels: str | Path = ""
) -> Backbone:
    """A published network by its name (`list_models`) with its weights.

    name: also '' or the weights themselves, which then say what they are. weights: a file, a folder
    that transformers' save_pretrained wrote, or the folder of job import_weights; '': the installed
    package that carries them; 'random': a smoke run. labels: a file with a name a line; '': those
    of the weights, of the file beside them, else Kinetics-400's where the number fits. Raises
    UserError for a name that is none, a network that takes no videos, and for weights that are not
    there or not whole.
    """
    is_path = not str(weights) and Path(name).expanduser().exists() and bool(str(name))
    if is_path and str(name) not in networks.VARIANTS:
        name, weights = "", name

    def check(spec: networks.BackboneSpec) -> None:
        if not spec.video:
            raise UserError(
                f"{spec.name} does not take videos: choose one of {', '.join(list_models())}."
            )

    network = pretrained.load_network(str(name), str(weights), check, Keys("name", "weights"))
    names = pretrained.class_names(network, str(weights), str(labels), "labels")
    return Backbone(network.backbone.spec.name, network.backbone, network.params, names)


def list_models(video_only: bool = True) -> list[str]:
    """Names of the published networks that are known; those that take videos alone, or all."""
    return sorted(
        name
        for name, spec in networks.VARIANTS.items()
        if (spec.video or not video_only) and not name.endswith("_tiny")
    )


def windows(
    video: str | bytes, frames: int, size: int, count: int, fps: float = 25.0, short_side: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Windows of a video, each uint8 [frames, size, size, 3] from its centre at `fps`, and their
    frames' times in seconds.

    They are spread evenly; a video shorter than one shows its last frame until the window is over.
    short_side: pixels to which frames are scaled before the crop; 0: size. Raises
    decode.Unreadable.
    """
    span, side = frames / fps, short_side or size
    with decode.Video(video) as opened:
        slack = max(opened.duration - span, 0)
        count = min(count, max(1, round(opened.duration / span)))
        starts = np.linspace(0, slack, count) if count > 1 else [slack / 2]
        taken = [opened.frames_at(start + np.arange(frames) / fps, side) for start in starts]
    return [(center_crop(shown, size), times) for shown, times in taken]


# -- training


class Trainer:
    """One stage, step by step: the loop's own programs without its files.

    trainer = pj.Trainer(config)
    state = trainer.init_state()
    for batch in itertools.islice(trainer.batches(), 100):
        state, metrics = trainer.step(state, batch)

    config: an experiment, or the ConfigDict or mapping of one. stage: its name; '': the first.
    Raises UserError as `python -m particlejax.main` does.
    """

    def __init__(self, config: Experiment | Mapping[str, Any] | Any, stage: str = "") -> None:
        if not isinstance(config, Experiment):
            config = Experiment.of(config.to_dict() if hasattr(config, "to_dict") else config)
        self.mesh = sharding.make_mesh(config.mesh)
        name = stage or next(iter(config.stages))
        self.setup: Setup = set_up(config, name, self.mesh)

    @property
    def steps(self) -> int:
        """How many steps the stage has."""
        return self.setup.steps

    def init_state(self) -> TrainState:
        """A fresh state; the seed is the experiment's."""
        return self.setup.init_state()

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step: the new state and its metrics, float32 scalars. `state` is donated: do not use
        it again.
        """
        return self.setup.step(state, batch)

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The stage's batches on the devices, from step `first` on, in the order of the seed."""
        setup = self.setup
        unreadable = stages.UnreadableClips(setup.stage.data.max_unreadable)
        stream = pipeline.read_batches(setup.batches, first, setup.steps, setup.stage.data)
        try:
            for loaded in stream:
                unreadable.record(loaded)
                yield sharding.shard_batch(loaded.batch, self.mesh)
        finally:
            stream.close()

    def run(self, state: TrainState) -> Run:
        """The state as a run that predicts and embeds."""
        params = jax.tree.map(jnp.copy, self.setup.eval_params(state))
        return Run(self.setup.stage, params, self.mesh)


# -- videos as records


class _Refusing:
    """Raises for the first clip that cannot be read."""

    def __call__(self, loaded: pipeline.LoadedBatch) -> None:
        for clip in loaded.unreadable:
            raise UserError(f"{clip.name} cannot be read ({clip.reason}).")


def _is_one(videos: Any) -> bool:
    """Whether it is one video, so that the answer is one, too."""
    if isinstance(videos, np.ndarray):
        return videos.ndim == 4
    return isinstance(videos, str | Path) and not Path(videos).expanduser().is_dir()


def _records(videos: Any, fps: float | None) -> list[sources.Record]:
    """Records of what somebody calls a video. Raises UserError for what is none."""
    if isinstance(videos, np.ndarray) and videos.ndim == 4:
        videos = [videos]
    if isinstance(videos, str | Path):
        path = Path(videos).expanduser()
        videos = _files(path) if path.is_dir() else [path]
    return [_record(video, i, fps) for i, video in enumerate(videos)]


def _files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no video: name a folder with files such as clip.mp4.")
    return files


def _record(video: Any, number: int, fps: float | None) -> sources.Record:
    if isinstance(video, str | Path):
        path = Path(video).expanduser()
        if not path.is_file():
            raise UserError(f"{path} does not exist: check its path.")
        return sources.Record(str(path), str(path), whole_frames=True)
    frames = np.asarray(video)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise UserError(
            f"video {number} is {frames.dtype} {list(frames.shape)}: give uint8 frames of shape "
            "[T, H, W, 3], RGB of 0 to 255, or a path."
        )
    if not fps:
        raise UserError("frames have no times by themselves: give fps, frames per second.")
    return sources.Record(f"video {number}", decode.raw_file(frames, fps), whole_frames=True)


def _rows(rows: int, mesh: Mesh) -> int:
    """As many rows, or the next number that the mesh's devices divide."""
    divisor = sharding.row_divisor(mesh)
    return -(-rows // divisor) * divisor


def _best(values: np.ndarray, labels: Sequence[str], top_k: int) -> Answers:
    order = np.argsort(-values, kind="stable")[:top_k]
    return [(labels[i], float(values[i])) for i in order]
