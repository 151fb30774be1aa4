# SPDX-License-Identifier: Apache-2.0
"""The table of objectives: pure functions (params, model, batch, key, train) -> (loss, metrics),
any weighted set in one step.

The loss and each metric are means over the clips they apply to; `train` switches dropout, the key
feeds masks too. They are grouped by theme in the files beside this one.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from particlejax.config.model import ContrastSpec, DistilSpec, SyncSpec, TraceSpec, VisualWordsSpec
from particlejax.core.typing import Metrics, Params, UserError
from particlejax.models.particle_model import Model, Needs
from particlejax.objectives import contrastive, pretext_video
from particlejax.objectives.base import Objective
from particlejax.objectives.classify import classify
from particlejax.objectives.feature_distillation import distil
from particlejax.objectives.framewise import trace
from particlejax.objectives.jepa import latent
from particlejax.objectives.label_targets import Targets
from particlejax.objectives.masked import masked, next_frame
from particlejax.objectives.masked_tokens import visual_words, words
from particlejax.objectives.pseudo_label import pseudo
from particlejax.objectives.synchronization import sync
from particlejax.objectives.text_matching import match
from particlejax.particles.types import Batch

_VISION: tuple[str, ...] = (pretext_video.VISION,)


class Entry(NamedTuple):
    """An objective's maker, the parts of the model that it needs, and the modalities that it reads,
    of its spec.

    answers: how many answers its question about a clip has, 0 for no question; each: the same of
    one about each particle.
    """

    make: Callable[..., Objective]
    reads: Callable[[Any], tuple[str, ...]] = lambda spec: (spec.modality,)
    decoder: bool = False
    predictor: bool = False
    head: bool = False
    answers: Callable[[Any], int] = lambda spec: 0
    each: Callable[[Any], int] = lambda spec: 0


TABLE: dict[str, Entry] = {
    "masked": Entry(masked, decoder=True),
    "latent": Entry(latent, predictor=True),
    "distil": Entry(distil, lambda spec: (spec.modality, spec.teacher), decoder=True),
    "next_frame": Entry(next_frame, decoder=True),
    "order": Entry(
        pretext_video.order,
        lambda spec: _VISION,
        answers=lambda spec: len(pretext_video.PERMUTATIONS),
    ),
    "speed": Entry(
        pretext_video.speed, lambda spec: _VISION, answers=lambda spec: spec.doublings + 1
    ),
    "arrow": Entry(pretext_video.arrow, lambda spec: _VISION, answers=lambda spec: 2),
    "transform": Entry(
        pretext_video.transform, lambda spec: _VISION, answers=lambda spec: pretext_video.TRANSFORMS
    ),
    "sync": Entry(
        sync,
        lambda spec: spec.pair,
        answers=lambda spec: (2 * spec.shifts + 1 + (spec.other > 0)) * (not spec.laid),
    ),
    "contrast": Entry(contrastive.contrast, lambda spec: spec.pair),
    "match": Entry(match, answers=lambda spec: 2),
    "align": Entry(contrastive.align, each=lambda spec: spec.bins),
    "words": Entry(words, decoder=True),
    "visual_words": Entry(visual_words, predictor=True, each=lambda spec: spec.codes),
    "trace": Entry(trace),
    "classify": Entry(classify, lambda spec: (), head=True),
    "pseudo": Entry(pseudo, lambda spec: (), head=True),
}


def combine(specs: Mapping[str, Any], targets: Targets | None = None) -> Objective:
    """The weighted sum of objectives; metrics are 'loss' and, of each objective, 'name/metric'.

    targets: what labels ask of the head; None: each is a class.
    """
    made = {
        name: TABLE[name].make(spec, *([targets] if TABLE[name].head else []))
        for name, spec in specs.items()
    }
    unseen = _unseen(specs)

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        total, metrics, batch = jnp.zeros(()), {}, model.normalize(batch)
        for i, (name, each) in enumerate(made.items()):
            read = batch if isinstance(specs[name], DistilSpec) else _without(batch, unseen)
            loss, more = each(params, model, read, jax.random.fold_in(key, i), train)
            total += specs[name].weight * loss
            metrics |= {f"{name}/{metric}": value for metric, value in more.items()}
        return total, {"loss": total} | metrics

    return objective


def parts(specs: Mapping[str, Any]) -> Needs:
    """Which parts of the model the objectives need, besides a head."""
    asked = tuple(
        (name, TABLE[name].answers(spec))
        for name, spec in specs.items()
        if TABLE[name].answers(spec)
    )
    each = tuple(
        (name, TABLE[name].each(spec)) for name, spec in specs.items() if TABLE[name].each(spec)
    )
    compared = {
        name for spec in specs.values() if isinstance(spec, ContrastSpec) for name in spec.pair
    }
    laid = {name for spec in specs.values() if isinstance(spec, SyncSpec) for name in spec.laid}
    return Needs(
        any(TABLE[name].decoder for name in specs),
        any(TABLE[name].predictor for name in specs),
        asked,
        tuple(sorted(compared)),
        each,
        tuple(
            (spec.modality, spec.codes)
            for spec in specs.values()
            if isinstance(spec, VisualWordsSpec)
        ),
        tuple(spec.modality for spec in specs.values() if isinstance(spec, TraceSpec)),
        _unseen(specs),
        tuple(sorted(laid)),
    )


def _unseen(specs: Mapping[str, Any]) -> tuple[str, ...]:
    """Modalities that are answers alone."""
    return tuple(sorted({spec.teacher for spec in specs.values() if isinstance(spec, DistilSpec)}))


def _without(batch: Batch, modalities: tuple[str, ...]) -> Batch:
    return replace(
        batch,
        particles={name: each for name, each in batch.particles.items() if name not in modalities},
    )


def classifies(specs: Mapping[str, Any]) -> bool:
    """Whether the objectives need a classification head, and so labels."""
    return any(TABLE[name].head for name in specs)


def check(specs: Mapping[str, Any], modalities: Mapping[str, Any]) -> None:
    """Raises UserError for an objective of modalities that the data do not have."""
    for name, spec in specs.items():
        lacking = [each for each in TABLE[name].reads(spec) if each not in modalities]
        if lacking:
            raise UserError(
                f"objective {name} reads {lacking[0]}, which "
                f"config.data.modalities={tuple(modalities)} lacks: add "
                "it there, or leave the objective out."
            )
