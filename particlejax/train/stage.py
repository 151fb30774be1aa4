# SPDX-License-Identifier: Apache-2.0
"""A stage built from an experiment (sources, model, folders), and a trained stage restored."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from particlejax.config import jobs, renames
from particlejax.config.data import DataSpec, ParticleSpec, ScaleSpec
from particlejax.config.experiment import Experiment
from particlejax.config.job_specs import RunDataSpec
from particlejax.config.model import ModelSpec
from particlejax.config.objectives import ClassifySpec
from particlejax.config.training import StageSpec
from particlejax.core import io
from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import Params, UserError
from particlejax.data import clips, label_subset, pipeline, sources
from particlejax.data.frame_cache import FrameCache
from particlejax.distributed import checkpoint, cluster, sharding
from particlejax.finetune import partition, restore
from particlejax.models import particle_model as models
from particlejax.models.modality import ModalitySpec
from particlejax.models.zoo.networks import BackboneSpec
from particlejax.objectives import label_targets, registry
from particlejax.particles.types import Batch
from particlejax.train import published
from particlejax.train.log import log_info, log_info_local

_MAX_LISTED = 30  # classes in the log
CONFIG, RESULTS = published.CONFIG, "results.json"
# data settings that may differ from those of the training run
_OVERRIDABLE_DATA_KEYS = (
    "split",
    "cache_dir",
    "max_unreadable",
    "max_unreadable_fraction",
    "num_threads",
    "num_workers",
)
_INHERITED = {
    "model": ("width", "depth", "num_heads", "distance_bias", "mlp_ratio", "stem"),
    "data": ("image_mean", "image_std", "temporal_mean_scale"),
    "particles": ("patch_size",),
}


@dataclass
class UnreadableClips:
    """Unreadable clips so far; more than `limit` of them, or of the tally's fraction, end the
    run.
    """

    limit: int
    reasons: dict[str, str] = field(default_factory=dict)

    def record(self, loaded: pipeline.LoadedBatch) -> None:
        """Reports each new clip once. Raises UserError past a limit, and if nothing is readable."""
        for clip in loaded.unreadable:
            if clip.name not in self.reasons:
                self.reasons[clip.name] = clip.reason
                log_info_local(f"clip {clip.name} cannot be read ({clip.reason}) and is skipped.")
        if len(self.reasons) > self.limit:
            raise UserError(
                f"{len(self.reasons)} clips cannot be read ({self._examples()}, ...), more than "
                f"config.data.max_unreadable={self.limit}: repair the data or raise the limit."
            )
        if tally := loaded.tally:
            self._check(tally)

    def _check(self, tally: pipeline.Tally) -> None:
        if tally.is_nothing_readable():
            raise UserError(
                f"none of the {tally.num_tried} clips can be read ({self._examples()}, ...): check "
                "the paths and the files; experiments/check_data.py lists every reason."
            )
        if tally.is_over_limit():
            raise UserError(
                f"{len(tally.unreadable)} of {tally.num_tried} clips cannot be read "
                f"({self._examples()}, ...), a larger fraction than "
                f"config.data.max_unreadable_fraction={tally.max_fraction:g}: repair the data or "
                "raise the limit."
            )

    def _examples(self) -> str:
        return ", ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:3])

    def gather_all(self) -> dict[str, str]:
        """The unreadable clips of all processes; every process must call it."""
        return {
            path: reason
            for reasons in cluster.gather_json(self.reasons)
            for path, reason in reasons.items()
        }


@dataclass(frozen=True)
class Stage:
    """One stage, ready to train or evaluate."""

    name: str
    spec: StageSpec
    experiment: Experiment
    data: DataSpec
    particles: ParticleSpec
    classes: tuple[str, ...]
    # maps labels to head targets, None without labels
    targets: label_targets.Targets | None
    model: models.Model
    example: Batch  # zeros, shaped like a batch of one row
    # (i, n): this process reads the i-th of n parts of each batch's rows
    process_slice: tuple[int, int]
    cache: FrameCache = field(default_factory=FrameCache)  # of the clips of all splits

    def eval_batches(
        self,
        source: sources.Source,
        rows: int,
        views: tuple[int, int] = (1, 1),
        scale: ScaleSpec | None = None,
    ) -> pipeline.EvalBatches:
        """All clips of a source once, for evaluation; `scale` overrides the default scale."""
        data, particles = (scale or ScaleSpec()).applied(self.data, self.particles)
        return pipeline.EvalBatches(
            source,
            data,
            particles,
            self.experiment.seed,
            rows,
            views,
            *self.process_slice,
            cache=self.cache,
        )

    def train_batches(self, source: sources.Source, clips: int) -> pipeline.TrainBatches:
        """Training batches of a source with `clips` clips in all; endless if 0."""
        return pipeline.TrainBatches(
            source,
            self.data,
            self.particles,
            self.experiment.seed,
            self.spec.batch_size,
            *self.process_slice,
            self.spec.scale_schedule,
            self.spec.num_steps,
            clips,
            cache=self.cache,
        )


def build_stage(
    experiment: Experiment, name: str, classes: tuple[str, ...], mesh: Mesh | None = None
) -> Stage:
    """Builds the stage and its model; without a mesh it reads all rows. Raises UserError if labels
    are needed but missing.
    """
    spec = experiment.stages[name]
    data, particles = experiment.data_of(spec), experiment.particles_of(spec)
    _check_directed(data, classes)
    row = pipeline.row_shape(data, particles, spec.scale_schedule)
    registry.check(spec.objectives, row.slots)
    needs_labels = registry.classifies(spec.objectives)
    if needs_labels and not classes:
        raise UserError(
            f"stage {name} classifies but {data.source} has no labels: give clips.csv a "
            "column 'label', or put the clips into one folder per class."
        )
    vocabulary_sizes = pipeline.vocabularies(data)
    patch_sizes = {
        clips.VISION: particles.patch_size,
        clips.AUDIO: (*data.audio.patch_size, 1),
        clips.TIMESERIES: (data.timeseries.patch_length, 1, 1),
    }
    payloads = {
        modality: ModalitySpec(
            slot_spec.payload_size,
            vocabulary_sizes.get(modality, 0),
            patch_sizes.get(modality, ()),
            clips.pixel_scale(data, particles) if modality == clips.VISION else None,
        )
        for modality, slot_spec in row.slots.items()
    }
    _check_objectives(spec, experiment.model_of(spec), f"config.stages.{name}")
    targets = (
        label_targets.build_targets(
            spec.objectives.get("classify", ClassifySpec()), classes, data.source
        )
        if needs_labels
        else None
    )
    model = models.build(
        experiment.model_of(spec),
        payloads,
        registry.heads(spec.objectives, len(targets.names) if targets else 0),
        registry.unseen(spec.objectives),
    )
    return Stage(
        name,
        spec,
        experiment,
        data,
        particles,
        classes,
        targets,
        model,
        pipeline.zero_batch(row, 1),
        sharding.process_slice(mesh) if mesh else (0, 1),
    )


def _check_objectives(spec: StageSpec, model: ModelSpec, key_path: str) -> None:
    """Raises UserError if an objective's settings would silently have no effect."""
    pseudo, classify = spec.objectives.get("pseudo_label"), spec.objectives.get("classify")
    if pseudo and pseudo.teacher == "ema" and not spec.ema_decay:
        raise UserError(
            f"{key_path}.objectives.pseudo_label.teacher is 'ema' but the stage keeps no EMA: "
            "set its ema_decay, such as 0.99, or teacher to 'self'."
        )
    if pseudo and classify and classify.loss != "softmax":
        raise UserError(
            f"{key_path}.objectives.pseudo_label needs one class per clip but classify.loss is "
            f"{classify.loss!r}: remove one of the two."
        )
    if classify and classify.class_balance_beta and classify.loss != "softmax":
        raise UserError(
            f"{key_path}.objectives.classify.class_balance_beta needs loss='softmax' but it is "
            f"{classify.loss!r}: set it to 0."
        )
    if classify and classify.pos_weight != 1 and classify.loss != "sigmoid":
        raise UserError(
            f"{key_path}.objectives.classify.pos_weight needs loss='sigmoid' but it is "
            f"{classify.loss!r}: set it to 1."
        )
    if classify and classify.rdrop_weight and not (model.dropout or model.drop_path_rate):
        raise UserError(
            f"{key_path}.objectives.classify.rdrop_weight compares two dropout samples but there "
            "is no dropout: set config.model.dropout or drop_path_rate, or rdrop_weight to 0."
        )


