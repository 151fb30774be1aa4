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

Primal = jax.custom_derivatives.CustomVJPPrimal


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Array, kernel: Array, num_axes: int) -> Array:
    """Contracts the last `num_axes` axes of x with the first of the kernel, in x's dtype; the
    kernel's gradient has the kernel's dtype.
    """
    return _matmul(x, kernel, num_axes)


def _matmul(x: Array, kernel: Array, num_axes: int) -> Array:
    return _dot_general(
        x, kernel.astype(x.dtype), range(x.ndim - num_axes, x.ndim), range(num_axes), x.dtype
    )


def _matmul_fwd(
    x: Primal, kernel: Primal, num_axes: int
) -> tuple[Array, tuple[Array | None, Array | None, Array]]:
    """Saves only what the backward pass needs: no input for a frozen kernel, no kernel without
    input gradient.

    Uses `_matmul`, because a remat policy (nn/precision.py) sees no dot inside a call of
    `matmul`.
    """
    residuals = (
        x.value if kernel.perturbed else None,
        kernel.value if x.perturbed else None,
        jnp.zeros((), kernel.value.dtype),
    )
    return _matmul(x.value, kernel.value, num_axes), residuals


def _matmul_bwd(
    num_axes: int, residuals: tuple[Array | None, Array | None, Array], grad: Array
) -> tuple[Array | None, Array | None]:
    x, kernel, dtype_like = residuals
    dx = dkernel = None  # symbolic zero
    if kernel is not None:
        dx = _dot_general(
            grad,
            kernel.astype(grad.dtype),
            range(grad.ndim - kernel.ndim + num_axes, grad.ndim),
            range(num_axes, kernel.ndim),
            grad.dtype,
        )
    if x is not None:
        dkernel = _kernel_grad(x, grad, num_axes, grad.ndim - x.ndim + num_axes, dtype_like.dtype)
    return dx, dkernel


def _kernel_grad(
    x: Array, grad: Array, num_input_axes: int, num_output_axes: int, dtype: Any
) -> Array:
    """Gradient of the kernel: the row sum of x's last `num_input_axes` axes times grad's last
    `num_output_axes`.

    XLA on CPU transposes the first operand in memory and recomputes its producer: therefore the
    narrower operand comes first there, and a barrier keeps XLA from swapping them back.
    """
    batch_axes = range(x.ndim - num_input_axes)
    if math.prod(x.shape[len(batch_axes) :]) <= math.prod(grad.shape[len(batch_axes) :]):
        return _dot_general(x, grad, batch_axes, batch_axes, dtype)

    def transposed_product(x: Array, grad: Array) -> Array:
        kernel = lax.optimization_barrier(_dot_general(grad, x, batch_axes, batch_axes, dtype))
        return kernel.transpose(*range(num_output_axes, kernel.ndim), *range(num_output_axes))

    return lax.platform_dependent(
        x,
        grad,
        cpu=transposed_product,
        default=lambda x, grad: _dot_general(x, grad, batch_axes, batch_axes, dtype),
    )


matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


def _dot_general(a: Array, b: Array, a_axes: range, b_axes: range, dtype: Any) -> Array:
    return lax.dot_general(
        a, b, ((tuple(a_axes), tuple(b_axes)), ((), ())), preferred_element_type=dtype
    )


def affine(x: Array, params: Mapping[str, Array]) -> Array:
    """x times the kernel [D, E], plus the bias [E], in the dtype of x."""
    y = matmul(x, params["kernel"], 1)
    return (y + params["bias"][(None,) * (y.ndim - 1)]).astype(x.dtype)


def _linen_dot_general(
    x: Array, kernel: Array, dimension_numbers: Any, precision: Any = None
) -> Array:
    """`matmul` with the dot_general signature of linen's layers."""
    del precision
    (x_axes, _), _ = dimension_numbers
    assert tuple(x_axes) == tuple(range(x.ndim - len(x_axes), x.ndim))
    return matmul(x, kernel, len(x_axes))


def _promote_dtype(
    x: Array, kernel: Array, bias: Array | None, dtype: Any
) -> tuple[Array, Array, Array | None]:
    # add the bias in its own dtype, so that its gradient accumulates in it
    return (x.astype(dtype), kernel, bias)


class Dense(nn.Dense):
    """nn.Dense with output in `dtype` and parameter gradients as described above."""

    dtype: Any = jnp.float32
    promote_dtype: Any = _promote_dtype
    dot_general: Any = _linen_dot_general

    def __call__(self, x: Array) -> Array:
        return super().__call__(x).astype(self.dtype)


class DenseGeneral(nn.DenseGeneral):
    """nn.DenseGeneral over the last axes, likewise."""

    dtype: Any = jnp.float32
    promote_dtype: Any = _promote_dtype
    dot_general: Any = _linen_dot_general

    def __call__(self, x: Array) -> Array:
        return super().__call__(x).astype(self.dtype)
