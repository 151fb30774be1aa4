# SPDX-License-Identifier: Apache-2.0
"""Supervised learning: classification, multi-label classification or regression, with optional
R-Drop.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from particlejax import losses
from particlejax.config.model import ClassifySpec
from particlejax.core.typing import Metrics, Params
from particlejax.models.heads import classification
from particlejax.models.particle_model import Model
from particlejax.objectives.base import Objective, ObjectiveType
from particlejax.objectives.label_targets import Targets
from particlejax.particles.types import Batch


def classify(spec: ClassifySpec, targets: Targets | None = None) -> Objective:
    """Loss of each labeled clip; metrics: loss, and top1 and top5, or exact_match (sigmoid), or
    mae (regression).

    targets: maps labels to head targets; None: label l is class l.
    """

    def objective(
        params: Params, model: Model, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        def logits_of(key: Array) -> Array:
            tokens, _ = model.apply(
                params, "encode", batch.particles, batch.clip.shape[1], key=key if train else None
            )
            return model.head(params, "head", tokens, batch.label.shape[1])

        logits, labelled = logits_of(key), batch.label >= 0
        loss = losses.mean(_error(spec, targets, logits, batch), labelled)
        metrics = _figures(targets, logits, batch.label, labelled)
        if spec.rdrop_weight and train:
            other = logits_of(jax.random.fold_in(key, 1))
            apart = losses.mean(_apart(spec, logits, other), labelled)
            loss = (
                loss + losses.mean(_error(spec, targets, other, batch), labelled)
            ) / 2 + spec.rdrop_weight * apart
            metrics["rdrop_kl"] = apart
        return loss, {"loss": loss} | metrics

    return objective


def _error(spec: ClassifySpec, targets: Targets | None, logits: Array, batch: Batch) -> Array:
    """Loss of each clip [B, S]; for mixed clips, weighted by their shares."""
    first, second = (
        _error_of(spec, targets, logits, jnp.maximum(label, 0)) * (label >= 0)
        for label in (batch.label, batch.other)
    )
    return batch.share * first + (1 - batch.share) * second


def _error_of(spec: ClassifySpec, targets: Targets | None, logits: Array, label: Array) -> Array:
    outputs = logits.shape[-1]
    table = jnp.eye(outputs) if targets is None else jnp.asarray(targets.table)
    target = table[label]
    if spec.loss == "regression":
        each = losses.squared_error(logits, target)
    elif spec.loss == "sigmoid":
        smooth = target * (1 - spec.label_smoothing) + spec.label_smoothing / 2
        each = losses.binary_cross_entropy(logits, smooth, spec.focal_gamma)
    else:
        each = losses.soft_cross_entropy(
            logits, optax.smooth_labels(target, spec.label_smoothing), spec.focal_gamma
        )
    return each if targets is None else each * jnp.asarray(targets.weight)[label]


def _apart(spec: ClassifySpec, one: Array, other: Array) -> Array:
    """Divergence between two predictions for a clip, [B, S]."""
    if spec.loss == "regression":
        return losses.squared_error(one, other)
    if spec.loss == "sigmoid":  # each class is a binary choice
        pair = (jnp.stack([each, jnp.zeros_like(each)], axis=-1) for each in (one, other))
        return losses.disagreement(*pair).mean(axis=-1)
    return losses.disagreement(one, other)


def _figures(targets: Targets | None, logits: Array, label: Array, labelled: Array) -> Metrics:
    safe = jnp.maximum(label, 0)
    if targets is not None and targets.loss != "softmax":
        target = jnp.asarray(targets.table)[safe]
        if targets.loss == "regression":
            return {"mae": losses.mean(jnp.abs(logits - target)[..., 0] * targets.spread, labelled)}
        return {"exact_match": losses.mean(((logits > 0) == (target > 0.5)).all(axis=-1), labelled)}
    rank = jnp.sum(logits > jnp.take_along_axis(logits, safe[..., None], -1), axis=-1)
    return {"top1": losses.mean(rank < 1, labelled), "top5": losses.mean(rank < 5, labelled)}


CLASSIFY = ObjectiveType(
    classify,
    heads=lambda spec, classes: classification(classes),
    modalities=lambda spec: (),
    labelled=True,
)