def class_weighted_targets(stage: Stage, source: sources.Source) -> label_targets.Targets | None:
    """The stage's targets, weighted by training label frequencies if the spec asks for it."""
    spec = stage.spec.objectives.get("classify")
    if stage.targets is None or not spec or not (spec.class_balance_beta or spec.pos_weight != 1):
        return stage.targets
    label = label_subset.labels(source)[
        pipeline.subset_indices(len(source), stage.data.train_fraction)
    ]
    return label_targets.with_class_weights(
        stage.targets, spec, np.bincount(label[label >= 0], minlength=len(stage.classes))
    )


def on_source(
    stage: Stage, split: str, key: str = "config.data.split"
) -> tuple[Stage, sources.Source]:
    """A trained stage with the labels of its data's source, and one split of that source.

    One class per clip: labels are the stage's classes, by name. Several classes or numbers: other
    combinations and values are fine. Without a head, any labels are. key: the setting of the
    split, for errors. Raises UserError for a label that the head does not know.
    """
    data = stage.data
    matched = stage.classes if stage.targets and stage.targets.loss == "softmax" else None
    source = sources.open_split(data, split, matched, key)
    targets = stage.targets and label_targets.remap_to_source(
        stage.targets, source.classes, data.source
    )
    return replace(stage, classes=source.classes, targets=targets), source


