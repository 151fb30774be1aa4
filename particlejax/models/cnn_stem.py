# SPDX-License-Identifier: Apache-2.0
"""CNN stem: a published 3D CNN, run on each sub-clip inside the step, makes the token of a
particle.

Legend: B rows, L slots, P numbers of a payload, N sub-clips, D width.
"""

import math
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from particlejax.config.model import StemSpec
from particlejax.core import tree
from particlejax.core.typing import Params, UserError
from particlejax.models.zoo import backbones
from particlejax.nn.dense import Dense

VISION = "vision"  # the modality whose payloads are sub-clips
PATH = f"encoder/payload_{VISION}/network/"  # prefix of the network's parameters in the model's


class CNNStem(nn.Module):
    """Tokens [B, L, D] of payloads [B, L, P]: mean-pooled feature map, layer norm, Dense layer.

    Holds only the parameters that the endpoint depends on. Empty slots are computed as well.
    """

    spec: StemSpec
    patch_size: tuple[int, ...]  # frames, rows and columns of a payload
    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, payload_BLP: Array) -> Array:
        network, endpoint = stem_network(self.spec, self.dtype)
        needed_shapes, unused_shapes = split_parameters(network, endpoint, self.patch_size)
        params = self.param(
            "network", lambda key: backbones.random_params(key, tree.nest(needed_shapes))
        )
        # XLA removes all operations that use them
        unused_params = {
            name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in unused_shapes.items()
        }
        all_params = tree.nest({**tree.flatten(params), **unused_params})
        feature_map = network.apply(
            {"params": all_params}, payload_BLP.reshape(-1, *self.patch_size, 3)
        )[1][endpoint]
        mean_ND = jnp.mean(
            feature_map.astype(jnp.float32), axis=tuple(range(1, feature_map.ndim - 1))
        )
        features = nn.LayerNorm(dtype=self.dtype, name="norm")(
            mean_ND.reshape(*payload_BLP.shape[:2], -1)
        )
        return Dense(self.embed_dim, dtype=self.dtype, name="project")(features)


def check_stem(spec: StemSpec, base: tuple[int, ...]) -> None:
    """Raises UserError if the network is no 3D CNN, or has no such feature map for cuboids of this
    size ((): none).
    """
    published = backbones.find_backbone(spec.model)
    if published.inputs:
        raise UserError(
            f"config.model.stem.model={spec.model!r} is no 3D CNN: choose one, such as i3d or "
            "x3d_xs."
        )
    if len(base) != 3:
        raise UserError(
            f"config.model.stem needs sub-clips but there is no modality {VISION!r}: add it "
            "to config.data.modalities, or leave config.model.stem.model empty."
        )
    net, endpoint = stem_network(spec, jnp.float32)
    shape = " x ".join(map(str, base))
    too_small = f"cuboids of {shape}, config.particles.patch_size, are too small for {spec.model}"
    try:
        maps = _feature_maps(net, base)
    except (
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:  # pooling or Dense layers with an empty input
        raise UserError(f"{too_small}: make them larger.") from error
    if endpoint not in maps:
        raise UserError(
            f"config.model.stem.endpoint={endpoint!r} is not a feature map of {spec.model}: "
            f"choose one of {', '.join(maps)}."
        )
    if not math.prod(maps[endpoint].shape):
        raise UserError(f"{too_small}: the feature map at {endpoint} is empty, make them larger.")


def stem_network(spec: StemSpec, dtype: Any) -> tuple[nn.Module, str]:
    """The network of a spec and its endpoint."""
    published = backbones.find_backbone(spec.model)
    return published.net.clone(dtype=dtype), spec.endpoint or published.default_endpoint


@lru_cache(maxsize=32)
def split_parameters(
    network: nn.Module, endpoint: str, patch_size: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes by path of the parameters that an endpoint depends on, and of the others, such as a
    head's.
    """
    clip = jax.ShapeDtypeStruct((1, *patch_size, 3), jnp.float32)
    flat = tree.flatten(jax.eval_shape(network.init, jax.random.key(0), clip)["params"])

    def apply(params: Params, clip: Array) -> Array:
        return network.apply({"params": tree.nest(params)}, clip)[1][endpoint]

    program = jax.make_jaxpr(apply)(flat, clip).jaxpr
    needed_variables = set(program.outvars)
    for equation in reversed(program.eqns):
        if needed_variables.intersection(equation.outvars):
            needed_variables.update(
                variable for variable in equation.invars if isinstance(variable, core.Var)
            )
    names = sorted(flat)  # same order as the leaves of a dict
    needed = {
        name
        for name, variable in zip(names, program.invars, strict=False)
        if variable in needed_variables
    }
    return (
        {name: flat[name] for name in names if name in needed},
        {name: flat[name] for name in names if name not in needed},
    )


@lru_cache(maxsize=32)
def _feature_maps(network: nn.Module, patch_size: tuple[int, ...]) -> dict[str, Any]:
    clip = jax.ShapeDtypeStruct((1, *patch_size, 3), jnp.float32)
    return jax.eval_shape(
        lambda key, clip: network.init_with_output(key, clip)[0][1], jax.random.key(0), clip
    )
