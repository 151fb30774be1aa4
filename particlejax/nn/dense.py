# SPDX-License-Identifier: Apache-2.0
"""Dense layers with compute in one dtype and parameter gradients accumulated in the parameters'
dtype.

Rows are sharded, so a gradient is a sum over devices. If a float32 kernel were cast to bfloat16
before the product, each device's partial gradient would be rounded to bfloat16 and summed in it: an
error that grows with the number of devices. Here the cast is inside the product, whose backward
pass keeps the kernel's gradient in float32, as the matrix units produce it.
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
    """Contracts the last `axes` axes of x with the first of the kernel, in x's dtype; the kernel's
    gradient has the kernel's dtype.
    """
    return _product(x, kernel, axes)


def _product(x: Array, kernel: Array, axes: int) -> Array:
    return _dot(x, kernel.astype(x.dtype), range(x.ndim - axes, x.ndim), range(axes), x.dtype)


def _forward(
    x: Asked, kernel: Asked, axes: int
) -> tuple[Array, tuple[Array | None, Array | None, Array]]:
    """Saves only what the backward pass needs: no input for a frozen kernel, no kernel without
    input gradient.

    Uses `_product`, because a remat policy (nn/precision.py) sees no dot inside a call of
    `product`.
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
    dx = dkernel = None  # symbolic zero
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
    """Gradient of the kernel: the row sum of x's last `axes` axes times grad's last `others`.

    XLA on CPU transposes the first operand in memory and recomputes its producer: therefore the
    narrower operand comes first there, and a barrier keeps XLA from swapping them back.
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
    """x times the kernel [D, E], plus the bias [E], in the dtype of x."""
    y = product(x, params["kernel"], 1)
    return (y + params["bias"][(None,) * (y.ndim - 1)]).astype(x.dtype)


def _along(x: Array, kernel: Array, dims: Any, precision: Any = None) -> Array:
    """`product` with the dot_general signature of linen's layers."""
    del precision
    (mine, _), _ = dims
    assert tuple(mine) == tuple(range(x.ndim - len(mine), x.ndim))
    return product(x, kernel, len(mine))


def _inputs(
    x: Array, kernel: Array, bias: Array | None, dtype: Any
) -> tuple[Array, Array, Array | None]:
    # add the bias in its own dtype, so that its gradient accumulates in it
    return (x.astype(dtype), kernel, bias)


class Dense(nn.Dense):
    """nn.Dense with output in `dtype` and parameter gradients as described above."""

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
