# SPDX-License-Identifier: Apache-2.0
"""3D convolution, normalization and pooling, shared by the 3D CNNs.

XLA on CPU has no fast 3D convolution: a grouped one is 80 to 170 times slower than the sum of its
shifted products, a dense one up to seven times slower than the sum of its planes' 2D convolutions.
The formulation is therefore chosen by platform when the program is lowered (also ahead of time for
another platform); tests check that outputs and gradients agree.

Legend: B rows, T frames, H rows of pixels, W columns, C channels; a kernel is [t, h, w, in, out].
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Triple = tuple[int, int, int]
Pads = tuple[tuple[int, int], ...]  # before and after, along time, rows and columns
_CONV3D_DIMS = ("NDHWC", "DHWIO", "NDHWC")
_CONV2D_DIMS = ("NHWC", "HWIO", "NHWC")


def padding_widths(padding: str, size: Sequence[int], kernel: Triple, stride: Triple) -> Pads:
    """Padding along each axis. 'same': as in TensorFlow, odd padding at the end; 'half': k // 2 at
    both sides; 'none'.
    """
    if padding == "none":
        return ((0, 0),) * 3
    if padding == "half":
        return tuple((k // 2, k // 2) for k in kernel)
    assert padding == "same", padding
    return tuple(
        (total // 2, total - total // 2)
        for total in (
            max((math.ceil(n / s) - 1) * s + k - n, 0)
            for n, k, s in zip(size, kernel, stride, strict=True)
        )
    )


@partial(jax.jit, static_argnums=(2, 3, 4))  # so that layers of equal shape are traced once
def convolve(x_BTHWC: Array, kernel: Array, stride: Triple, pad: Pads, groups: int = 1) -> Array:
    """Convolution of x with the kernel, grouped over channels (depthwise: one group per
    channel).
    """

    def cpu_convolve(x: Array, k: Array) -> Array:
        return (convolve_taps if groups > 1 else convolve_planes)(x, k, stride, pad, groups)

    def accelerator_convolve(x: Array, k: Array) -> Array:
        return convolve_xla(x, k, stride, pad, groups)

    return lax.platform_dependent(x_BTHWC, kernel, cpu=cpu_convolve, default=accelerator_convolve)


def convolve_xla(
    x_BTHWC: Array, kernel: Array, stride: Triple, pad: Pads, groups: int = 1
) -> Array:
    """XLA's own 3D convolution, fast on accelerators."""
    return lax.conv_general_dilated(
        x_BTHWC, kernel, stride, pad, dimension_numbers=_CONV3D_DIMS, feature_group_count=groups
    )


def convolve_planes(
    x_BTHWC: Array, kernel: Array, stride: Triple, pad: Pads, groups: int = 1
) -> Array:
    """Sum of 2D convolutions over the kernel's time planes, with frames as rows of the batch."""
    x_BTHWC = jnp.pad(x_BTHWC, ((0, 0), pad[0], (0, 0), (0, 0), (0, 0)))
    frames = (x_BTHWC.shape[1] - kernel.shape[0]) // stride[0] + 1
    total = None
    for t in range(kernel.shape[0]):
        plane = x_BTHWC[:, t : t + (frames - 1) * stride[0] + 1 : stride[0]]
        y = lax.conv_general_dilated(
            plane.reshape(-1, *plane.shape[2:]),
            kernel[t],
            stride[1:],
            pad[1:],
            dimension_numbers=_CONV2D_DIMS,
            feature_group_count=groups,
        )
        total = y if total is None else total + y
    return total.reshape(-1, frames, *total.shape[1:])


def convolve_taps(x_BTHWC: Array, kernel: Array, stride: Triple, pad: Pads, groups: int) -> Array:
    """Sum over the kernel's taps of shifted input times tap: fast for few inputs per group."""
    if kernel.shape[3:] == (1, groups):
        return _depthwise(x_BTHWC, kernel, stride, pad)
    return _sum_of_taps(x_BTHWC, kernel, stride, pad, groups)


def _sum_of_taps(x_BTHWC: Array, kernel: Array, stride: Triple, pad: Pads, groups: int) -> Array:
    x = jnp.pad(x_BTHWC, ((0, 0), *pad, (0, 0)))
    size = _output_size(x_BTHWC, kernel, stride, pad)
    total = None
    for tap in np.ndindex(*kernel.shape[:3]):
        y = _tap(_tap_view(x, tap, size, stride), kernel[tap], groups)
        total = y if total is None else total + y
    return total


def _tap(x_BTHWC: Array, tap_IO: Array, groups: int) -> Array:
    if tap_IO.shape == (1, groups):
        return x_BTHWC * tap_IO[None, None, None]
    grouped = x_BTHWC.reshape(*x_BTHWC.shape[:4], groups, -1)
    y = jnp.einsum("bthwgi,igo->bthwgo", grouped, tap_IO.reshape(tap_IO.shape[0], groups, -1))
    return y.reshape(*x_BTHWC.shape[:4], -1)


def _output_size(x_BTHWC: Array, kernel: Array, stride: Triple, pad: Pads) -> Triple:
    """Frames, rows and columns of the output."""
    return tuple(
        (n + sum(p) - k) // s + 1
        for n, p, k, s in zip(x_BTHWC.shape[1:4], pad, kernel.shape[:3], stride, strict=True)
    )


