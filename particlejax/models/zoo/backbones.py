# SPDX-License-Identifier: Apache-2.0
"""Published networks at the border: each variant a pair of pure functions over its linen modules.

Used alone as a classifier, as an embedder whose features become particles, and as a teacher.
Legend: B clips, T frames, H rows, W columns, D width of features, C classes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.core import tree
from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import Params, UserError
from particlejax.models.zoo.networks import VARIANTS, BackboneSpec, resized
from particlejax.models.zoo.video_transformers import Grids


class Backbone(NamedTuple):
    """init(key) -> params; apply(params, video [B, T, H, W, 3], normalised) -> (logits [B, C],
    features by name).

    Networks of other things than videos take the arrays of `spec.inputs` instead, batched.
    """

    spec: BackboneSpec
    init: Callable[[Array], Params]
    apply: Callable[..., tuple[Array, dict[str, Array]]]


def find(name: str) -> BackboneSpec:
    """The variant of this name. Raises UserError for another's."""
    if name not in VARIANTS:
        raise UserError(f"there is no model {name!r}: {did_you_mean(name, VARIANTS)}")
    return VARIANTS[name]


def build(spec: BackboneSpec, classes: int = 0, frames: int = 0, size: int = 0) -> Backbone:
    """The backbone of a spec, with as many classes as it was published with where none are named,
    and the same for sizes.

    Raises UserError for classes of a network that has no head, and for another size of one that has
    no sizes.
    """
    if classes and not getattr(spec.net, "classes", 0):
        raise UserError(
            f"a {spec.kind} has no head for {classes} classes: leave config.num_classes at 0."
        )
    spec = resized(spec, frames, size) if frames or size else spec
    net = spec.net.clone(classes=classes) if classes else spec.net

    def init(key: Array) -> Params:
        inputs = [jax.ShapeDtypeStruct((1, *shape), dtype) for shape, dtype in spec.examples]
        if spec.inputs and not spec.sound:  # a Transformer's parameters are stacked, and so few
            return net.init(key, *(jnp.zeros(each.shape, each.dtype) for each in inputs))["params"]
        return drawn(key, jax.eval_shape(net.init, key, *inputs)["params"])

    def apply(params: Params, *inputs: Array) -> tuple[Array, dict[str, Array]]:
        return net.apply({"params": params}, *inputs)

    return Backbone(dataclasses.replace(spec, net=net), init, apply)


def grids(backbone: Backbone) -> Grids:
    """Learned tables of positions by path: how many tokens stand before the grid, the grid, whether
    its frames were square.
    """
    return getattr(backbone.spec.net, "grids", {})


def drawn(key: Array, shapes: Any) -> Params:
    """Kernels by He's rule (arXiv:1502.01852), the head's small, scales and variances one, all else
    zero.

    One draw for all: linen's own, one for each kernel, takes XLA's CPU 100 seconds to compile for
    I3D.
    """
    kernels = {name: leaf for name, leaf in tree.flatten(shapes).items() if name.endswith("kernel")}
    ends = np.cumsum([leaf.size for leaf in kernels.values()])
    numbers = dict(
        zip(kernels, jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1]), strict=True)
    )

    def leaf(name: str, shape: jax.ShapeDtypeStruct) -> Array:
        if name in numbers:
            deviation = (
                0.01 if name == "head/kernel" else math.sqrt(2 * shape.shape[-1] / shape.size)
            )
            return numbers[name].reshape(shape.shape) * deviation
        return (jnp.ones if name.endswith(("scale", "var")) else jnp.zeros)(shape.shape)

    return tree.map_named(leaf, shapes)


def normalise(spec: BackboneSpec, pixels: Array) -> Array:
    """Pixels, uint8 or float in [0, 255], as the network expects them, float32."""
    mean, std = (
        np.broadcast_to(np.float32(each), 3)[(None,) * (pixels.ndim - 1)]
        for each in (spec.mean, spec.std)
    )
    return (jnp.asarray(pixels, jnp.float32) / 255.0 - mean) / std


def classify(backbone: Backbone, params: Params, pixels: Array) -> Array:
    """Logits [B, C] of clips of pixels in [0, 255]."""
    return backbone.apply(params, normalise(backbone.spec, pixels))[0]


def features(
    backbone: Backbone, params: Params, pixels: Array, endpoint: str = "", pooled: bool = True
) -> Array:
    """An endpoint's features of clips of pixels in [0, 255]: [B, D], or the map [B, T, H, W, D]
    where not `pooled`.

    A Transformer's map is its tokens [B, L, D]. Networks of sound take samples [B, N] for pixels,
    and their maps have mel bands for rows; those of text take ids [B, L], 0 where there is no word.

    endpoint: '' is the network's last map, of text what it says of the sentence. Raises UserError
    for one that it does not have, and for a network that takes several things.
    """
    spec = backbone.spec
    if spec.text:
        sentence, ends = backbone.apply(params, pixels, pixels > 0)
        ends = ends | {spec.last: sentence[:, None]}
    elif spec.video or spec.sound:
        _, ends = backbone.apply(params, normalise(spec, pixels) if spec.video else pixels)
    else:
        raise UserError(
            f"a {spec.kind} takes several things at once: choose another model for features."
        )
    name = endpoint or spec.last
    if name not in ends:
        raise UserError(f"the model has no feature map {name!r}: choose one of {', '.join(ends)}.")
    return jnp.mean(ends[name], axis=tuple(range(1, ends[name].ndim - 1))) if pooled else ends[name]


def parameter_shapes(backbone: Backbone) -> Any:
    """Shapes of the parameters, without computing them."""
    return jax.eval_shape(backbone.init, jax.random.key(0))
