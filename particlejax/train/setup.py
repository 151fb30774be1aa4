# SPDX-License-Identifier: Apache-2.0
"""Everything about a stage that is fixed before its first step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from particlejax.config.experiment import Experiment
from particlejax.core import flops
from particlejax.core.typing import Params, UserError
from particlejax.data import label_subset, pipeline, sources
from particlejax.distributed import sharding
from particlejax.finetune import partition
from particlejax.objectives.label_targets import Targets
from particlejax.train import eval, train_step
from particlejax.train import stage as run
from particlejax.train.train_state import (
    Step,
    TrainState,
    abstract_state,
    as_abstract,
    initialize,
    jit_step,
)

_LEAST_VAL_STEPS = 10  # a short run is measured at its end alone


@dataclass(frozen=True)
class Setup:
    """A stage with its data, its compiled programs and its length.

    batches: from the first step on. step: (state, batch) -> (state, metrics), jitted, state
    donated. evaluation: on the val split. merge: (trained, frozen) -> the model's parameters.
    shapes: of the state, with shardings.
    """

    stage: run.Stage
    mesh: Mesh
    source: sources.Source
    val: sources.Source | None
    clips: int  # number of training clips
    batches: pipeline.TrainBatches
    steps: int
    targets: Targets | None
    program: train_step.TrainProgram
    shapes: TrainState
    step: Step
    evaluation: eval.Evaluation
    merge: Any

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name

    @property
    def val_every(self) -> int:
        """Steps from one measurement on the val split to the next: by default ten a run."""
        return self.stage.spec.val_every_steps or max(self.steps // 10, _LEAST_VAL_STEPS)

    def init_state(self) -> TrainState:
        """A fresh state: parameters drawn from the experiment's seed, sharded over the mesh."""
        stage = self.stage
        spec = stage.spec
        return initialize(
            stage.model,
            self.program.optimizer,
            stage.example,
            stage.experiment.seed,
            spec.ema_decay,
            self.mesh,
            spec.finetune,
        )

    def eval_params(self, state: TrainState) -> Params:
        """The model's parameters for evaluation: the EMA if the stage keeps one."""
        if self.stage.spec.finetune.method == "full":
            return state.eval_params
        return self.merge(state.eval_params, state.frozen)

    def open(self, split: str, key: str) -> sources.Source:
        """A split of the stage's source, with labels indexed by the stage's classes. key: the
        setting that names the split.
        """
        return sources.open_split(self.stage.data, split, self.stage.classes, key)

    def operations(self) -> int:
        """Model FLOPs of a step, from shapes; recomputation by remat does not count."""
        stage = self.stage
        row = pipeline.zero_batch(self.batches.plan.schedule.row, 1)
        # called like the step itself, so that it is not traced again
        rows, divided = stage.spec.batch_size, sharding.batch_sharding(self.mesh)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=divided), row
        )
        state = as_abstract(self.shapes)
        if stage.experiment.model_of(stage.spec).remat_policy == "none":
            return flops.count(self.step.trace(state, batch).jaxpr)
        spec = replace(stage.spec, model={**stage.spec.model, "remat_policy": "none"})
        plain_experiment = replace(
            stage.experiment, stages={self.name: spec}, stage_order=(self.name,), init_from=""
        )
        plain = run.build_stage(plain_experiment, self.name, stage.classes)
        step = train_step.build_program(plain, self.targets, self.steps).step
        return flops.count(jax.make_jaxpr(step)(state, batch))


def set_up(experiment: Experiment, name: str, mesh: Mesh) -> Setup:
    """The setup of a stage. Raises UserError for missing data, splits or metrics."""
    spec = experiment.stages[name]
    data = experiment.data_of(spec)
    sharding.check_rows(
        spec.batch_size // spec.grad_accum_steps,
        mesh,
        f"config.stages.{name}.batch_size / grad_accum_steps",
    )
    source = label_subset.limit_labels(
        sources.open_split(data, key=_split_key(name, spec.data), check=True), data, experiment.seed
    )
    stage = run.build_stage(experiment, name, source.classes, mesh)
    clips = len(pipeline.subset_indices(len(source), data.train_fraction))
    batches = stage.train_batches(source, math.ceil(clips * spec.num_epochs))
    steps = spec.num_steps or batches.plan.num_batches()
    targets = run.class_weighted_targets(stage, source)
    program = train_step.build_program(stage, targets, steps)
    shapes = abstract_state(
        stage.model, program.optimizer, stage.example, spec.ema_decay, mesh, spec.finetune
    )
    setup = Setup(
        stage,
        mesh,
        source,
        None,
        clips,
        batches,
        steps,
        targets,
        program,
        shapes,
        jit_step(program.step, shapes, mesh),
        eval.jit_evaluation(program.objective, stage.model, mesh),
        jax.jit(lambda params, frozen: partition.merge(spec.finetune, params, frozen)),
    )
    opened = {data.split: source} | _check_measuring(setup)
    if spec.val_split:
        val_key = f"config.stages.{name}.val_split"
        opened[spec.val_split] = setup.open(spec.val_split, val_key)
    run.log_source(name, data.source, opened)
    return replace(setup, val=opened[spec.val_split] if spec.val_split else None)


def _split_key(name: str, overrides: Mapping[str, Any]) -> str:
    """The setting that names the training split of a stage."""
    return f"config.stages.{name}.data.split" if "split" in overrides else "config.data.split"


def _check_measuring(setup: Setup) -> dict[str, sources.Source]:
    """Opens the splits to evaluate. Raises UserError for unknown splits or metrics, before training
    starts.
    """
    spec, name = setup.stage.spec, setup.name
    opened = {}
    if "classify" in spec.objectives:
        for split in setup.stage.experiment.eval.splits:
            opened[split] = setup.open(split, "config.eval.splits")
    if not spec.best_metric:
        return opened
    if not spec.val_split:
        raise UserError(
            f"config.stages.{name}.best_metric={spec.best_metric!r} is measured on the val "
            "split, but val_split is empty: name a split there."
        )
    known = eval.metric_names(setup.stage)
    if spec.best_metric not in known:
        raise UserError(
            f"config.stages.{name}.best_metric={spec.best_metric!r} is not measured: choose "
            f"one of {', '.join(known)}."
        )
    return opened
