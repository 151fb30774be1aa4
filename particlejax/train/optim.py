# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules: an OptimSpec becomes one optax transformation."""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from particlejax.config.renames import old_parameter
from particlejax.config.training import FinetuneSpec, OptimSpec
from particlejax.core import tree
from particlejax.core.typing import Array, Params

# No weight decay for norms, biases and single vectors, whose scale does not limit capacity
# (arXiv:1706.05350), nor for statistics (mean, var) and codebook centers, which are fixed.
_BLOCK_PARAMS = re.compile(
    r"(^|/)encoder/transformer/(blocks|tuned)/"
)  # [blocks from the bottom, ...]
_BELOW_BLOCKS = re.compile(r"(^|/)encoder/(?!transformer/)")  # the embedding layers
_NO_DECAY = re.compile(r"(^|/)(bias|scale|token|log_sharpness|centres|mean|var)$")


def decay_mask(params: Params) -> Params:
    """Mask of the parameters with weight decay, a tree of bool."""
    return tree.map_named(lambda name, leaf: not _NO_DECAY.search(name), params)


def learning_rate_schedule(spec: OptimSpec, steps: int) -> optax.Schedule:
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
        clipped_by_path = dict(zip(flat, clipped, strict=True))
        return tree.map_named(lambda name, _: clipped_by_path[name], updates), state

    return optax.GradientTransformation(clip.init, update)


def build_optimizer(
    spec: OptimSpec,
    steps: int,
    final_transform: optax.GradientTransformation | None = None,
    freeze: str = "",
) -> optax.GradientTransformation:
    """Gradient clipping, then AdamW or SGD with decoupled weight decay over `steps` steps, then
    `final_transform`.

    freeze: regular expression of paths with zero updates and no optimizer moments; '': none.
    """
    rate = learning_rate_schedule(spec, steps)
    clip = clip_by_global_norm(spec.grad_clip_norm) if spec.grad_clip_norm else optax.identity()
    decay = optax.add_decayed_weights(spec.weight_decay, decay_mask)
    update_rule = (
        optax.trace(spec.momentum) if spec.name == "sgd" else optax.scale_by_adam(spec.b1, spec.b2)
    )
    chain = optax.chain(
        clip,
        update_rule,
        decay,
        optax.scale_by_learning_rate(rate),
        *([final_transform] if final_transform else []),
    )
    if not freeze:
        return chain

    def match_freeze(frozen: bool) -> Callable[[Params], Params]:
        return lambda params: tree.map_named(
            lambda name, _: bool(re.search(freeze, name)) == frozen, params
        )

    return optax.chain(
        optax.masked(chain, match_freeze(False)),
        optax.masked(optax.set_to_zero(), match_freeze(True)),
    )


def layerwise_decay(
    tune: FinetuneSpec, depth: int, steps: int
) -> optax.GradientTransformation | None:
    """Scales updates per layer: layer decay (arXiv:2106.08254) and gradual unfreezing
    (arXiv:1801.06146).

    Layers above the blocks always train at the full rate. Blocks unfreeze one by one from the top,
    the embedding last; frozen updates are exactly zero. Moments accumulate while frozen, so that
    the first update is not an outlier.
    """
    if tune.layer_decay == 1 and not tune.gradual_unfreeze_fraction:
        return None
    layers_above = jnp.arange(depth, 0, -1)  # number of layers above each block, including the head

    def factor(layer: Array, step: Array) -> Array:
        start_step = jnp.ceil(tune.gradual_unfreeze_fraction * steps * layer / (depth + 1))
        return jnp.where(step >= start_step, tune.layer_decay ** layer.astype(jnp.float32), 0.0)

    def update(updates: Params, step: Array, params: Params | None = None) -> tuple[Params, Array]:
        del params

        def scale_leaf(name: str, leaf: Array) -> Array:
            if _BLOCK_PARAMS.search(name):
                return leaf * factor(layers_above, step).reshape(depth, *(1,) * (leaf.ndim - 1))
            return (
                leaf * factor(jnp.asarray(depth + 1), step) if _BELOW_BLOCKS.search(name) else leaf
            )

        return tree.map_named(scale_leaf, updates), step + 1

    def init(params: Params) -> Any:
        del params
        return jnp.zeros((), jnp.int32)

    return optax.GradientTransformation(init, update)
