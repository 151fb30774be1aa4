# SPDX-License-Identifier: Apache-2.0
"""The program of a stage, built once for both the training loop and `plan`."""

from typing import NamedTuple

import optax

from particlejax.objectives import label_targets, registry
from particlejax.objectives.base import WeightedSum
from particlejax.train import optim
from particlejax.train.stage import Stage
from particlejax.train.train_state import Step, make_step


class TrainProgram(NamedTuple):
    """objective: applied to a batch as it comes from the data.

    step: pure, (state, batch) -> (state, metrics).
    """

    objective: WeightedSum
    optimizer: optax.GradientTransformation
    step: Step


def build_program(stage: Stage, targets: label_targets.Targets | None, steps: int) -> TrainProgram:
    """The stage's program for `steps` steps; targets: head targets, None without labels."""
    spec = stage.spec
    objective = registry.combine(spec.objectives, targets)
    layer_decay = optim.layerwise_decay(spec.finetune, stage.experiment.model_of(spec).depth, steps)
    optimizer = optim.build_optimizer(
        spec.optim,
        steps,
        layer_decay,
        spec.finetune.freeze if spec.finetune.method == "full" else "",
    )
    step = make_step(
        stage.model,
        objective,
        optimizer,
        ema=spec.ema_decay,
        accumulate=spec.grad_accum_steps,
        tuning=spec.finetune,
        robust=spec.robust,
        on_nan=stage.experiment.on_nan,
    )
    return TrainProgram(objective, optimizer, step)
