# SPDX-License-Identifier: Apache-2.0
"""Dense layers that compute in one type and whose parameters' gradients are sums in the parameters'
own.

Rows are divided over devices, so a gradient is a sum over devices, too. Were a float32 kernel cast
to bfloat16 before the product, every device's part would be rounded to bfloat16 and the parts be
added up in it: gradients that shrink with the number of devices they are split over. Here the cast
is inside the product, whose backward pass leaves the kernel's part as the matrix units make it, in
float32.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

Asked = jax.custom_derivatives.CustomVJPPrimal


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, axes: int) -> Array:
    """The last `axes` axes of x times the first of the kernel, in the type of x; the kernel's
    gradient is in the kernel's.
    """
    return _product(x, kernel, axes)


def _product(x: Array, kernel: Array, axes: int) -> Array:
    return _dot(x, kernel.astype(x.dtype), range(x.ndim - axes, x.ndim), range(axes), x.dtype)


def _forward(
    x: Asked, kernel: Asked, axes: int
) -> tuple[Array, tuple[Array | None, Array | None, Array]]:
    """Remembers what is needed alone: of a frozen kernel no input, where nothing before it learns
    no kernel.

    Made of what is within `product`, as a policy of what is remembered (nn/policy.py) sees no
    products in a call of that.
    """
    kept = (
        x.value if kernel.perturbed else None,
        kernel.value if x.perturbed else None,
        jnp.zeros((), kernel.value.dtype),
    )
    return _product(x.value, kernel.value, axes), kept


def _backward(
    axes: int, kept: tuple[Array | None, Array | None, Array], grad: Array
) -> tuple[Array | None, Array | None]:
    x, kernel, like = kept
    dx = dkernel = None  # as good as zero
    if kernel is not None:
        dx = _dot(
            grad,
            kernel.astype(grad.dtype),
            range(grad.ndim - kernel.ndim + axes, grad.ndim),
            range(axes, kernel.ndim),
            grad.dtype,
        )
    if x is not None:
        dkernel = _outer(x, grad, axes, grad.ndim - x.ndim + axes, like.dtype)
    return dx, dkernel


def _outer(x: Array, grad: Array, axes: int, others: int, dtype: Any) -> Array:
    """The kernel's gradient: the sum over rows of x's last `axes` axes times grad's last `others`.

    XLA's CPU writes the first operand of such a product down transposed, and computes again for it
    whatever made it: there the narrower one comes first, and a barrier keeps the compiler from
    turning the product back.
    """
    rows = range(x.ndim - axes)
    if math.prod(x.shape[len(rows) :]) <= math.prod(grad.shape[len(rows) :]):
        return _dot(x, grad, rows, rows, dtype)

    def turned(x: Array, grad: Array) -> Array:
        kernel = lax.optimization_barrier(_dot(grad, x, rows, rows, dtype))
        return kernel.transpose(*range(others, kernel.ndim), *range(others))

    return lax.platform_dependent(
        x, grad, cpu=turned, default=lambda x, grad: _dot(x, grad, rows, rows, dtype)
    )


product.defvjp(_forward, _backward, symbolic_zeros=True)


def _dot(a: Array, b: Array, of_a: range, of_b: range, dtype: Any) -> Array:
    return lax.dot_general(
        a, b, ((tuple(of_a), tuple(of_b)), ((), ())), preferred_element_type=dtype
    )


def affine(x: Array, params: Mapping[str, Array]) -> Array:
    """x times the kernel [D, E], and the bias [E], in the type of x."""
    y = product(x, params["kernel"], 1)
    return (y + params["bias"][(None,) * (y.ndim - 1)]).astype(x.dtype)


def _along(x: Array, kernel: Array, dims: Any, precision: Any = None) -> Array:
    """`product` as linen's layers call a product."""
    del precision
    (mine, _), _ = dims
    assert tuple(mine) == tuple(range(x.ndim - len(mine), x.ndim))
    return product(x, kernel, len(mine))


def _inputs(
    x: Array, kernel: Array, bias: Array | None, dtype: Any
) -> tuple[Array, Array, Array | None]:
    # the bias is added in its own type, so that its gradient is a sum in that
    return (x.astype(dtype), kernel, bias)


class Dense(nn.Dense):
    """nn.Dense that answers in `dtype`, with gradients of its parameters as this file says."""

    dtype: Any = jnp.float32
    promote_dtype: Any = _inputs
    dot_general: Any = _along

    def __call__(self, x: Array) -> Array:
        return super().__call__(x).astype(self.dtype)


class DenseGeneral(nn.DenseGeneral):
    """nn.DenseGeneral over the last axes, likewise."""

    dtype: Any = jnp.float32
    promote_dtype: Any = _inputs
    dot_general: Any = _along

    def __call__(self, x: Array) -> Array:
        return super().__call__(x).astype(self.dtype)
