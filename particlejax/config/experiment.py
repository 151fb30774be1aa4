# SPDX-License-Identifier: Apache-2.0
"""The configuration of a training run, and all that an experiment file imports.

An experiment file fills a ConfigDict of these dataclasses (`section`). `Experiment.of` converts it
back and rejects unknown keys with the closest match.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from particlejax.config import plugins
from particlejax.config.data import (
    AudioSpec,
    AugmentSpec,
    DataSpec,
    FeatureSpec,
    ParticleSpec,
    ScaleScheduleSpec,
    ScaleSpec,
    TextSpec,
    TimeseriesSpec,
)
from particlejax.config.fields import (
    Spec,
    arguments,
    as_dict,
    at_least,
    interval,
    make,
    one_of,
    replaced,
    section,
)
from particlejax.config.model import ModelSpec, StemSpec
from particlejax.config.objectives import OBJECTIVES
from particlejax.config.training import (
    CheckpointSpec,
    DistributedSpec,
    EvalSpec,
    FinetuneSpec,
    LogSpec,
    MeshSpec,
    OptimSpec,
    RobustSpec,
    StageSpec,
)
from particlejax.core.errors import UserError
from particlejax.core.suggest import did_you_mean

__all__ = (
    "AudioSpec",
    "AugmentSpec",
    "CheckpointSpec",
    "DataSpec",
    "DistributedSpec",
    "EvalSpec",
    "Experiment",
    "FeatureSpec",
    "FinetuneSpec",
    "LogSpec",
    "MeshSpec",
    "ModelSpec",
    "OptimSpec",
    "ParticleSpec",
    "RobustSpec",
    "ScaleScheduleSpec",
    "ScaleSpec",
    "StageSpec",
    "StemSpec",
    "TextSpec",
    "TimeseriesSpec",
    "arguments",
    "as_dict",
    "section",
)


@dataclasses.dataclass(frozen=True)
class Experiment(Spec):
    """All settings of a run; config.json is enough to repeat it."""

    job: str = one_of("train")  # job of these settings
    seed: int = at_least(0, 0)  # random seed of parameters, augmentation, masks and clip order
    # Python modules that register objectives, policies, augmentations, sources or networks
    plugins: tuple[str, ...] = ()
    # RUN_DIR or RUN_DIR:STAGE that initializes the first stage; encoder settings come from it; '':
    # random
    init_from: str = ""
    data: DataSpec = DataSpec()
    particles: ParticleSpec = ParticleSpec()
    model: ModelSpec = ModelSpec()
    # training stages by name
    stages: Mapping[str, StageSpec] = dataclasses.field(default_factory=dict)
    # names of the stages to run, in order; () if there is only one
    stage_order: tuple[str, ...] = ()
    eval: EvalSpec = EvalSpec()
    # at a NaN or Inf in loss or gradient: stop, or skip the step
    on_nan: str = one_of("stop", "skip")
    # first and last step of a profiler trace in profile/; (0, 0): none
    profile_steps: tuple[int, int] = interval((0, 0), 0)
    mesh: MeshSpec = MeshSpec()
    distributed: DistributedSpec = DistributedSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    log: LogSpec = LogSpec()

    def check(self) -> None:
        """Sorts the stages by `stage_order`. Raises UserError if they cannot be run."""
        if len(self.stages) > 1 and not self.stage_order:
            raise UserError(
                "Experiment.stage_order is empty: name the stages to run in their order "
                f"({', '.join(self.stages)})."
            )
        for name in self.stage_order:
            if name not in self.stages:
                raise UserError(
                    f"Experiment.stage_order names {name!r}, which Experiment.stages lacks: "
                    f"{did_you_mean(str(name), self.stages)}"
                )
            if self.stage_order.count(name) > 1:
                raise UserError(
                    f"Experiment.stage_order names {name!r} twice: name each stage once."
                )
        order = self.stage_order or tuple(self.stages)
        object.__setattr__(self, "stages", {name: self.stages[name] for name in order})
        for name, stage in self.stages.items():
            _check_lengths(stage, f"Experiment.stages.{name}")
            _check_objectives(self, stage, f"Experiment.stages.{name}")
            if stage.data.get("label_map"):  # a file is read once: config.json keeps its pairs
                label_pairs = self.data_of(stage).label_map
                data = {**stage.data, "label_map": label_pairs}
                self.stages[name] = dataclasses.replace(stage, data=data)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Experiment":
        """Returns the experiment of a config. Raises UserError for an invalid key or value."""
        plugins.load(*config.get("plugins", ()))
        return make(cls, config, "config")

    def data_of(self, stage: StageSpec) -> DataSpec:
        """Returns the data section with the stage's overrides."""
        return replaced(self.data, stage.data, "config.stages.*.data")

    def particles_of(self, stage: StageSpec) -> ParticleSpec:
        """Returns the particles section with the stage's overrides."""
        return replaced(self.particles, stage.particles, "config.stages.*.particles")

    def model_of(self, stage: StageSpec) -> ModelSpec:
        """Returns the model section with the stage's overrides."""
        return replaced(self.model, stage.model, "config.stages.*.model")