def on_labeled_source(stage: Stage) -> tuple[Stage, sources.Source]:
    """`on_source` for the data's split. Raises UserError if the stage does not classify or no clip
    has a label.
    """
    if stage.targets is None:
        raise UserError(
            f"stage {stage.name} is not a classifier: name one that is, as RUN_DIR:STAGE."
        )
    stage, source = on_source(stage, stage.data.split)
    if not (label_subset.labels(source) >= 0).any():
        raise UserError(
            f"no clip of {stage.data.source} ({stage.data.split}) has a label to measure with: "
            "give clips.csv a column 'label', put the clips into one folder per class, or predict "
            "them with the job 'predict' (experiments/predict.py)."
        )
    return stage, source


def _check_directed(data: DataSpec, classes: tuple[str, ...]) -> None:
    """Raises UserError if no_flip_classes names an unknown class, which would be flipped."""
    for name in data.augment.no_flip_classes if classes else ():
        if name not in classes:
            raise UserError(
                f"config.data.augment.no_flip_classes names {name!r}, which is not a class of "
                f"{data.source}: {did_you_mean(name, classes)}"
            )


def checkpoint_folder(workdir: Path, stage: str, kind: str = "latest") -> Path:
    """Folder of a stage's checkpoints; kind is 'latest' or 'best'."""
    return Path(workdir) / "checkpoints" / stage / kind


def result_folder(workdir: Path, stage: str) -> Path:
    """The checkpoints of a stage's result: the best if a metric is selected, else the latest."""
    best = checkpoint_folder(workdir, stage, "best")
    return (
        best
        if best.is_dir() and any(p.name.isdigit() for p in best.iterdir())
        else checkpoint_folder(workdir, stage)
    )


