# SPDX-License-Identifier: Apache-2.0
"""3D CNNs with residual bottlenecks: I3D-R50 (arXiv:1711.07971) and X3D (arXiv:2004.04730).

Each takes video [B, T, H, W, 3], normalized as its weights expect, and returns logits [B, classes]
and its feature maps by name: 'stem', 'stage1' to 'stage4' and those of its head. Legend as in
`conv3d`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from particlejax.models.zoo.c3d_i3d import Endpoints
from particlejax.models.zoo.conv3d import Conv, Norm, Triple, max_pool, mean_logits, mean_pool

_EPSILON = 1e-5


class Squeeze(nn.Module):
    """Squeeze and excitation: channel weights from the mean over the clip (arXiv:1709.01507)."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> Array:
        mean = jnp.mean(x_BTHWC, axis=(1, 2, 3), keepdims=True)
        hidden = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="down")(mean))
        return x_BTHWC * nn.sigmoid(
            nn.Dense(x_BTHWC.shape[-1], dtype=self.dtype, name="up")(hidden)
        )


class Bottleneck(nn.Module):
    """relu(shortcut(x) + c(b(a(x)))); b convolves in space with stride, and in time too if
    depthwise.
    """

    width: int
    inner: int
    stride: int
    a: Triple
    b: Triple
    groups: int = 1
    squeeze: int = 0  # hidden width of squeeze and excitation; 0: none
    activation: Callable[[Array], Array] = nn.relu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> Array:
        dtype, stride = self.dtype, (1, self.stride, self.stride)
        x = nn.relu(self._norm("norm_a")(Conv(self.inner, self.a, dtype=dtype, name="a")(x_BTHWC)))
        x = self._norm("norm_b")(
            Conv(self.inner, self.b, stride, groups=self.groups, dtype=dtype, name="b")(x)
        )
        if self.squeeze:
            x = Squeeze(self.squeeze, dtype, name="squeeze")(x)
        x = self._norm("norm_c")(
            Conv(self.width, (1, 1, 1), dtype=dtype, name="c")(self.activation(x))
        )
        shortcut = x_BTHWC
        if x_BTHWC.shape[-1] != self.width or self.stride > 1:
            shortcut = Conv(self.width, (1, 1, 1), stride, dtype=dtype, name="shortcut")(x_BTHWC)
            if (
                x_BTHWC.shape[-1] != self.width
            ):  # X3D's first stage has a stride but keeps its width
                shortcut = self._norm("shortcut_norm")(shortcut)
        return nn.relu(shortcut + x)

    def _norm(self, name: str) -> Norm:
        return Norm(_EPSILON, dtype=self.dtype, name=name)


class ResNet(nn.Module):
    """I3D-R50: ResNet-50 with a temporal kernel of three frames in every other block."""

    classes: int
    stem: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 3)
    # temporal kernel sizes of the blocks, in turn
    spans: tuple[tuple[int, ...], ...] = ((3,), (3, 1), (3, 1), (1, 3))
    window: Triple = (4, 7, 7)  # of the last pool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> tuple[Array, Endpoints]:
        x, endpoints, dtype = x_BTHWC.astype(self.dtype), {}, self.dtype
        x = Conv(self.stem, (5, 7, 7), (1, 2, 2), dtype=dtype, name="stem")(x)
        x = nn.relu(Norm(_EPSILON, dtype=dtype, name="stem_norm")(x))
        x = endpoints["stem"] = max_pool(x, (1, 3, 3), (1, 2, 2), "half")
        for i, (depth, spans) in enumerate(zip(self.depths, self.spans, strict=True)):
            inner = self.stem * 2**i
            for j in range(depth):
                x = Bottleneck(
                    4 * inner,
                    inner,
                    2 if i and not j else 1,
                    (spans[j % len(spans)], 1, 1),
                    (1, 3, 3),
                    dtype=dtype,
                    name=f"stage{i + 1}_block{j}",
                )(x)
            endpoints[f"stage{i + 1}"] = x
            if i == 0:
                x = max_pool(x, (2, 1, 1), (2, 1, 1), "none")
        x = mean_pool(x, self.window).astype(jnp.float32)
        return mean_logits(nn.Dense(self.classes, name="head")(x), probabilities=False), endpoints


class X3D(nn.Module):
    """Narrow, deep and depthwise, without temporal strides. The head averages probabilities over
    positions.
    """

    classes: int
    depths: tuple[int, ...] = (3, 5, 11, 7)
    widths: tuple[int, ...] = (24, 48, 96, 192)  # the first is also the stem's
    inner: tuple[int, ...] = (54, 108, 216, 432)
    squeeze: tuple[int, ...] = (8, 8, 16, 32)  # of every other block, from the first
    hidden: int = 2048  # of the head
    window: Triple = (16, 7, 7)  # of the last pool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> tuple[Array, Endpoints]:
        x, endpoints, dtype = x_BTHWC.astype(self.dtype), {}, self.dtype
        x = Conv(self.widths[0], (1, 3, 3), (1, 2, 2), dtype=dtype, name="stem_space")(x)
        x = Conv(self.widths[0], (5, 1, 1), groups=self.widths[0], dtype=dtype, name="stem_time")(x)
        x = endpoints["stem"] = nn.relu(Norm(_EPSILON, dtype=dtype, name="stem_norm")(x))
        for i, depth in enumerate(self.depths):
            for j in range(depth):
                x = Bottleneck(
                    self.widths[i],
                    self.inner[i],
                    1 if j else 2,
                    (1, 1, 1),
                    (3, 3, 3),
                    self.inner[i],
                    0 if j % 2 else self.squeeze[i],
                    nn.swish,
                    dtype,
                    name=f"stage{i + 1}_block{j}",
                )(x)
            endpoints[f"stage{i + 1}"] = x
        x = Conv(self.inner[-1], (1, 1, 1), dtype=dtype, name="last")(x)
        x = endpoints["last"] = nn.relu(Norm(_EPSILON, dtype=dtype, name="last_norm")(x))
        x = Conv(self.hidden, (1, 1, 1), dtype=dtype, name="project")(mean_pool(x, self.window))
        x = endpoints["project"] = nn.relu(x)
        logits = nn.Dense(self.classes, name="head")(x.astype(jnp.float32))
        return mean_logits(logits, probabilities=True), endpoints
