# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules: an OptimSpec becomes one optax transformation."""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from particlejax.config.experiment import OptimSpec
from particlejax.config.renames import old_parameter
from particlejax.config.training import FinetuneSpec
from particlejax.core import tree
from particlejax.core.typing import Array, Params

# No weight decay for norms, biases and single vectors, whose scale does not limit capacity
# (arXiv:1706.05350), nor for statistics (mean, var) and codebook centers, which are fixed.
_STACKED = re.compile(r"(^|/)encoder/transformer/(blocks|tuned)/")  # [blocks from the bottom, ...]
_BELOW = re.compile(r"(^|/)encoder/(?!transformer/)")  # the embedding layers
_SPARED = re.compile(r"(^|/)(bias|scale|token|log_sharpness|centres|mean|var)$")


def decay_mask(params: Params) -> Params:
    """Mask of the parameters with weight decay, a tree of bool."""
    return tree.map_named(lambda name, leaf: not _SPARED.search(name), params)


def schedule(spec: OptimSpec, steps: int) -> optax.Schedule:
    """Linear warm-up over the first share of the steps, then a cosine to `final` of the peak."""
    steps = spec.schedule_steps or steps
    warmup = round(spec.warmup_ratio * steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else spec.learning_rate,
        spec.learning_rate,
        warmup,
        max(steps, warmup + 1),
        spec.learning_rate * spec.final_lr_ratio,
    )


def in_order(params: Params) -> dict[str, Array]:
    """Leaves by path, sorted by their format-1 names: sums over them stay bit-identical when a
    parameter is renamed.
    """
    flat = tree.flatten(params)
    return {name: flat[name] for name in sorted(flat, key=lambda n: old_parameter(n).split("/"))}


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm that sums in the order of `in_order`."""
    clip = optax.clip_by_global_norm(largest)

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        flat = in_order(updates)
        clipped, state = clip.update(list(flat.values()), state, params)
        found = dict(zip(flat, clipped, strict=True))
        return tree.map_named(lambda name, _: found[name], updates), state

    return optax.GradientTransformation(clip.init, update)


def build(
    spec: OptimSpec, steps: int, after: optax.GradientTransformation | None = None, freeze: str = ""
) -> optax.GradientTransformation:
    """Gradient clipping, then AdamW or SGD with decoupled weight decay over `steps` steps, then
    `after`.

    freeze: regular expression of paths with zero updates and no optimizer moments; '': none.
    """
    rate = schedule(spec, steps)
    clip = clip_by_global_norm(spec.grad_clip_norm) if spec.grad_clip_norm else optax.identity()
    decay = optax.add_decayed_weights(spec.weight_decay, decay_mask)
    direction = (
        optax.trace(spec.momentum) if spec.name == "sgd" else optax.scale_by_adam(spec.b1, spec.b2)
    )
    chain = optax.chain(
        clip, direction, decay, optax.scale_by_learning_rate(rate), *([after] if after else [])
    )
    if not freeze:
        return chain

    def named(wanted: bool) -> Callable[[Params], Params]:
        return lambda params: tree.map_named(
            lambda name, _: bool(re.search(freeze, name)) == wanted, params
        )

    return optax.chain(
        optax.masked(chain, named(False)), optax.masked(optax.set_to_zero(), named(True))
    )


def layered(tune: FinetuneSpec, depth: int, steps: int) -> optax.GradientTransformation | None:
    """Scales updates per layer: layer decay (arXiv:2106.08254) and gradual unfreezing
    (arXiv:1801.06146).

    Layers above the blocks always train at the full rate. Blocks unfreeze one by one from the top,
    the embedding last; frozen updates are exactly zero. Moments accumulate while frozen, so that
    the first update is not an outlier.
    """
    if tune.layer_decay == 1 and not tune.gradual_unfreeze_fraction:
        return None
    under = jnp.arange(depth, 0, -1)  # number of layers above each block, including the head

    def factor(number: Array, step: Array) -> Array:
        begins = jnp.ceil(tune.gradual_unfreeze_fraction * steps * number / (depth + 1))
        return jnp.where(step >= begins, tune.layer_decay ** number.astype(jnp.float32), 0.0)

    def update(updates: Params, step: Array, params: Params | None = None) -> tuple[Params, Array]:
        del params

        def scaled(name: str, leaf: Array) -> Array:
            if _STACKED.search(name):
                return leaf * factor(under, step).reshape(depth, *(1,) * (leaf.ndim - 1))
            return leaf * factor(jnp.asarray(depth + 1), step) if _BELOW.search(name) else leaf

        return tree.map_named(scaled, updates), step + 1

    def init(params: Params) -> Any:
        del params
        return jnp.zeros((), jnp.int32)

    return optax.GradientTransformation(init, update)