def find_init(experiment: Experiment, name: str, workdir: Path) -> Path | None:
    """The checkpoints that a stage starts from, None for a fresh start. Raises UserError if they do
    not exist.
    """
    wanted = experiment.stages[name].init_from
    if wanted in experiment.stages:
        return result_folder(workdir, wanted)
    if not wanted and name == next(iter(experiment.stages)):
        wanted = experiment.init_from
    if not wanted:
        return None
    try:
        return result_folder(*split_run(wanted))
    except UserError as error:
        if wanted != experiment.stages[name].init_from:
            raise
        raise UserError(
            f"config.stages.{name}.init_from={wanted!r} is not an earlier stage, and {error}"
        ) from error


def check_init_from(experiment: Experiment, workdir: Path) -> None:
    """Raises UserError, before the first stage trains, if a later one would have nothing to start
    from. Stages with checkpoints of their own continue from these.
    """
    names = list(experiment.stages)
    for position, name in enumerate(names):
        wanted = experiment.stages[name].init_from
        if checkpoint_folder(workdir, name).is_dir():
            continue
        if wanted in names[position:]:
            raise UserError(
                f"config.stages.{name}.init_from={wanted!r} does not run before {name}: change "
                "config.stage_order, or name an earlier stage."
            )
        find_init(experiment, name, workdir)


def inherit_settings(experiment: Experiment, overridden: Collection[str] = ()) -> Experiment:
    """The experiment with the payload and encoder settings of the run that `init_from` names; of
    a published 3D CNN with its weights in the stem.

    overridden: settings given explicitly, such as 'model.width', which are kept.
    """
    if not experiment.init_from:
        return experiment
    if network := published.network_at(experiment.init_from):
        return _as_stem_weights(experiment, network, overridden)
    run, _ = split_run(experiment.init_from)
    source_experiment, changed = read_experiment(run), []
    for section, names in _INHERITED.items():
        current, source = getattr(experiment, section), getattr(source_experiment, section)
        new = {
            name: getattr(source, name)
            for name in names
            if getattr(source, name) != getattr(current, name)
            and f"{section}.{name}" not in overridden
        }
        changed += [f"{section}.{name}={value}" for name, value in new.items()]
        experiment = replace(experiment, **{section: replace(current, **new)})
    if changed:
        log_info(f"settings taken from {run}: {', '.join(changed)}")
    return experiment


def _as_stem_weights(
    experiment: Experiment, network: BackboneSpec, overridden: Collection[str]
) -> Experiment:
    """The experiment with the published weights of `init_from` in its stem. Raises UserError unless
    they are of a 3D CNN and the model has a stem.
    """
    stem, weights = experiment.model.stem, experiment.init_from
    if not stem.model or network.inputs:
        published.refuse(weights)
    if "model.stem.weights" in overridden and stem.weights != weights:
        raise UserError(
            f"config.init_from={weights!r} and config.model.stem.weights={stem.weights!r} both "
            "name weights of the stem: leave one of them empty."
        )
    log_info(f"{weights} holds {network.name}: read as config.model.stem.weights")
    model = replace(experiment.model, stem=replace(stem, weights=weights))
    return replace(experiment, model=model, init_from="")


def split_run(text: str) -> tuple[Path, str]:
    """Splits RUN_DIR or RUN_DIR:STAGE into folder and stage; default: the last trained stage."""
    run, _, name = (text, "", "") if Path(text).is_dir() else text.rpartition(":")
    run = Path(run or text)
    published.refuse(str(run))
    if not (run / CONFIG).exists():
        raise UserError(
            f"{run} is not a run (it has no {CONFIG}): give the --workdir of a run, or "
            "RUN_DIR:STAGE."
        )
    stages = list(read_experiment(run).stages)
    trained = [stage for stage in stages if checkpoint_folder(run, stage).is_dir()]
    if not trained or (name and name not in trained):
        raise UserError(
            f"run {run} has trained {', '.join(trained) or 'no stage'} but not "
            f"{name or 'any yet'}: name a stage it has, or run it first."
        )
    return run, name or trained[-1]


