# SPDX-License-Identifier: Apache-2.0
"""Optimisers and schedules: an OptimSpec becomes one optax transformation."""

import re

import optax

from particlejax import tree
from particlejax.spec import OptimSpec
from particlejax.typing import Params

# Norms, biases and lone vectors are not decayed: their size says nothing about complexity (arXiv:1706.05350).
# Statistics (mean, var) must stay as they came.
_SPARED = re.compile(r"(^|/)(bias|scale|token|log_sharpness|mean|var)$")


def decay_mask(params: Params) -> Params:
    """Which parameters weight decay shrinks, bool by path."""
    return tree.map_named(lambda name, leaf: not _SPARED.search(name), params)


def schedule(spec: OptimSpec, steps: int) -> optax.Schedule:
    """Linear warm-up over the first share of the steps, then a cosine to `final` of the peak."""
    warmup = round(spec.warmup * steps)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else spec.rate, spec.rate, warmup, max(steps, warmup + 1),
                                              spec.rate * spec.final)


def build(spec: OptimSpec, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW or SGD with decoupled weight decay, over `steps` steps."""
    rate = schedule(spec, steps)
    clip = optax.clip_by_global_norm(spec.clip_norm) if spec.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(spec.weight_decay, decay_mask)
    direction = optax.trace(spec.momentum) if spec.name == "sgd" else optax.scale_by_adam(spec.b1, spec.b2)
    return optax.chain(clip, direction, decay, optax.scale_by_learning_rate(rate))
