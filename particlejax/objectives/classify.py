# SPDX-License-Identifier: Apache-2.0
"""Supervised learning: classification, multi-label classification or regression, with optional
R-Drop.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from particlejax import losses
from particlejax.config.objectives import ClassifySpec
from particlejax.core.typing import Params
from particlejax.losses import Mean, Means
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
    ) -> tuple[Mean, Means]:
        def compute_logits(key: Array) -> Array:
            tokens, _ = model.apply(
                params,
                "encode",
                batch.particles,
                batch.clip_index.shape[1],
                key=key if train else None,
            )
            return model.head(params, "head", tokens, batch.label.shape[1])

        logits, labeled = compute_logits(key), batch.label >= 0
        loss = losses.mean_over(_mixed_loss(spec, targets, logits, batch), labeled)
        metrics = _metrics(targets, logits, batch.label, labeled)
        if spec.rdrop_weight and train:
            second_logits = compute_logits(jax.random.fold_in(key, 1))
            kl = losses.mean_over(_rdrop_divergence(spec, logits, second_logits), labeled)
            second_loss = losses.mean(_mixed_loss(spec, targets, second_logits, batch), labeled)
            loss = loss._replace(
                value=(loss.value + second_loss) / 2 + spec.rdrop_weight * kl.value
            )
            metrics["rdrop_kl"] = kl
        return loss, {"loss": loss} | metrics

    return objective


def _mixed_loss(spec: ClassifySpec, targets: Targets | None, logits: Array, batch: Batch) -> Array:
    """Loss of each clip [B, S]; for mixed clips, weighted by their shares."""
    first, second = (
        _clip_loss(spec, targets, logits, jnp.maximum(label, 0)) * (label >= 0)
        for label in (batch.label, batch.second_label)
    )
    return batch.label_weight * first + (1 - batch.label_weight) * second


def _clip_loss(spec: ClassifySpec, targets: Targets | None, logits: Array, label: Array) -> Array:
    num_outputs = logits.shape[-1]
    table = jnp.eye(num_outputs) if targets is None else jnp.asarray(targets.table)
    target = table[label]
    if spec.loss == "regression":
        loss = losses.squared_error(logits, target)
    elif spec.loss == "sigmoid":
        smoothed = target * (1 - spec.label_smoothing) + spec.label_smoothing / 2
        weighted = targets is not None and targets.pos_weight is not None
        pos_weight = jnp.asarray(targets.pos_weight) if weighted else 1.0
        loss = losses.binary_cross_entropy(logits, smoothed, spec.focal_gamma, pos_weight)
    else:
        loss = losses.soft_cross_entropy(
            logits, optax.smooth_labels(target, spec.label_smoothing), spec.focal_gamma
        )
    return loss if targets is None else loss * jnp.asarray(targets.weight)[label]


def _rdrop_divergence(spec: ClassifySpec, first_logits: Array, second_logits: Array) -> Array:
    """Divergence between two predictions for a clip, [B, S]."""
    if spec.loss == "regression":
        return losses.squared_error(first_logits, second_logits)
    if spec.loss == "sigmoid":  # each class is a binary choice
        binary_logits = (
            jnp.stack([logits, jnp.zeros_like(logits)], axis=-1)
            for logits in (first_logits, second_logits)
        )
        return losses.symmetric_kl(*binary_logits).mean(axis=-1)
    return losses.symmetric_kl(first_logits, second_logits)


def _metrics(targets: Targets | None, logits: Array, label: Array, labeled: Array) -> Means:
    safe_label = jnp.maximum(label, 0)
    if targets is not None and targets.loss != "softmax":
        target = jnp.asarray(targets.table)[safe_label]
        if targets.loss == "regression":
            error = jnp.abs(logits - target)[..., 0] * targets.std
            return {"mae": losses.mean_over(error, labeled)}
        exact = ((logits > 0) == (target > 0.5)).all(axis=-1)
        return {"exact_match": losses.mean_over(exact, labeled)}
    rank = jnp.sum(logits > jnp.take_along_axis(logits, safe_label[..., None], -1), axis=-1)
    return {
        "top1": losses.mean_over(rank < 1, labeled),
        "top5": losses.mean_over(rank < 5, labeled),
    }


CLASSIFY = ObjectiveType(
    classify,
    heads=lambda spec, classes: classification(classes),
    modalities=lambda spec: (),
    labelled=True,
)
