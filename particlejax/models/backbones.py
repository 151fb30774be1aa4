# SPDX-License-Identifier: Apache-2.0
"""3D CNNs at the border: a table of variants, each a pair of pure functions over the linen modules.

Used alone as a classifier, as an embedder whose features become particles, and as a teacher. Legend: B clips, T frames,
H rows, W columns, D width of features, C classes.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax import tree
from particlejax.nn.cnn import C3D, I3D
from particlejax.nn.resnet3d import X3D, ResNet
from particlejax.typing import Params, UserError


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """A network, the clips that it was made for and how their pixels are normalised."""

    kind: str  # of names in `adapt.names`
    net: nn.Module
    frames: int
    size: int  # rows and columns
    last: str  # endpoint that `features` gives by default
    mean: float = 0.45  # of pixels in [0, 1]
    std: float = 0.225


class Backbone(NamedTuple):
    """init(key) -> params; apply(params, video [B, T, H, W, 3], normalised) -> (logits [B, C], features by name)."""

    spec: BackboneSpec
    init: Callable[[Array], Params]
    apply: Callable[[Params, Array], tuple[Array, dict[str, Array]]]


# Widths and depths as published; the tiny ones are for tests and smoke runs.
VARIANTS: dict[str, BackboneSpec] = {
    "c3d": BackboneSpec("c3d", C3D(487), 16, 112, "fc6"),  # 487: Sports-1M
    "i3d": BackboneSpec("i3d", I3D(400), 64, 224, "Mixed_5c", 0.5, 0.5),
    "i3d_r50": BackboneSpec("resnet", ResNet(400), 8, 224, "stage4"),
    "x3d_xs": BackboneSpec("x3d", X3D(400, window=(4, 5, 5)), 4, 160, "stage4"),
    "x3d_s": BackboneSpec("x3d", X3D(400, window=(13, 5, 5)), 13, 160, "stage4"),
    "x3d_m": BackboneSpec("x3d", X3D(400), 16, 224, "stage4"),
    "x3d_l": BackboneSpec("x3d", X3D(400, depths=(5, 10, 25, 15), window=(16, 10, 10)), 16, 312, "stage4"),
    "c3d_tiny": BackboneSpec("c3d", C3D(10, ((4,), (4,), (4, 4), (8, 8), (8, 8)), 16), 16, 32, "fc6"),
    "i3d_tiny": BackboneSpec("i3d", I3D(400, share=16), 16, 32, "Mixed_5c", 0.5, 0.5),
    "i3d_r50_tiny": BackboneSpec("resnet", ResNet(10, 2, window=(2, 1, 1)), 4, 32, "stage4"),
    "x3d_tiny": BackboneSpec("x3d", X3D(10, (1, 1, 3, 2), (8, 8, 16, 32), (18, 18, 36, 72), (8, 8, 8, 8), 32,
                                        (4, 1, 1)), 4, 32, "stage4"),
}


def find(name: str) -> BackboneSpec:
    """The variant of this name. Raises UserError for another's."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, 1)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(VARIANTS)}."
        raise UserError(f"there is no model {name!r}: {remedy}")
    return VARIANTS[name]


def build(spec: BackboneSpec, classes: int = 0) -> Backbone:
    """The backbone of a spec, with as many classes as it was published with where none are named."""
    net = spec.net.clone(classes=classes) if classes else spec.net

    def init(key: Array) -> Params:
        clip = jax.ShapeDtypeStruct((1, spec.frames, spec.size, spec.size, 3), jnp.float32)
        return _drawn(key, jax.eval_shape(net.init, key, clip)["params"])

    def apply(params: Params, video: Array) -> tuple[Array, dict[str, Array]]:
        return net.apply({"params": params}, video)

    return Backbone(dataclasses.replace(spec, net=net), init, apply)


def _drawn(key: Array, shapes: Any) -> Params:
    """Kernels by He's rule (arXiv:1502.01852), the head's small, scales and variances one, all else zero.

    One draw for all: linen's own, one for each kernel, takes XLA's CPU 100 seconds to compile for I3D.
    """
    kernels = {name: leaf for name, leaf in tree.flatten(shapes).items() if name.endswith("kernel")}
    ends = np.cumsum([leaf.size for leaf in kernels.values()])
    numbers = dict(zip(kernels, jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1]), strict=True))

    def leaf(name: str, shape: jax.ShapeDtypeStruct) -> Array:
        if name in numbers:
            deviation = 0.01 if name == "head/kernel" else math.sqrt(2 * shape.shape[-1] / shape.size)
            return numbers[name].reshape(shape.shape) * deviation
        return (jnp.ones if name.endswith(("scale", "var")) else jnp.zeros)(shape.shape)

    return tree.map_named(leaf, shapes)


def normalise(spec: BackboneSpec, pixels: Array) -> Array:
    """Pixels, uint8 or float in [0, 255], as the network expects them, float32."""
    return (jnp.asarray(pixels, jnp.float32) / 255.0 - spec.mean) / spec.std


def classify(backbone: Backbone, params: Params, pixels: Array) -> Array:
    """Logits [B, C] of clips of pixels in [0, 255]."""
    return backbone.apply(params, normalise(backbone.spec, pixels))[0]


def features(backbone: Backbone, params: Params, pixels: Array, endpoint: str = "", pooled: bool = True) -> Array:
    """An endpoint's features of clips of pixels in [0, 255]: [B, D], or the map [B, T, H, W, D] where not `pooled`.

    endpoint: '' is the network's last map. Raises UserError for one that it does not have.
    """
    name = endpoint or backbone.spec.last
    _, ends = backbone.apply(params, normalise(backbone.spec, pixels))
    if name not in ends:
        raise UserError(f"the model has no feature map {name!r}: choose one of {', '.join(ends)}.")
    return jnp.mean(ends[name], axis=tuple(range(1, ends[name].ndim - 1))) if pooled else ends[name]


def parameter_shapes(backbone: Backbone) -> Any:
    """Shapes of the parameters, without computing them."""
    return jax.eval_shape(backbone.init, jax.random.key(0))