def read_experiment(run: Path) -> Experiment:
    """Reads the experiment of a training run. Raises UserError for the folder of another job."""
    config = jobs.upgraded(json.loads((run / CONFIG).read_text(encoding="utf-8")))
    if config.get("job", "train") != "train":
        raise UserError(
            f"{run} holds no training run (its job is {config['job']}): give the --workdir of one."
        )
    return Experiment.of(config)


def read_results(workdir: Path) -> dict[str, Any]:
    """Reads results.json, {} if it does not exist."""
    path = Path(workdir) / RESULTS
    return renames.results(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def add_results(
    workdir: Path, stage: str, metrics: Mapping[str, Any], new_unreadable: Mapping[str, str]
) -> None:
    """Adds a stage's metrics and the unreadable clips to results.json; only the first process
    writes.
    """
    if not cluster.is_primary():
        return
    results = read_results(workdir)
    unreadable = {entry["path"]: entry["reason"] for entry in results.pop("unreadable", [])} | dict(
        new_unreadable
    )
    results[stage] = results.get(stage, {}) | dict(metrics)
    results["unreadable"] = [
        {"path": path, "reason": reason} for path, reason in unreadable.items()
    ]
    io.write_json(Path(workdir) / RESULTS, results)


def data_overrides(data: RunDataSpec) -> dict[str, Any]:
    """Data settings for `load_trained`: another source, if one is named."""
    return {key: getattr(data, key) for key in _OVERRIDABLE_DATA_KEYS} | (
        {"source": data.source} if data.source else {}
    )


def log_source(name: str, source: str, opened: Mapping[str, sources.Source]) -> None:
    """Logs the classes of a source, and what was made of its splits or left out of them."""
    classes = next((part.classes for part in opened.values() if part.classes), ())
    listed = ", ".join(classes[:_MAX_LISTED]) + ", ..." * (len(classes) > _MAX_LISTED)
    noun = "class" if len(classes) == 1 else "classes"
    log_info(f"{name}: {source} has {len(classes)} {noun}" + (f": {listed}" if listed else ""))
    for note in dict.fromkeys(note for part in opened.values() for note in sources.notes(part)):
        log_info(f"{name}: {note}")
    for split, part in opened.items():
        if classes and isinstance(part, sources.ListSource):  # labels of others are read slowly
            unlabeled = int((sources.labels(part) < 0).sum())
            if unlabeled:
                log_info(f"{name}: {unlabeled} of {len(part)} clips of {split} have no label")


def load_trained(
    text: str, mesh: Mesh, source: Mapping[str, Any], step: int | None = None
) -> tuple[Stage, Params]:
    """A trained stage of RUN_DIR[:STAGE] and its result's parameters, or those of `step`.

    source: overrides of the data section.
    """
    run, name = split_run(text)
    folder = result_folder(run, name)
    experiment = read_experiment(run)
    data = checkpoint.load_data(folder)
    stage = build_stage(experiment, name, tuple(data["classes"]), mesh)
    stage = replace(stage, data=replace(stage.data, **source))
    if stage.targets:
        weights = {name: np.array(x, np.float32) for name, x in data.get("weights", {}).items()}
        stage = replace(stage, targets=stage.targets._replace(**weights))
    shapes = models.parameter_shapes(stage.model, stage.example)
    shardings = sharding.param_shardings(shapes, mesh)
    params = jax.tree.map(
        lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings
    )
    # merged: includes adapters and prefixes
    if restore.BASE_KEY not in data and stage.spec.finetune.method != "full":
        merged = jax.eval_shape(
            lambda p: partition.merge(
                stage.spec.finetune, *partition.split(stage.spec.finetune, p, jax.random.key(0))
            ),
            params,
        )
        params = jax.tree.map(
            lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d),
            merged,
            sharding.param_shardings(merged, mesh),
        )
    params, _ = restore.from_checkpoint(params, folder, step)
    return stage, params