def _check_lengths(stage: StageSpec, key_path: str) -> None:
    if bool(stage.num_steps) == bool(stage.num_epochs):
        raise UserError(
            f"{key_path} has num_steps={stage.num_steps} and num_epochs={stage.num_epochs:g}: set "
            "one of them, and the other to 0."
        )
    if stage.early_stopping_patience and not stage.best_metric:
        raise UserError(
            f"{key_path}.early_stopping_patience={stage.early_stopping_patience} needs "
            "best_metric: set it to a validation metric such as 'loss' or 'top1', or set "
            "early_stopping_patience to 0."
        )
    if stage.batch_size % stage.grad_accum_steps:
        raise UserError(
            f"{key_path}.batch_size={stage.batch_size} is not a multiple of "
            f"grad_accum_steps={stage.grad_accum_steps}: change one of them."
        )


def _check_objectives(experiment: Experiment, stage: StageSpec, key_path: str) -> None:
    if not stage.objectives:
        raise UserError(f"{key_path} has no objective: add one of {', '.join(OBJECTIVES)}.")
    data, particles = experiment.data_of(stage), experiment.particles_of(stage)
    model = experiment.model_of(stage)
    sync, words = (
        stage.objectives.get("synchronization"),
        stage.objectives.get("masked_visual_tokens"),
    )
    if (
        sync
        and "vision" in sync.correlated_modalities
        and particles.patch_size[0] >= data.num_frames
    ):
        raise UserError(
            f"{key_path}.objectives.synchronization needs at least 2 time steps, but "
            f"particles.patch_size[0]={particles.patch_size[0]} covers all {data.num_frames} "
            "frames: use a smaller one, such as 2, or synchronization.method 'joint'."
        )
    if words and (stage.finetune.method != "full" or words.modality == "text"):
        raise UserError(
            f"{key_path}.objectives.masked_visual_tokens clusters numeric payloads and trains all "
            "parameters: set finetune.method to 'full' and use a modality other than text."
        )
    if "jepa" in stage.objectives and (not stage.ema_decay or model.token_reduction_layers):
        raise UserError(
            f"{key_path}.objectives.jepa needs an EMA teacher with the same tokens: set "
            f"{key_path}.ema_decay, such as to 0.99, and leave model.token_reduction_layers empty."
        )
    _check_model(stage.objectives, stage.finetune, model, key_path)


def _check_model(
    objectives: Mapping[str, Any], tune: FinetuneSpec, model: ModelSpec, key_path: str
) -> None:
    """Raises UserError if objectives or fine-tuning settings contradict the model."""
    _check_finetune(tune, model.pool_type, key_path)
    if (
        tune.method in ("lora", "ia3", "adapter", "prefix", "vpt_shallow", "vpt_deep")
        and not model.share_encoder
    ):
        raise UserError(
            f"{key_path}.finetune.method={tune.method!r} needs shared blocks: set "
            "model.share_encoder=True, or finetune.method to full, bitfit, attentive_probe or "
            "linear_probe."
        )
    if tune.method == "vpt_shallow" and (model.fusion != "early" or model.token_reduction_layers):
        raise UserError(
            f"{key_path}.finetune.method='vpt_shallow' needs model.fusion='early' and empty "
            "model.token_reduction_layers: set these, or finetune.method to 'vpt_deep'."
        )
    for name in ("temporal_alignment", "framewise", "synchronization"):
        if (
            name in objectives
            and model.token_reduction_layers
            and (name != "synchronization" or objectives[name].correlated_modalities)
        ):
            raise UserError(
                f"{key_path}.objectives.{name} predicts for every particle: leave "
                "model.token_reduction_layers empty."
            )
    if "feature_distillation" in objectives and model.fusion in ("late", "bottleneck"):
        raise UserError(
            f"{key_path}.objectives.feature_distillation decodes one modality from another, which "
            f"fusion {model.fusion!r} does not support: set model.fusion to 'early' or 'cross'."
        )
    distil = objectives.get("feature_distillation")
    if distil and distil.modality == distil.teacher_modality:
        raise UserError(
            f"{key_path}.objectives.feature_distillation has modality and teacher_modality "
            f"{distil.teacher_modality!r}: use two different modalities."
        )


def _check_finetune(tune: FinetuneSpec, pool: str, key_path: str) -> None:
    """Raises UserError if the frozen part would stay randomly initialized."""
    if tune.method == "attentive_probe" and pool != "attention":
        raise UserError(
            f"{key_path}.finetune.method='attentive_probe' needs attention pooling, but "
            f"model.pool_type is {pool!r}: set it to 'attention', or finetune.method to "
            "'linear_probe'."
        )
    if tune.method == "linear_probe" and pool != "mean":
        raise UserError(
            f"{key_path}.finetune.method='linear_probe' needs mean pooling, but model.pool_type is "
            f"{pool!r}: set it to 'mean', or finetune.method to 'attentive_probe'."
        )
