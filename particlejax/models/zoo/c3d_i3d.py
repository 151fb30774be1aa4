# SPDX-License-Identifier: Apache-2.0
"""3D CNNs without shortcuts: C3D (arXiv:1412.0767) and I3D, Inception inflated (arXiv:1705.07750).

Each takes video [B, T, H, W, 3], normalized as its weights expect, and returns logits [B, classes]
and its feature maps by name. Legend as in `conv3d`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from particlejax.models.zoo.conv3d import Conv, Norm, Triple, max_pool, mean_logits, mean_pool

Endpoints = dict[str, Array]


class C3D(nn.Module):
    """Eight 3x3x3 convolutions and two wide Dense layers, which fix the clip size."""

    classes: int
    # widths between pools
    groups: tuple[tuple[int, ...], ...] = ((64,), (128,), (256, 256), (512, 512), (512, 512))
    hidden: int = 4096
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> tuple[Array, Endpoints]:
        x, endpoints = x_BTHWC.astype(self.dtype), {}
        for i, widths in enumerate(self.groups, 1):
            for j, width in enumerate(widths):
                name = f"conv{i}" + ("" if len(widths) == 1 else "ab"[j])
                x = endpoints[name] = nn.relu(
                    Conv(width, (3, 3, 3), bias=True, dtype=self.dtype, name=name)(x)
                )
            pool = (1, 2, 2) if i == 1 else (2, 2, 2)
            if i == len(self.groups):  # 7 rows become 4, as Caffe rounds
                # exact, because ReLU leaves no negative values
                x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
            x = endpoints[f"pool{i}"] = max_pool(x, pool, pool, "none")
        x = x.reshape(x.shape[0], -1)
        for name in ("fc6", "fc7"):
            x = endpoints[name] = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name=name)(x))
        return nn.Dense(self.classes, name="head")(x.astype(jnp.float32)), endpoints


# For each Inception block: the widths of its four branches; 3x3x3 convolutions with their
# bottleneck.
_BLOCKS: dict[str, tuple[int, tuple[int, int], tuple[int, int], int]] = {
    "Mixed_3b": (64, (96, 128), (16, 32), 32),
    "Mixed_3c": (128, (128, 192), (32, 96), 64),
    "Mixed_4b": (192, (96, 208), (16, 48), 64),
    "Mixed_4c": (160, (112, 224), (24, 64), 64),
    "Mixed_4d": (128, (128, 256), (24, 64), 64),
    "Mixed_4e": (112, (144, 288), (32, 64), 64),
    "Mixed_4f": (256, (160, 320), (32, 128), 128),
    "Mixed_5b": (256, (160, 320), (32, 128), 128),
    "Mixed_5c": (384, (192, 384), (48, 128), 128),
}
_POOL_BEFORE: dict[str, tuple[str, Triple, Triple]] = {  # endpoint, window, stride
    "Mixed_3b": ("MaxPool3d_3a_3x3", (1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ("MaxPool3d_4a_3x3", (3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ("MaxPool3d_5a_2x2", (2, 2, 2), (2, 2, 2)),
}


class Unit(nn.Module):
    """Convolution, normalization without a scale, ReLU, padded as in TensorFlow."""

    features: int
    kernel: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> Array:
        x = Conv(
            self.features,
            (self.kernel,) * 3,
            (self.stride,) * 3,
            "same",
            dtype=self.dtype,
            name="conv",
        )(x_BTHWC)
        return nn.relu(Norm(1e-3, scale=False, dtype=self.dtype, name="norm")(x))


class Branch(nn.Module):
    """A sequence of units (name, width, kernel), after a 3x3x3 pool if `pooled`."""

    units: tuple[tuple[str, int, int], ...]
    pooled: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> Array:
        x = max_pool(x_BTHWC, (3, 3, 3), (1, 1, 1), "same") if self.pooled else x_BTHWC
        for name, width, kernel in self.units:
            x = Unit(width, kernel, dtype=self.dtype, name=name)(x)
        return x


class Mixed(nn.Module):
    """An Inception block: four parallel branches."""

    widths: tuple[int, tuple[int, int], tuple[int, int], int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> Array:
        width_0, widths_1, widths_2, width_3 = self.widths
        branches = [Branch((("Conv3d_0a_1x1", width_0, 1),), dtype=self.dtype, name="Branch_0")]
        for i, (reduced, width) in enumerate((widths_1, widths_2), 1):
            units = (("Conv3d_0a_1x1", reduced, 1), ("Conv3d_0b_3x3", width, 3))
            branches.append(Branch(units, dtype=self.dtype, name=f"Branch_{i}"))
        branches.append(
            Branch((("Conv3d_0b_1x1", width_3, 1),), pooled=True, dtype=self.dtype, name="Branch_3")
        )
        return jnp.concatenate([branch(x_BTHWC) for branch in branches], axis=-1)


class I3D(nn.Module):
    """Inception-v1 in three dimensions. Endpoints are named as in the paper's figure.

    Its last pool, 2 x 7 x 7, shrinks for clips of fewer than 9 frames or 193 rows, which the
    original rejects.
    """

    classes: int
    width_divisor: int = 1  # divisor of all widths, for tests
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> tuple[Array, Endpoints]:
        x, endpoints, dtype = x_BTHWC.astype(self.dtype), {}, self.dtype
        x = endpoints["Conv3d_1a_7x7"] = Unit(
            64 // self.width_divisor, 7, 2, dtype, name="Conv3d_1a_7x7"
        )(x)
        x = endpoints["MaxPool3d_2a_3x3"] = max_pool(x, (1, 3, 3), (1, 2, 2), "same")
        x = endpoints["Conv3d_2b_1x1"] = Unit(
            64 // self.width_divisor, 1, dtype=dtype, name="Conv3d_2b_1x1"
        )(x)
        x = endpoints["Conv3d_2c_3x3"] = Unit(
            192 // self.width_divisor, 3, dtype=dtype, name="Conv3d_2c_3x3"
        )(x)
        for name, widths in _BLOCKS.items():
            if name in _POOL_BEFORE:
                pool, window, stride = _POOL_BEFORE[name]
                x = endpoints[pool] = max_pool(x, window, stride, "same")
            x = endpoints[name] = Mixed(
                _divide_widths(widths, self.width_divisor), dtype, name=name
            )(x)
        x = mean_pool(x, (2, 7, 7)).astype(jnp.float32)
        return mean_logits(nn.Dense(self.classes, name="head")(x), probabilities=False), endpoints


def _divide_widths(widths: Any, divisor: int) -> Any:
    return (
        tuple(_divide_widths(width, divisor) for width in widths)
        if isinstance(widths, tuple)
        else max(1, widths // divisor)
    )
