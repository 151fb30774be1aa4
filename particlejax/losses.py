# SPDX-License-Identifier: Apache-2.0
"""Losses and the means they are taken in: over particles within a clip, then over clips, never over
rows.

Legend: B rows, L slots, S clips of a row, P numbers of a payload, C classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped


class Mean(NamedTuple):
    """A mean, and the number of clips (particles, pairs ...) that it was taken over.

    Parts of a whole (micro-batches, validation batches) have different numbers of them, so only the
    weights tell how their means recombine. The value of a mean over nothing is 0.
    """

    value: Float[Array, ""]
    weight: Float[Array, ""]


Means = dict[str, Mean]  # by name of the metric


def mean_over(values: Shaped[Array, "..."], mask: Bool[Array, "..."]) -> Mean:
    """Mean of the values where the mask holds, weighted by how many these are."""
    return Mean(mean(values, mask), jnp.sum(mask, dtype=jnp.float32))


def membership(segment: Int[Array, "B L"], num_clips: int) -> Float[Array, "B L S"]:
    """1 where slot l belongs to clip s of its row."""
    return jax.nn.one_hot(segment - 1, num_clips)  # -1, an empty slot, is a row of zeros


def clip_mean(
    values: Float[Array, "B L *D"],
    segment: Int[Array, "B L"],
    num_clips: int,
    weight: Float[Array, "B L"] | None = None,
) -> Float[Array, "B S *D"]:
    """Mean over each clip's particles, weighted by `weight` where there is one; zeros for a clip
    that has none.
    """
    weighted_membership = membership(segment, num_clips)
    if weight is not None:
        weighted_membership *= weight[..., None]
    total = jnp.einsum("bls,bl...->bs...", weighted_membership, values)
    total_weight = jnp.maximum(weighted_membership.sum(axis=1), 1.0)
    return total / total_weight.reshape(*total_weight.shape, *(1,) * (values.ndim - 2))


def mean(values: Shaped[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Mean of the values where the mask holds; 0 where it holds nowhere."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def normalize_payload(payload: Float[Array, "... P"]) -> Float[Array, "... P"]:
    """Each payload with mean 0 and variance 1, so that contrast counts and brightness does not."""
    centered = payload - payload.mean(axis=-1, keepdims=True)
    return centered / jnp.sqrt(jnp.var(payload, axis=-1, keepdims=True) + 1e-6)


def squared_error(
    predicted: Float[Array, "B L P"], target: Float[Array, "B L P"]
) -> Float[Array, "B L"]:
    """Mean squared error of each payload."""
    return jnp.square(predicted - target).mean(axis=-1)


def cross_entropy(
    logits: Float[Array, "... C"], label: Int[Array, "..."], smoothing: float = 0.0
) -> Float[Array, "..."]:
    """Softmax cross-entropy; `smoothing` is the share of the target spread over all classes
    (arXiv:1512.00567).
    """
    return soft_cross_entropy(
        logits, optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), smoothing)
    )


def soft_cross_entropy(
    logits: Float[Array, "... C"], target: Float[Array, "... C"], focal_gamma: float = 0.0
) -> Float[Array, "..."]:
    """Softmax cross-entropy to a distribution; each class's part times (1 - p)^focus (focal loss,
    arXiv:1708.02002).
    """
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(target * log_p * _focal_factor(log_p, focal_gamma), axis=-1)


def binary_cross_entropy(
    logits: Float[Array, "... C"],
    target: Float[Array, "... C"],
    focal_gamma: float = 0.0,
    pos_weight: Float[Array, " C"] | float = 1.0,
) -> Float[Array, "..."]:
    """Mean over classes that each hold or not; times (1 - p of what is true)^focus
    (arXiv:1708.02002), and times `pos_weight` where a class holds.
    """
    log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    if not isinstance(pos_weight, float):  # [C] to the rank of the logits
        pos_weight = jnp.broadcast_to(pos_weight, target.shape)
    return -(
        pos_weight * target * log_p * _focal_factor(log_p, focal_gamma)
        + (1 - target) * log_not_p * _focal_factor(log_not_p, focal_gamma)
    ).mean(axis=-1)


def _focal_factor(log_p: Float[Array, "... C"], focal_gamma: float) -> Float[Array, "... C"]:
    """(1 - p)^focus, with a slope also where p is 1."""
    return (
        jnp.maximum(1 - jnp.exp(log_p), 1e-6) ** focal_gamma
        if focal_gamma
        else jnp.ones_like(log_p)
    )


def symmetric_kl(
    first_logits: Float[Array, "... C"], second_logits: Float[Array, "... C"]
) -> Float[Array, "..."]:
    """Mean of both Kullback-Leibler divergences between two softmaxes (R-Drop,
    arXiv:2106.14448).
    """
    first_log_p, second_log_p = jax.nn.log_softmax(first_logits), jax.nn.log_softmax(second_logits)
    return (
        jnp.sum(
            (jnp.exp(first_log_p) - jnp.exp(second_log_p)) * (first_log_p - second_log_p), axis=-1
        )
        / 2
    )


def class_weights(counts: Float[Array, " C"], beta: float) -> Float[Array, " C"]:
    """1 over the effective number of clips of each class, which at beta 1 is their number; mean 1
    over the clips (arXiv:1901.05555); 0 for an absent class.
    """
    effective = counts if beta == 1 else (1 - beta**counts) / (1 - beta)
    weights = jnp.where(counts > 0, 1 / jnp.maximum(effective, 1e-9), 0.0)
    return weights * counts.sum() / jnp.maximum(jnp.sum(weights * counts), 1e-9)
