# SPDX-License-Identifier: Apache-2.0
"""Registry of objectives: pure functions (params, model, batch, key, train) -> (loss, metrics).

Loss and metrics are means over the clips that the objective applies to, each a `losses.Mean` with
its weight; `train` enables dropout, the key also drives masks. The objectives are grouped by theme
in the files of this folder.
"""

import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import jax
from jax import Array

from particlejax.config import plugins
from particlejax.config.fields import Spec
from particlejax.config.modalities import ordered
from particlejax.config.objectives import OBJECTIVES
from particlejax.core.typing import Params, UserError
from particlejax.models.heads import HeadSpec
from particlejax.models.particle_model import Model
from particlejax.objectives import (
    classify,
    contrastive,
    feature_distillation,
    framewise,
    jepa,
    masked,
    masked_tokens,
    pretext_video,
    pseudo_label,
    synchronization,
    text_matching,
)
from particlejax.objectives.base import Measured, Objective, ObjectiveType, WeightedSum, declared
from particlejax.objectives.label_targets import Targets
from particlejax.particles.types import Batch

Make = TypeVar("Make", bound=Callable[..., Objective])

TABLE: dict[str, ObjectiveType] = {
    "masked_autoencoder": masked.MASKED_AUTOENCODER,
    "jepa": jepa.JEPA,
    "feature_distillation": feature_distillation.FEATURE_DISTILLATION,
    "future_prediction": masked.FUTURE_PREDICTION,
    "clip_order": pretext_video.CLIP_ORDER,
    "playback_speed": pretext_video.PLAYBACK_SPEED,
    "arrow_of_time": pretext_video.ARROW_OF_TIME,
    "rotation_flip": pretext_video.ROTATION_FLIP,
    "synchronization": synchronization.SYNCHRONIZATION,
    "contrastive": contrastive.CONTRASTIVE,
    "text_matching": text_matching.TEXT_MATCHING,
    "temporal_alignment": contrastive.TEMPORAL_ALIGNMENT,
    "masked_lm": masked_tokens.MASKED_LM,
    "masked_visual_tokens": masked_tokens.MASKED_VISUAL_TOKENS,
    "framewise": framewise.FRAMEWISE,
    "classify": classify.CLASSIFY,
    "pseudo_label": pseudo_label.PSEUDO_LABEL,
}


def register_objective(
    name: str,
    *,
    heads: Callable[[Any, int], Mapping[str, HeadSpec]] = lambda spec, classes: {},
    modalities: Callable[[Any], tuple[str, ...]] = lambda spec: (),
    labelled: bool = False,
    unseen: Callable[[Any], tuple[str, ...]] = lambda spec: (),
) -> Callable[[Make], Make]:
    """Decorator that registers an objective: a stage may then have `objectives={name: {...}}`.

    The function is (spec) -> objective, where `spec` is annotated with its settings class (a
    dataclass that inherits `Spec` and has a `weight`); the objective is (params, model, batch, key,
    train) -> (loss, metrics). A loss or metric that does not apply to every clip of the batch must
    be a `losses.Mean` (`losses.mean_over(values, mask)` makes one): a plain scalar counts as a mean
    over all clips. See `ObjectiveType` for the other arguments. Raises ValueError for a duplicate
    name, TypeError without the annotation.
    """

    def register(make: Make) -> Make:
        settings = next(iter(typing.get_type_hints(make).values()), None)
        if not (isinstance(settings, type) and issubclass(settings, Spec)):
            raise TypeError(
                f"objective {name!r}: annotate the argument of {make.__qualname__} with the "
                "class of its settings, a frozen dataclass that inherits particlejax.Spec."
            )
        objective_type = ObjectiveType(make, heads, modalities, labelled, unseen)
        plugins.add(TABLE, "objective", name, objective_type)
        OBJECTIVES[name] = settings
        return make

    return register


def combine(specs: Mapping[str, Any], targets: Targets | None = None) -> WeightedSum:
    """The weighted sum of objectives; metrics are 'loss' and, for each objective, 'name/metric'.

    targets: maps labels to head targets; None: each label is a class.
    """
    objectives = {
        name: TABLE[name].make(spec, *([targets] if TABLE[name].labelled else []))
        for name, spec in specs.items()
    }
    hidden = set(unseen(specs))

    def measure(params: Params, model: Model, batch: Batch, key: Array, train: bool) -> Measured:
        losses, metrics, batch = {}, {}, model.normalize(batch)
        for i, (name, objective_fn) in enumerate(objectives.items()):
            inputs = _without(batch, hidden - set(TABLE[name].unseen(specs[name])))
            loss, objective_metrics = objective_fn(
                params, model, inputs, jax.random.fold_in(key, i), train
            )
            losses[name] = declared(loss, batch)
            metrics |= {
                f"{name}/{metric}": declared(value, batch)
                for metric, value in objective_metrics.items()
            }
        return Measured(losses, metrics)

    return WeightedSum(measure, {name: spec.weight for name, spec in specs.items()})


def heads(specs: Mapping[str, Any], classes: int = 0) -> dict[str, HeadSpec]:
    """The heads of the objectives. Raises ValueError if two declarations of a name differ."""
    declared: dict[str, HeadSpec] = {}
    for name, spec in specs.items():
        for key, head in TABLE[name].heads(spec, classes).items():
            if declared.setdefault(key, head) != head:
                raise ValueError(
                    f"objective {name} declares a head {key!r} that another objective "
                    f"declares differently ({head} and {declared[key]}): give it another name."
                )
    return declared


def unseen(specs: Mapping[str, Any]) -> tuple[str, ...]:
    """Modalities that are only targets, never seen by the encoder."""
    return ordered({m for name, spec in specs.items() for m in TABLE[name].unseen(spec)})


def _without(batch: Batch, modalities: Collection[str]) -> Batch:
    return replace(
        batch,
        particles={
            name: particles for name, particles in batch.particles.items() if name not in modalities
        },
    )


def classifies(specs: Mapping[str, Any]) -> bool:
    """Whether the objectives need a classification head, and thus labels."""
    return any(TABLE[name].labelled for name in specs)


def check(specs: Mapping[str, Any], modalities: Mapping[str, Any]) -> None:
    """Raises UserError if an objective reads a modality that the data lack."""
    for name, spec in specs.items():
        missing = [
            modality for modality in TABLE[name].modalities(spec) if modality not in modalities
        ]
        if missing:
            raise UserError(
                f"objective {name} reads {missing[0]}, which "
                f"config.data.modalities={tuple(modalities)} lacks: add it there, or remove "
                "the objective."
            )
