# SPDX-License-Identifier: Apache-2.0
"""Functional interface of published networks: a pair of pure functions per variant.

Used as classifiers, as feature extractors and as teachers. Legend: B clips, T frames, H rows, W
columns, D width of features, C classes.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.core import tree
from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import Params, UserError
from particlejax.models.zoo.networks import VARIANTS, BackboneSpec, with_size
from particlejax.models.zoo.video_transformers import Grids


class Backbone(NamedTuple):
    """init(key) -> params; apply(params, video [B, T, H, W, 3], normalized) -> (logits [B, C],
    features by name).

    Networks with other inputs than video take the arrays of `spec.inputs` instead, batched.
    """

    spec: BackboneSpec
    init: Callable[[Array], Params]
    apply: Callable[..., tuple[Array, dict[str, Array]]]


def find_backbone(name: str) -> BackboneSpec:
    """The variant of this name. Raises UserError for an unknown name."""
    if name not in VARIANTS:
        raise UserError(f"there is no model {name!r}: {did_you_mean(name, VARIANTS)}")
    return dataclasses.replace(VARIANTS[name], name=name)


def build_backbone(
    spec: BackboneSpec, num_classes: int = 0, num_frames: int = 0, image_size: int = 0
) -> Backbone:
    """The backbone of a spec; classes and sizes default to the published ones.

    Raises UserError for classes of a network without a head, and for sizes of a network without
    sizes.
    """
    if num_classes and not getattr(spec.net, "classes", 0):
        raise UserError(
            f"a {spec.kind} has no head for {num_classes} classes: leave config.num_classes at 0."
        )
    spec = with_size(spec, num_frames, image_size) if num_frames or image_size else spec
    net = spec.net.clone(classes=num_classes) if num_classes else spec.net

    def init(key: Array) -> Params:
        inputs = [jax.ShapeDtypeStruct((1, *shape), dtype) for shape, dtype in spec.examples]
        if (
            spec.inputs and not spec.sound
        ):  # a Transformer's parameters are stacked, so they are few
            return net.init(key, *(jnp.zeros(shape.shape, shape.dtype) for shape in inputs))[
                "params"
            ]
        return random_params(key, jax.eval_shape(net.init, key, *inputs)["params"])

    def apply(params: Params, *inputs: Array) -> tuple[Array, dict[str, Array]]:
        return net.apply({"params": params}, *inputs)

    return Backbone(dataclasses.replace(spec, net=net), init, apply)


def position_grids(backbone: Backbone) -> Grids:
    """Learned position tables by path: number of tokens before the grid, the grid, whether its
    frames are square.
    """
    return getattr(backbone.spec.net, "grids", {})


def random_params(key: Array, shapes: Any) -> Params:
    """Random parameters: He-initialized kernels (arXiv:1502.01852), small head; scales and
    variances one, else zero.

    Uses one random draw for all: linen's own, one per kernel, takes XLA on CPU 100 seconds to
    compile for I3D.
    """
    kernels = {name: leaf for name, leaf in tree.flatten(shapes).items() if name.endswith("kernel")}
    offsets = np.cumsum([leaf.size for leaf in kernels.values()])
    draws = dict(
        zip(
            kernels,
            jnp.split(jax.random.normal(key, (int(offsets[-1]),)), offsets[:-1]),
            strict=True,
        )
    )

    def leaf(name: str, shape: jax.ShapeDtypeStruct) -> Array:
        if name in draws:
            std = 0.01 if name == "head/kernel" else math.sqrt(2 * shape.shape[-1] / shape.size)
            return draws[name].reshape(shape.shape) * std
        return (jnp.ones if name.endswith(("scale", "var")) else jnp.zeros)(shape.shape)

    return tree.map_named(leaf, shapes)


def normalize(spec: BackboneSpec, pixels: Array) -> Array:
    """Normalizes pixels, uint8 or float in [0, 255], as the network expects, float32."""
    mean, std = (
        np.broadcast_to(np.float32(statistic), 3)[(None,) * (pixels.ndim - 1)]
        for statistic in (spec.mean, spec.std)
    )
    return (jnp.asarray(pixels, jnp.float32) / 255.0 - mean) / std


def classify(backbone: Backbone, params: Params, pixels: Array) -> Array:
    """Logits [B, C] of clips of pixels in [0, 255]."""
    return backbone.apply(params, normalize(backbone.spec, pixels))[0]


def features(
    backbone: Backbone, params: Params, pixels: Array, endpoint: str = "", pool: bool = True
) -> Array:
    """Features of an endpoint for clips of pixels in [0, 255]: [B, D], or if not `pool` the map
    [B, T, H, W, D].

    A Transformer's map is its tokens [B, L, D]. Audio networks take samples [B, N], and their maps
    have mel bands as rows; text networks take ids [B, L], 0 for padding.

    endpoint: '' is the network's last map, or for text its sentence embedding. Raises UserError for
    an unknown endpoint, and for a network with several inputs.
    """
    spec = backbone.spec
    if spec.text:
        sentence, feature_maps = backbone.apply(params, pixels, pixels > 0)
        feature_maps = feature_maps | {spec.default_endpoint: sentence[:, None]}
    elif spec.video or spec.sound:
        _, feature_maps = backbone.apply(params, normalize(spec, pixels) if spec.video else pixels)
    else:
        raise UserError(f"a {spec.kind} takes several inputs: choose another model for features.")
    name = endpoint or spec.default_endpoint
    if name not in feature_maps:
        raise UserError(
            f"the model has no feature map {name!r}: choose one of {', '.join(feature_maps)}."
        )
    return (
        jnp.mean(feature_maps[name], axis=tuple(range(1, feature_maps[name].ndim - 1)))
        if pool
        else feature_maps[name]
    )


def parameter_shapes(backbone: Backbone) -> Any:
    """Shapes of the parameters, without computing them."""
    return _parameter_shapes(backbone.spec)


@lru_cache(maxsize=64)  # traces the network, half a second
def _parameter_shapes(spec: BackboneSpec) -> Any:
    return jax.eval_shape(build_backbone(spec).init, jax.random.key(0))