def _tap_view(x_BTHWC: Array, tap: Triple, size: Triple, stride: Triple) -> Array:
    """The part of the padded input under the kernel tap `tap`, which may be traced."""
    span = tuple((n - 1) * s + 1 for n, s in zip(size, stride, strict=True))
    window = lax.dynamic_slice(x_BTHWC, (0, *tap, 0), (x_BTHWC.shape[0], *span, x_BTHWC.shape[4]))
    return window[:, :: stride[0], :: stride[1], :: stride[2]]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x_BTHWC: Array, kernel: Array, stride: Triple, pad: Pads) -> Array:
    return _sum_of_taps(x_BTHWC, kernel, stride, pad, kernel.shape[4])


def _depthwise_fwd(
    x_BTHWC: Array, kernel: Array, stride: Triple, pad: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise(x_BTHWC, kernel, stride, pad), (x_BTHWC, kernel)


def _depthwise_bwd(
    stride: Triple, pad: Pads, residuals: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    """Custom derivative: XLA takes seconds to compile that of each sum of 27 slices; this halves it
    and runs faster.
    """
    x, kernel = residuals
    k = kernel.shape[:3]
    before = [n - 1 - p[0] for n, p in zip(k, pad, strict=True)]
    spans = [(n - 1) * s + 1 for n, s in zip(grad.shape[1:4], stride, strict=True)]
    after = [
        n + q - 1 - b - span for n, q, b, span in zip(x.shape[1:4], k, before, spans, strict=True)
    ]
    between = [s - 1 for s in stride]
    dilated = lax.pad(
        grad,
        jnp.zeros((), grad.dtype),
        [(0, 0, 0), *zip(before, after, between, strict=True), (0, 0, 0)],
    )
    dx = _sum_of_taps(dilated, kernel[::-1, ::-1, ::-1], (1, 1, 1), ((0, 0),) * 3, kernel.shape[4])
    padded = jnp.pad(x, ((0, 0), *pad, (0, 0)))

    def tap(i: Array) -> Array:
        position = (i // (k[1] * k[2]), i // k[2] % k[1], i % k[2])
        return jnp.sum(
            _tap_view(padded, position, grad.shape[1:4], stride) * grad, axis=(0, 1, 2, 3)
        )

    return dx, lax.map(tap, jnp.arange(math.prod(k))).reshape(kernel.shape)


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)


class Conv(nn.Module):
    """A 3D convolution with parameters `kernel` and, optionally, `bias`."""

    features: int
    kernel: Triple
    stride: Triple = (1, 1, 1)
    padding: str = "half"
    groups: int = 1
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> Array:
        shape = (*self.kernel, x_BTHWC.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(self.dtype)
        pad = padding_widths(self.padding, x_BTHWC.shape[1:4], self.kernel, self.stride)
        y = convolve(x_BTHWC.astype(self.dtype), kernel, self.stride, pad, self.groups)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += bias.astype(self.dtype)[None, None, None, None]
        return y


class Norm(nn.Module):
    """Batch normalization with fixed statistics: an affine map per channel.

    `mean` and `var` are parameters, so that checkpoints, imports and shardings handle one tree;
    they get no gradient and no weight decay (`optim`), so training leaves them unchanged. `scale`
    and `bias` are trained.
    """

    epsilon: float
    scale: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> Array:
        shape = (x_BTHWC.shape[-1],)
        mean = lax.stop_gradient(self.param("mean", nn.initializers.zeros, shape))
        var = lax.stop_gradient(self.param("var", nn.initializers.ones, shape))
        bias = self.param("bias", nn.initializers.zeros, shape)
        factor = lax.rsqrt(var + self.epsilon)
        if self.scale:
            factor *= self.param("scale", nn.initializers.ones, shape)
        offset = bias - mean * factor
        channel_axis = (None,) * 4
        return (
            x_BTHWC * factor.astype(self.dtype)[channel_axis]
            + offset.astype(self.dtype)[channel_axis]
        )


def max_pool(x_BTHWC: Array, window: Triple, stride: Triple, padding: str) -> Array:
    """Max pooling; padding never is the maximum."""
    return nn.max_pool(
        x_BTHWC, window, stride, padding_widths(padding, x_BTHWC.shape[1:4], window, stride)
    )


def mean_pool(x_BTHWC: Array, window: Triple) -> Array:
    """Average pooling at stride 1; a window larger than the input shrinks to the input's size."""
    window = tuple(min(k, n) for k, n in zip(window, x_BTHWC.shape[1:4], strict=True))
    return nn.avg_pool(x_BTHWC, window, (1, 1, 1), "VALID")


def mean_logits(logits_BTHWC: Array, probabilities: bool) -> Array:
    """Averages logits, or their probabilities, over all positions: [B, C], float32."""
    logits = logits_BTHWC.astype(jnp.float32).reshape(
        logits_BTHWC.shape[0], -1, logits_BTHWC.shape[-1]
    )
    if not probabilities or logits.shape[1] == 1:
        return jnp.mean(logits, axis=1)
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1) - math.log(logits.shape[1])
