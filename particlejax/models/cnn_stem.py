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


class Stem(nn.Module):
    """Tokens [B, L, D] of payloads [B, L, P]: mean-pooled feature map, layer norm, Dense layer.

    Holds only the parameters that the endpoint depends on. Empty slots are computed as well.
    """

    spec: StemSpec
    base: tuple[int, ...]  # frames, rows and columns of a payload
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, payload_BLP: Array) -> Array:
        net, endpoint = network(self.spec, self.dtype)
        needed, rest = parts(net, endpoint, self.base)
        params = self.param("network", lambda key: backbones.drawn(key, tree.nest(needed)))
        # XLA removes all operations that use them
        unread = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in rest.items()}
        whole = tree.nest({**tree.flatten(params), **unread})
        found = net.apply({"params": whole}, payload_BLP.reshape(-1, *self.base, 3))[1][endpoint]
        mean_ND = jnp.mean(found.astype(jnp.float32), axis=tuple(range(1, found.ndim - 1)))
        features = nn.LayerNorm(dtype=self.dtype, name="norm")(
            mean_ND.reshape(*payload_BLP.shape[:2], -1)
        )
        return Dense(self.width, dtype=self.dtype, name="project")(features)


def check(spec: StemSpec, base: tuple[int, ...]) -> None:
    """Raises UserError if the network is no 3D CNN, or has no such feature map for cuboids of this
    size ((): none).
    """
    found = backbones.find(spec.model)
    if found.inputs:
        raise UserError(
            f"config.model.stem.model={spec.model!r} is no 3D CNN: choose one, such as i3d or "
            "x3d_xs."
        )
    if len(base) != 3:
        raise UserError(
            f"config.model.stem needs sub-clips but there is no modality {VISION!r}: add it "
            "to config.data.modalities, or leave config.model.stem.model empty."
        )
    net, endpoint = network(spec, jnp.float32)
    shape = " x ".join(map(str, base))
    small = f"cuboids of {shape}, config.particles.patch_size, are too small for {spec.model}"
    try:
        maps = _maps(net, base)
    except (
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:  # pooling or Dense layers with an empty input
        raise UserError(f"{small}: make them larger.") from error
    if endpoint not in maps:
        raise UserError(
            f"config.model.stem.endpoint={endpoint!r} is not a feature map of {spec.model}: "
            f"choose one of {', '.join(maps)}."
        )
    if not math.prod(maps[endpoint].shape):
        raise UserError(f"{small}: the feature map at {endpoint} is empty, make them larger.")


def network(spec: StemSpec, dtype: Any) -> tuple[nn.Module, str]:
    """The network of a spec and its endpoint."""
    found = backbones.find(spec.model)
    return found.net.clone(dtype=dtype), spec.endpoint or found.last


@lru_cache(maxsize=32)
def parts(
    net: nn.Module, endpoint: str, base: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes by path of the parameters that an endpoint depends on, and of the others, such as a
    head's.
    """
    clip = jax.ShapeDtypeStruct((1, *base, 3), jnp.float32)
    flat = tree.flatten(jax.eval_shape(net.init, jax.random.key(0), clip)["params"])

    def apply(params: Params, clip: Array) -> Array:
        return net.apply({"params": tree.nest(params)}, clip)[1][endpoint]

    program = jax.make_jaxpr(apply)(flat, clip).jaxpr
    read = set(program.outvars)
    for equation in reversed(program.eqns):
        if read.intersection(equation.outvars):
            read.update(each for each in equation.invars if isinstance(each, core.Var))
    names = sorted(flat)  # same order as the leaves of a dict
    needed = {
        name for name, variable in zip(names, program.invars, strict=False) if variable in read
    }
    return (
        {name: flat[name] for name in names if name in needed},
        {name: flat[name] for name in names if name not in needed},
    )


@lru_cache(maxsize=32)
def _maps(net: nn.Module, base: tuple[int, ...]) -> dict[str, Any]:
    clip = jax.ShapeDtypeStruct((1, *base, 3), jnp.float32)
    return jax.eval_shape(
        lambda key, clip: net.init_with_output(key, clip)[0][1], jax.random.key(0), clip
    )
